//! The data plane: one thread, one io_uring, owns the core; sockets and replicas as ring operations.
//!
//! A map, from the outside in:
//!
//! - [`handle`]: start, hand over connections, commands, status, stop: the way in from other threads.
//! - [`availability`]: whether io_uring can be used here, and what to change if not.
//! - [`device`]: a replica's file or block device; plain access before the engine starts.
//! - `data_plane`: the loop around the core. Its parts: `receive` and `client` (bytes to requests), `send` and
//!   `send_batch` (replies to bytes), `memory` (who may hold how much), `devices` and `device_io` (the core's
//!   device operations), `admin` (messages and the stop).
//! - `ring`, `operation`, `slab`: io_uring made safe by ownership; `spin`: when to wait for it awake; `timers`: until when.
//!
//! What must hold, besides the promises: memory that the kernel may touch is owned by an operation in the ring until
//! its completion has been taken; no client costs anybody more than its own connection.

pub mod availability;
pub mod device;
pub mod handle;

mod admin;
mod client;
mod data_plane;
mod device_io;
mod device_probe;
mod devices;
mod memory;
mod operation;
mod receive;
mod ring;
mod send;
mod send_batch;
mod slab;
mod spin;
mod survey;
#[cfg(test)]
mod tests;
mod timers;

pub use availability::{UringUnavailable, check_io_uring};
pub use device::{Access, DeviceIdentity, DeviceKind, DeviceOpenError, ReplicaDevice, identity_of_path};
pub use handle::{
    AdminRequest, Connection, DeviceStatus, Engine, EngineConfig, EngineError, EngineHandle, EngineStatus,
    MEMORY_BYTES_MAX_DEFAULT, StopReport, start,
};
