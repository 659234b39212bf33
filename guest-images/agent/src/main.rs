//! The workload that runs inside the minimal guest.

fn main() {}
