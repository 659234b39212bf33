//! One virtual machine on KVM. Knows nothing of networks or peers.
