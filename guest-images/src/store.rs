//! The directory in which a cloudlet keeps its bases.
