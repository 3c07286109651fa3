//! One run of a small world: at each moment a list of choices, of which the explorer takes one.
//!
//! ```text
//!  setup (boot) ──► choices: send · an operation ends · an operation fails · tick ──take──► choices ──► ... ──► none
//! ```
//!
//! What must hold: equal choices give equal runs (nothing here draws from chance), and the list of choices is in an
//! order that depends on the run so far only. Every operation that is submitted is checked to overlap none in flight
//! on its disk (metadata too) where one of them writes: `small/mod.rs` says what rests on that.

use nix::errno::Errno;

use crate::mirror::event::Event;
use crate::sim::counts::FaultKind;
use crate::sim::device::Kind;
use crate::sim::world::{Checked, OpKey, Violation, World, violated};

use super::worlds::{Fault, Setup, SmallWorld};

/// More ticks than this with requests waiting and nothing else to do: they wait for ever.
const IDLE_TICKS_MAX: u32 = 40;
/// Far more steps than any setup takes.
const SETUP_STEPS_MAX: u32 = 1000;

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// With no effect.
    Clean,
    /// A write that landed nevertheless; a flush that lost what it was to flush.
    Dirty,
}

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// A client sends its next request.
    Send(usize),
    /// A device operation takes effect and is answered.
    Done(OpKey),
    /// The core's tick comes.
    Tick,
    /// A device operation fails with EIO.
    Fail(OpKey, Failure),
}

/// A run on its way.
pub(super) struct Run {
    /// Its row of the table.
    pub row: &'static SmallWorld,
    /// The world.
    pub world: World,
    /// How many requests each client has sent.
    sent: Vec<usize>,
    ticks: u32,
    idle_ticks: u32,
    failed: bool,
}

impl Run {
    /// A run at the moment where exploration begins.
    ///
    /// # Errors
    /// A promise was broken on the way.
    pub(super) fn new(row: &'static SmallWorld, verbose: bool) -> Result<Self, Violation> {
        let mut world = World::new(row.plan(), verbose);
        world.chaos = false;
        let mut run =
            Self { row, world, sent: vec![0; row.clients.len()], ticks: 0, idle_ticks: 0, failed: false };
        run.world.create()?;
        run.world.disks.iter_mut().for_each(|disk| disk.traits.cheap_zero = true);
        run.world.manual = true;
        match row.setup {
            Setup::Fresh => run.open(&[0, 1])?,
            Setup::Opening => run.world.start(&[0, 1])?,
            Setup::HalfWritten(side) => run.half_written(side)?,
            Setup::Returned => run.returned()?,
            Setup::Alone => {
                run.world.disks[1].gone = true;
                run.open(&[0])?;
            }
        }
        run.world.trace(|| "HERE THE CHOICES BEGIN".to_owned());
        Ok(run)
    }

    /// Starts the daemon and does the oldest thing first until the volume is open.
    fn open(&mut self, disks: &[usize]) -> Checked {
        self.world.start(disks)?;
        self.drive(|world| world.daemon.as_ref().is_some_and(|daemon| daemon.mirror.is_open()))
    }

    /// Does the oldest thing first until `done`.
    fn drive(&mut self, done: impl Fn(&World) -> bool) -> Checked {
        for _ in 0..SETUP_STEPS_MAX {
            if done(&self.world) {
                return Ok(());
            }
            let oldest = self.world.daemon.as_ref().and_then(|d| d.ops.keys().next().copied());
            self.happen(oldest.map_or(Choice::Tick, Choice::Done))?;
        }
        violated("liveness", "the setup does not end")
    }

    /// Sends a write of block A that is not in any script.
    fn setup_write(&mut self) -> Checked {
        self.world.next_id = 50;
        let range = crate::units::ByteRange::new(super::worlds::BLOCK_A, crate::units::BLOCK_BYTES);
        self.world.send(0, crate::sim::client::Asked::Write, range, false)
    }

    fn half_written(&mut self, side: usize) -> Checked {
        self.open(&[0, 1])?;
        self.setup_write()?;
        let is_data = |world: &World| {
            let volume = world.plan.volume_bytes;
            let Some(daemon) = &world.daemon else { return vec![] };
            let data = daemon.ops.iter().filter(|(_, op)| op.writes() && op.range.offset < volume);
            data.map(|(key, op)| (*key, op.disk)).collect::<Vec<_>>()
        };
        self.drive(|world| is_data(world).len() == 2)?;
        for (key, disk) in is_data(&self.world) {
            if disk == side {
                self.world.apply_op(key);
            } else if let Some(op) = self.world.daemon.as_mut().and_then(|d| d.ops.get_mut(&key)) {
                op.result = Some(Ok(false)); // and so the kill does not let it land
            }
        }
        self.world.crash(false);
        self.open(&[0, 1])
    }

    fn returned(&mut self) -> Checked {
        self.open(&[0, 1])?;
        self.drive(|world| world.daemon.as_ref().is_some_and(|daemon| daemon.ops.is_empty()))?;
        self.world.crash(false);
        self.open(&[0])?;
        self.setup_write()?;
        self.drive(|world| world.daemon.as_ref().is_some_and(|d| d.ops.is_empty() && d.requests.is_empty()))?;
        self.world.crash(false);
        self.open(&[0, 1])
    }

    /// What may happen next; empty where the run is over.
    ///
    /// # Errors
    /// Requests wait for ever.
    pub(super) fn choices(&self) -> Result<Vec<Choice>, Violation> {
        let Some(daemon) = &self.world.daemon else { return Ok(vec![]) };
        let mut choices: Vec<Choice> =
            (0..self.row.clients.len()).filter(|client| self.may_send(*client)).map(Choice::Send).collect();
        choices.extend(daemon.ops.keys().copied().map(Choice::Done));
        let due = daemon.mirror.next_deadline().is_some();
        let idle = choices.is_empty();
        if due && (self.ticks < self.row.ticks || idle && !daemon.requests.is_empty()) {
            choices.push(Choice::Tick);
        }
        if !self.failed {
            for (key, op) in &daemon.ops {
                let (clean, dirty) = match (self.row.fault, &op.kind) {
                    (Fault::None, _) => (false, false),
                    (Fault::Any, Kind::Write { .. } | Kind::Zero(_) | Kind::Flush(_)) => (true, true),
                    (Fault::Any, _) => (true, false),
                    (Fault::TurnsBack, kind) => (false, matches!(kind, Kind::Flush(_))),
                };
                choices.extend(clean.then_some(Choice::Fail(*key, Failure::Clean)));
                choices.extend(dirty.then_some(Choice::Fail(*key, Failure::Dirty)));
            }
        }
        let stuck = choices.is_empty() || self.idle_ticks > IDLE_TICKS_MAX;
        if stuck && !daemon.requests.is_empty() {
            return violated("liveness", format!("{} requests are never answered", daemon.requests.len()));
        }
        Ok(choices)
    }

    fn may_send(&self, client: usize) -> bool {
        let waits = |daemon: &crate::sim::world::Daemon| daemon.requests.values().any(|p| p.client == client);
        self.sent[client] < self.row.clients[client].len() && !self.world.daemon.as_ref().is_some_and(waits)
    }

    /// Takes a choice and checks the promises.
    ///
    /// # Errors
    /// One was broken.
    pub(super) fn take(&mut self, choice: Choice) -> Checked {
        match choice {
            Choice::Send(client) => {
                let step = self.row.clients[client][self.sent[client]];
                // The same whatever came before, so that equal contents of disks are equal in every order.
                self.world.next_id = 100 + 10 * client as u64 + self.sent[client] as u64;
                self.sent[client] += 1;
                let range = crate::units::ByteRange::new(step.offset, step.len);
                self.world.send(client, step.asked, range, step.fua)?;
                return self.check();
            }
            Choice::Fail(..) => self.failed = true,
            Choice::Tick => self.ticks += 1,
            Choice::Done(_) => {}
        }
        self.idle_ticks = if choice == Choice::Tick { self.idle_ticks + 1 } else { 0 };
        self.happen(choice)
    }

    fn happen(&mut self, choice: Choice) -> Checked {
        match choice {
            Choice::Done(key) => {
                self.world.apply_op(key);
                self.world.complete_op(key)?;
            }
            Choice::Fail(key, failure) => {
                self.fail(key, failure);
                self.world.complete_op(key)?;
            }
            Choice::Tick => {
                let due = self.world.daemon.as_ref().and_then(|daemon| daemon.mirror.next_deadline());
                let Some(due) = due else { return violated("liveness", "nothing moves and no tick is due") };
                self.world.now = self.world.now.max(due);
                self.world.deliver(Event::Tick)?;
            }
            Choice::Send(_) => {}
        }
        self.check()
    }

    fn check(&mut self) -> Checked {
        self.world.check_promises()?;
        self.no_overlap_on_one_disk()
    }

    /// An operation fails on a disk; where no other replica is in sync, clients may hear of it.
    fn fail(&mut self, key: OpKey, failure: Failure) {
        let in_sync = self.world.in_sync_disks();
        let Some(daemon) = &mut self.world.daemon else { return };
        let Some(op) = daemon.ops.get_mut(&key) else { return };
        op.result = Some(Err(Errno::EIO));
        let lone = in_sync.iter().all(|disk| *disk == op.disk);
        self.world.excused |= lone;
        let kind = match &op.kind {
            Kind::Read(_) | Kind::ProbeHole | Kind::Cache | Kind::Allocation(_) => FaultKind::ReadError,
            Kind::Write { .. } | Kind::Zero(_) => FaultKind::WriteError,
            Kind::Flush(_) => FaultKind::FlushError,
        };
        self.world.counts.fault(kind);
        let disk = &mut self.world.disks[op.disk].disk;
        if failure == Failure::Clean {
            return;
        }
        match &op.kind {
            Kind::Write { data, seq, .. } => disk.apply(*seq, op.range.offset, data, |_| true),
            Kind::Zero(seq) => disk.apply_zero(*seq, op.range, |_| true),
            Kind::Flush(mark) => {
                disk.lose_cache(mark);
                if lone {
                    self.world.oracle.cache_lost();
                }
            }
            Kind::Read(_) | Kind::ProbeHole | Kind::Cache | Kind::Allocation(_) => {}
        }
    }

    fn no_overlap_on_one_disk(&self) -> Checked {
        let Some(daemon) = &self.world.daemon else { return Ok(()) };
        for (key, op) in daemon.ops.iter().filter(|(_, op)| op.writes()) {
            let clash = daemon.ops.iter().find(|(other_key, other)| {
                *other_key != key && other.disk == op.disk && other.range.overlaps(op.range)
            });
            if let Some((other, _)) = clash {
                return violated("promise_3_one_order", format!("ops {key} and {other} overlap in flight"));
            }
        }
        Ok(())
    }
}
