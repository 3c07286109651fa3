//! nbdmirror: RAID-1 for block devices in Linux userspace, served over NBD.
//!
//! A map of the crate, in the direction of its imports (a test holds the direction):
//!
//! - [`units`], [`extent`], [`buffer`], [`planted`]: offsets, ranges, slots; what block status speaks of; aligned buffers.
//! - [`mod@format`]: the on-disk format and who is trusted at start. Pure.
//! - [`mirror`]: THE CORE. Pure: events in, actions out.
//! - [`nbd`]: the NBD protocol. Pure; never sees the mirror.
//! - [`engine`]: the data plane, one thread and one io_uring, owns the core.
//! - [`control`]: the control plane: accepts, negotiates, answers operators.
//! - [`attach`]: the kernel's NBD client: a volume as `/dev/nbdN`, and its keeper.
//! - [`cli`]: one file a verb.
//! - [`sim`]: simulated disks, clients, faults and the oracle (feature `sim` and tests only).

pub mod attach;
pub mod buffer;
pub mod cli;
pub mod control;
pub mod engine;
pub mod extent;
pub mod format;
pub mod mirror;
pub mod nbd;
pub mod planted;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod units;
