//! The simulator: seeded worlds in which the core must keep its promises.

pub mod disk;
pub mod oracle;
pub mod rng;
