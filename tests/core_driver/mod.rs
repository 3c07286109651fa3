//! The core, driven like the data plane does it, over devices that do nothing: for counting what it allocates and
//! for timing it.
//!
//! What must hold: nothing here allocates once it is warm, so that what is counted is the core's. Operations are
//! answered in the order they were asked for; time goes on by `STEP_NS` an event.
//!
//! ```text
//!  next request ──► handle ──► device operations ──► queue (oldest first) ──► handle ──► … ──► reply: one less in flight
//! ```

#![allow(unreachable_pub, dead_code, clippy::unwrap_used, reason = "used by a test and by a benchmark")]

use std::collections::VecDeque;

use nbdmirror::buffer::{BufferPool, UniquePayload};
use nbdmirror::format::assemble::{AssembleOptions, Found, assemble};
use nbdmirror::format::create::{NewReplica, NewVolume, new_volume};
use nbdmirror::format::layout::Layout;
use nbdmirror::mirror::event::{
    Action, AdminCommand, AdminId, DeviceOp, DeviceOutput, DeviceTraits, Event, OpId, Request, RequestId,
};
use nbdmirror::mirror::{Mirror, MirrorConfig};
use nbdmirror::units::{ByteRange, Nanos, REPLICAS_MAX, Regions, ReplicaSet, ReplicaSlot, SECOND_NS};
use uuid::Uuid;

/// Virtual time between two events.
pub const STEP_NS: u64 = 1000;
/// Free buffers that the pool keeps.
const POOL_BYTES: usize = 256 << 20;

/// How the volume is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Two replicas in sync.
    Healthy,
    /// One of two has failed.
    Degraded,
}

/// The core and what is in flight.
pub struct CoreDriver {
    mirror: Mirror,
    pool: BufferPool,
    now: Nanos,
    actions: Vec<Action>,
    queue: VecDeque<(OpId, DeviceOp)>,
    next_id: u64,
    in_flight: usize,
    /// Events handled.
    pub steps: u64,
    /// Requests answered with success.
    pub answered: u64,
    /// Device operations carried out.
    pub operations: u64,
}

impl CoreDriver {
    /// An open volume of `volume_bytes` on devices with logical blocks of `io_align` bytes.
    pub fn new(volume_bytes: u64, io_align: u32, health: Health) -> Self {
        Self::with_intent_idle(volume_bytes, io_align, health, 5 * SECOND_NS)
    }

    /// The same, with intent bits that are cleared after `intent_idle_ns` of virtual time.
    pub fn with_intent_idle(volume_bytes: u64, io_align: u32, health: Health, intent_idle_ns: u64) -> Self {
        let regions = Regions { volume_bytes, region_bytes: Layout::default_region_bytes(volume_bytes) };
        let device_bytes = Layout::device_bytes_min(regions);
        let replicas = ["a", "b"].iter().zip(100..).map(|(path, uuid)| NewReplica {
            uuid: Uuid::from_u128(uuid),
            path: (*path).to_owned(),
            device_bytes,
        });
        let created = new_volume(NewVolume {
            name: "v".to_owned(),
            regions,
            now_unix_ns: 1,
            volume_uuid: Uuid::from_u128(1),
            generation: Uuid::from_u128(2),
            replicas: replicas.collect(),
            in_sync: true,
        })
        .unwrap();
        let founds: Vec<Found> = created
            .superblocks
            .iter()
            .map(|superblock| Found::new("r", superblock.clone(), created.maps.clone()))
            .collect();
        let assembly = assemble(&founds, AssembleOptions::default()).unwrap();
        let traits = DeviceTraits { device_bytes, io_align, cheap_zero: true, cheap_allocated_zero: true };
        let mut config = MirrorConfig {
            read_only: false,
            write_mostly: ReplicaSet::EMPTY,
            traits: [None; REPLICAS_MAX],
            entropy: 7,
            wall_clock_origin_ns: 0,
            intent_idle_ns,
            resync_jobs_max: 4,
            resync_burst_ns: 16_000_000,
            without_intent: false,
        };
        config.traits[..2].fill(Some(traits));
        let pool = BufferPool::new(POOL_BYTES);
        let mut driver = Self {
            mirror: Mirror::new(config, assembly, pool.clone()),
            pool,
            now: Nanos(0),
            actions: Vec::new(),
            queue: VecDeque::new(),
            next_id: 0,
            in_flight: 0,
            steps: 0,
            answered: 0,
            operations: 0,
        };
        driver.handle(Event::Tick);
        driver.drain();
        if health == Health::Degraded {
            driver.fail(ReplicaSlot::new(1));
        }
        assert!(driver.mirror.is_open());
        driver
    }

    /// An operator fails a replica.
    fn fail(&mut self, slot: ReplicaSlot) {
        self.handle(Event::Admin { id: AdminId(0), command: AdminCommand::Fail(slot) });
        self.drain();
    }

    fn handle(&mut self, event: Event) {
        self.now = self.now.plus(STEP_NS);
        self.steps += 1;
        self.mirror.handle(self.now, event, &mut self.actions);
        for action in self.actions.drain(..) {
            match action {
                Action::Device { op, request, .. } => self.queue.push_back((op, request)),
                Action::Reply { result, .. } => {
                    assert!(result.is_ok(), "{result:?}");
                    self.in_flight -= 1;
                    self.answered += 1;
                }
                Action::Attach { .. }
                | Action::Detach { .. }
                | Action::AdminDone { .. }
                | Action::Notice(_) => {}
            }
        }
    }

    /// Ends the oldest device operation; whether there was one.
    fn step(&mut self) -> bool {
        let Some((op, request)) = self.queue.pop_front() else { return false };
        self.operations += 1;
        let output = match request {
            DeviceOp::Read { buffer, .. } => DeviceOutput::Read(buffer),
            DeviceOp::ProbeHole { .. } => DeviceOutput::Hole(false),
            _ => DeviceOutput::Done,
        };
        self.handle(Event::DeviceDone { op, result: Ok(output) });
        if self.mirror.next_deadline().is_some_and(|at| at <= self.now) {
            self.handle(Event::Tick);
        }
        true
    }

    /// Sends a request, after waiting until fewer than `depth` are in flight.
    pub fn submit(&mut self, depth: usize, request: Request) {
        while self.in_flight >= depth {
            assert!(self.step(), "requests wait for device operations only");
        }
        self.next_id += 1;
        self.in_flight += 1;
        self.handle(Event::Request { id: RequestId(self.next_id), request });
    }

    /// What a client's write of `range` is received into.
    pub fn payload(&self, range: ByteRange) -> UniquePayload {
        self.pool.payload_for(range)
    }

    /// Ends everything that is in flight.
    pub fn drain(&mut self) {
        while self.step() {}
        assert_eq!(self.in_flight, 0);
    }

    /// Lets `ns` pass without a request: intent bits are cleared meanwhile.
    pub fn idle(&mut self, ns: u64) {
        let end = self.now.plus(ns);
        while let Some(at) = self.mirror.next_deadline().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.handle(Event::Tick);
            self.drain();
        }
        self.now = self.now.max(end);
    }
}

/// A small random number generator (splitmix64).
pub struct Random(pub u64);

impl Random {
    /// The next number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}
