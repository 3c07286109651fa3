//! What the ring is asked to do, as values that own every byte the kernel may touch.
//!
//! What must hold: all memory an entry points to is on the heap and belongs to its [`Operation`], which stays in
//! the ring's slab until the completion has been taken. So memory outlives the kernel's use of it by ownership.
//! Descriptors are kept open by their owners: a connection or a device is let go only when nothing of it is in flight.

use std::os::fd::RawFd;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};

use super::device_io::DeviceIo;
use super::receive::Receive;
use super::send_batch::SendBatch;
use super::slab::Key;
use crate::units::Nanos;

/// An operation of the ring.
pub(super) enum Operation {
    /// On a replica.
    Device(DeviceIo),
    /// From a client.
    Receive(Receive),
    /// To a client.
    Send(Box<SendBatch>),
    /// The mailbox's eventfd.
    Wake {
        /// The eventfd.
        fd: RawFd,
        /// What is read from it.
        value: Box<u64>,
    },
    /// Ends when its time is over.
    Timer {
        /// When that is, by the engine's clock.
        at: Nanos,
        /// How long from its start.
        time: Box<types::Timespec>,
    },
    /// Ends another operation early.
    Cancel {
        /// Which.
        target: Key,
    },
}

impl Operation {
    /// The entry for the submission queue. Points into `self`'s heap memory only.
    pub(super) fn entry(&mut self) -> Entry {
        match self {
            Self::Device(io) => io.entry(),
            Self::Receive(receive) => receive.entry(),
            Self::Send(batch) => batch.entry(),
            Self::Wake { fd, value } => {
                opcode::Read::new(types::Fd(*fd), std::ptr::from_mut(&mut **value).cast(), 8).build()
            }
            Self::Timer { time, .. } => opcode::Timeout::new(std::ptr::from_ref(&**time)).build(),
            Self::Cancel { target } => opcode::AsyncCancel::new(target.to_u64()).build(),
        }
    }
}
