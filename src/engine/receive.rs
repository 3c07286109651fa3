//! Receiving from clients: as much as there is in one operation, large payloads straight into their place.

use std::os::fd::RawFd;

use io_uring::opcode;
use io_uring::squeue::Entry;
use io_uring::types::Fd;
use nix::errno::Errno;

use super::client::{Incoming, Next};
use super::data_plane::{DataPlane, Pending};
use super::operation::Operation;
use super::slab::Key;
use crate::buffer::Buffer;
use crate::mirror::event::{Event, RequestId};
use crate::nbd::session::Refusal;
use crate::units::SECOND_NS;

/// Receive buffer of a connection that is idle or moves large payloads, bytes.
pub(super) const BUFFER_BYTES_MIN: usize = 4 << 10;
/// Receive buffer of a busy connection, bytes.
pub(super) const BUFFER_BYTES_MAX: usize = 256 << 10;
/// How much a buffer that was filled grows.
const BUFFER_GROWTH: usize = 8;
/// From here on the rest of a payload is received into its place, without a copy.
pub(super) const DIRECT_BYTES: usize = 64 << 10;
/// Received straight into place at a time, so that a slow peer shows progress.
const DIRECT_BYTES_MAX: usize = 1 << 20;
/// After this long without a byte a connection gives its large buffer back, nanoseconds.
pub(super) const IDLE_NS: u64 = 2 * SECOND_NS;

/// Bytes being received.
pub(super) struct Receive {
    /// From whom.
    pub connection: Key,
    pub fd: RawFd,
    /// Where to.
    pub into: Into,
}

/// Where bytes are received to.
pub(super) enum Into {
    /// Behind the first `filled` bytes of a buffer.
    Buffer { buffer: Buffer, filled: usize },
    /// To the end of a payload.
    Payload(Incoming),
}

/// What a receive into a buffer says of what the peer has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Came {
    /// Nothing: an error, the end of the stream, a receive that was called off.
    Nothing,
    /// All that there was.
    Everything,
    /// As much as had room: there may be more.
    Full,
}

impl Came {
    /// Of `count` bytes behind the first `filled` ones of a buffer of `capacity` bytes.
    fn of(capacity: usize, filled: usize, count: usize) -> Self {
        assert!(filled < capacity && filled + count <= capacity);
        match count {
            0 => Self::Nothing,
            _ if filled + count == capacity => Self::Full,
            _ => Self::Everything,
        }
    }
}

impl Receive {
    /// The entry. Points into the buffer or the payload.
    pub(super) fn entry(&mut self) -> Entry {
        let (to, flags) = match &mut self.into {
            Into::Buffer { buffer, filled } => (&mut buffer[*filled..], 0),
            Into::Payload(incoming) => {
                let rest = &mut incoming.payload.bytes_mut()[incoming.filled..];
                let count = rest.len().min(DIRECT_BYTES_MAX);
                (&mut rest[..count], libc::MSG_WAITALL)
            }
        };
        opcode::Recv::new(Fd(self.fd), to.as_mut_ptr(), to.len() as u32).flags(flags).build()
    }
}

impl DataPlane {
    /// Bytes have come from a client, or the end of its stream, or an error.
    pub(super) fn received(&mut self, receive: Receive, result: i32) {
        let key = receive.connection;
        let Some(client) = self.clients.get_mut(key) else { unreachable!("kept while it is receiving") };
        client.receiving = None;
        let count = result.max(0) as usize;
        let mut caught_up = false;
        match receive.into {
            Into::Buffer { buffer, filled } => {
                let capacity = buffer.len();
                client.took_buffer(buffer, filled + count);
                match Came::of(capacity, filled, count) {
                    Came::Nothing => {}
                    Came::Everything => caught_up = true,
                    Came::Full => {
                        client.buffer_bytes =
                            (capacity * BUFFER_GROWTH).clamp(BUFFER_BYTES_MIN, BUFFER_BYTES_MAX);
                        self.sweep_within(IDLE_NS);
                    }
                }
            }
            Into::Payload(mut incoming) => {
                incoming.filled += count;
                let cost = client.took_payload(incoming);
                self.budget.release(cost);
            }
        }
        let Some(client) = self.clients.get_mut(key) else { return };
        if count > 0 {
            client.moved_at = self.now;
        } else {
            match Errno::from_raw(-result) {
                Errno::EINTR | Errno::EAGAIN => {}
                // By the idle sweep: a small buffer does.
                Errno::ECANCELED => client.buffer_bytes = BUFFER_BYTES_MIN,
                // 0 is the end of the stream: what has been asked is still answered.
                errno if result == 0 || client.shut => {
                    tracing::debug!("{}: end of stream ({errno})", client.peer);
                    self.end_reading(key);
                }
                errno => {
                    tracing::info!("{}: connection lost: {}", client.peer, errno.desc());
                    self.break_off(key);
                }
            }
        }
        self.drop_if_stale(key);
        if let Some(client) = self.clients.get_mut(key) {
            client.held_back &= !caught_up;
        }
        self.parse(key, false);
        // Clients send a header and its payload one after the other: the rest is nearer than a next request would be.
        if count > 0 && self.clients.get(key).is_some_and(|client| client.is_near_its_end(DIRECT_BYTES)) {
            self.answers = self.answers_before;
        }
    }

    /// Gives a connection up whose requests had to wait and whose peer has hung up meanwhile. What it sends elsewhere comes
    /// after this look, so it is begun after what is begun now.
    fn drop_if_stale(&mut self, key: Key) {
        let Some(client) = self.clients.get(key) else { return };
        if client.held_back && client.is_reading() && client.has_hung_up() {
            tracing::info!("{}: hung up; requests that had to wait are dropped", client.peer);
            self.break_off(key);
        }
    }

    /// As `parse`, for a connection that may have been held back.
    pub(super) fn resume(&mut self, key: Key, at_front: bool) {
        self.drop_if_stale(key);
        self.parse(key, at_front);
    }

    /// Starts the receives of this turn. After its sends: the kernel takes operations in order, so replies are on their way
    /// before it looks for the next requests, and finds those that came meanwhile.
    pub(super) fn start_receives(&mut self) {
        while let Some(key) = self.receivers.pop() {
            let Some(client) = self.clients.get_mut(key) else { continue };
            client.will_receive = false;
            // Nobody is charged for receive buffers: where memory is short, they are small.
            let roomy = self.pool.used_bytes() as u64 <= self.budget.bytes_max() / 2;
            let buffer_bytes_max = if roomy { BUFFER_BYTES_MAX } else { BUFFER_BYTES_MIN };
            if let Some(receive) = client.receive(key, &self.pool, buffer_bytes_max) {
                client.receiving = Some(self.ring.start(Operation::Receive(receive)));
            } else {
                // It was given up meanwhile.
                self.let_go_if_done(key);
            }
        }
    }

    /// Deals with everything that has been received and may be begun; receives more at the end of the turn where that is the way on.
    /// `at_front`: the connection has just come out of the budget's line, and may have one request.
    pub(super) fn parse(&mut self, key: Key, at_front: bool) {
        let mut at_front = at_front;
        loop {
            let Some(client) = self.clients.get_mut(key) else { return };
            if client.in_line {
                return self.let_go_if_done(key);
            }
            let budget = &mut self.budget;
            let next = client.next(&self.pool, |held, cost| budget.admit(held, cost, at_front));
            match next {
                Next::Request { tag, request, expect, cost } => {
                    at_front = false;
                    let pending = Pending { connection: key, tag, cost, expect };
                    let id = RequestId(self.requests.insert(pending).to_u64());
                    self.feed(Event::Request { id, request });
                }
                Next::Refused { tag, refusal: Refusal { error, message, at }, cost } => {
                    let head = client.session.encode_error(tag, error, message, at);
                    self.reply(key, head, None, cost);
                }
                Next::OwnShareFull => {
                    client.held_back = true;
                    return;
                }
                Next::Wait => {
                    client.held_back = true;
                    client.in_line = true;
                    self.budget.stand_in_line(key, at_front);
                    return;
                }
                Next::More => {
                    if client.is_reading() && client.receiving.is_none() && !client.will_receive {
                        client.will_receive = true;
                        self.receivers.push(key);
                    }
                    return self.let_go_if_done(key);
                }
                Next::Ended(why) => {
                    if let Some(why) = why {
                        tracing::warn!("{}: closing the connection: {why}", client.peer);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_full_only_when_bytes_came_to_its_end() {
        for filled in [0, 27, 4095] {
            assert_eq!(Came::of(4096, filled, 0), Came::Nothing, "an error or the end: no reason to grow");
            assert_eq!(Came::of(4096, filled, 4096 - filled), Came::Full);
        }
        assert_eq!(Came::of(4096, 27, 28), Came::Everything);
    }
}
