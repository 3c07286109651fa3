//! The control plane: accepts and negotiates, answers operators; async on tokio-uring in its own thread.

pub mod failure;
pub mod listen;
pub mod runtime_dir;
