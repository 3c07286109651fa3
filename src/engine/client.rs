//! One client's connection: bytes received become requests.
//!
//! ```text
//!             header complete          WRITE                   payload complete
//! Header ────────────────────────────► Payload ──────────────────────────────► request, Header
//!   │  ▲                                 │  ▲  (large: lent to the kernel, Lent, and back)
//!   │  └───── all skipped: reply ──── Skip ◄── refused WRITE
//!   └─► Ended: DISC, wrong magic, end of stream, engine stops; nothing is read any more
//! ```
//!
//! What must hold: `unanswered` counts the requests whose reply has not been sent or dropped, `held_bytes` what they
//! are charged; a connection is let go only when both are zero and the ring has nothing of it.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::handle::Counted;
use super::memory::{Admission, CLIENT_REQUESTS_MAX, payload_cost};
use super::receive::{BUFFER_BYTES_MIN, DIRECT_BYTES, Into, Receive};
use super::send_batch::Outgoing;
use super::slab::Key;
use crate::buffer::{Buffer, BufferPool, UniquePayload};
use crate::mirror::event::Request;
use crate::nbd::session::{Command, Parsed, Session};
use crate::nbd::wire::{NbdError, REQUEST_BYTES};
use crate::units::{ByteRange, Nanos};

/// A WRITE whose payload is being received.
pub(super) struct Incoming {
    pub payload: UniquePayload,
    pub filled: usize,
    cookie: u64,
    fua: bool,
    offset: u64,
    cost: u64,
}

enum Stage {
    Header,
    Payload(Incoming),
    /// The payload is with the kernel; what it is charged.
    Lent(u64),
    Skip {
        cookie: u64,
        error: NbdError,
        remaining: usize,
    },
    Ended,
}

/// What the bytes received so far come to.
pub(super) enum Next {
    /// A request, charged.
    Request { cookie: u64, request: Request, cost: u64 },
    /// A request that is refused.
    Refused { cookie: u64, error: NbdError },
    /// The connection's own limits are reached: go on when a reply has been sent.
    OwnShareFull,
    /// The memory budget is used up: stand in line.
    Wait,
    /// More bytes are needed.
    More,
    /// Nothing is read any more; with why, where the client did wrong.
    Ended(Option<String>),
}

/// A connection.
pub(super) struct Client {
    /// The socket.
    pub fd: OwnedFd,
    /// What was negotiated.
    pub session: Session,
    /// Who it is, for the log.
    pub peer: String,
    _counted: Counted,
    /// Requests not answered yet (reply sent or dropped).
    pub unanswered: u32,
    /// Bytes those are charged.
    pub held_bytes: u64,
    /// Replies waiting to be sent.
    pub outgoing: VecDeque<Outgoing>,
    /// The receive in flight.
    pub receiving: Option<Key>,
    /// A send is in flight.
    pub sending: bool,
    /// Stands in the budget's line.
    pub in_line: bool,
    /// Nothing can be sent any more: replies are dropped.
    pub broken: bool,
    /// The socket has been shut down.
    pub shut: bool,
    /// When the peer last moved a byte, or work for it began.
    pub moved_at: Nanos,
    /// Bytes to be received at a time; grows with use.
    pub buffer_bytes: usize,
    stage: Stage,
    buffer: Option<Buffer>,
    /// What of the buffer has been received and not parsed.
    start: usize,
    end: usize,
}

impl Client {
    /// A connection past its handshake.
    pub(super) fn new(fd: OwnedFd, session: Session, peer: String, counted: Counted, now: Nanos) -> Self {
        Self {
            fd,
            session,
            peer,
            _counted: counted,
            unanswered: 0,
            held_bytes: 0,
            outgoing: VecDeque::new(),
            receiving: None,
            sending: false,
            in_line: false,
            broken: false,
            shut: false,
            moved_at: now,
            buffer_bytes: BUFFER_BYTES_MIN,
            stage: Stage::Header,
            buffer: None,
            start: 0,
            end: 0,
        }
    }

    /// The socket's descriptor; open as long as `self`.
    pub(super) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Takes bytes that were received before the connection came here.
    pub(super) fn preload(&mut self, pool: &BufferPool, bytes: &[u8]) {
        assert!(self.buffer.is_none());
        if !bytes.is_empty() {
            let mut buffer = pool.take(bytes.len());
            buffer[..bytes.len()].copy_from_slice(bytes);
            self.took_buffer(buffer, bytes.len());
        }
    }

    /// Takes a buffer whose first `end` bytes have been received.
    pub(super) fn took_buffer(&mut self, buffer: Buffer, end: usize) {
        assert!(self.buffer.is_none() && end <= buffer.len());
        (self.buffer, self.start, self.end) = (Some(buffer), 0, end);
    }

    /// Takes back a payload that the kernel has received into.
    pub(super) fn took_payload(&mut self, incoming: Incoming) {
        match self.stage {
            Stage::Lent(cost) => {
                assert!(cost == incoming.cost);
                self.stage = Stage::Payload(incoming);
            }
            // Given up meanwhile, its charge with it.
            Stage::Ended => {}
            Stage::Header | Stage::Payload(_) | Stage::Skip { .. } => unreachable!("lent once"),
        }
    }

    /// Whether requests are still read.
    pub(super) fn is_reading(&self) -> bool {
        !matches!(self.stage, Stage::Ended)
    }

    /// Whether nothing but the peer's own next byte is waited for.
    pub(super) fn waits_for_peer(&self) -> bool {
        let half_received = matches!(self.stage, Stage::Payload(_) | Stage::Lent(_) | Stage::Skip { .. });
        self.receiving.is_some() && !self.sending && self.unanswered == u32::from(half_received)
    }

    /// Whether a request stands half received, with memory charged for it.
    pub(super) fn is_inside_payload(&self) -> bool {
        matches!(self.stage, Stage::Payload(_) | Stage::Lent(_))
    }

    /// Reads no more. Gives what a half-received request was charged, to be released; it was never begun.
    #[must_use]
    pub(super) fn end_reading(&mut self) -> u64 {
        let cost = match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Payload(Incoming { cost, .. }) | Stage::Lent(cost) => cost,
            Stage::Skip { .. } => 0,
            Stage::Header | Stage::Ended => return 0,
        };
        self.unanswered -= 1;
        self.held_bytes -= cost;
        cost
    }

    /// Parses on, to the next thing that has to be dealt with. `admit` is asked with the bytes held and wanted.
    pub(super) fn next(&mut self, pool: &BufferPool, mut admit: impl FnMut(u64, u64) -> Admission) -> Next {
        loop {
            match &mut self.stage {
                Stage::Ended | Stage::Lent(_) => return Next::More,
                Stage::Header => {
                    if let Some(next) = self.parse_header(pool, &mut admit) {
                        return next;
                    }
                }
                Stage::Payload(incoming) => {
                    let bytes = self.buffer.as_deref().map_or(&[][..], |b| &b[self.start..self.end]);
                    let to = &mut incoming.payload.bytes_mut()[incoming.filled..];
                    let count = bytes.len().min(to.len());
                    to[..count].copy_from_slice(&bytes[..count]);
                    incoming.filled += count;
                    self.start += count;
                    if incoming.filled < incoming.payload.len {
                        return Next::More;
                    }
                    return self.payload_complete();
                }
                Stage::Skip { cookie, error, remaining } => {
                    let count = (self.end - self.start).min(*remaining);
                    self.start += count;
                    *remaining -= count;
                    if *remaining > 0 {
                        return Next::More;
                    }
                    let next = Next::Refused { cookie: *cookie, error: *error };
                    self.stage = Stage::Header;
                    return next;
                }
            }
        }
    }

    fn payload_complete(&mut self) -> Next {
        let Stage::Payload(Incoming { payload, cookie, fua, offset, cost, .. }) =
            std::mem::replace(&mut self.stage, Stage::Header)
        else {
            unreachable!("called in this stage")
        };
        Next::Request { cookie, request: Request::Write { offset, data: payload, fua }, cost }
    }

    /// Obeys the next header; `None` where its payload is what comes next.
    fn parse_header(
        &mut self,
        pool: &BufferPool,
        admit: &mut impl FnMut(u64, u64) -> Admission,
    ) -> Option<Next> {
        let bytes = self.buffer.as_deref().map_or(&[][..], |buffer| &buffer[self.start..self.end]);
        let Some(header) = bytes.first_chunk::<REQUEST_BYTES>() else { return Some(Next::More) };
        if self.unanswered >= CLIENT_REQUESTS_MAX {
            return Some(Next::OwnShareFull);
        }
        let (cookie, command) = match self.session.parse(header) {
            Parsed::Close(why) => {
                self.stage = Stage::Ended;
                return Some(Next::Ended(Some(why)));
            }
            Parsed::Disconnect => {
                self.stage = Stage::Ended;
                return Some(Next::Ended(None));
            }
            Parsed::Refuse { cookie, error, skip_payload_bytes } => {
                self.start += REQUEST_BYTES;
                self.unanswered += 1;
                self.stage = Stage::Skip { cookie, error, remaining: skip_payload_bytes as usize };
                return None;
            }
            Parsed::Command { cookie, command } => (cookie, command),
        };
        let cost = match command {
            Command::Read { offset, len } | Command::Write { offset, len, .. } => {
                payload_cost(offset, u64::from(len))
            }
            Command::WriteZeroes { .. } | Command::Trim { .. } | Command::Flush => 0,
        };
        match admit(self.held_bytes, cost) {
            Admission::Granted => {}
            Admission::OwnShareFull => return Some(Next::OwnShareFull),
            Admission::Wait => return Some(Next::Wait),
        }
        self.start += REQUEST_BYTES;
        self.unanswered += 1;
        self.held_bytes += cost;
        let range = |offset, len: u32| ByteRange::new(offset, u64::from(len));
        let request = match command {
            Command::Write { offset, len, fua } => {
                let payload = pool.payload_for(range(offset, len));
                self.stage = Stage::Payload(Incoming { payload, filled: 0, cookie, fua, offset, cost });
                return None;
            }
            Command::Read { offset, len } => Request::Read { range: range(offset, len) },
            Command::WriteZeroes { offset, len, may_unmap, fua } => {
                Request::WriteZeroes { range: range(offset, len), may_unmap, fast: false, fua }
            }
            Command::Trim { offset, len, fua } => Request::Trim { range: range(offset, len), fua },
            Command::Flush => Request::Flush,
        };
        Some(Next::Request { cookie, request, cost })
    }

    /// What to receive next, after `Next::More`; `None` where nothing is to be received.
    pub(super) fn receive(
        &mut self,
        key: Key,
        pool: &BufferPool,
        buffer_bytes_max: usize,
    ) -> Option<Receive> {
        if self.receiving.is_some() {
            return None;
        }
        let fd = self.raw_fd();
        let into = match &self.stage {
            Stage::Ended | Stage::Lent(_) => return None,
            Stage::Payload(incoming) if incoming.payload.len - incoming.filled >= DIRECT_BYTES => {
                assert!(self.start == self.end);
                self.buffer = None;
                // Behind a large payload stands a header; whatever is received with it has to be copied.
                self.buffer_bytes = BUFFER_BYTES_MIN;
                let Stage::Payload(incoming) = std::mem::replace(&mut self.stage, Stage::Header) else {
                    unreachable!("matched above")
                };
                self.stage = Stage::Lent(incoming.cost);
                Into::Payload(incoming)
            }
            _ => self.receive_buffer(pool, self.buffer_bytes.min(buffer_bytes_max)),
        };
        Some(Receive { connection: key, fd, into })
    }

    /// A buffer to receive into, with the unparsed beginning of a header (if any) moved to its front.
    fn receive_buffer(&mut self, pool: &BufferPool, bytes: usize) -> Into {
        let kept = self.end - self.start;
        assert!(kept < REQUEST_BYTES);
        let buffer = match self.buffer.take() {
            Some(mut buffer) if buffer.len() == bytes => {
                buffer.copy_within(self.start..self.end, 0);
                buffer
            }
            old => {
                let mut buffer = pool.take(bytes);
                if let Some(old) = old {
                    buffer[..kept].copy_from_slice(&old[self.start..self.end]);
                }
                buffer
            }
        };
        assert!(buffer.len() > kept);
        (self.start, self.end) = (0, 0);
        Into::Buffer { buffer, filled: kept }
    }
}
