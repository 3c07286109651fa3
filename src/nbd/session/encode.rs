//! Replies, put together: simple ones, and chunks of structured and extended ones.
//!
//! What must hold: every request gets one reply, whose last chunk has DONE; the chunks of a READ cover what was asked
//! for, once; a reply carries no more extents than [`extents_max`].

use std::ops::Range;

use smallvec::SmallVec;

use super::{Session, Tag, holes};
use crate::extent::{ContextExtents, EXTENTS_MAX, Extent};
use crate::nbd::context;
use crate::nbd::export::ReplyMode;
use crate::nbd::wire::{self, NbdError};
use crate::units::BLOCK_BYTES;

/// The bytes of a reply, or of a chunk of one, before the bytes that were read. All but errors fit without an
/// allocation.
pub type Head = SmallVec<[u8; HEAD_BYTES]>;

const HEAD_BYTES: usize = 48;

/// Longest extent that 32 bits hold, bytes, in whole blocks.
const SHORT_EXTENT_BYTES_MAX: u32 = u32::MAX - (BLOCK_BYTES as u32 - 1);

const _: () = assert!(SHORT_EXTENT_BYTES_MAX.is_multiple_of(BLOCK_BYTES as u32));
const _: () = assert!(EXTENTS_MAX <= 1 << 20);

/// Most extents for one context in the reply to a BLOCK_STATUS of `len` bytes: one a block, and two cut ones. A client
/// asks again from where the answer ends.
#[must_use]
pub fn extents_max(len: u64, one: bool) -> u64 {
    if one { 1 } else { (len / BLOCK_BYTES + 2).min(EXTENTS_MAX as u64) }
}

impl Session {
    /// The whole reply to a request that succeeded and brings nothing.
    #[must_use]
    pub fn encode_done(&self, tag: Tag) -> Head {
        match self.negotiated.mode {
            ReplyMode::Simple => simple(tag, 0),
            _ => self.chunk(tag, true, wire::CHUNK_NONE, 0),
        }
    }

    /// The whole reply to a request that failed; `message` says why, at most `STRING_BYTES_MAX` bytes of it; `at` is
    /// the byte of the request that failed, where it is known.
    #[must_use]
    pub fn encode_error(&self, tag: Tag, error: NbdError, message: &str, at: Option<u64>) -> Head {
        if self.negotiated.mode == ReplyMode::Simple {
            return simple(tag, error.value());
        }
        assert!(message.len() <= wire::STRING_BYTES_MAX);
        let kind = if at.is_some() { wire::CHUNK_ERROR_OFFSET } else { wire::CHUNK_ERROR };
        let payload_bytes = 6 + message.len() + if at.is_some() { 8 } else { 0 };
        let mut head = self.chunk(tag, true, kind, payload_bytes);
        head.extend_from_slice(&error.value().to_be_bytes());
        head.extend_from_slice(&(message.len() as u16).to_be_bytes());
        head.extend_from_slice(message.as_bytes());
        if let Some(at) = at {
            head.extend_from_slice(&at.to_be_bytes());
        }
        head
    }

    /// The reply to a READ of `data` from `tag.offset` on: calls `piece` with each chunk's beginning and the range of
    /// the data that follows it. `df`: in one chunk.
    pub fn encode_read(&self, tag: Tag, df: bool, data: &[u8], mut piece: impl FnMut(Head, Range<usize>)) {
        if self.negotiated.mode == ReplyMode::Simple {
            return piece(simple(tag, 0), 0..data.len());
        }
        if data.is_empty() {
            // A content chunk tells of at least one byte.
            return piece(self.encode_done(tag), 0..0);
        }
        let mut chunk = |range: Range<usize>, hole: bool| {
            let done = range.end == data.len();
            let offset = (tag.offset + range.start as u64).to_be_bytes();
            if hole {
                let mut head = self.chunk(tag, done, wire::CHUNK_OFFSET_HOLE, 12);
                head.extend_from_slice(&offset);
                head.extend_from_slice(&(range.len() as u32).to_be_bytes());
                piece(head, 0..0);
            } else {
                let mut head = self.chunk(tag, done, wire::CHUNK_OFFSET_DATA, 8 + range.len());
                head.extend_from_slice(&offset);
                piece(head, range);
            }
        };
        if df {
            chunk(0..data.len(), false);
        } else {
            holes::pieces(tag.offset, data, chunk);
        }
    }

    /// The whole reply to a BLOCK_STATUS of `len` bytes that wants `one` extent a context or many.
    ///
    /// # Panics
    /// Where there is no context, or one without an extent.
    #[must_use]
    pub fn encode_status(&self, tag: Tag, len: u64, one: bool, answer: &[ContextExtents]) -> Vec<u8> {
        assert!(!answer.is_empty() && self.negotiated.mode != ReplyMode::Simple);
        let extended = self.negotiated.mode == ReplyMode::Extended;
        let mut reply = Vec::new();
        for (index, ContextExtents { context, extents }) in answer.iter().enumerate() {
            let done = index + 1 == answer.len();
            let count = extents.len().min(extents_max(len, one) as usize);
            let extents = &extents[..count];
            assert!(!extents.is_empty());
            let longest = if one { len } else { u64::MAX };
            let id = context::id(*context);
            if extended {
                reply.extend_from_slice(&self.chunk(tag, done, wire::CHUNK_BLOCK_STATUS_EXT, 8 + 16 * count));
                reply.extend_from_slice(&id.to_be_bytes());
                reply.extend_from_slice(&(count as u32).to_be_bytes());
                for extent in extents {
                    reply.extend_from_slice(&extent.len.min(longest).to_be_bytes());
                    reply.extend_from_slice(&u64::from(extent.flags).to_be_bytes());
                }
            } else {
                let count = extents.iter().position(is_long).map_or(count, |first| first + 1);
                reply.extend_from_slice(&self.chunk(tag, done, wire::CHUNK_BLOCK_STATUS, 4 + 8 * count));
                reply.extend_from_slice(&id.to_be_bytes());
                for extent in &extents[..count] {
                    let short = u32::try_from(extent.len.min(longest)).unwrap_or(SHORT_EXTENT_BYTES_MAX);
                    reply.extend_from_slice(&short.to_be_bytes());
                    reply.extend_from_slice(&extent.flags.to_be_bytes());
                }
            }
        }
        reply
    }

    /// A chunk's header. Put together in one piece: every READ has one.
    fn chunk(&self, tag: Tag, done: bool, kind: u16, payload_bytes: usize) -> Head {
        let extended = self.negotiated.mode == ReplyMode::Extended;
        let magic = if extended { wire::EXTENDED_CHUNK_MAGIC } else { wire::CHUNK_MAGIC };
        let flags = if done { wire::CHUNK_FLAG_DONE } else { 0 };
        let mut bytes = [0; HEAD_BYTES];
        bytes[..4].copy_from_slice(&magic.to_be_bytes());
        bytes[4..6].copy_from_slice(&flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&tag.cookie.to_be_bytes());
        let len = if extended {
            bytes[16..24].copy_from_slice(&tag.offset.to_be_bytes());
            bytes[24..32].copy_from_slice(&(payload_bytes as u64).to_be_bytes());
            wire::EXTENDED_CHUNK_BYTES
        } else {
            bytes[16..20].copy_from_slice(&(payload_bytes as u32).to_be_bytes());
            wire::CHUNK_BYTES
        };
        Head::from_buf_and_len(bytes, len)
    }
}

/// Whether it has to be cut for 32 bits.
fn is_long(extent: &Extent) -> bool {
    extent.len > u32::MAX.into()
}

/// A simple reply: magic, error (0 is success), cookie.
fn simple(tag: Tag, error: u32) -> Head {
    let mut reply = Head::new();
    reply.extend_from_slice(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
    reply.extend_from_slice(&error.to_be_bytes());
    reply.extend_from_slice(&tag.cookie.to_be_bytes());
    reply
}
