//! One client's connection: bytes received become requests.
//!
//! ```text
//!             header complete          WRITE                   payload complete
//! Header ────────────────────────────► Payload ──────────────────────────────► request, Header
//!   │  ▲                                 │  ▲  (large: lent to the kernel, Lent, and back)
//!   │  └───── all skipped: reply ──── Skip ◄── refused
//!   └─► Ended: DISC, wrong magic, end of stream; nothing is read any more
//! ```
//!
//! Requests that had to wait (for memory, or for earlier ones of their connection) are begun only if their client is still
//! there: one that hung up may have sent them again elsewhere, and newer writes after them.
//! While the engine stops, requests go on being read, and each is refused with ESHUTDOWN.
//!
//! What must hold: `unanswered` counts the requests whose reply has not been sent or dropped, `held_bytes` what they
//! are charged; a connection is let go only when both are zero and the ring has nothing of it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::handle::Counted;
use super::memory::{Admission, CLIENT_REQUESTS_MAX, payload_cost};
use super::receive::{BUFFER_BYTES_MIN, DIRECT_BYTES, Into, Receive};
use super::send_batch::Outgoing;
use super::slab::Key;
use crate::buffer::{Buffer, BufferPool, UniquePayload};
use crate::mirror::event::Request;
use crate::nbd::session::{Command, Parsed, Refusal, Session, Tag, extents_max};
use crate::nbd::wire::NbdError;
use crate::units::{ByteRange, Nanos};

/// What is charged for an extent of an answer to BLOCK_STATUS, bytes: as the core's value, and as it is sent.
const EXTENT_COST: u64 = 32;

/// Why nothing is begun while the engine stops.
const STOPPING: Refusal = Refusal { error: NbdError::Shutdown, message: "the volume is stopping", at: None };

/// What a request is answered with when it succeeds.
#[derive(Clone, Copy, Debug)]
pub(super) enum Expect {
    /// Nothing but that.
    Done,
    /// That many bytes; in one piece where `df`.
    Read { bytes: u64, df: bool },
    /// The status of that many bytes, in `one` extent a context or many.
    Status { len: u64, one: bool },
}

/// A WRITE whose payload is being received.
pub(super) struct Incoming {
    pub payload: UniquePayload,
    pub filled: usize,
    tag: Tag,
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
        tag: Tag,
        refusal: Refusal,
        remaining: usize,
    },
    Ended,
}

/// What the bytes received so far come to.
pub(super) enum Next {
    /// A request, charged.
    Request { tag: Tag, request: Request, expect: Expect, cost: u64 },
    /// A request that is refused; what it was charged until now.
    Refused { tag: Tag, refusal: Refusal, cost: u64 },
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
    /// The turn ends with a receive.
    pub will_receive: bool,
    /// A send is in flight.
    pub sending: bool,
    /// It has sent large batches, and its socket has been seen to.
    pub sends_large: bool,
    /// Stands in the budget's line.
    pub in_line: bool,
    /// Nothing can be sent any more: replies are dropped.
    pub broken: bool,
    /// The socket has been shut down.
    pub shut: bool,
    /// The engine stops: requests are refused.
    pub stopping: bool,
    /// Requests had to wait, here or in the socket, and may still do so.
    pub held_back: bool,
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
            will_receive: false,
            sending: false,
            sends_large: false,
            in_line: false,
            broken: false,
            shut: false,
            stopping: false,
            held_back: false,
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

    /// Whether the peer has closed the connection both ways (or it broke), so that it will never see a reply. A peer that
    /// has only sent its last request is still there. Over TCP the two look alike until a reply was sent.
    pub(super) fn has_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(self.fd.as_fd(), PollFlags::empty())];
        let _ = poll(&mut polled, PollTimeout::ZERO);
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        polled[0].revents().is_some_and(|events| events.intersects(gone))
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

    /// Takes back a payload that the kernel has received into. Gives what it was charged, to be released, where reading
    /// has ended meanwhile.
    #[must_use]
    pub(super) fn took_payload(&mut self, incoming: Incoming) -> u64 {
        match self.stage {
            Stage::Lent(cost) => {
                assert!(cost == incoming.cost);
                self.stage = Stage::Payload(incoming);
                0
            }
            Stage::Ended => {
                self.held_bytes -= incoming.cost;
                incoming.cost
            }
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

    /// Whether less than `bytes` of a payload is all that a request still wants.
    pub(super) fn is_near_its_end(&self, bytes: usize) -> bool {
        let Stage::Payload(incoming) = &self.stage else { return false };
        (1..bytes).contains(&(incoming.payload.len - incoming.filled))
    }

    /// Reads no more. Gives what a half-received request was charged, to be released; it was never begun.
    #[must_use]
    pub(super) fn end_reading(&mut self) -> u64 {
        let cost = match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Payload(Incoming { cost, .. }) => cost,
            // The memory is in use until the kernel gives it back: `took_payload` releases the charge.
            Stage::Lent(_) | Stage::Skip { .. } => 0,
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
                Stage::Skip { tag, refusal, remaining } => {
                    let count = (self.end - self.start).min(*remaining);
                    self.start += count;
                    *remaining -= count;
                    if *remaining > 0 {
                        return Next::More;
                    }
                    let next = Next::Refused { tag: *tag, refusal: *refusal, cost: 0 };
                    self.stage = Stage::Header;
                    return next;
                }
            }
        }
    }

    fn payload_complete(&mut self) -> Next {
        let Stage::Payload(Incoming { payload, tag, fua, offset, cost, .. }) =
            std::mem::replace(&mut self.stage, Stage::Header)
        else {
            unreachable!("called in this stage")
        };
        if self.stopping {
            return Next::Refused { tag, refusal: STOPPING, cost };
        }
        Next::Request {
            tag,
            request: Request::Write { offset, data: payload, fua },
            expect: Expect::Done,
            cost,
        }
    }

    /// Obeys the next header; `None` where its payload is what comes next.
    fn parse_header(
        &mut self,
        pool: &BufferPool,
        admit: &mut impl FnMut(u64, u64) -> Admission,
    ) -> Option<Next> {
        let bytes = self.buffer.as_deref().map_or(&[][..], |buffer| &buffer[self.start..self.end]);
        let Some((parsed, taken)) = self.session.parse(bytes) else { return Some(Next::More) };
        if self.unanswered >= CLIENT_REQUESTS_MAX {
            return Some(Next::OwnShareFull);
        }
        let (tag, command) = match parsed {
            Parsed::Close(why) => {
                self.stage = Stage::Ended;
                return Some(Next::Ended(Some(why)));
            }
            Parsed::Disconnect => {
                self.stage = Stage::Ended;
                return Some(Next::Ended(None));
            }
            Parsed::Refuse { tag, refusal, skip_payload_bytes } => {
                self.refuse(taken, tag, refusal, skip_payload_bytes);
                return None;
            }
            Parsed::Command { tag, command } if self.stopping => {
                let payload_bytes = if let Command::Write { len, .. } = command { len } else { 0 };
                self.refuse(taken, tag, STOPPING, payload_bytes);
                return None;
            }
            Parsed::Command { tag, command } => (tag, command),
        };
        let cost = cost(&command);
        match admit(self.held_bytes, cost) {
            Admission::Granted => {}
            Admission::OwnShareFull => return Some(Next::OwnShareFull),
            Admission::Wait => return Some(Next::Wait),
        }
        self.start += taken;
        self.unanswered += 1;
        self.held_bytes += cost;
        if let Command::Write { offset, len, fua } = command {
            let payload = pool.payload_for(ByteRange::new(offset, len.into()));
            self.stage = Stage::Payload(Incoming { payload, filled: 0, tag, fua, offset, cost });
            return None;
        }
        let (request, expect) = request(command);
        Some(Next::Request { tag, request, expect, cost })
    }

    /// Goes on to skip the payload of a request whose beginning of `taken` bytes has been parsed, and then to refuse it.
    fn refuse(&mut self, taken: usize, tag: Tag, refusal: Refusal, payload_bytes: u32) {
        self.start += taken;
        self.unanswered += 1;
        self.stage = Stage::Skip { tag, refusal, remaining: payload_bytes as usize };
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
        assert!(kept < Session::PARSE_BYTES_MAX);
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

/// The memory that a command is charged, bytes.
fn cost(command: &Command) -> u64 {
    match *command {
        Command::Read { offset, len, .. } | Command::Write { offset, len, .. } => {
            payload_cost(offset, u64::from(len))
        }
        Command::BlockStatus { len, contexts, one, .. } => {
            EXTENT_COST * extents_max(len, one) * contexts.iter().count() as u64
        }
        Command::WriteZeroes { .. } | Command::Trim { .. } | Command::Cache { .. } | Command::Flush => 0,
    }
}

/// What the core is asked for a command without a payload, and what it answers.
fn request(command: Command) -> (Request, Expect) {
    let request = match command {
        Command::Write { .. } => unreachable!("begun when its payload has come"),
        Command::Read { offset, len, df } => {
            let range = ByteRange::new(offset, len.into());
            return (Request::Read { range }, Expect::Read { bytes: range.len, df });
        }
        Command::BlockStatus { offset, len, contexts, one } => {
            let range = ByteRange::new(offset, len);
            return (Request::BlockStatus { range, contexts, one }, Expect::Status { len, one });
        }
        Command::WriteZeroes { offset, len, may_unmap, fast, fua } => {
            Request::WriteZeroes { range: ByteRange::new(offset, len), may_unmap, fast, fua }
        }
        Command::Trim { offset, len, fua } => Request::Trim { range: ByteRange::new(offset, len), fua },
        Command::Cache { offset, len } => Request::Cache { range: ByteRange::new(offset, len) },
        Command::Flush => Request::Flush,
    };
    (request, Expect::Done)
}
