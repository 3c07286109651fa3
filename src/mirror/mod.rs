//! The core: RAID-1 as a pure state machine. Events in, actions out; no I/O, no clock, no randomness.
//!
//! What must hold: the promises of `docs/design.md`. Each has a home:
//!
//! ```text
//!  1 intent before data        intent, write        7 idempotent recovery   resync, format::assemble
//!  2 failure before ack        membership, write    8 no silent rollback    format::assemble, membership
//!  3 one order                 overlap              9 a flush is a flush    flush
//!  4 clean means clean         intent              10 the data is yours     format::layout
//!  5 one answer                read, resync        11 bad input             nbd (before it gets here)
//!  6 never the last            membership
//! ```
//!
//! How an event is handled: it changes some state and queues *work* (a lock was granted, a page is durable, ...);
//! the queue is drained; then each *pump* issues what has become due. Both repeat until nothing moves, so no
//! function needs to call back into another one's middle.
//!
//! ```text
//!  opening ──superblock commits, pages in use──► open ──stop──► draining ─► flush ─► pages ─► superblock ─► stopped
//!  (requests wait)                                    │ metadata can be recorded nowhere
//!                                                     ▼
//!                                                  broken (writes fail, clean regions are read) ──recorded──► open
//! ```

mod add;
mod admin;
mod block_status;
mod cache;
mod chunks;
pub mod event;
mod flush;
mod intent;
mod invariants;
mod links;
mod membership;
mod open;
mod ops;
mod overlap;
mod pace;
mod read;
mod read_policy;
mod read_streams;
mod region_words;
mod replica;
mod report;
mod resync;
mod slab;
pub mod status;
#[cfg(test)]
mod tests;
mod write;

use std::collections::VecDeque;

use crate::buffer::BufferPool;
use crate::format::bitmap::{Bitmap, RegionMaps};
use crate::format::superblock::Superblock;
use crate::planted::{Bug, planted};
use crate::units::{Nanos, REPLICAS_MAX, Regions, ReplicaSet, ReplicaSlot};
use admin::AdminState;
use block_status::StatusTask;
use event::{Action, Answer, DeviceTraits, Event, Notice, NoticeLevel, Request, RequestError, RequestId};
use flush::Flushes;
use intent::{Pages, Sweep};
use membership::Meta;
use open::OpeningFlush;
use ops::{Op, OpOwner};
use overlap::{LockId, OverlapTable};
use read::ReadTask;
use read_policy::ReadPolicy;
use region_words::RegionWords;
use replica::Replica;
use resync::{Job, JobEnd, ResyncState};
use slab::{Key, Slab};
use status::ClientCounters;
use write::WriteTask;

/// How a volume is run; nothing in here is on disk.
#[derive(Clone, Debug)]
pub struct MirrorConfig {
    /// Refuse all writes and write no metadata.
    pub read_only: bool,
    /// Replicas to read only when nothing else can answer.
    pub write_mostly: ReplicaSet,
    /// What each attached replica's backing can do; `Some` for exactly the slots with an open device.
    pub traits: [Option<DeviceTraits>; REPLICAS_MAX],
    /// Where generations come from: random bits, different at each start.
    pub entropy: u128,
    /// Wall-clock time (nanoseconds since 1970) at `Nanos(0)`, for the superblock's "last written".
    pub wall_clock_origin_ns: u64,
    /// A region's intent bit is cleared after this long without a write, nanoseconds (default 5 s).
    pub intent_idle_ns: u64,
    /// Regions copied at the same time by a resync (default 4).
    pub resync_jobs_max: usize,
    /// While clients are busy no copy begins after this long, until a rest is over, nanoseconds (default 16 ms).
    pub resync_burst_ns: u64,
    /// Benchmarks only: writes set no intent bits and wait for none. A crash, or a replica that fails, then leaves
    /// replicas that differ and nothing that says where: promises 1, 2 and 5 do not hold.
    pub without_intent: bool,
}

/// Something in flight that waits for locks, commits, operations.
enum Task {
    Read(ReadTask),
    Write(WriteTask),
    Status(Box<StatusTask>),
    Job(Box<Job>),
    /// A job that is just being made.
    Starting,
}

/// What is to be gone on with.
#[derive(Debug)]
enum Work {
    /// A lock is granted to this task.
    Granted(Key),
    /// A page that this write waited for is durable: ask again.
    IntentDurable(Key),
    /// A page that this write waited for could not be written.
    IntentFailed(Key, RequestError),
    /// The region that this task waited for is synced, or not.
    SyncEnded(Key, JobEnd),
    /// Every membership change is durable: this write may be answered, this read may begin.
    Settled(Key),
    /// The membership change cannot be recorded: this request fails.
    Unrecorded(Key),
    /// The replica of this operation was failed.
    Lost(OpOwner, ReplicaSlot),
    /// A failed replica may be closed.
    DetachIfIdle(ReplicaSlot),
    /// Nothing but another turn of the pumps.
    Pump,
}

/// The core. One owner drives it with [`Mirror::handle`].
pub struct Mirror {
    config: MirrorConfig,
    regions: Regions,
    /// Identity, event count, generation and parents as last committed or being committed. Its member table,
    /// slot and device size are not used: `replicas` has them.
    head: Superblock,
    now: Nanos,
    out: Vec<Action>,
    work: VecDeque<Work>,
    pool: BufferPool,

    replicas: [Option<Replica>; REPLICAS_MAX],
    in_sync: ReplicaSet,
    resyncing: ReplicaSet,
    /// What unsynced regions are read from in a read-only volume, and synced from where it can be.
    source: ReplicaSlot,
    /// Alignment of reads and writes that every active replica can do, bytes.
    io_align: u64,

    /// Intent bits and stale maps as they should be on disk.
    maps: RegionMaps,
    /// Intent bits that are on every metadata target for certain.
    intent_durable: Bitmap,
    /// Regions whose copies on the in-sync replicas may differ.
    unsynced: Bitmap,
    unsynced_count: u64,
    stale_count: [u64; REPLICAS_MAX],
    /// For each region: whether a write may go on, whether there was one since the last sweep, those in flight.
    region_words: RegionWords,

    ops: Slab<Op>,
    tasks: Slab<Task>,
    locks: OverlapTable,
    pages: Pages,
    sweep: Sweep,
    meta: Meta,
    flushes: Flushes,
    policy: ReadPolicy,
    resync: ResyncState,
    admin: AdminState,

    /// Writes whose answer waits for a membership change to be durable, and reads that wait for one to begin.
    held: Vec<Key>,
    /// Flushes whose answer waits for the same.
    held_flushes: Vec<RequestId>,
    /// A replica left, and that is not durable yet.
    shrinking: bool,
    /// Metadata can be recorded on no in-sync replica.
    broken: bool,
    /// Requests are taken.
    open: bool,
    /// The flush that comes before everything else.
    opening_flush: OpeningFlush,
    /// In-sync replicas that came with a superblock older than the head, and the head as it was found.
    laggards: ReplicaSet,
    assembled_head: Superblock,
    /// Superblock commits until it opens.
    opening_commits: u32,
    /// Requests that came before it was open.
    early: VecDeque<(RequestId, Request)>,
    unclean_bytes_at_start: u64,
    counters: ClientCounters,
}

impl Mirror {
    /// Takes one event and appends what is to be done to `out`. `now` never goes back.
    pub fn handle(&mut self, now: Nanos, event: Event, out: &mut Vec<Action>) {
        assert!(now >= self.now, "time goes forward");
        self.now = now;
        // What `new` had to say comes first.
        out.append(&mut self.out);
        std::mem::swap(&mut self.out, out);
        match event {
            Event::Request { id, request } => self.request(id, request),
            Event::DeviceDone { op, result } => self.device_done(op, result),
            Event::Admin { id, command } => self.admin_command(id, command),
            Event::Tick => {}
        }
        self.run();
        std::mem::swap(&mut self.out, out);
    }

    /// Goes on until nothing moves.
    fn run(&mut self) {
        loop {
            while let Some(work) = self.work.pop_front() {
                self.do_work(work);
            }
            self.pump_pages();
            self.pump_superblock();
            self.pump_settled();
            self.pump_opening();
            self.pump_sweep();
            self.pump_resync();
            self.pump_admin();
            if self.work.is_empty() {
                return;
            }
        }
    }

    fn do_work(&mut self, work: Work) {
        match work {
            Work::Granted(key)
                if planted(Bug::OverlapRace) && !matches!(self.tasks.get(key), Some(Task::Job(_))) =>
            {
                match self.tasks.get(key) {
                    Some(Task::Read(_)) => self.read_granted(key),
                    Some(Task::Status(_)) => self.status_granted(key),
                    _ => {}
                }
            }
            Work::Granted(key) => match self.tasks.get(key) {
                Some(Task::Read(_)) => self.read_granted(key),
                Some(Task::Write(_)) => self.write_granted(key),
                Some(Task::Status(_)) => self.status_granted(key),
                Some(Task::Job(_)) => self.job_granted(key),
                Some(Task::Starting) | None => unreachable!("a lock is granted to who waits for it"),
            },
            Work::IntentDurable(key) => match self.tasks.get(key) {
                Some(Task::Job(_)) => self.job_granted(key),
                _ => self.write_intent(key),
            },
            Work::IntentFailed(key, error) => match self.tasks.get(key) {
                Some(Task::Job(_)) => self.job_unrecorded(key),
                _ => self.write_intent_failed(key, error),
            },
            Work::SyncEnded(key, end) => match self.tasks.get(key) {
                Some(Task::Read(_)) => self.read_sync_ended(key, end),
                Some(Task::Write(_)) if end == JobEnd::Failed => {
                    self.write_intent_failed(key, RequestError::Io);
                }
                Some(Task::Write(_)) => self.write_lock(key),
                Some(Task::Status(_) | Task::Job(_) | Task::Starting) | None => {
                    unreachable!("only reads and writes wait for a sync")
                }
            },
            Work::Settled(key) => match self.tasks.get(key) {
                Some(Task::Read(_)) => self.read_granted(key),
                _ => self.write_finish(key),
            },
            Work::Unrecorded(key) => match self.tasks.get(key) {
                Some(Task::Read(_)) => self.read_unrecorded(key),
                _ => self.write_unrecorded(key),
            },
            Work::Lost(owner, slot) => self.complete(owner, slot, Err(nix::errno::Errno::ENODEV)),
            Work::DetachIfIdle(slot) => self.detach_if_idle(slot),
            Work::Pump => {}
        }
    }

    /// A client's request: queued before the volume is open, refused while it stops.
    fn request(&mut self, id: RequestId, request: Request) {
        self.counters.in_flight += 1;
        self.resync.pace.client_came(self.now);
        if self.stopping() {
            self.reply(id, Err(RequestError::Stopping));
        } else if !self.open {
            self.early.push_back((id, request));
        } else {
            self.start_request(id, request);
        }
    }

    fn start_request(&mut self, id: RequestId, request: Request) {
        match request {
            Request::Read { range } => self.start_read(id, range),
            Request::Write { offset, data, fua } => self.start_write(id, offset, data, fua),
            Request::WriteZeroes { range, may_unmap, fast, fua } => {
                self.start_zeroes(id, range, (may_unmap, fast), fua);
            }
            Request::Trim { range, fua } => self.start_trim(id, range, fua),
            Request::Cache { range } => self.start_cache(id, range),
            Request::BlockStatus { range, contexts, one } => {
                self.start_block_status(id, range, contexts, one);
            }
            Request::Flush if self.config.read_only => self.reply_flush(id, true),
            Request::Flush => self.request_flush(self.active(), flush::FlushOwner::Client(id)),
        }
    }

    fn reply(&mut self, id: RequestId, result: Result<Answer, RequestError>) {
        assert!(self.counters.in_flight > 0);
        self.counters.in_flight -= 1;
        if result.is_err() {
            self.counters.errors += 1;
        }
        self.out.push(Action::Reply { id, result });
    }

    fn reply_flush(&mut self, id: RequestId, ok: bool) {
        if ok {
            self.counters.flushes += 1;
        }
        self.reply(id, if ok { Ok(Answer::Done) } else { Err(RequestError::Io) });
    }

    fn unlock(&mut self, lock: LockId) {
        struct Granted<'a>(&'a mut VecDeque<Work>);
        impl Extend<u64> for Granted<'_> {
            fn extend<T: IntoIterator<Item = u64>>(&mut self, owners: T) {
                self.0.extend(owners.into_iter().map(Work::Granted));
            }
        }
        self.locks.release(lock, &mut Granted(&mut self.work));
    }

    fn notice(&mut self, level: NoticeLevel, text: String) {
        self.out.push(Action::Notice(Notice { level, text }));
    }

    /// When `Event::Tick` is wanted next; changed only by `handle`.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Nanos> {
        let sweep = match self.sweep {
            Sweep::Idle(at) if self.open => at,
            Sweep::Idle(_) | Sweep::Flushing(_) => None,
        };
        let resync = if self.open && !self.stopping() { self.resync.deadline() } else { None };
        [self.pages.deadline(), sweep, self.meta.retry_at, resync].into_iter().flatten().min()
    }

    /// Whether requests are taken. Requests sent before are queued.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open
    }
}
