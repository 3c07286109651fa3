//! The control plane: accepts and negotiates, answers operators; async on tokio-uring in its own thread.
