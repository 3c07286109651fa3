//! A world: the core, its disks, its clients, its operator and its misfortunes, under one virtual clock.
//!
//! ```text
//!            ┌─────────── start (boot.rs: the real assembly) ◄──────────┐
//!            ▼                                                          │
//!   queue ──► step: device.rs, client.rs, faults.rs ──► core ──► actions ──► crash (kill, power cut)
//!                          after each step: promises.rs
//! ```
//!
//! What must hold: everything that happens follows from the plan's seed; nothing iterates over hashes.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt::Display;
use std::rc::Rc;

use crate::buffer::BufferPool;
use crate::format::superblock::MemberState;
use crate::mirror::Mirror;
use crate::mirror::event::{Action, AdminId, DeviceTraits, Event, OpId};
use crate::units::{Nanos, REPLICAS_MAX, Regions, ReplicaSet, ReplicaSlot, SECOND_NS};

use super::client::{Client, Pending};
use super::counts::Counts;
use super::device::Op;
use super::disk::{Disk, Image};
use super::faults::table::FaultKind;
use super::oracle::Oracle;
use super::plan::Plan;
use super::promises::MetaView;
use super::rng::Rng;

mod fork;
pub use fork::CrashEpoch;

/// Far more events than any world needs.
const EVENTS_MAX: u64 = 400_000;

/// What went wrong: the promise's name and the details.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

/// The result of a check, or of a step that checks.
pub type Checked = Result<(), Violation>;

/// A violation of the promise `name`.
pub fn violated<T>(name: &str, what: impl Display) -> Result<T, Violation> {
    Err(Violation(format!("{name}: {what}")))
}

/// Something that happens at its time. Those of an earlier life of the daemon are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wake {
    /// A device operation takes effect.
    Apply(u64, OpKey),
    /// A device operation is answered.
    Complete(u64, OpKey),
    /// A client may send.
    Client(usize),
    /// The core wanted a tick.
    Tick(u64),
    /// A fault of this kind.
    Fault(FaultKind),
    /// A disk is there again, has room again.
    Better(usize),
}

/// Which operation a scripted fault waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailNext {
    /// A read.
    Read,
    /// A write or zeroes.
    Write,
    /// A flush.
    Flush,
}

/// Called after each step.
pub type Watch = Rc<RefCell<dyn FnMut(&World) -> Checked>>;

/// An operation's id, ordered.
pub type OpKey = u64;

/// A disk and what surrounds it.
#[derive(Clone)]
pub struct SimDisk {
    /// Its content.
    pub disk: Disk,
    /// As given to the core.
    pub path: String,
    /// As given to the core.
    pub traits: DeviceTraits,
    /// Gone: operations fail with ENODEV, and a start does not find it.
    pub gone: bool,
    /// Its filesystem is full.
    pub full: bool,
    /// A flush lost data and the daemon died before it heard: the next flush says so (as Linux does).
    pub unseen_error: bool,
    /// A flush failed and lost data while it was the last one in sync, since the last power cut.
    pub failed_alone: bool,
    /// This many times slower than the others.
    pub slow_factor: u64,
    /// Much slower until then.
    pub slow_until: Nanos,
    /// Answers nothing before then.
    pub stuck_until: Nanos,
    /// Another volume's replica stands here: it may not be written before an operator gives it up.
    pub foreign: bool,
    /// A metadata sector rotted while the daemon ran, and nothing was written to it since its start.
    pub rotten: bool,
    /// Earlier contents with the number of starts before, for putting an old copy back.
    pub copies: Vec<(u64, Image)>,
}

/// A running daemon.
pub struct Daemon {
    /// The core.
    pub mirror: Mirror,
    /// Its buffers.
    pub pool: BufferPool,
    /// Grows with each start.
    pub life: u64,
    /// Which disk (by index) is the replica in each slot.
    pub attached: [Option<usize>; REPLICAS_MAX],
    /// Device operations in flight.
    pub ops: BTreeMap<OpKey, Op>,
    /// Client requests not answered.
    pub requests: BTreeMap<u64, Pending>,
    /// Admin commands not answered; the disk that an `Add` offers.
    pub admins: BTreeMap<u64, Option<usize>>,
    /// In sync after the last event.
    pub in_sync: ReplicaSet,
    /// Resyncing after the last event.
    pub resyncing: ReplicaSet,
    /// Members after the last event.
    pub members: ReplicaSet,
    /// `Stop` was sent.
    pub stopping: bool,
    /// `Stop` was answered: whether the stop was clean.
    pub stopped: Option<bool>,
    /// The command that is to stop it.
    pub stop_id: u64,
    /// Those that were resyncing at some time since the start.
    pub ever_resyncing: ReplicaSet,
    /// In sync since the start.
    pub always_in_sync: ReplicaSet,
    /// Requests answered.
    pub replies: u64,
    tick_at: Option<Nanos>,
}

/// One seed's world.
pub struct World {
    /// What was drawn beforehand.
    pub plan: Plan,
    /// Chance.
    pub rng: Rng,
    /// Virtual time.
    pub now: Nanos,
    /// The disks, of which not all need be members.
    pub disks: Vec<SimDisk>,
    /// What stands durably in each disk's metadata.
    pub meta: Vec<MetaView>,
    /// The daemon, while it runs.
    pub daemon: Option<Daemon>,
    /// The clients.
    pub clients: Vec<Client>,
    /// Requests still to be sent in the chaos phase.
    pub requests_left: u64,
    /// What reads may return.
    pub oracle: Oracle,
    /// Faults are injected.
    pub chaos: bool,
    /// The disk that faults are aimed at (within the fault model: the only one).
    pub victim: Option<usize>,
    /// Requests may fail: a script hurts what stands alone.
    pub excused: bool,
    /// When a disk was last too full for a write.
    pub last_full: Nanos,
    /// More went wrong than a mirror can bear; the run ends here.
    pub beyond_repair: bool,
    /// Disks ever made.
    pub disks_made: u64,
    /// For the report.
    pub counts: Counts,
    /// Print what happens.
    pub verbose: bool,
    /// The core's own checks run beside the promises.
    pub invariants: bool,
    /// Operations, ticks and clients wait to be chosen (`small`) instead of having their times. Changed only while
    /// no daemon runs, or by `World::leave_manual`.
    pub manual: bool,
    queue: BinaryHeap<Reverse<(Nanos, u64, Wake)>>,
    next_wake: u64,
    /// Source of ids for requests, values and admin commands.
    pub(super) next_id: u64,
    life: u64,
    last_tick: Nanos,
    ticks_now: u32,
    /// The daemon serves read-only.
    pub read_only: bool,
    /// The volume's identity.
    pub volume_uuid: uuid::Uuid,
    /// Changes of durable metadata that were looked at.
    pub looks: u64,
    /// `Add` commands that have to be refused.
    pub must_refuse: BTreeSet<u64>,
    /// The sides of a split are being run: disks that are not there have histories of their own.
    pub split: bool,
    /// Requests that were in flight when an operation failed: the victim stays the same until they are answered.
    pub troubled: BTreeSet<u64>,
    /// The disk that an old copy was put back on since all were well.
    pub suspect: Option<usize>,
    /// Disks that were in sync, and know it, when the daemon ended: one of them has to be there at the next start.
    pub holders: Vec<usize>,
    /// Scripted faults: the next operation of this kind on this disk fails.
    pub next_fails: Vec<(usize, FailNext)>,
    /// With more events than this there is no end of them.
    pub events_max: u64,
    /// Looks at the world after each step (forks are not watched).
    pub watch: Option<Watch>,
}

impl World {
    /// The world of `plan`, before anything happened.
    #[must_use]
    pub fn new(plan: Plan, verbose: bool) -> Self {
        let mut rng = Rng::new(plan.seed ^ 0x5157_4f52_4c44);
        let clients = (0..plan.clients).map(|_| Client::new(&plan, &mut rng)).collect();
        Self {
            requests_left: plan.requests,
            oracle: Oracle::new(plan.volume_bytes),
            plan,
            rng,
            now: Nanos(0),
            disks: vec![],
            meta: vec![],
            daemon: None,
            clients,
            chaos: true,
            victim: None,
            excused: false,
            last_full: Nanos(0),
            beyond_repair: false,
            disks_made: 0,
            counts: Counts::default(),
            verbose,
            invariants: true,
            manual: false,
            queue: BinaryHeap::new(),
            next_wake: 0,
            next_id: 1,
            life: 0,
            last_tick: Nanos(0),
            ticks_now: 0,
            read_only: false,
            volume_uuid: uuid::Uuid::nil(),
            looks: 0,
            must_refuse: BTreeSet::new(),
            split: false,
            troubled: BTreeSet::new(),
            suspect: None,
            holders: vec![],
            next_fails: vec![],
            events_max: EVENTS_MAX,
            watch: None,
        }
    }

    /// The volume's regions.
    #[must_use]
    pub fn regions(&self) -> Regions {
        Regions { volume_bytes: self.plan.volume_bytes, region_bytes: self.plan.region_bytes }
    }

    /// A fresh number.
    pub fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// A line of the trace.
    pub fn trace(&self, line: impl FnOnce() -> String) {
        if self.verbose {
            println!("[{:>12.6} s] {}", self.now.0 as f64 / 1e9, line());
        }
    }

    /// Lets something happen after `delay_ns`.
    pub fn wake_in(&mut self, delay_ns: u64, wake: Wake) {
        if self.manual {
            return;
        }
        self.next_wake += 1;
        self.queue.push(Reverse((self.now.plus(delay_ns), self.next_wake, wake)));
    }

    /// The next thing happens. False where nothing is left to happen.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn step(&mut self) -> Result<bool, Violation> {
        let Some(Reverse((at, _, wake))) = self.queue.pop() else { return Ok(false) };
        self.now = self.now.max(at);
        match wake {
            Wake::Apply(life, op) if self.is_life(life) => self.apply_op(op),
            Wake::Complete(life, op) if self.is_life(life) => self.complete_op(op)?,
            Wake::Tick(life) if self.is_life(life) => {
                if let Some(daemon) = self.daemon.as_mut().filter(|d| d.tick_at.is_some_and(|t| t <= at)) {
                    daemon.tick_at = None;
                    self.deliver(Event::Tick)?;
                    self.promise_no_storm()?;
                }
            }
            Wake::Apply(..) | Wake::Complete(..) | Wake::Tick(_) => {}
            Wake::Client(client) => self.client_wakes(client)?,
            Wake::Fault(fault) => self.fault_strikes(fault)?,
            Wake::Better(_) if self.read_only => self.wake_in(SECOND_NS, wake),
            Wake::Better(disk) => {
                self.disks[disk].gone = false;
                self.disks[disk].full = false;
            }
        }
        self.check_promises()?;
        if self.counts.events > self.events_max {
            return violated("liveness", "there is no end of events");
        }
        self.be_watched()?;
        Ok(true)
    }

    /// Lets the watcher look.
    ///
    /// # Errors
    /// The watcher's.
    pub fn be_watched(&self) -> Checked {
        match &self.watch {
            Some(watch) => (watch.borrow_mut())(self),
            None => Ok(()),
        }
    }

    /// A core that wants one tick after another without time going on would keep its thread busy.
    fn promise_no_storm(&mut self) -> Checked {
        self.ticks_now = if self.last_tick == self.now { self.ticks_now + 1 } else { 0 };
        self.last_tick = self.now;
        if self.ticks_now > 100 {
            return violated("liveness", "the core wants ticks without end at one time");
        }
        Ok(())
    }

    fn is_life(&self, life: u64) -> bool {
        self.daemon.as_ref().is_some_and(|daemon| daemon.life == life)
    }

    /// Steps until `done`, at most `limit_ns` of virtual time. False where that was not enough.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn run_until(&mut self, limit_ns: u64, done: impl Fn(&Self) -> bool) -> Result<bool, Violation> {
        let limit = self.now.plus(limit_ns);
        let mut steps = 0u64;
        while !done(self) {
            steps += 1;
            if self.now > limit || steps > 1_000_000 || !self.step()? {
                return Ok(done(self));
            }
        }
        Ok(true)
    }

    /// A daemon begins its life with `mirror`.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn begin_life(
        &mut self,
        mirror: Mirror,
        pool: BufferPool,
        attached: [Option<usize>; REPLICAS_MAX],
    ) -> Checked {
        self.life += 1;
        if !self.read_only {
            self.disks.iter_mut().for_each(|disk| disk.rotten = false);
        }
        self.counts.starts += 1;
        self.daemon = Some(Daemon {
            mirror,
            pool,
            life: self.life,
            attached,
            ops: BTreeMap::new(),
            requests: BTreeMap::new(),
            admins: BTreeMap::new(),
            in_sync: ReplicaSet::EMPTY,
            resyncing: ReplicaSet::EMPTY,
            members: ReplicaSet::EMPTY,
            stopping: false,
            stopped: None,
            stop_id: 0,
            ever_resyncing: ReplicaSet::EMPTY,
            always_in_sync: ReplicaSlot::all().collect(),
            replies: 0,
            tick_at: None,
        });
        for client in 0..self.clients.len() {
            for _ in 0..self.plan.depth {
                self.wake_in(1000, Wake::Client(client));
            }
        }
        self.deliver(Event::Tick)
    }

    /// Gives the core an event and does what it wants.
    ///
    /// # Errors
    /// A promise was broken.
    pub fn deliver(&mut self, event: Event) -> Checked {
        let now = self.now;
        let Some(daemon) = &mut self.daemon else { return Ok(()) };
        let mut actions = Vec::new();
        daemon.mirror.handle(now, event, &mut actions);
        self.counts.events += 1;
        self.refresh_sets()?;
        for action in actions {
            match action {
                Action::Device { op, slot, request } => self.submit(op, slot, request)?,
                Action::Reply { id, result } => self.client_reply(id, result)?,
                Action::Attach { id, slot } => self.attach(id, slot)?,
                Action::Detach { slot } => self.detach(slot)?,
                Action::AdminDone { id, result } => self.admin_done(id, &result)?,
                Action::Notice(notice) => self.trace(|| format!("notice: {}", notice.text)),
            }
        }
        self.schedule_tick();
        Ok(())
    }

    /// Time goes on by itself again; no device operation is in flight.
    ///
    /// # Errors
    /// A promise was broken.
    pub(super) fn leave_manual(&mut self) -> Checked {
        self.manual = false;
        if let Some(daemon) = &mut self.daemon {
            assert!(daemon.ops.is_empty());
            daemon.tick_at = None;
        }
        self.deliver(Event::Tick)
    }

    fn refresh_sets(&mut self) -> Checked {
        let Some(daemon) = &mut self.daemon else { return Ok(()) };
        let before = (daemon.in_sync, daemon.resyncing, daemon.members);
        (daemon.in_sync, daemon.resyncing, daemon.members) = daemon.mirror.replica_sets();
        let after = (daemon.in_sync, daemon.resyncing, daemon.members);
        daemon.ever_resyncing = daemon.ever_resyncing.union(daemon.resyncing);
        daemon.always_in_sync = daemon.always_in_sync.intersection(daemon.in_sync);
        if before != after {
            self.trace(|| format!("in sync {:?}, resyncing {:?}, members {:?}", after.0, after.1, after.2));
            let in_sync = self.in_sync_disks();
            let new = after.0.difference(before.0);
            let new: Vec<usize> = new.iter().filter_map(|slot| self.disk_of(slot)).collect();
            for (disk, view) in self.meta.iter_mut().enumerate() {
                if in_sync.contains(&disk) && !new.contains(&disk) {
                    view.look_again();
                } else {
                    view.forget();
                }
            }
            self.promise_6_the_well_stay(before.0.difference(after.0))?;
        }
        Ok(())
    }

    fn schedule_tick(&mut self) {
        let Some(daemon) = &mut self.daemon else { return };
        let Some(at) = daemon.mirror.next_deadline() else { return };
        if daemon.tick_at.is_none_or(|planned| at < planned) {
            daemon.tick_at = Some(at);
            let (life, delay) = (daemon.life, at.since(self.now));
            self.wake_in(delay, Wake::Tick(life));
        }
    }

    fn attach(&mut self, id: AdminId, slot: ReplicaSlot) -> Checked {
        self.trace(|| format!("attach slot {slot}"));
        let Some(daemon) = &mut self.daemon else { return Ok(()) };
        let disk = daemon.admins.get(&id.0).copied().flatten();
        if disk.is_none() || daemon.attached[slot.index()].is_some() {
            return violated("protocol", format!("attach of slot {slot}: not offered, or slot in use"));
        }
        daemon.attached[slot.index()] = disk;
        if let Some(disk) = disk {
            self.disks[disk].foreign = false;
        }
        Ok(())
    }

    fn detach(&mut self, slot: ReplicaSlot) -> Checked {
        self.trace(|| format!("detach slot {slot}"));
        let Some(daemon) = &mut self.daemon else { return Ok(()) };
        if daemon.ops.values().any(|op| op.slot == slot) {
            return violated("protocol", format!("detach of slot {slot} with operations in flight"));
        }
        if daemon.attached[slot.index()].take().is_none() {
            return violated("protocol", format!("detach of slot {slot}, which is not attached"));
        }
        Ok(())
    }

    /// The daemon dies; `cut`: the power goes with it.
    pub fn crash(&mut self, cut: bool) {
        self.holders = self.in_sync_disks();
        // The kernel reports a loss once, and whoever heard of it dies before it is recorded: nobody can know.
        self.beyond_repair |= !cut && self.holder_turned_back();
        let Some(daemon) = self.daemon.take() else { return };
        self.trace(|| format!("CRASH: {}", if cut { "power cut" } else { "kill" }));
        self.must_refuse.clear();
        for op in daemon.ops.into_values() {
            self.interrupt(op);
        }
        let unknown = if cut { self.turn_back_unknown() } else { vec![] };
        self.beyond_repair |= unknown.iter().any(|disk| self.holders.contains(disk));
        let mode = super::disk::CutMode::from_chance(&mut self.rng);
        for disk in &mut self.disks {
            if cut {
                (disk.unseen_error, disk.failed_alone) = (false, false);
                disk.disk.power_cut(&mut self.rng, mode);
            } else {
                disk.disk.process_killed();
            }
        }
        if !self.beyond_repair {
            unknown.into_iter().for_each(|disk| self.replace_disk(disk));
        }
        self.keep_sure_holders();
        if cut {
            self.oracle.power_cut();
        } else {
            self.oracle.process_killed();
        }
        self.meta.iter_mut().for_each(MetaView::forget);
        self.clients.iter_mut().for_each(Client::forget);
    }

    /// Beyond the fault model the last replica in sync may have lost its cache in an earlier life of the daemon. What a power
    /// cut brings back there can be known to nobody (docs/testing.md), and so cannot be judged; where others are in sync
    /// by then, the operator gives that one a full copy (docs/operating.md).
    fn turn_back_unknown(&self) -> Vec<usize> {
        let counts = |disk: &usize| self.disks[*disk].failed_alone || self.holders.contains(disk);
        let unknown = |disk: &usize| self.disks[*disk].disk.has_lost_before(self.plan.volume_bytes);
        let disks = (0..self.disks.len()).filter(|_| !self.plan.within_model);
        disks.filter(counts).filter(unknown).collect()
    }

    /// A replica that counts as in sync by the others' word only (the commit in which it joined did not reach it) is refused
    /// alone, and rightly. So it is no holder while there is another.
    fn keep_sure_holders(&mut self) {
        let is_sure = |disk: &usize| match self.find(*disk) {
            Ok(Some(found)) => {
                found.superblock.own_entry().is_some_and(|own| own.state == MemberState::InSync)
            }
            Ok(None) => false,
            Err(_) => true, // gone for now
        };
        let sure: Vec<usize> = self.holders.iter().copied().filter(is_sure).collect();
        if !sure.is_empty() {
            self.holders = sure;
        }
    }

    /// The disk in `slot`.
    #[must_use]
    pub fn disk_of(&self, slot: ReplicaSlot) -> Option<usize> {
        self.daemon.as_ref().and_then(|daemon| daemon.attached[slot.index()])
    }

    /// Disks of the replicas in sync.
    #[must_use]
    pub fn in_sync_disks(&self) -> Vec<usize> {
        let Some(daemon) = &self.daemon else { return vec![] };
        daemon.in_sync.iter().filter_map(|slot| daemon.attached[slot.index()]).collect()
    }
}

/// The key of an operation.
#[must_use]
pub fn op_key(op: OpId) -> OpKey {
    op.0
}
