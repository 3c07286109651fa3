//! The transmission phase: one request header in, a checked command or a refusal out.
//!
//! What must hold:
//! - A [`Command`] lies within the export, a READ or WRITE within `PAYLOAD_BYTES_MAX`, and a write is to a
//!   writable export; everything is checked in one place, `validate`.
//! - A refused request is answered like any other, and its payload is skipped, so the stream stays in step.
//! - What was negotiated is read from here and never guessed again: replies are made by `Session` methods.

use std::sync::Arc;

use super::export::Export;
use super::wire::{self, NbdError, Reader};
use crate::planted::{Bug, planted};

#[cfg(test)]
mod tests;

/// Longest payload of a refused WRITE that is read and dropped, bytes. Above it the connection is closed:
/// no client sends that in good faith, and following it would cost its length in traffic.
pub const SKIP_BYTES_MAX: u32 = 64 << 20;

const _: () = assert!(SKIP_BYTES_MAX >= wire::PAYLOAD_BYTES_MAX);

/// A connection past its handshake: what was negotiated, and the export. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Session {
    export: Arc<Export>,
}

/// What a request header asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Close the connection without a reply: the stream cannot be trusted. The text says why, for the log.
    Close(String),
    /// Finish the requests in flight and send their replies, then close; no reply to this one.
    Disconnect,
    /// Do this, then reply. The payload of a `Write` follows the header.
    Command {
        /// Names the request in its reply.
        cookie: u64,
        /// What to do.
        command: Command,
    },
    /// Skip the payload, then reply with this error.
    Refuse {
        /// Names the request in its reply.
        cookie: u64,
        /// Why.
        error: NbdError,
        /// Bytes of payload that follow the header, at most `SKIP_BYTES_MAX`.
        skip_payload_bytes: u32,
    },
}

/// A checked request. `offset` and `len` are bytes, `offset + len` is at most the export's size, `len` may be 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read a range; at most `PAYLOAD_BYTES_MAX`.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u32,
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
        len: u32,
        /// Whether the space may be given back (NO_HOLE is clear).
        may_unmap: bool,
        /// On stable storage before the reply.
        fua: bool,
    },
    /// The range's content is not needed any more.
    Trim {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u32,
        /// On stable storage before the reply.
        fua: bool,
    },
    /// Everything answered so far, on any connection, goes to stable storage.
    Flush,
}

/// A request as it stands on the wire, its magic checked.
#[derive(Clone, Copy, Debug)]
struct Request {
    flags: u16,
    kind: u16,
    offset: u64,
    len: u32,
}

impl Session {
    /// A session of a client that negotiated nothing beyond the export: compact headers, simple replies.
    #[must_use]
    pub fn new(export: Arc<Export>) -> Self {
        Self { export }
    }

    /// The export that was chosen.
    #[must_use]
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// Reads and checks one request header.
    #[must_use]
    pub fn parse(&self, header: &[u8; wire::REQUEST_BYTES]) -> Parsed {
        let mut reader = Reader::new(header);
        let (Some(magic), Some(flags), Some(kind)) = (reader.u32(), reader.u16(), reader.u16()) else {
            unreachable!("a request header holds 28 bytes");
        };
        let (Some(cookie), Some(offset), Some(len)) = (reader.u64(), reader.u64(), reader.u32()) else {
            unreachable!("a request header holds 28 bytes");
        };
        if magic != wire::REQUEST_MAGIC {
            return Parsed::Close(format!("no request magic but {magic:#x}: the client is out of step"));
        }
        if kind == wire::CMD_DISC {
            // Whatever else it says: the client wants to leave.
            return Parsed::Disconnect;
        }
        let error = match validate(&self.export, Request { flags, kind, offset, len }) {
            Ok(command) => return Parsed::Command { cookie, command },
            Err(error) => error,
        };
        let skip_payload_bytes = if kind == wire::CMD_WRITE { len } else { 0 };
        if skip_payload_bytes > SKIP_BYTES_MAX {
            return Parsed::Close(format!("a WRITE of {len} bytes is too long even to be skipped"));
        }
        Parsed::Refuse { cookie, error, skip_payload_bytes }
    }

    /// The header of the reply to a request. After `Ok` to a READ, its data follows.
    #[must_use]
    pub fn encode_reply(&self, cookie: u64, result: Result<(), NbdError>) -> [u8; wire::SIMPLE_REPLY_BYTES] {
        encode_simple_reply(cookie, result)
    }
}

/// A simple reply: magic, error (0 is success), cookie.
#[must_use]
pub fn encode_simple_reply(cookie: u64, result: Result<(), NbdError>) -> [u8; wire::SIMPLE_REPLY_BYTES] {
    let error = result.map_or_else(NbdError::value, |()| 0);
    let mut reply = [0; wire::SIMPLE_REPLY_BYTES];
    reply[..4].copy_from_slice(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
    reply[4..8].copy_from_slice(&error.to_be_bytes());
    reply[8..].copy_from_slice(&cookie.to_be_bytes());
    reply
}

/// Everything that makes a request wrong, in this order: the command, its flags, read-only, its length, its
/// range. `docs/error-table.md` has the same as a table, and a test compares the two.
fn validate(export: &Export, request: Request) -> Result<Command, NbdError> {
    let Request { flags, kind, offset, len } = request;
    // FUA is fine on every command, also where it does nothing: the specification demands it.
    let (flags_allowed, writes) = match kind {
        wire::CMD_READ | wire::CMD_FLUSH => (wire::CMD_FLAG_FUA, false),
        wire::CMD_WRITE | wire::CMD_TRIM => (wire::CMD_FLAG_FUA, true),
        wire::CMD_WRITE_ZEROES => (wire::CMD_FLAG_FUA | wire::CMD_FLAG_NO_HOLE, true),
        _ => return Err(NbdError::Inval),
    };
    if flags & !flags_allowed != 0 {
        return Err(NbdError::Inval);
    }
    if writes && export.read_only {
        return Err(NbdError::Perm);
    }
    if kind == wire::CMD_FLUSH {
        // Both are reserved: a client that sets them means something that this server does not know.
        return if offset == 0 && len == 0 { Ok(Command::Flush) } else { Err(NbdError::Inval) };
    }
    if matches!(kind, wire::CMD_READ | wire::CMD_WRITE) && len > wire::PAYLOAD_BYTES_MAX {
        return Err(NbdError::Inval);
    }
    let in_range = offset.checked_add(u64::from(len)).is_some_and(|end| end <= export.size_bytes);
    if !in_range && !planted(Bug::RangeNotChecked) {
        let stores = matches!(kind, wire::CMD_WRITE | wire::CMD_WRITE_ZEROES);
        return Err(if stores { NbdError::NoSpc } else { NbdError::Inval });
    }
    let fua = flags & wire::CMD_FLAG_FUA != 0;
    Ok(match kind {
        wire::CMD_READ => Command::Read { offset, len },
        wire::CMD_WRITE => Command::Write { offset, len, fua },
        wire::CMD_TRIM => Command::Trim { offset, len, fua },
        wire::CMD_WRITE_ZEROES => {
            let may_unmap = flags & wire::CMD_FLAG_NO_HOLE == 0;
            Command::WriteZeroes { offset, len, may_unmap, fua }
        }
        _ => unreachable!("unknown commands were refused above"),
    })
}
