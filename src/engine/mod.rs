//! The data plane: one thread, one io_uring, owns the core; sockets and replicas as ring operations.
