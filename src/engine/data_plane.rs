//! The data plane's thread: one loop around the core.
//!
//! ```text
//!      ┌──► ring: submit, wait ──► completions ──► events ──► core ──► actions ──┐
//!      │       (one system call)    received, sent,                 device operations,
//!      │                            device done, mailbox             replies, notices
//!      └──────────────── sends, timers, the line for memory ◄────────────────────┘
//! ```
//!
//! What must hold: the core's contract (`mirror::event`): one reply a request, one completion a device operation,
//! `Tick` when a deadline is due. Everything here is on one thread; other threads reach it by the mailbox only.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::admin::{AdminWaiter, Stop};
use super::client::{Client, Expect};
use super::device_io::ZEROES_BYTES;
use super::devices::Devices;
use super::handle::{EngineConfig, Mailbox, StopReport};
use super::memory::Budget;
use super::operation::Operation;
use super::ring::{Completion, Ring};
use super::send_batch::SendBatch;
use super::slab::{Key, Slab};
use super::spin::Spin;
use super::timers::Timers;
use crate::buffer::{BufferPool, SharedBuffer};
use crate::mirror::Mirror;
use crate::mirror::event::{
    Action, AdminId, Answer, DeviceOutput, Event, Notice, NoticeLevel, OpId, RequestError, RequestId,
};
use crate::nbd::session::Tag;
use crate::nbd::wire::NbdError;
use crate::units::{Nanos, SECOND_NS};

/// Part of the memory budget that is kept for reuse when free.
const KEEP_DIVISOR: u64 = 4;
/// How long the end waits for operations on failed replicas, nanoseconds.
const CLOSE_NS_MAX: u64 = 3 * SECOND_NS;
/// Completions handled between two looks at the clock.
const CLOCK_EVERY: usize = 8;

/// Why a connection must be there.
const KEPT: &str = "a connection is kept while it has requests";

/// A client's request with the core.
pub(super) struct Pending {
    pub connection: Key,
    pub tag: Tag,
    /// What it is charged.
    pub cost: u64,
    /// What a successful reply carries.
    pub expect: Expect,
}

/// Everything the thread owns.
pub(super) struct DataPlane {
    pub ring: Ring,
    pub mirror: Mirror,
    pub pool: BufferPool,
    /// What is written where zeroing has no cheaper way.
    pub zeroes: SharedBuffer,
    pub devices: Devices,
    pub clients: Slab<Client>,
    pub requests: Slab<Pending>,
    pub budget: Budget,
    pub mailbox: Arc<Mailbox>,
    pub now: Nanos,
    /// Turns of the loop so far.
    pub turn: u64,
    /// Device operations that have ended and that the core has not heard of.
    pub device_done: VecDeque<(OpId, Result<DeviceOutput, Errno>)>,
    /// Connections that may have replies to send, or may read on.
    pub touched: Vec<Key>,
    /// Connections to receive from at the end of the turn.
    pub receivers: Vec<Key>,
    /// Boxed as they go into operations, which stay small.
    #[expect(clippy::vec_box, reason = "the boxes are what is reused")]
    pub spare_batches: Vec<Box<SendBatch>>,
    pub admin: HashMap<AdminId, AdminWaiter>,
    pub admin_count: u64,
    pub stop: Option<Stop>,
    /// When idle and stalled connections are looked for next.
    pub sweep_at: Option<Nanos>,
    /// How long a client may be idle (see `EngineConfig`).
    pub client_idle_ns_max: Option<u64>,
    /// Requests that the core has answered since something else than sends was completed.
    pub answers: u32,
    /// What `answers` was when it was last counted anew.
    pub answers_before: u32,
    spin: Spin,
    timers: Timers,
    actions: Vec<Action>,
    /// The core is being fed: what it asks for is done before the next event.
    feeding: bool,
    origin: Instant,
    wake: Option<Key>,
}

impl DataPlane {
    /// Takes everything over. On the thread that will run it.
    pub(super) fn new(ring: Ring, config: EngineConfig, mailbox: Arc<Mailbox>) -> Self {
        let EngineConfig { mut mirror, assembly, devices, memory_bytes_max, client_idle_ns_max } = config;
        mirror.traits = devices.each_ref().map(|device| device.as_ref().map(|device| device.traits));
        let keep = usize::try_from(memory_bytes_max / KEEP_DIVISOR).unwrap_or(usize::MAX);
        let pool = BufferPool::new(keep);
        let mut zeroes = BufferPool::new(0).take(ZEROES_BYTES);
        zeroes.fill(0);
        Self {
            ring,
            mirror: Mirror::new(mirror, assembly, pool.clone()),
            pool,
            zeroes: zeroes.share(),
            devices: Devices::new(devices),
            clients: Slab::new(),
            requests: Slab::new(),
            budget: Budget::new(memory_bytes_max),
            mailbox,
            now: Nanos(0),
            turn: 1,
            device_done: VecDeque::new(),
            touched: Vec::new(),
            receivers: Vec::new(),
            spare_batches: Vec::new(),
            admin: HashMap::new(),
            admin_count: 0,
            stop: None,
            sweep_at: None,
            client_idle_ns_max,
            answers: 0,
            answers_before: 0,
            spin: Spin::new(),
            timers: Timers::default(),
            actions: Vec::new(),
            feeding: false,
            origin: Instant::now(),
            wake: None,
        }
    }

    /// Runs until it is stopped.
    pub(super) fn run(mut self) -> StopReport {
        self.listen_to_mailbox(Box::new(0));
        self.feed(Event::Tick);
        let mut completions = Vec::new();
        loop {
            self.turn += 1;
            self.settle();
            if let Some(report) = self.stop_step() {
                return self.close(report);
            }
            self.wait(&mut completions);
            for (index, completion) in completions.drain(..).enumerate() {
                if index % CLOCK_EVERY == 0 {
                    self.look_at_clock();
                }
                self.completed(completion);
            }
            self.look_at_clock();
            if self.mirror.next_deadline().is_some_and(|deadline| deadline <= self.now) {
                self.feed(Event::Tick);
            }
            if self.sweep_at.is_some_and(|at| at <= self.now) {
                self.sweep();
            }
        }
    }

    /// Submits what is queued and waits for completions, awake for a moment where that is likely to be enough.
    fn wait(&mut self, completions: &mut Vec<Completion>) {
        let deadline = self.next_deadline();
        if let Some(limit) = self.spin.limit(self.answers, self.requests.len()) {
            let left = deadline.map(|at| Duration::from_nanos(at.since(self.now)));
            let limit = left.map_or(limit, |left| limit.min(left));
            let found = self.ring.spin(limit, completions);
            // A reply is sent at once as a rule, which says nothing of the next request.
            if !found || !only_sends(completions) {
                self.spin.looked(found);
            }
        }
        if completions.is_empty() {
            let limit = deadline.and_then(|at| self.timers.arm(&mut self.ring, self.now, at));
            self.ring.wait(limit, completions);
        }
        if completions.is_empty() || !only_sends(completions) {
            (self.answers_before, self.answers) = (self.answers, 0);
        }
    }

    pub(super) fn look_at_clock(&mut self) {
        // 64 bits of nanoseconds last for centuries.
        self.now = Nanos(self.origin.elapsed().as_nanos() as u64);
    }

    /// Until when there is nothing to do but wait; `None`: until something happens.
    fn next_deadline(&self) -> Option<Nanos> {
        let stop_at = self.stop.as_ref().and_then(Stop::deadline);
        [self.mirror.next_deadline(), self.sweep_at, stop_at].into_iter().flatten().min()
    }

    fn completed(&mut self, completion: Completion) {
        let result = completion.result;
        match completion.operation {
            Operation::Device(io) => self.device_completed(io, result),
            Operation::Receive(receive) => self.received(receive, result),
            Operation::Send(batch) => self.sent(batch, result),
            Operation::Wake { value, .. } => {
                self.wake = None;
                self.read_mailbox();
                self.listen_to_mailbox(value);
            }
            Operation::Timer { at, time } => self.timers.ended(at, time),
            Operation::Cancel { .. } => {}
        }
    }

    /// Into `value`, which is used again and again.
    fn listen_to_mailbox(&mut self, value: Box<u64>) {
        let fd = self.mailbox.eventfd.as_raw_fd();
        self.wake = Some(self.ring.start(Operation::Wake { fd, value }));
    }

    /// Tells the core, and does what it asks for, until it asks for nothing more.
    pub(super) fn feed(&mut self, event: Event) {
        assert!(!self.feeding);
        self.feeding = true;
        let mut event = Some(event);
        let mut actions = std::mem::take(&mut self.actions);
        while let Some(this) = event {
            self.mirror.handle(self.now, this, &mut actions);
            for action in actions.drain(..) {
                self.perform(action);
            }
            event = self.next_device_done();
        }
        self.actions = actions;
        self.feeding = false;
    }

    /// Tells the core of the device operations that have ended.
    pub(super) fn feed_device_done(&mut self) {
        if let Some(event) = self.next_device_done() {
            self.feed(event);
        }
    }

    fn next_device_done(&mut self) -> Option<Event> {
        self.device_done.pop_front().map(|(op, result)| Event::DeviceDone { op, result })
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::Device { op, slot, request } => self.begin_device_op(op, slot, request),
            Action::Reply { id: RequestId(id), result } => {
                let Some(pending) = self.requests.remove(Key::from_u64(id)) else {
                    unreachable!("the core answers each request once")
                };
                self.answers += 1;
                self.answer(pending, result);
            }
            Action::Attach { id, slot } => self.attach(id, slot),
            Action::Detach { slot } => self.devices.detach(slot),
            Action::AdminDone { id, result } => self.admin_done(id, result),
            Action::Notice(notice) => log(&notice),
        }
    }

    /// Makes the core's answer a reply.
    fn answer(&mut self, pending: Pending, result: Result<Answer, RequestError>) {
        let Pending { connection, tag, cost, expect } = pending;
        match (expect, result) {
            (Expect::Read { bytes, df }, Ok(answer)) => {
                let payload = answer.data();
                // Anything else would put the client's stream out of step.
                assert!(payload.as_ref().map_or(0, |payload| payload.len as u64) == bytes);
                self.reply_data(connection, tag, df, payload, cost);
            }
            (Expect::Status { len, one }, Ok(Answer::Status(answer))) => {
                self.reply_status(connection, tag, (len, one), &answer, cost);
            }
            (Expect::Status { .. }, Ok(_)) => unreachable!("a range with bytes has a status"),
            (Expect::Done, Ok(answer)) => {
                assert!(matches!(answer, Answer::Done));
                let Some(client) = self.clients.get(connection) else { unreachable!("{KEPT}") };
                self.reply(connection, client.session.encode_done(tag), None, cost);
            }
            (_, Err(error)) => {
                let Some(client) = self.clients.get(connection) else { unreachable!("{KEPT}") };
                let head = client.session.encode_error(tag, nbd_error(error), &error.to_string(), None);
                self.reply(connection, head, None, cost);
            }
        }
    }

    /// Ends: nothing of the clients or the core is under way, but for operations on failed replicas. Where such a
    /// replica hangs, they are left to the kernel (and their memory with them).
    fn close(mut self, report: StopReport) -> StopReport {
        if let Some(target) = self.wake.take() {
            self.ring.start(Operation::Cancel { target });
        }
        for target in self.timers.keys() {
            self.ring.start(Operation::Cancel { target });
        }
        for key in self.clients.keys() {
            self.break_off(key);
        }
        let mut completions = Vec::new();
        self.look_at_clock();
        let give_up_at = self.now.plus(CLOSE_NS_MAX);
        loop {
            for key in self.clients.keys() {
                self.let_go_if_done(key);
            }
            if self.ring.in_flight() == 0 {
                break;
            }
            let left_ns = give_up_at.since(self.now);
            if left_ns == 0 {
                tracing::warn!(
                    "{} operations on failed replicas do not end; they are given up",
                    self.ring.in_flight()
                );
                break;
            }
            self.ring.wait(Some(Duration::from_nanos(left_ns)), &mut completions);
            self.look_at_clock();
            for completion in completions.drain(..) {
                match completion.operation {
                    Operation::Wake { .. } | Operation::Timer { .. } | Operation::Cancel { .. } => {}
                    _ => self.completed(completion),
                }
            }
        }
        assert!(self.clients.len() == 0 && self.requests.len() == 0 && self.budget.used_bytes() == 0);
        if let Some(stop) = self.stop.take() {
            stop.announce(&report);
        }
        report
    }
}

fn only_sends(completions: &[Completion]) -> bool {
    completions.iter().all(|completion| matches!(completion.operation, Operation::Send(_)))
}

/// The protocol's word for the core's.
fn nbd_error(error: RequestError) -> NbdError {
    match error {
        RequestError::Io => NbdError::Io,
        RequestError::NoSpace => NbdError::NoSpc,
        RequestError::ReadOnly => NbdError::Perm,
        RequestError::Stopping => NbdError::Shutdown,
        RequestError::NotSupported => NbdError::NotSup,
    }
}

fn log(notice: &Notice) {
    match notice.level {
        NoticeLevel::Info => tracing::info!("{}", notice.text),
        NoticeLevel::Warning => tracing::warn!("{}", notice.text),
        NoticeLevel::Error => tracing::error!("{}", notice.text),
    }
}
