//! Replies go out; connections are looked after and let go.
//!
//! What must hold: one send a connection is in flight at a time, so replies never mix. A broken connection drops its
//! replies; its requests with the core are carried to their end all the same.

use nix::sys::socket::{
    AddressFamily, Shutdown, SockaddrLike, SockaddrStorage, getsockname, setsockopt, shutdown, sockopt,
};

use super::client::Client;
use super::data_plane::DataPlane;
use super::memory::STALL_NS;
use super::operation::Operation;
use super::receive::{BUFFER_BYTES_MIN, IDLE_NS};
use super::send_batch::{Outgoing, SendBatch, SendStep};
use super::slab::Key;
use crate::buffer::Payload;
use crate::extent::ContextExtents;
use crate::nbd::session::{Head, Tag};
use crate::units::{ByteRange, SECOND_NS};

/// Batches kept for reuse.
const SPARE_BATCHES_MAX: usize = 64;
/// How often stalled connections are looked for while somebody waits for memory, nanoseconds.
const STALL_SWEEP_NS: u64 = SECOND_NS;
/// Idle connections are not looked for more often than this, nanoseconds.
const IDLE_SWEEP_NS_MIN: u64 = SECOND_NS / 10;

/// A batch from which on the default send buffer of a Unix socket is too small, bytes.
const LARGE_BYTES: usize = 256 << 10;
/// The send buffer of a Unix socket with such batches, bytes; the kernel counts its own overhead on top of it.
const SEND_BUFFER_BYTES: usize = 1 << 20;
/// With more clients than this nobody gets one: what it holds is in no budget.
const LARGE_CLIENTS_MAX: usize = 16;

impl DataPlane {
    /// Puts a whole reply in line; it goes out at the end of the turn.
    pub(super) fn reply(&mut self, key: Key, head: Head, payload: Option<Payload>, cost: u64) {
        let Some(client) = self.clients.get_mut(key) else { unreachable!("kept while it has requests") };
        if client.broken {
            drop(payload);
            self.answered(key, 1, cost);
        } else {
            client.outgoing.push_back(Outgoing { head, payload, replies: 1, cost });
            self.touch(key);
        }
    }

    /// Puts the bytes of a READ in line, in as many pieces as they are sent in; `None`: there are no bytes.
    pub(super) fn reply_data(&mut self, key: Key, tag: Tag, df: bool, payload: Option<Payload>, cost: u64) {
        let Some(client) = self.clients.get_mut(key) else { unreachable!("kept while it has requests") };
        if client.broken {
            drop(payload);
            return self.answered(key, 1, cost);
        }
        let outgoing = &mut client.outgoing;
        client.session.encode_read(tag, df, payload.as_ref().map_or(&[], Payload::bytes), |head, part| {
            // All pieces share the memory.
            let payload = payload.as_ref().filter(|_| !part.is_empty()).map(|payload| Payload {
                buffer: payload.buffer.clone(),
                start: payload.start + part.start,
                len: part.len(),
            });
            outgoing.push_back(Outgoing { head, payload, replies: 0, cost: 0 });
        });
        let Some(last) = outgoing.back_mut() else { unreachable!("a reply has a piece") };
        (last.replies, last.cost) = (1, cost);
        self.touch(key);
    }

    /// Puts the answer to a BLOCK_STATUS in line.
    pub(super) fn reply_status(
        &mut self,
        key: Key,
        tag: Tag,
        (len, one): (u64, bool),
        answer: &[ContextExtents],
        cost: u64,
    ) {
        let Some(client) = self.clients.get_mut(key) else { unreachable!("kept while it has requests") };
        let bytes = client.session.encode_status(tag, len, one, answer);
        let mut payload = self.pool.payload_for(ByteRange::new(0, bytes.len() as u64));
        payload.bytes_mut().copy_from_slice(&bytes);
        self.reply(key, Head::new(), Some(payload.share()), cost);
    }

    /// Looks after the connection at the end of the turn.
    pub(super) fn touch(&mut self, key: Key) {
        if self.touched.last() != Some(&key) {
            self.touched.push(key);
        }
    }

    /// `replies` have been sent or dropped.
    fn answered(&mut self, key: Key, replies: u32, cost: u64) {
        let Some(client) = self.clients.get_mut(key) else { unreachable!("kept while it has requests") };
        client.unanswered -= replies;
        client.held_bytes -= cost;
        self.budget.release(cost);
        self.touch(key);
    }

    /// The end of a turn: starts sends, lets connections read on that can, lets the line for memory move, starts receives.
    pub(super) fn settle(&mut self) {
        loop {
            while let Some(key) = self.touched.pop() {
                self.start_send(key);
                let waits = |client: &Client| client.receiving.is_none() && !client.will_receive;
                if self.clients.get(key).is_some_and(waits) {
                    self.resume(key, false);
                }
            }
            if !self.budget.is_waited_for() || !self.move_line() {
                break;
            }
        }
        if self.budget.is_waited_for() {
            self.sweep_within(STALL_SWEEP_NS);
        }
        self.start_receives();
    }

    /// Has `sweep` called within so many nanoseconds.
    pub(super) fn sweep_within(&mut self, ns: u64) {
        let at = self.now.plus(ns);
        self.sweep_at = Some(self.sweep_at.map_or(at, |before| before.min(at)));
    }

    /// Lets the first of the line have a request. `false` where there is no room for it yet.
    fn move_line(&mut self) -> bool {
        let Some(key) = self.budget.next_in_line() else { return false };
        let Some(client) = self.clients.get_mut(key) else { return true };
        client.in_line = false;
        let used_before = self.budget.used_bytes();
        self.resume(key, true);
        self.budget.used_bytes() != used_before || self.clients.get(key).is_none_or(|client| !client.in_line)
    }

    fn start_send(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if client.sending || client.outgoing.is_empty() {
            return;
        }
        let fd = client.raw_fd();
        let mut batch = match self.spare_batches.pop() {
            Some(mut batch) => {
                batch.reset(key, fd);
                batch
            }
            None => SendBatch::new(key, fd),
        };
        let bytes = batch.fill(&mut client.outgoing);
        if bytes >= LARGE_BYTES && !client.sends_large && self.clients.len() <= LARGE_CLIENTS_MAX {
            self.make_room_to_send(key);
        }
        let Some(client) = self.clients.get_mut(key) else { unreachable!("looked up above") };
        client.sending = true;
        client.moved_at = self.now;
        self.ring.start(Operation::Send(batch));
    }

    /// Lets the kernel take a large batch at once, where by default it takes a fifth of that, and then a wake-up for the rest again
    /// and again. Over TCP it finds the right amount by itself.
    fn make_room_to_send(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        client.sends_large = true;
        let family =
            getsockname::<SockaddrStorage>(client.raw_fd()).ok().and_then(|address| address.family());
        if family != Some(AddressFamily::Unix) {
            return;
        }
        let forced = setsockopt(&client.fd, sockopt::SndBufForce, &SEND_BUFFER_BYTES);
        // Without the right to that: as much as anybody may have.
        let result = forced.or_else(|_| setsockopt(&client.fd, sockopt::SndBuf, &SEND_BUFFER_BYTES));
        if let Err(errno) = result {
            tracing::debug!("{}: the send buffer stays as it is: {}", client.peer, errno.desc());
        }
    }

    /// The kernel has taken some of a batch, or the connection is gone.
    pub(super) fn sent(&mut self, mut batch: Box<SendBatch>, result: i32) {
        let key = batch.connection;
        let Some(client) = self.clients.get_mut(key) else { unreachable!("kept while it is sending") };
        let step = batch.advance(result);
        match step {
            SendStep::Again if !client.broken => {
                client.moved_at = self.now;
                self.ring.start(Operation::Send(batch));
                return;
            }
            SendStep::Again | SendStep::Sent => client.sending = false,
            SendStep::Failed(errno) => {
                client.sending = false;
                if !client.broken {
                    tracing::debug!("{}: cannot send: {}", client.peer, errno.desc());
                }
                self.break_off(key);
            }
        }
        let (replies, cost) = (batch.replies, batch.cost);
        batch.reset(key, -1);
        if self.spare_batches.len() < SPARE_BATCHES_MAX {
            self.spare_batches.push(batch);
        }
        self.answered(key, replies, cost);
    }

    /// Reads no more requests from a connection; what it asked for is still done and answered.
    pub(super) fn end_reading(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        let cost = client.end_reading();
        self.budget.release(cost);
        self.touch(key);
    }

    /// Gives a connection up: no more requests, no more replies. Its requests with the core go on.
    pub(super) fn break_off(&mut self, key: Key) {
        self.end_reading(key);
        let Some(client) = self.clients.get_mut(key) else { return };
        client.broken = true;
        if !client.shut {
            client.shut = true;
            // Ends what is in flight on it. Fails where the peer has gone already.
            let _ = shutdown(client.raw_fd(), Shutdown::Both);
        }
        let dropped = std::mem::take(&mut client.outgoing);
        let cost = dropped.iter().map(|reply| reply.cost).sum();
        let replies = dropped.iter().map(|reply| reply.replies).sum();
        self.answered(key, replies, cost);
    }

    /// Closes a connection that reads no more and has everything behind it.
    pub(super) fn let_go_if_done(&mut self, key: Key) {
        let Some(client) = self.clients.get_mut(key) else { return };
        if client.is_reading() || client.unanswered > 0 || client.sending {
            return;
        }
        assert!(client.outgoing.is_empty());
        if client.receiving.is_some() {
            self.break_off(key); // ends the receive; its completion comes here again
            return;
        }
        assert!(client.held_bytes == 0);
        tracing::debug!("{}: connection closed", client.peer);
        self.clients.remove(key);
    }

    /// Disconnects a client that has been idle for as long as is allowed, and says so. Where it may stay, `sweep` comes
    /// back in time.
    fn end_if_idle(&mut self, key: Key) -> bool {
        let (Some(ns_max), Some(client)) = (self.client_idle_ns_max, self.clients.get(key)) else {
            return false;
        };
        let still_ns = self.now.since(client.moved_at);
        if !client.waits_for_peer() || still_ns < ns_max {
            self.sweep_within(ns_max.saturating_sub(still_ns).max(IDLE_SWEEP_NS_MIN));
            return false;
        }
        tracing::info!("{}: closing the connection: idle for {} s", client.peer, still_ns / SECOND_NS);
        self.break_off(key);
        true
    }

    /// Ends idle connections, takes large buffers back from quiet ones, and memory from stalled ones where others wait for it.
    pub(super) fn sweep(&mut self) {
        self.sweep_at = None;
        let mut large_buffers = false;
        let wanted = self.budget.is_waited_for();
        for key in self.clients.keys() {
            if self.end_if_idle(key) {
                continue;
            }
            let Some(client) = self.clients.get(key) else { continue };
            large_buffers |= client.buffer_bytes > BUFFER_BYTES_MIN;
            let still_ns = self.now.since(client.moved_at);
            let peer_owes = client.sending || (client.receiving.is_some() && client.is_inside_payload());
            if wanted && peer_owes && client.held_bytes > 0 && still_ns >= STALL_NS {
                tracing::warn!(
                    "{}: closing the connection: it has moved no byte for {} s and holds {} bytes that others wait for",
                    client.peer,
                    still_ns / SECOND_NS,
                    client.held_bytes
                );
                self.break_off(key);
            } else if let Some(target) = client.receiving
                && client.buffer_bytes > BUFFER_BYTES_MIN
                && !client.is_inside_payload()
                && still_ns >= IDLE_NS
            {
                self.ring.start(Operation::Cancel { target });
            }
        }
        if large_buffers {
            self.sweep_within(IDLE_NS);
        }
    }
}
