//! Replies on their way to one client: many in one system call, large payloads without a copy.
//!
//! What must hold: a batch owns the bytes it sends until the kernel has taken all of them. The vectors point into
//! the batch's own `bytes` (not changed while it is in flight) and into the payloads that it keeps.

use std::collections::VecDeque;
use std::os::fd::RawFd;

use io_uring::opcode;
use io_uring::squeue::Entry;
use io_uring::types::Fd;
use nix::errno::Errno;

use super::slab::Key;
use crate::buffer::Payload;
use crate::nbd::session::Head;

/// Payloads below this are copied behind their header; from here on a vector of their own is cheaper.
const COPY_BYTES_MAX: usize = 2048;
/// Bytes in a batch, about: what has been sent is released batch by batch.
const BATCH_BYTES: usize = 1 << 20;
/// Bytes given to the kernel at a time, about, so that a slow peer shows progress.
const WINDOW_BYTES: usize = 1 << 20;
/// Vectors in a batch, below the system's limit of 1024.
const VECTORS_MAX: usize = 1000;

/// A reply that waits to be sent, or a piece of one. Not empty.
pub(super) struct Outgoing {
    /// The encoded beginning.
    pub head: Head,
    /// The bytes behind it.
    pub payload: Option<Payload>,
    /// 1 for the last piece of a reply, 0 for others.
    pub replies: u32,
    /// Bytes to be released when it has been sent.
    pub cost: u64,
}

enum Segment {
    /// Of `bytes`, up to this position from where the last such segment ended.
    Bytes(usize),
    /// The payload of that index, that part of it.
    Payload { index: usize, start: usize, end: usize },
}

/// Replies being sent.
pub(super) struct SendBatch {
    /// To whom.
    pub connection: Key,
    /// Replies that end in it.
    pub replies: u32,
    /// Bytes to be released when it has been sent.
    pub cost: u64,
    fd: RawFd,
    bytes: Vec<u8>,
    payloads: Vec<Payload>,
    segments: Vec<Segment>,
    vectors: Vec<libc::iovec>,
    /// The first vector that is not wholly sent.
    next: usize,
    message: libc::msghdr,
}

/// What comes after a completion.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SendStep {
    /// Start it again: there is more to send.
    Again,
    /// All of it is sent.
    Sent,
    /// The connection is gone.
    Failed(Errno),
}

impl SendBatch {
    /// An empty batch.
    pub(super) fn new(connection: Key, fd: RawFd) -> Box<Self> {
        // SAFETY: a `msghdr` is integers and pointers, for all of which zero is a value.
        let message = unsafe { std::mem::zeroed() };
        Box::new(Self {
            connection,
            fd,
            replies: 0,
            cost: 0,
            bytes: Vec::new(),
            payloads: Vec::new(),
            segments: Vec::new(),
            vectors: Vec::new(),
            next: 0,
            message,
        })
    }

    /// Makes a batch that has been sent (or failed) an empty one for another connection; lets go of payloads.
    pub(super) fn reset(&mut self, connection: Key, fd: RawFd) {
        (self.connection, self.fd) = (connection, fd);
        (self.replies, self.cost, self.next) = (0, 0, 0);
        self.bytes.clear();
        self.payloads.clear();
        self.segments.clear();
        self.vectors.clear();
    }

    /// Takes replies (and pieces) from the front of `queue`, at least one, in order. Gives their length in bytes.
    pub(super) fn fill(&mut self, queue: &mut VecDeque<Outgoing>) -> usize {
        assert!(self.segments.is_empty() && !queue.is_empty());
        let mut batch_bytes = 0;
        while batch_bytes < BATCH_BYTES && self.segments.len() < VECTORS_MAX - 2 {
            let Some(reply) = queue.pop_front() else { break };
            self.replies += reply.replies;
            self.cost += reply.cost;
            batch_bytes += reply.head.len() + reply.payload.as_ref().map_or(0, |payload| payload.len);
            self.bytes.extend_from_slice(&reply.head);
            match reply.payload {
                Some(payload) if payload.len > COPY_BYTES_MAX => {
                    if !reply.head.is_empty() {
                        self.close_bytes();
                    }
                    self.push_payload(payload);
                }
                Some(payload) => {
                    self.bytes.extend_from_slice(payload.bytes());
                    self.close_bytes();
                }
                None => self.close_bytes(),
            }
        }
        self.point();
        batch_bytes
    }

    /// What has been added to `bytes` is to be sent: as part of the last segment or as a new one.
    fn close_bytes(&mut self) {
        let end = self.bytes.len();
        match self.segments.last_mut() {
            Some(Segment::Bytes(last)) => *last = end,
            _ => self.segments.push(Segment::Bytes(end)),
        }
    }

    fn push_payload(&mut self, payload: Payload) {
        let index = self.payloads.len();
        let mut start = 0;
        while start < payload.len {
            let end = payload.len.min(start + WINDOW_BYTES);
            self.segments.push(Segment::Payload { index, start, end });
            start = end;
        }
        self.payloads.push(payload);
    }

    /// Makes the vectors, once nothing moves any more.
    fn point(&mut self) {
        let mut sent_bytes = 0;
        for segment in &self.segments {
            let part = match *segment {
                Segment::Bytes(end) => {
                    let part = &self.bytes[sent_bytes..end];
                    sent_bytes = end;
                    part
                }
                Segment::Payload { index, start, end } => &self.payloads[index].bytes()[start..end],
            };
            let vector = libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
            self.vectors.push(vector);
        }
        assert!(sent_bytes == self.bytes.len());
    }

    /// The entry for the next piece. Points into the batch.
    pub(super) fn entry(&mut self) -> Entry {
        let rest = &mut self.vectors[self.next..];
        let mut count = 0;
        let mut bytes = 0;
        while count < rest.len().min(VECTORS_MAX) && bytes < WINDOW_BYTES {
            bytes += rest[count].iov_len;
            count += 1;
        }
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        if count == 1 {
            let vector = rest[0];
            // A window plus what stands before it fits in 32 bits by far.
            return opcode::Send::new(Fd(self.fd), vector.iov_base.cast(), vector.iov_len as u32)
                .flags(flags)
                .build();
        }
        self.message.msg_iov = rest.as_mut_ptr();
        self.message.msg_iovlen = count as _;
        opcode::SendMsg::new(Fd(self.fd), &raw const self.message).flags(flags as u32).build()
    }

    /// Takes the kernel's result.
    pub(super) fn advance(&mut self, result: i32) -> SendStep {
        if result < 0 {
            let errno = Errno::from_raw(-result);
            let again = matches!(errno, Errno::EINTR | Errno::EAGAIN);
            return if again { SendStep::Again } else { SendStep::Failed(errno) };
        }
        let mut sent = result as usize;
        while sent > 0 {
            let vector = &mut self.vectors[self.next];
            if sent < vector.iov_len {
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(sent).cast();
                vector.iov_len -= sent;
                break;
            }
            sent -= vector.iov_len;
            self.next += 1;
        }
        if self.next < self.vectors.len() { SendStep::Again } else { SendStep::Sent }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;
    use crate::engine::slab::Slab;
    use crate::units::ByteRange;

    fn payload(pool: &BufferPool, len: u64, byte: u8) -> Payload {
        let mut payload = pool.payload_for(ByteRange::new(3, len));
        payload.bytes_mut().fill(byte);
        payload.share()
    }

    /// What is left to be sent, as the kernel would read it.
    fn rest(batch: &SendBatch) -> Vec<u8> {
        let mut bytes = Vec::new();
        for vector in &batch.vectors[batch.next..] {
            // SAFETY: the vector points into the batch, which is borrowed.
            bytes.extend_from_slice(unsafe {
                std::slice::from_raw_parts(vector.iov_base.cast::<u8>(), vector.iov_len)
            });
        }
        bytes
    }

    #[test]
    fn replies_go_out_in_order_whatever_the_kernel_takes_at_a_time() {
        let pool = BufferPool::new(0);
        let lens = [0, 100, 4096, 0, 0, 5000, 2048, (3 << 20) + 5, 0, 4096];
        let mut queue = VecDeque::new();
        let mut expected = Vec::new();
        for (index, len) in lens.into_iter().enumerate() {
            // Heads that fit and heads that do not, and none at all where a payload can stand alone.
            let head = Head::from_elem(index as u8, if len == 4096 { 0 } else { 16 + index * 7 });
            let payload = (len > 0).then(|| payload(&pool, len, 100 + index as u8));
            expected.extend_from_slice(&head);
            expected.extend_from_slice(payload.as_ref().map_or(&[][..], Payload::bytes));
            queue.push_back(Outgoing { head, payload, replies: u32::from(index % 3 != 0), cost: len });
        }
        let mut batch = SendBatch::new(Slab::new().insert(()), -1);
        let mut sent = 0;
        let (mut replies, mut cost) = (0, 0);
        while !queue.is_empty() {
            batch.reset(batch.connection, -1);
            batch.fill(&mut queue);
            (replies, cost) = (replies + batch.replies, cost + batch.cost);
            let mut step = SendStep::Again;
            while step == SendStep::Again {
                let _ = batch.entry();
                let left = rest(&batch);
                assert!(expected[sent..].starts_with(&left));
                let taken = left.len().min(1 + left.len() / 3);
                sent += taken;
                assert_eq!(batch.advance(-libc::EINTR), SendStep::Again);
                step = batch.advance(taken as i32);
            }
            assert_eq!(step, SendStep::Sent);
        }
        assert_eq!((sent, replies, cost), (expected.len(), 6, lens.iter().sum()));
        batch.reset(batch.connection, -1);
        assert_eq!(pool.used_bytes(), 0);
    }
}
