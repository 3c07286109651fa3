//! Replies of the transmission phase, put together from what comes on the wire, and every rule that the specification
//! has for them.
//!
//! ```text
//!  simple reply ─────────────────────────────┐
//!  chunk, chunk, ..., chunk with DONE ──► Partial ──► Reply
//! ```
//!
//! What must hold: a reply that breaks a rule (bounds, overlap, cover, types, error values, strings) fails the case that
//! sees it, whatever the case is about.

use super::link::{Mode, cmd, flag};
use super::raw::{be16, be32, be64, check_string};

/// The largest payload of a READ or WRITE, bytes.
pub(crate) const PAYLOAD_MAX: u64 = 32 << 20;

/// The specification's error values.
pub(crate) mod err {
    pub(crate) const EPERM: u32 = 1;
    pub(crate) const EIO: u32 = 5;
    pub(crate) const EINVAL: u32 = 22;
    pub(crate) const ENOSPC: u32 = 28;
    pub(crate) const EOVERFLOW: u32 = 75;
    pub(crate) const ENOTSUP: u32 = 95;
    pub(crate) const ESHUTDOWN: u32 = 108;
    /// All that a server may send. ENOMEM (12), which it should not, is left out.
    pub(crate) const ALL: [u32; 7] = [EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN];
    /// For what the specification leaves open.
    pub(crate) const ANY: &[u32] = &ALL;
}

/// Types of chunks.
pub(crate) mod chunk {
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const BLOCK_STATUS_EXT: u16 = 6;
    pub(crate) const ERROR: u16 = 0x8001;
    pub(crate) const ERROR_OFFSET: u16 = 0x8002;
    pub(crate) const FLAG_DONE: u16 = 1;
}

/// The chunk's header, of either width.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkHeader {
    pub(crate) flags: u16,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    /// Echoed by extended replies.
    pub(crate) offset: Option<u64>,
    pub(crate) len: u64,
}

/// An extent of a metadata context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) len: u64,
    pub(crate) status: u64,
}

/// What a request in flight asked for.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) command: u16,
    pub(crate) flags: u16,
    pub(crate) offset: u64,
    /// What the request works on, bytes.
    pub(crate) len: u64,
    /// The metadata contexts that are to be answered.
    pub(crate) contexts: Vec<u32>,
}

/// The whole answer to one request.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    /// 0 is success.
    pub(crate) error: u32,
    /// What a successful READ brought.
    pub(crate) data: Vec<u8>,
    /// What a successful BLOCK_STATUS brought: context and extents.
    pub(crate) extents: Vec<(u32, Vec<Extent>)>,
    /// Type and payload bytes of each chunk; empty for a simple reply.
    pub(crate) chunks: Vec<(u16, u64)>,
}

impl Reply {
    /// The data of a request that must have succeeded.
    pub(crate) fn ok(self) -> Vec<u8> {
        assert_eq!(self.error, 0, "the error of a request that should succeed");
        self.data
    }
}

/// What has come so far of the answer to one request.
#[derive(Debug)]
pub(crate) struct Partial {
    asked: Asked,
    data: Vec<u8>,
    /// Ranges of content and errors: first byte and one past the last.
    seen: Vec<(u64, u64)>,
    errors: Vec<u32>,
    extents: Vec<(u32, Vec<Extent>)>,
    chunks: Vec<(u16, u64)>,
}

impl Partial {
    pub(crate) fn new(asked: Asked) -> Self {
        let (data, seen, errors, extents, chunks) = Default::default();
        Self { asked, data, seen, errors, extents, chunks }
    }

    /// Bytes of payload that follow a simple reply with this error, its rules checked.
    pub(crate) fn simple_payload_bytes(&self, mode: Mode, error: u32) -> usize {
        let asked = &self.asked;
        assert!(self.chunks.is_empty(), "a simple reply after chunks");
        if mode == Mode::Structured {
            assert_ne!(asked.command, cmd::READ, "READ is answered by a simple reply");
            assert!(asked.command != cmd::BLOCK_STATUS || error != 0, "BLOCK_STATUS: a simple reply");
        }
        if error == 0 && asked.command == cmd::READ { asked.len as usize } else { 0 }
    }

    /// A simple reply with its payload is the whole answer.
    pub(crate) fn finish_simple(self, cookie: u64, error: u32, data: Vec<u8>) -> Reply {
        if error != 0 {
            check_error(&self.asked, error);
        }
        Reply { cookie, error, data, extents: Vec::new(), chunks: Vec::new() }
    }

    /// Takes one chunk. `size`: of the export, bytes.
    pub(crate) fn take(&mut self, header: ChunkHeader, payload: &[u8], mode: Mode, size: u64) {
        assert_eq!(header.flags & !chunk::FLAG_DONE, 0, "unknown flags on a chunk");
        let done = header.flags & chunk::FLAG_DONE != 0;
        if let Some(offset) = header.offset {
            assert_eq!(offset, self.asked.offset, "the offset that an extended reply echoes");
        }
        self.chunks.push((header.kind, header.len));
        match header.kind {
            chunk::NONE => assert!(done && payload.is_empty(), "NONE with a payload or without DONE"),
            chunk::OFFSET_DATA => {
                assert!(payload.len() >= 9, "OFFSET_DATA of {} bytes", payload.len());
                self.content(be64(payload, 0), &payload[8..]);
            }
            chunk::OFFSET_HOLE => {
                assert_eq!(payload.len(), 12, "OFFSET_HOLE's length");
                let len = be32(payload, 8) as usize;
                assert_ne!(len, 0, "a hole of no bytes");
                assert_eq!(self.asked.flags & flag::DF, 0, "a hole in answer to DF");
                self.content(be64(payload, 0), &vec![0; len.min(self.asked.len as usize + 1)]);
            }
            chunk::BLOCK_STATUS if mode == Mode::Structured => self.status(payload, 4, 4, size),
            chunk::BLOCK_STATUS_EXT if mode == Mode::Extended => {
                let count = be32(payload, 4) as usize;
                assert!(count == 0 || payload.len() == 8 + 16 * count, "BLOCK_STATUS_EXT's count");
                self.status(payload, 8, 8, size);
            }
            chunk::ERROR | chunk::ERROR_OFFSET => self.error(header.kind, payload),
            other => panic!("a chunk of type {other} ({mode:?})"),
        }
    }

    fn content(&mut self, offset: u64, bytes: &[u8]) {
        let asked = &self.asked;
        assert_eq!(asked.command, cmd::READ, "content in answer to another command");
        let end = offset.checked_add(bytes.len() as u64).expect("content beyond 2^64");
        assert!(offset >= asked.offset && end <= asked.offset + asked.len, "content beyond the request");
        let overlaps = self.seen.iter().any(|(from, to)| *from < end && offset < *to);
        assert!(!overlaps, "content at {offset} overlaps with what came before");
        assert!(bytes.len() as u64 <= PAYLOAD_MAX, "{} bytes in one chunk", bytes.len());
        if asked.flags & flag::DF != 0 {
            assert!(self.seen.is_empty(), "a second content chunk in answer to DF");
        }
        self.seen.push((offset, end));
        self.data.resize(asked.len as usize, 0);
        let at = (offset - asked.offset) as usize;
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn error(&mut self, kind: u16, payload: &[u8]) {
        let tail = if kind == chunk::ERROR_OFFSET { 8 } else { 0 };
        assert!(payload.len() >= 6 + tail, "an error chunk of {} bytes", payload.len());
        let message_bytes = be16(payload, 4) as usize;
        assert!(message_bytes <= payload.len() - 6 - tail, "an error's message is longer than its chunk");
        check_string(&payload[6..6 + message_bytes]);
        check_error(&self.asked, be32(payload, 0));
        self.errors.push(be32(payload, 0));
        if tail > 0 {
            let offset = be64(payload, 6 + message_bytes);
            let inside = offset >= self.asked.offset && offset - self.asked.offset < self.asked.len.max(1);
            assert!(inside, "an error's offset {offset} lies outside the request");
        }
    }

    /// `head`: bytes before the extents; `width`: bytes of each of their two numbers.
    fn status(&mut self, payload: &[u8], head: usize, width: usize, size: u64) {
        let asked = &self.asked;
        assert_eq!(asked.command, cmd::BLOCK_STATUS, "status in answer to another command");
        let extents = &payload[head..];
        assert!(!extents.is_empty() && extents.len().is_multiple_of(2 * width), "a status chunk's length");
        assert!(extents.len() / (2 * width) <= 1 << 20, "more than 2^20 extents in a chunk");
        let id = be32(payload, 0);
        assert!(asked.contexts.contains(&id), "status of context {id}, which was not asked for");
        assert!(self.extents.iter().all(|(other, _)| *other != id), "context {id} comes twice");
        let number = |at: usize| if width == 4 { be32(extents, at).into() } else { be64(extents, at) };
        let extents: Vec<Extent> = (0..extents.len())
            .step_by(2 * width)
            .map(|at| Extent { len: number(at), status: number(at + width) })
            .collect();
        assert!(extents.iter().all(|extent| extent.len > 0), "an extent of no bytes");
        let before_last: u64 = extents[..extents.len() - 1].iter().map(|extent| extent.len).sum();
        let total = before_last + extents[extents.len() - 1].len;
        assert!(before_last < asked.len.max(1), "extents begin beyond the request");
        assert!(asked.offset + total <= size, "extents beyond the export");
        if asked.flags & flag::REQ_ONE != 0 {
            assert!(extents.len() == 1 && total <= asked.len, "REQ_ONE: {extents:?}");
        }
        self.extents.push((id, extents));
    }

    /// The last chunk has come.
    pub(crate) fn finish(self, cookie: u64) -> Reply {
        let asked = &self.asked;
        let error = self.errors.first().copied().unwrap_or(0);
        if error == 0 && asked.command == cmd::READ {
            let covered: u64 = self.seen.iter().map(|(from, to)| to - from).sum();
            assert_eq!(covered, asked.len, "bytes that a successful READ brought");
        }
        if error == 0 && asked.command == cmd::BLOCK_STATUS && asked.len > 0 {
            let mut came: Vec<u32> = self.extents.iter().map(|(id, _)| *id).collect();
            let mut wanted = asked.contexts.clone();
            came.sort_unstable();
            wanted.sort_unstable();
            assert_eq!(came, wanted, "the contexts that a successful BLOCK_STATUS brought");
        }
        Reply { cookie, error, data: self.data, extents: self.extents, chunks: self.chunks }
    }
}

fn check_error(asked: &Asked, error: u32) {
    assert!(err::ALL.contains(&error), "error {error}, which a server should not send");
    if error == err::ENOTSUP {
        assert_ne!(asked.flags & flag::FAST_ZERO, 0, "ENOTSUP without FAST_ZERO");
    }
}
