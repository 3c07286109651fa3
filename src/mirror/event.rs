//! What goes into the core and what comes out: events and actions.
//!
//! What must hold: every `Event::Request` is answered by exactly one `Action::Reply`, every `Event::Admin`
//! by exactly one `Action::AdminDone`, and every `Action::Device` by exactly one `Event::DeviceDone`.
//! A device operation owns (a handle to) its buffer and its completion gives it back or drops it.

use nix::errno::Errno;

use crate::buffer::{Buffer, Payload, UniquePayload};
use crate::extent::{ContextExtents, ContextSet, Extent};
use crate::format::Found;
use crate::units::{ByteRange, ReplicaOffset, ReplicaSlot};

/// Names a client request for its reply; chosen by the shell, unique among those in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Names an admin command for its answer; chosen by the shell, unique among those in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdminId(pub u64);

/// Names a device operation for its completion; chosen by the core, unique among those in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// What the core is told.
#[derive(Debug)]
pub enum Event {
    /// A client asks for something. The range has been validated: it lies within the volume and is at most
    /// `REQUEST_BYTES_MAX` long for `Read` and `Write`; zero-length requests are allowed.
    Request {
        /// Names the reply.
        id: RequestId,
        /// What is asked.
        request: Request,
    },
    /// A device operation has ended.
    DeviceDone {
        /// Which.
        op: OpId,
        /// Its result: whole success or an error; the shell has dealt with short transfers.
        result: Result<DeviceOutput, Errno>,
    },
    /// An operator's command.
    Admin {
        /// Names the answer.
        id: AdminId,
        /// What to do.
        command: AdminCommand,
    },
    /// Time has passed; sent when `Mirror::next_deadline` is due, harmless at any other time.
    Tick,
}

/// A client's request. Offsets and lengths are bytes of the volume, with any alignment.
#[derive(Debug)]
pub enum Request {
    /// Read the range.
    Read {
        /// Which bytes.
        range: ByteRange,
    },
    /// Write `data` at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes, placed as [`crate::buffer::BufferPool::payload_for`] does.
        data: UniquePayload,
        /// On stable storage before the reply.
        fua: bool,
    },
    /// Make the range read as zeroes. Up to the whole volume at once.
    WriteZeroes {
        /// Which bytes.
        range: ByteRange,
        /// Whether the space may be given back (NBD: `NO_HOLE` clear).
        may_unmap: bool,
        /// Rather not at all (`RequestError::NotSupported`, nothing changed) than by writing zeroes (NBD:
        /// `FAST_ZERO`).
        fast: bool,
        /// On stable storage before the reply.
        fua: bool,
    },
    /// The client does not need the range's content any more. Up to the whole volume at once.
    Trim {
        /// Which bytes.
        range: ByteRange,
        /// On stable storage before the reply.
        fua: bool,
    },
    /// Warm the range up for reads to come. Up to the whole volume at once. Always answered with `Answer::Done`
    /// (but while the volume stops): what cannot be warmed up is not.
    Cache {
        /// Which bytes.
        range: ByteRange,
    },
    /// What is known of the range, by these contexts: answered with `Answer::Status`, one element for each context
    /// in `contexts`, in the order of their identifiers. Up to the whole volume at once; an empty range is answered
    /// with `Answer::Done`. An answer may end before the range does.
    BlockStatus {
        /// Which bytes.
        range: ByteRange,
        /// Which contexts; not empty.
        contexts: ContextSet,
        /// Exactly one extent for each context (NBD: `REQ_ONE`).
        one: bool,
    },
    /// Everything answered before this request (on any connection) goes to stable storage.
    Flush,
}

/// What a device operation gives back.
#[derive(Debug)]
pub enum DeviceOutput {
    /// Done.
    Done,
    /// The bytes read fill the first `len` bytes of the buffer that the operation was given.
    Read(Buffer),
    /// The answer to [`DeviceOp::ProbeHole`]: whether the whole range is known to be a hole (reads as zero).
    Hole(bool),
    /// The answer to [`DeviceOp::Allocation`]: at least one extent from the first byte on, together at most as long
    /// as the range; flags are `ALLOCATION_*`.
    Allocation(Vec<Extent>),
}

/// An operation on one replica.
#[derive(Debug)]
pub enum DeviceOp {
    /// Read `len` bytes at `offset` into the start of `buffer`. Offset and length keep the replica's
    /// alignment.
    Read {
        /// First byte.
        offset: ReplicaOffset,
        /// Bytes to read.
        len: u64,
        /// Where to.
        buffer: Buffer,
    },
    /// Write `data` at `offset`; offset, length and memory keep the replica's alignment.
    Write {
        /// First byte.
        offset: ReplicaOffset,
        /// The bytes.
        data: Payload,
        /// Complete only when it is on stable storage (`RWF_DSYNC`).
        durable: bool,
    },
    /// Make the range read as zeroes, by whatever means the backing has; writing zeroes is the last resort.
    /// Not durable before a flush.
    Zero {
        /// First byte, a multiple of 4096.
        offset: ReplicaOffset,
        /// Bytes, a multiple of 4096.
        len: u64,
        /// Whether the space may be given back (a hole punched).
        may_unmap: bool,
    },
    /// All writes completed before this was issued go to stable storage.
    Flush,
    /// Warm the range up for reads to come. Its result means nothing.
    Cache {
        /// First byte.
        offset: ReplicaOffset,
        /// Bytes.
        len: u64,
    },
    /// Ask where the range has holes. "Data" is always a correct answer.
    Allocation {
        /// First byte.
        offset: ReplicaOffset,
        /// Bytes, more than 0.
        len: u64,
    },
    /// Ask whether the whole range is a hole. "No" is always a correct answer.
    ProbeHole {
        /// First byte.
        offset: ReplicaOffset,
        /// Bytes.
        len: u64,
    },
}

/// What an operator asks for.
#[derive(Debug)]
pub enum AdminCommand {
    /// Stop using a replica; refused for the last one in sync.
    Fail(ReplicaSlot),
    /// Take a replica in: one that was away (delta where its history allows) or a new one (full copy).
    Add(Box<Candidate>),
    /// Forget a replica: its slot becomes free, its superblocks are wiped where it can be reached.
    Remove(ReplicaSlot),
    /// No more requests will come: finish what is in flight, flush, clear intent bits, mark clean.
    Stop,
}

/// A device offered to `AdminCommand::Add`, opened and locked by the shell.
#[derive(Debug)]
pub struct Candidate {
    /// What stands on it, `None` where it holds no volume.
    pub found: Option<Found>,
    /// What it can do.
    pub traits: DeviceTraits,
    /// The path, for messages and for the member table.
    pub path: String,
    /// A fresh random identity, used where the candidate becomes a new member.
    pub fresh_uuid: uuid::Uuid,
    /// Take it in even where its content is another volume's, diverged, or of unknown history (full copy).
    pub force: bool,
}

/// What a replica's backing can do, found out by the shell when it opens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceTraits {
    /// Size of the whole backing, metadata included, bytes; a multiple of 4096 (rounded down).
    pub device_bytes: u64,
    /// Offsets and lengths of reads and writes must be multiples of this; a power of two, 1 to 4096.
    pub io_align: u32,
    /// Whether zeroing without writing works (punched holes, zero range, write-zeroes offload).
    pub cheap_zero: bool,
    /// The same where the space must stay allocated (zero range; a punched hole does not do).
    pub cheap_allocated_zero: bool,
}

/// What the core wants done.
#[derive(Debug)]
pub enum Action {
    /// Start an operation on a replica; answer with [`Event::DeviceDone`].
    Device {
        /// Names the completion.
        op: OpId,
        /// On which replica.
        slot: ReplicaSlot,
        /// What to do.
        request: DeviceOp,
    },
    /// Answer a client.
    Reply {
        /// Which request.
        id: RequestId,
        /// What it comes to.
        result: Result<Answer, RequestError>,
    },
    /// The candidate of this admin command is now the replica in `slot`; comes before any operation on it.
    Attach {
        /// Which `AdminCommand::Add`.
        id: AdminId,
        /// Its slot from now on.
        slot: ReplicaSlot,
    },
    /// The replica in `slot` is not used any more and has no operation in flight: close it.
    Detach {
        /// Which.
        slot: ReplicaSlot,
    },
    /// Answer an operator.
    AdminDone {
        /// Which command.
        id: AdminId,
        /// Success, with a line that says what happens now, or what is wrong and what to do.
        result: Result<String, AdminError>,
    },
    /// Something that an operator wants to know (the shell logs it).
    Notice(Notice),
}

/// What a successful request is answered with.
#[derive(Debug)]
pub enum Answer {
    /// Done; nothing to say. Also the answer to a read of no bytes.
    Done,
    /// The bytes of a read.
    Data(Payload),
    /// For each context that was asked for, in the order of their identifiers, its extents.
    Status(Vec<ContextExtents>),
}

impl Answer {
    /// The bytes of a read; `None` for everything else.
    #[must_use]
    pub fn data(self) -> Option<Payload> {
        match self {
            Self::Data(payload) => Some(payload),
            Self::Done | Self::Status(_) => None,
        }
    }
}

/// Why a request failed; the NBD layer maps it to an error value (`docs/error-table.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No replica could do it.
    #[error("input/output error")]
    Io,
    /// The replicas' filesystem is full.
    #[error("no space left on the replicas")]
    NoSpace,
    /// The volume is served read-only.
    #[error("the volume is read-only")]
    ReadOnly,
    /// The volume is stopping.
    #[error("the volume is stopping")]
    Stopping,
    /// A fast zeroing was asked for, and some replica has none. Nothing was changed.
    #[error("not supported: zeroing is not fast on every replica")]
    NotSupported,
}

/// Why an admin command was refused. The text says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AdminError(pub String);

/// What the shell logs: a level and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// How bad it is.
    pub level: NoticeLevel,
    /// A sentence for an operator.
    pub text: String,
}

/// How bad a notice is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NoticeLevel {
    /// Normal.
    Info,
    /// Redundancy or performance is reduced.
    Warning,
    /// A client saw or will see an error.
    Error,
}
