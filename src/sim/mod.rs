//! The simulator: seeded worlds in which the core must keep its promises.
//!
//! - `rng`, `plan`: chance, and what it decides for a seed.
//! - `disk`, `image`: a disk with a volatile cache, and what stands on it. `oracle`: what a read may return.
//! - `world`: the event loop; `device`, `client`, `faults`, `boot`: what happens in it.
//! - `counts`: what happened, by kind.
//! - `promises`: one check a promise; `recovery`: of what a crash would leave; `status_check`: of what is shown.
//! - `run`: a seed from create to stop. `swarm`: many seeds; `bugs`: with planted bugs.
//!
//! A new fault is one place (a row of the table in `faults/table.rs`), a new promise is one place (`promises.rs`).

pub mod boot;
pub mod bugs;
pub mod client;
pub mod counts;
pub mod device;
pub mod disk;
pub mod faults;
pub mod image;
pub mod oracle;
pub mod plan;
pub mod promises;
pub mod recovery;
pub mod rng;
pub mod run;
pub mod small;
pub mod status_check;
mod status_extents;
pub mod steps;
pub mod swarm;
pub mod world;
