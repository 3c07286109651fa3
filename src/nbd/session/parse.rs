//! Requests, taken apart and checked.

use super::{Command, Parsed, Refusal, SKIP_BYTES_MAX, Session, Tag};
use crate::extent::{CONTEXTS, ContextSet};
use crate::nbd::context;
use crate::nbd::export::{Negotiated, ReplyMode};
use crate::nbd::wire::{self, NbdError, Reader};
use crate::planted::{Bug, planted};

/// Longest payload of a BLOCK_STATUS, bytes: a length, and every context once.
const STATUS_PAYLOAD_BYTES_MAX: usize = 8 + 4 * CONTEXTS;
/// Most bytes that [`Session::parse`] wants to see at once.
pub(super) const PARSE_BYTES_MAX: usize = wire::EXTENDED_REQUEST_BYTES + STATUS_PAYLOAD_BYTES_MAX;

/// A request as it stands on the wire.
#[derive(Clone, Copy, Debug)]
struct Request {
    magic: u32,
    flags: u16,
    kind: u16,
    tag: Tag,
    len: u64,
}

impl Session {
    /// Most bytes that [`Session::parse`] wants to see at once.
    pub const PARSE_BYTES_MAX: usize = PARSE_BYTES_MAX;

    /// Reads and checks the request at the beginning of `bytes`, and says how many of them it has taken: its header,
    /// and the payload of a BLOCK_STATUS. `None`: there are too few.
    #[must_use]
    pub fn parse(&self, bytes: &[u8]) -> Option<(Parsed, usize)> {
        let header_bytes = self.header_bytes();
        let request = self.read_header(bytes)?;
        let done = |parsed| Some((parsed, header_bytes));
        if request.magic != self.request_magic() {
            let magic = request.magic;
            return done(Parsed::Close(format!(
                "no request magic but {magic:#x}: the client is out of step"
            )));
        }
        if request.kind == wire::CMD_DISC {
            // Whatever else it says: the client wants to leave.
            return done(Parsed::Disconnect);
        }
        let payload_bytes = match self.payload_bytes(request) {
            Ok(payload_bytes) => payload_bytes,
            Err(why) => return done(Parsed::Close(why)),
        };
        let Negotiated { contexts, .. } = self.negotiated;
        let mut taken = header_bytes;
        let checked = if request.kind == wire::CMD_BLOCK_STATUS && payload_bytes > 0 {
            match self.check_status_payload_bytes(payload_bytes) {
                Err(refusal) => Err(refusal),
                Ok(()) => {
                    let payload = bytes.get(header_bytes..header_bytes + payload_bytes as usize)?;
                    parse_status_payload(payload, contexts).and_then(|(len, contexts)| {
                        let command = self.validate(Request { len, ..request }, contexts)?;
                        taken += payload.len();
                        Ok(command)
                    })
                }
            }
        } else {
            self.validate(request, contexts)
        };
        let tag = request.tag;
        Some(match checked {
            Ok(command) => (Parsed::Command { tag, command }, taken),
            Err(refusal) => {
                (Parsed::Refuse { tag, refusal, skip_payload_bytes: payload_bytes }, header_bytes)
            }
        })
    }

    fn request_magic(&self) -> u32 {
        match self.negotiated.mode {
            ReplyMode::Simple | ReplyMode::Structured => wire::REQUEST_MAGIC,
            ReplyMode::Extended => wire::EXTENDED_REQUEST_MAGIC,
        }
    }

    fn read_header(&self, bytes: &[u8]) -> Option<Request> {
        let mut reader = Reader::new(bytes.get(..self.header_bytes())?);
        let (magic, flags, kind) = (reader.u32()?, reader.u16()?, reader.u16()?);
        let tag = Tag { cookie: reader.u64()?, offset: reader.u64()? };
        let len = match self.negotiated.mode {
            ReplyMode::Simple | ReplyMode::Structured => reader.u32()?.into(),
            ReplyMode::Extended => reader.u64()?,
        };
        Some(Request { magic, flags, kind, tag, len })
    }

    /// Bytes of payload that follow the header. `Err` says why so many are not borne.
    fn payload_bytes(&self, request: Request) -> Result<u32, String> {
        let Request { kind, flags, len, .. } = request;
        let is_write = kind == wire::CMD_WRITE;
        let has_payload = match self.negotiated.mode {
            ReplyMode::Simple | ReplyMode::Structured => is_write,
            // A WRITE must have the flag, but QEMU (10.0) leaves it out, and sends the payload all the same.
            ReplyMode::Extended => is_write || flags & wire::CMD_FLAG_PAYLOAD_LEN != 0,
        };
        match u32::try_from(len) {
            _ if !has_payload => Ok(0),
            Ok(len) if len <= SKIP_BYTES_MAX => Ok(len),
            _ => Err(format!(
                "a payload of {len} bytes ({}) is too long even to be skipped",
                wire::command_name(kind)
            )),
        }
    }

    fn check_status_payload_bytes(&self, payload_bytes: u32) -> Result<(), Refusal> {
        let bytes = payload_bytes as usize;
        let fits = (8 + 4..=STATUS_PAYLOAD_BYTES_MAX).contains(&bytes) && bytes.is_multiple_of(4);
        if !self.negotiated.status_payload() {
            refuse(NbdError::Inval, "no metadata context was selected")
        } else if !fits {
            refuse(
                NbdError::Inval,
                "a payload of the wrong length: a length, then some of the contexts selected",
            )
        } else {
            Ok(())
        }
    }

    /// Everything that makes a request wrong, in this order: the command, its flags, read-only, its length, its
    /// range. `docs/error-table.md` has the same as a table, and a test compares the two.
    fn validate(&self, request: Request, contexts: ContextSet) -> Result<Command, Refusal> {
        let Request { flags, kind, tag: Tag { offset, .. }, len, .. } = request;
        let Some(flags_allowed) = self.flags_allowed(kind) else {
            return refuse(NbdError::Inval, "an unknown command");
        };
        if flags & !flags_allowed != 0 {
            return refuse(NbdError::Inval, "a flag that this command does not have");
        }
        let stores = matches!(kind, wire::CMD_WRITE | wire::CMD_WRITE_ZEROES);
        if (stores || kind == wire::CMD_TRIM) && self.export.read_only {
            return refuse(NbdError::Perm, "the export is read-only");
        }
        if kind == wire::CMD_FLUSH {
            // Both are reserved: a client that sets them means something that this server does not know.
            let message = "a FLUSH has neither offset nor length";
            return if offset == 0 && len == 0 {
                Ok(Command::Flush)
            } else {
                refuse(NbdError::Inval, message)
            };
        }
        let has_data = matches!(kind, wire::CMD_READ | wire::CMD_WRITE);
        if has_data && len > wire::PAYLOAD_BYTES_MAX.into() {
            return refuse(NbdError::Inval, "more than the largest payload: split it");
        }
        if kind == wire::CMD_BLOCK_STATUS && contexts.is_empty() {
            return refuse(NbdError::Inval, "no metadata context was selected");
        }
        if kind == wire::CMD_BLOCK_STATUS && len == 0 {
            return refuse(NbdError::Inval, "no byte has no status");
        }
        let size_bytes = self.export.size_bytes;
        let end = offset.checked_add(len);
        let in_range = end.is_some_and(|end| end <= size_bytes);
        if !in_range && !planted(Bug::RangeNotChecked) {
            let error = if stores { NbdError::NoSpc } else { NbdError::Inval };
            // Not where the range leaves 64 bits: libnbd's own check of the offset overflows then, and it hangs up.
            let at = end.filter(|_| len > 0).map(|_| offset.max(size_bytes));
            return Err(Refusal { error, message: "beyond the end of the export", at });
        }
        let fua = flags & wire::CMD_FLAG_FUA != 0;
        let short_len = if has_data { len as u32 } else { 0 };
        Ok(match kind {
            wire::CMD_READ => Command::Read { offset, len: short_len, df: flags & wire::CMD_FLAG_DF != 0 },
            wire::CMD_WRITE => Command::Write { offset, len: short_len, fua },
            wire::CMD_TRIM => Command::Trim { offset, len, fua },
            wire::CMD_CACHE => Command::Cache { offset, len },
            wire::CMD_WRITE_ZEROES => {
                let may_unmap = flags & wire::CMD_FLAG_NO_HOLE == 0;
                let fast = flags & wire::CMD_FLAG_FAST_ZERO != 0;
                Command::WriteZeroes { offset, len, may_unmap, fast, fua }
            }
            wire::CMD_BLOCK_STATUS => {
                Command::BlockStatus { offset, len, contexts, one: flags & wire::CMD_FLAG_REQ_ONE != 0 }
            }
            _ => unreachable!("unknown commands were refused above"),
        })
    }

    /// The flags that a command may have; `None` where it is not known. FUA is fine on every command, also where it
    /// does nothing: the specification demands it.
    fn flags_allowed(&self, kind: u16) -> Option<u16> {
        let Negotiated { mode, .. } = self.negotiated;
        let if_mode = |least, flag| if mode >= least { flag } else { 0 };
        let more = match kind {
            wire::CMD_READ => if_mode(ReplyMode::Structured, wire::CMD_FLAG_DF),
            wire::CMD_WRITE => if_mode(ReplyMode::Extended, wire::CMD_FLAG_PAYLOAD_LEN),
            wire::CMD_FLUSH | wire::CMD_TRIM | wire::CMD_CACHE => 0,
            wire::CMD_WRITE_ZEROES => wire::CMD_FLAG_NO_HOLE | wire::CMD_FLAG_FAST_ZERO,
            wire::CMD_BLOCK_STATUS => {
                // With a payload of no bytes the flag is all there is of it: refused.
                wire::CMD_FLAG_REQ_ONE | if_mode(ReplyMode::Extended, wire::CMD_FLAG_PAYLOAD_LEN)
            }
            _ => return None,
        };
        Some(wire::CMD_FLAG_FUA | more)
    }
}

fn refuse<T>(error: NbdError, message: &'static str) -> Result<T, Refusal> {
    Err(Refusal { error, message, at: None })
}

/// The length and the contexts that a BLOCK_STATUS names in its payload: each once, and of those `selected`.
fn parse_status_payload(payload: &[u8], selected: ContextSet) -> Result<(u64, ContextSet), Refusal> {
    let mut reader = Reader::new(payload);
    let Some(len) = reader.u64() else { unreachable!("its length was checked") };
    let mut contexts = ContextSet::EMPTY;
    while let Some(id) = reader.u32() {
        match context::from_id(id) {
            Some(context) if selected.contains(context) && !contexts.contains(context) => {
                contexts.insert(context);
            }
            _ => return refuse(NbdError::Inval, "a metadata context that was not selected, or one twice"),
        }
    }
    Ok((len, contexts))
}
