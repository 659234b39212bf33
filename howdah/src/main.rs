//! howdah: agile VM handoff between cloudlets.

fn main() {}
