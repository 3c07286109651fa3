//! The simulator: seeded worlds in which the core must keep its promises.
