//! The transmission phase: request headers in, checked commands or refusals out; results in, replies out.
//!
//! What must hold:
//! - A [`Command`] lies within the export, a READ or WRITE within `PAYLOAD_BYTES_MAX`, and a write is to a
//!   writable export; everything is checked in one place, `parse::validate`.
//! - A refused request is answered like any other, and its payload is skipped, so the stream stays in step.
//! - What was negotiated is read from here and never guessed again: replies are made by `Session` methods.

use std::sync::Arc;

use super::export::{Export, Negotiated, ReplyMode};
use super::wire::{self, NbdError};
use crate::extent::ContextSet;

mod encode;
mod holes;
mod parse;
#[cfg(test)]
mod tests;

pub use encode::{Head, extents_max};
pub use holes::HOLE_BYTES_MIN;

/// Longest payload of a refused request that is read and dropped, bytes. Above it the connection is closed:
/// no client sends that in good faith, and following it would cost its length in traffic.
pub const SKIP_BYTES_MAX: u32 = 64 << 20;

const _: () = assert!(SKIP_BYTES_MAX >= wire::PAYLOAD_BYTES_MAX);

/// A connection past its handshake: the export, and what was negotiated. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Session {
    export: Arc<Export>,
    negotiated: Negotiated,
}

/// Names a request in its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// The client's name for it.
    pub cookie: u64,
    /// The offset that it gave, whatever it means: extended replies repeat it.
    pub offset: u64,
}

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Close the connection without a reply: the stream cannot be trusted. The text says why, for the log.
    Close(String),
    /// Finish the requests in flight and send their replies, then close; no reply to this one.
    Disconnect,
    /// Do this, then reply. The payload of a `Write` follows.
    Command {
        /// Names the request in its reply.
        tag: Tag,
        /// What to do.
        command: Command,
    },
    /// Skip the payload, then reply with this error.
    Refuse {
        /// Names the request in its reply.
        tag: Tag,
        /// Why.
        refusal: Refusal,
        /// Bytes of payload that follow, at most `SKIP_BYTES_MAX`.
        skip_payload_bytes: u32,
    },
}

/// Why a request is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The error's kind.
    pub error: NbdError,
    /// A sentence for people; at most `STRING_BYTES_MAX` bytes.
    pub message: &'static str,
    /// The first byte concerned, within the request, where there is one.
    pub at: Option<u64>,
}

/// A checked request. `offset` and `len` are bytes, `offset + len` is at most the export's size, `len` may be 0 (but for
/// `BlockStatus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read a range; at most `PAYLOAD_BYTES_MAX`.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u32,
        /// In one content chunk.
        df: bool,
    },
    /// Write the payload of `len` bytes, at most `PAYLOAD_BYTES_MAX`.
    Write {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u32,
        /// On stable storage before the reply.
        fua: bool,
    },
    /// Make a range read as zero.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Whether the space may be given back (NO_HOLE is clear).
        may_unmap: bool,
        /// Fail with ENOTSUP unless it is faster than a write.
        fast: bool,
        /// On stable storage before the reply.
        fua: bool,
    },
    /// The range's content is not needed any more.
    Trim {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// On stable storage before the reply.
        fua: bool,
    },
    /// The range will be read soon.
    Cache {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Tell of a range by contexts.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Number of bytes; not 0.
        len: u64,
        /// Which contexts, of those that were selected; not empty.
        contexts: ContextSet,
        /// One extent a context.
        one: bool,
    },
    /// Everything answered so far, on any connection, goes to stable storage.
    Flush,
}

impl Command {
    /// Whether it changes the volume.
    #[must_use]
    pub fn writes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::WriteZeroes { .. } | Self::Trim { .. })
    }
}

impl Session {
    /// A session of a client that has chosen the export and negotiated this.
    #[must_use]
    pub fn new(export: Arc<Export>, negotiated: Negotiated) -> Self {
        Self { export, negotiated }
    }

    /// The export that was chosen.
    #[must_use]
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// What was negotiated.
    #[must_use]
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// Length of a request's header, bytes.
    #[must_use]
    pub fn header_bytes(&self) -> usize {
        match self.negotiated.mode {
            ReplyMode::Simple | ReplyMode::Structured => wire::REQUEST_BYTES,
            ReplyMode::Extended => wire::EXTENDED_REQUEST_BYTES,
        }
    }
}
