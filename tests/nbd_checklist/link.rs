//! A connection in the transmission phase: requests in any of the three forms, and the ledger of those in flight.
//!
//! What must hold: each reply is to a request in flight, in the form that was negotiated; after the case no request is
//! left without an answer unless the case says so.

use std::collections::{HashMap, VecDeque};

use super::raw::{Raw, be16, be32, be64, info, info_data, meta_data, opt, rep};
use super::reply::{Asked, ChunkHeader, PAYLOAD_MAX, Partial, Reply, chunk, err};

pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Commands.
pub(crate) mod cmd {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
    pub(crate) const RESIZE: u16 = 8;
}

/// Command flags.
pub(crate) mod flag {
    pub(crate) const FUA: u16 = 1;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
    pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Transmission flags.
pub(crate) mod tf {
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_RESIZE: u16 = 1 << 9;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
    pub(crate) const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// The form of headers and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Simple,
    Structured,
    Extended,
}

impl Mode {
    pub(crate) const ALL: [Self; 3] = [Self::Simple, Self::Structured, Self::Extended];

    /// The option that a client asks for it with.
    pub(crate) fn option(self) -> Option<u32> {
        match self {
            Self::Simple => None,
            Self::Structured => Some(opt::STRUCTURED_REPLY),
            Self::Extended => Some(opt::EXTENDED_HEADERS),
        }
    }
}

/// A connection in the transmission phase.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) raw: Raw,
    pub(crate) mode: Mode,
    /// The export's size, bytes.
    pub(crate) size: u64,
    /// `tf::*`
    pub(crate) flags: u16,
    /// Minimum, preferred and maximum block size, bytes.
    pub(crate) block_sizes: [u32; 3],
    /// The metadata contexts selected.
    pub(crate) contexts: Vec<(u32, String)>,
    in_flight: HashMap<u64, VecDeque<Partial>>,
    next_cookie: u64,
}

impl Link {
    /// Negotiates `mode` and metadata contexts on a connection past its client flags, and goes on to transmission.
    pub(crate) fn open(mut raw: Raw, mode: Mode, name: &[u8], contexts: &[&str]) -> Self {
        if let Some(code) = mode.option() {
            let kind = raw.ask_one(code, &[]);
            assert_eq!(kind, rep::ACK, "the answer to the option for {mode:?}");
        }
        let contexts = if contexts.is_empty() { Vec::new() } else { select(&mut raw, name, contexts) };
        Self::go(raw, mode, name, contexts)
    }

    /// Sends GO and goes on to transmission in `mode`, whatever was negotiated before.
    pub(crate) fn go(mut raw: Raw, mode: Mode, name: &[u8], contexts: Vec<(u32, String)>) -> Self {
        let replies = raw.ask(opt::GO, &info_data(name, &[info::BLOCK_SIZE]));
        assert_eq!(replies[replies.len() - 1].kind, rep::ACK, "the answer to GO");
        let info_of = |kind: u16| {
            let found = replies.iter().find(|reply| reply.kind == rep::INFO && be16(&reply.data, 0) == kind);
            found.map(|reply| reply.data[2..].to_vec())
        };
        let export = info_of(info::EXPORT).expect("GO without INFO_EXPORT");
        let sizes = info_of(info::BLOCK_SIZE).expect("GO without the block sizes asked for");
        Self::in_transmission(raw, mode, be64(&export, 0), be16(&export, 8))
            .with([be32(&sizes, 0), be32(&sizes, 4), be32(&sizes, 8)], contexts)
    }

    /// A connection that is in transmission already.
    pub(crate) fn in_transmission(raw: Raw, mode: Mode, size: u64, flags: u16) -> Self {
        assert_ne!(flags & tf::HAS_FLAGS, 0, "HAS_FLAGS");
        let (contexts, in_flight) = Default::default();
        // Not small, so that a server that cuts cookies is found out.
        let next_cookie = 0xa5a5_0000_c001_e000;
        Self { raw, mode, size, flags, block_sizes: [1, 4096, 32 << 20], contexts, in_flight, next_cookie }
    }

    fn with(self, block_sizes: [u32; 3], contexts: Vec<(u32, String)>) -> Self {
        Self { block_sizes, contexts, ..self }
    }

    /// The header of a request, in this connection's form.
    pub(crate) fn header(&self, command: u16, flags: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
        let extended = self.mode == Mode::Extended;
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let mut header = magic.to_be_bytes().to_vec();
        header.extend_from_slice(&flags.to_be_bytes());
        header.extend_from_slice(&command.to_be_bytes());
        header.extend_from_slice(&cookie.to_be_bytes());
        header.extend_from_slice(&offset.to_be_bytes());
        if extended {
            header.extend_from_slice(&len.to_be_bytes());
        } else {
            header.extend_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
        }
        header
    }

    /// A fresh cookie.
    pub(crate) fn cookie(&mut self) -> u64 {
        self.next_cookie += 1;
        self.next_cookie
    }

    /// Notes that an answer to `cookie` is due.
    pub(crate) fn expect(&mut self, cookie: u64, asked: Asked) {
        self.in_flight.entry(cookie).or_default().push_back(Partial::new(asked));
    }

    /// What a request with these fields asks for, all selected contexts included.
    pub(crate) fn asked(&self, command: u16, flags: u16, offset: u64, len: u64) -> Asked {
        let contexts = self.contexts.iter().map(|(id, _)| *id).collect();
        Asked { command, flags, offset, len, contexts }
    }

    /// The bytes of a request. A WRITE gets the flag that says so under extended headers.
    pub(crate) fn encode(
        &self,
        command: u16,
        flags: u16,
        cookie: u64,
        (offset, len): (u64, u64),
        payload: &[u8],
    ) -> Vec<u8> {
        let is_write = command == cmd::WRITE && self.mode == Mode::Extended;
        let flags = if is_write { flags | flag::PAYLOAD_LEN } else { flags };
        let mut bytes = self.header(command, flags, cookie, offset, len);
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Sends a request with this cookie; the length is the payload's where there is one.
    pub(crate) fn send_as(
        &mut self,
        cookie: u64,
        command: u16,
        flags: u16,
        range: (u64, u64),
        payload: &[u8],
    ) {
        let bytes = self.encode(command, flags, cookie, range, payload);
        self.expect(cookie, self.asked(command, flags, range.0, range.1));
        self.raw.send(&bytes);
    }

    /// Sends a request without a payload and gives its cookie.
    pub(crate) fn send(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> u64 {
        let cookie = self.cookie();
        self.send_as(cookie, command, flags, (offset, len), &[]);
        cookie
    }

    /// Sends a WRITE and gives its cookie.
    pub(crate) fn send_write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u64 {
        let cookie = self.cookie();
        self.send_as(cookie, cmd::WRITE, flags, (offset, data.len() as u64), data);
        cookie
    }

    /// Number of requests in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.values().map(VecDeque::len).sum()
    }

    /// Strikes a request off the ledger: it will not be answered.
    pub(crate) fn forget(&mut self, cookie: u64) {
        self.in_flight.remove(&cookie);
    }

    /// The next whole reply, or `None` where the server closed between two messages.
    pub(crate) fn try_receive(&mut self) -> Option<Reply> {
        loop {
            let magic = be32(&self.raw.try_take(4)?, 0);
            if magic == SIMPLE_REPLY_MAGIC && self.mode != Mode::Extended {
                return Some(self.receive_simple());
            }
            let header = match (magic, self.mode) {
                (STRUCTURED_REPLY_MAGIC, Mode::Structured) => structured_header(&self.raw.take(16)),
                (EXTENDED_REPLY_MAGIC, Mode::Extended) => extended_header(&self.raw.take(28)),
                _ => panic!("a reply with magic {magic:#x} ({:?})", self.mode),
            };
            assert!(header.len <= PAYLOAD_MAX + 8, "a chunk of {} bytes", header.len);
            let payload = if header.len == 0 { Vec::new() } else { self.raw.take(header.len as usize) };
            let cookie = header.cookie;
            let queue = self.in_flight.get_mut(&cookie);
            let queue = queue.unwrap_or_else(|| panic!("a reply to cookie {cookie:#x}, not in flight"));
            queue[0].take(header, &payload, self.mode, self.size);
            if header.flags & chunk::FLAG_DONE != 0 {
                return Some(self.pop(cookie).finish(cookie));
            }
        }
    }

    fn receive_simple(&mut self) -> Reply {
        let rest = self.raw.take(12);
        let (error, cookie) = (be32(&rest, 0), be64(&rest, 4));
        let partial = self.pop(cookie);
        let len = partial.simple_payload_bytes(self.mode, error);
        let data = if len == 0 { Vec::new() } else { self.raw.take(len) };
        partial.finish_simple(cookie, error, data)
    }

    fn pop(&mut self, cookie: u64) -> Partial {
        let queue = self.in_flight.get_mut(&cookie);
        let queue = queue.unwrap_or_else(|| panic!("a reply to cookie {cookie:#x}, not in flight"));
        let partial = queue.pop_front().unwrap();
        if queue.is_empty() {
            self.in_flight.remove(&cookie);
        }
        partial
    }

    /// The next whole reply.
    pub(crate) fn receive(&mut self) -> Reply {
        self.try_receive().unwrap_or_else(|| panic!("closed with {} requests unanswered", self.in_flight()))
    }

    /// The replies to all requests in flight, by cookie.
    pub(crate) fn receive_all(&mut self) -> HashMap<u64, Reply> {
        let mut replies = HashMap::new();
        while self.in_flight() > 0 {
            let reply = self.receive();
            replies.insert(reply.cookie, reply);
        }
        replies
    }

    /// The replies that come until the server closes; how many requests were left unanswered stays in the ledger.
    pub(crate) fn receive_until_closed(&mut self) -> HashMap<u64, Reply> {
        let mut replies = HashMap::new();
        while let Some(reply) = self.try_receive() {
            replies.insert(reply.cookie, reply);
        }
        replies
    }

    /// One request without a payload and its reply; none other may be in flight.
    pub(crate) fn call(&mut self, command: u16, flags: u16, offset: u64, len: u64) -> Reply {
        assert_eq!(self.in_flight(), 0);
        self.send(command, flags, offset, len);
        self.receive()
    }

    /// Asserts that a request (a WRITE with a payload of its length) fails with one of `errors`, as an error chunk
    /// where those were negotiated, and that the connection is usable after it.
    pub(crate) fn refused(&mut self, command: u16, flags: u16, (offset, len): (u64, u64), errors: &[u32]) {
        let payload = if command == cmd::WRITE { vec![0xdd; len as usize] } else { Vec::new() };
        let cookie = self.cookie();
        self.send_as(cookie, command, flags, (offset, len), &payload);
        let error = self.receive().error;
        assert!(
            errors.contains(&error),
            "command {command} flags {flags:#x} offset {offset:#x} length {len:#x}: error {error}, not one of {errors:?}"
        );
        self.usable();
    }

    /// Asserts that the connection goes on as if nothing had been.
    pub(crate) fn usable(&mut self) {
        if self.in_flight() == 0 {
            let expected = super::ground::kept(512, 512);
            assert!(self.read(512, 512) == expected, "the connection is out of step, or data has changed");
        }
    }

    /// Reads a range.
    pub(crate) fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        self.call(cmd::READ, 0, offset, len).ok()
    }

    /// Writes a range.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        self.write_with(0, offset, data);
    }

    /// Writes a range with flags.
    pub(crate) fn write_with(&mut self, flags: u16, offset: u64, data: &[u8]) {
        assert_eq!(self.in_flight(), 0);
        self.send_write(flags, offset, data);
        self.receive().ok();
    }

    /// A request without a payload that must succeed.
    pub(crate) fn done(&mut self, command: u16, flags: u16, offset: u64, len: u64) {
        let error = self.call(command, flags, offset, len).error;
        assert_eq!(error, 0, "the error of command {command} flags {flags:#x} offset {offset} length {len}");
    }

    /// Asserts that the transmission flag is set.
    pub(crate) fn offers(&self, flag: u16) {
        assert_ne!(self.flags & flag, 0, "transmission flag {flag:#x} is missing ({:#x})", self.flags);
    }

    /// Leaves in order: DISC, and the server closes.
    pub(crate) fn leave(mut self) {
        let header = self.header(cmd::DISC, 0, 0, 0, 0);
        self.raw.send(&header);
        self.raw.expect_closed();
    }

    /// Asserts that a request is refused, or takes the payload and succeeds, or that the server closes. Whether the
    /// connection goes on.
    pub(crate) fn refused_or_closed(&mut self) -> bool {
        match self.try_receive() {
            None => false,
            Some(reply) => {
                assert!(reply.error == 0 || err::ANY.contains(&reply.error));
                self.usable();
                true
            }
        }
    }
}

/// SET_META_CONTEXT: what was selected.
pub(crate) fn select(raw: &mut Raw, name: &[u8], queries: &[&str]) -> Vec<(u32, String)> {
    let mut replies = raw.ask(opt::SET_META_CONTEXT, &meta_data(name, queries));
    assert_eq!(replies.pop().map(|reply| reply.kind), Some(rep::ACK), "the answer to SET_META_CONTEXT");
    replies.iter().map(|reply| context(&reply.data)).collect()
}

/// The id and name in a META_CONTEXT reply.
pub(crate) fn context(data: &[u8]) -> (u32, String) {
    (be32(data, 0), String::from_utf8(data[4..].to_vec()).unwrap())
}

fn structured_header(rest: &[u8]) -> ChunkHeader {
    ChunkHeader {
        flags: be16(rest, 0),
        kind: be16(rest, 2),
        cookie: be64(rest, 4),
        offset: None,
        len: be32(rest, 12).into(),
    }
}

fn extended_header(rest: &[u8]) -> ChunkHeader {
    ChunkHeader {
        flags: be16(rest, 0),
        kind: be16(rest, 2),
        cookie: be64(rest, 4),
        offset: Some(be64(rest, 12)),
        len: be64(rest, 20),
    }
}
