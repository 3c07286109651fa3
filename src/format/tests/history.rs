//! Histories: what assembly makes of replicas after crashes, losses and returns.
