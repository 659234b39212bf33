//! The lab: hosts with KVM, shaped links, scenarios and faults.

fn main() {}
