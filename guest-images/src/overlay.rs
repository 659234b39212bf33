//! A VM's disk: what differs from the base disk, sparse and crash-consistent.
