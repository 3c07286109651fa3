//! The data plane: one thread, one io_uring, owns the core; sockets and replicas as ring operations.

pub mod device;
mod device_probe;
mod slab;
