//! The world that the target `mirror` drives: the core over two or three disks in memory, one of them perhaps spare.

use std::collections::BTreeMap;

use nbdmirror::buffer::{Buffer, BufferPool, Payload};
use nbdmirror::extent::Extent;
use nbdmirror::format::Found;
use nbdmirror::format::assemble::{AssembleError, AssembleOptions, assemble};
use nbdmirror::format::create::{NewReplica, NewVolume, new_volume};
use nbdmirror::format::layout::Layout;
use nbdmirror::format::read::read_found;
use nbdmirror::format::superblock::MemberState;
use nbdmirror::mirror::event::{
    Action, AdminCommand, AdminId, Answer, Candidate, DeviceOp, DeviceOutput, DeviceTraits, Event, OpId,
    Request, RequestError, RequestId,
};
use nbdmirror::mirror::{Mirror, MirrorConfig};
use nbdmirror::units::{ByteRange, Nanos, REPLICAS_MAX, Regions, ReplicaSet, ReplicaSlot, SECOND_NS};
use nix::errno::Errno;
use uuid::Uuid;

use super::input::Input;
use super::register::{ReadBegun, Register, value_of};

/// Two whole regions and a part of one.
pub const VOLUME_BYTES: u64 = (128 << 10) + (16 << 10);
const REGIONS: Regions = Regions { volume_bytes: VOLUME_BYTES, region_bytes: 64 << 10 };
const INTENT_IDLE_NS: u64 = SECOND_NS;

/// How much of a write reaches the disk.
#[derive(Clone, Copy, Debug)]
pub enum Landing {
    Whole,
    Nothing,
    /// Every second sector.
    Torn,
}

struct Disk {
    image: Vec<u8>,
    traits: DeviceTraits,
}

/// A device operation in flight.
struct Operation {
    id: OpId,
    slot: ReplicaSlot,
    disk: usize,
    range: ByteRange,
    kind: Kind,
}

enum Kind {
    Read(Buffer),
    Write { payload: Payload, copy: Vec<u8> },
    Zero,
    Flush,
    ProbeHole,
    Cache,
    Allocation,
}

/// A request that is not answered.
enum Pending {
    Read(ByteRange, ReadBegun),
    /// Of which the answer is sure, and one (a trim) of which nobody knows what it did.
    Write(ByteRange, u64),
    Trim(ByteRange, u64),
    Flush,
}

struct Daemon {
    mirror: Mirror,
    pool: BufferPool,
    attached: [Option<usize>; REPLICAS_MAX],
    operations: Vec<Operation>,
    requests: BTreeMap<u64, Pending>,
    /// The disk that an `Add` offers.
    commands: BTreeMap<u64, Option<usize>>,
    stop: Option<u64>,
    stopped: Option<bool>,
}

pub struct World {
    disks: Vec<Disk>,
    daemon: Option<Daemon>,
    register: Register,
    now: Nanos,
    next_id: u64,
    next_value: u16,
    /// Operations that failed, ever: what this volume may then do is refuse.
    errors: u32,
    starts: u64,
}

impl World {
    /// A new volume of `replicas` replicas and a blank disk, running.
    pub fn new(replicas: usize, input: &mut Input<'_>) -> Self {
        let bytes = Layout::device_bytes_min(REGIONS);
        let mut disks: Vec<Disk> = (0..=replicas)
            .map(|_| {
                let io_align = input.pick(&[512, 512, 4096, 1]);
                let traits = DeviceTraits {
                    device_bytes: bytes,
                    io_align,
                    cheap_zero: input.one_in(2),
                    cheap_allocated_zero: false,
                };
                Disk { image: vec![0; bytes as usize], traits }
            })
            .collect();
        let volume = NewVolume {
            name: "v".to_owned(),
            regions: REGIONS,
            now_unix_ns: 1,
            volume_uuid: Uuid::from_u128(1),
            generation: Uuid::from_u128(2),
            replicas: (0..replicas)
                .map(|index| NewReplica {
                    uuid: Uuid::from_u128(100 + index as u128),
                    path: format!("disk-{index}"),
                    device_bytes: bytes,
                })
                .collect(),
            in_sync: true,
        };
        let created = new_volume(volume).expect("a valid volume");
        for (index, disk) in disks.iter_mut().take(replicas).enumerate() {
            for (offset, bytes) in created.writes(index) {
                disk.image[offset.0 as usize..offset.0 as usize + bytes.len()].copy_from_slice(&bytes);
            }
        }
        let register = Register::new(VOLUME_BYTES);
        let mut world = Self {
            disks,
            daemon: None,
            register,
            now: Nanos(1),
            next_id: 0,
            next_value: 0,
            errors: 0,
            starts: 0,
        };
        world.start();
        world
    }

    /// Whether the daemon runs and was not told to stop.
    pub fn runs(&self) -> bool {
        self.daemon.as_ref().is_some_and(|daemon| daemon.stop.is_none())
    }

    /// Requests that are not answered.
    pub fn requests(&self) -> usize {
        self.daemon.as_ref().map_or(0, |daemon| daemon.requests.len())
    }

    /// Device operations in flight.
    pub fn operations(&self) -> usize {
        self.daemon.as_ref().map_or(0, |daemon| daemon.operations.len())
    }

    fn find(&self, disk: usize) -> Option<Found> {
        let Disk { image, traits } = &self.disks[disk];
        let mut read_at = |offset: nbdmirror::units::ReplicaOffset, out: &mut [u8]| {
            out.copy_from_slice(&image[offset.0 as usize..offset.0 as usize + out.len()]);
            Ok(())
        };
        // Two superblocks that an error spoilt: no replica any more.
        read_found(&format!("disk-{disk}"), traits.device_bytes, &mut read_at).ok().flatten()
    }

    /// Starts the daemon from what stands on the disks. Where that is refused after errors, the run ends.
    fn start(&mut self) {
        let mut found: Vec<(usize, Found)> =
            (0..self.disks.len()).filter_map(|disk| Some((disk, self.find(disk)?))).collect();
        let options = AssembleOptions { degraded: true, ..AssembleOptions::default() };
        let assembly = loop {
            let list: Vec<Found> = found.iter().map(|(_, found)| found.clone()).collect();
            match assemble(&list, options) {
                Ok(assembly) => break assembly,
                Err(AssembleError::NotMember { path, .. }) => found.retain(|(_, found)| found.path != path),
                Err(error) => {
                    assert!(self.errors > 0, "refused though no device failed: {error}");
                    return;
                }
            }
        };
        let attached = assembly.found_of_slot.map(|at| at.map(|at| found[at].0));
        self.starts += 1;
        let config = MirrorConfig {
            read_only: false,
            write_mostly: ReplicaSet::EMPTY,
            traits: attached.map(|disk| disk.map(|disk| self.disks[disk].traits)),
            entropy: u128::from(self.starts) << 64,
            wall_clock_origin_ns: 0,
            intent_idle_ns: INTENT_IDLE_NS,
            resync_jobs_max: 2,
            resync_burst_ns: 16_000_000,
            without_intent: false,
        };
        let pool = BufferPool::new(1 << 20);
        let daemon = Daemon {
            mirror: Mirror::new(config, assembly, pool.clone()),
            pool,
            attached,
            operations: Vec::new(),
            requests: BTreeMap::new(),
            commands: BTreeMap::new(),
            stop: None,
            stopped: None,
        };
        self.daemon = Some(daemon);
        self.handle(Event::Tick);
    }

    fn handle(&mut self, event: Event) {
        let Some(daemon) = &mut self.daemon else { return };
        let mut actions = Vec::new();
        daemon.mirror.handle(self.now, event, &mut actions);
        daemon.mirror.check_invariants();
        for action in actions {
            match action {
                Action::Device { op, slot, request } => self.submit(op, slot, request),
                Action::Reply { id, result } => self.reply(id.0, result),
                Action::Attach { id, slot } => {
                    let Some(daemon) = &mut self.daemon else { return };
                    let disk = daemon.commands[&id.0];
                    assert!(disk.is_some() && daemon.attached[slot.index()].is_none());
                    daemon.attached[slot.index()] = disk;
                }
                Action::Detach { slot } => {
                    let Some(daemon) = &mut self.daemon else { return };
                    assert!(
                        daemon.operations.iter().all(|operation| operation.slot != slot),
                        "detached in use"
                    );
                    assert!(daemon.attached[slot.index()].take().is_some());
                }
                Action::AdminDone { id, result } => {
                    let Some(daemon) = &mut self.daemon else { return };
                    assert!(daemon.commands.remove(&id.0).is_some(), "a command is answered twice");
                    if daemon.stop == Some(id.0) {
                        daemon.stopped = Some(result.is_ok());
                    }
                }
                Action::Notice(_) => {}
            }
        }
    }

    fn submit(&mut self, id: OpId, slot: ReplicaSlot, request: DeviceOp) {
        let Some(daemon) = &mut self.daemon else { return };
        let disk = daemon.attached[slot.index()].expect("an operation on a replica that is attached");
        let DeviceTraits { device_bytes, io_align, .. } = self.disks[disk].traits;
        let align = u64::from(io_align);
        let (range, align, kind) = match request {
            DeviceOp::Read { offset, len, buffer } => {
                assert!(len as usize <= buffer.len());
                (ByteRange::new(offset.0, len), align, Kind::Read(buffer))
            }
            DeviceOp::Write { offset, data, .. } => {
                let copy = data.bytes().to_vec();
                assert!((data.bytes().as_ptr() as u64).is_multiple_of(align), "memory is not aligned");
                (ByteRange::new(offset.0, data.len as u64), align, Kind::Write { payload: data, copy })
            }
            DeviceOp::Zero { offset, len, .. } => (ByteRange::new(offset.0, len), 4096, Kind::Zero),
            DeviceOp::Flush => (ByteRange::new(0, 0), 1, Kind::Flush),
            DeviceOp::ProbeHole { offset, len } => (ByteRange::new(offset.0, len), 1, Kind::ProbeHole),
            DeviceOp::Cache { offset, len } => (ByteRange::new(offset.0, len), 1, Kind::Cache),
            DeviceOp::Allocation { offset, len } => (ByteRange::new(offset.0, len), 1, Kind::Allocation),
        };
        assert!(range.is_aligned(align) && range.end() <= device_bytes, "{range:?} on slot {slot}");
        assert!(daemon.operations.iter().all(|operation| operation.id != id));
        let operation = Operation { id, slot, disk, range, kind };
        self.check_intent_before_data(&operation);
        if let Some(daemon) = &mut self.daemon {
            daemon.operations.push(operation);
        }
    }

    /// The disks of the replicas in sync.
    fn in_sync_disks(&self) -> Vec<usize> {
        let Some(daemon) = &self.daemon else { return vec![] };
        let (in_sync, _, _) = daemon.mirror.replica_sets();
        in_sync.iter().filter_map(|slot| daemon.attached[slot.index()]).collect()
    }

    /// Promise 1: before data goes to a replica in sync, its regions' intent bits stand on every replica in sync.
    fn check_intent_before_data(&self, operation: &Operation) {
        let Operation { range, kind, disk, .. } = operation;
        let in_sync = self.in_sync_disks();
        let writes = matches!(kind, Kind::Write { .. } | Kind::Zero) && range.offset < VOLUME_BYTES;
        if !writes || !in_sync.contains(disk) {
            return;
        }
        for at in in_sync {
            // The first sector of the only page has the bits of all regions, behind its header of eight bytes.
            let page =
                Layout { regions: REGIONS, device_bytes: self.disks[at].traits.device_bytes }.page_offset(0);
            let bits = self.disks[at].image[page.0 as usize + 8];
            for region in REGIONS.touched(*range) {
                assert!(
                    bits & (1 << region.0) != 0,
                    "data for {region:?} before its intent bit on disk {at}"
                );
            }
        }
    }

    /// Promise 2: whoever may have missed an acknowledged write is recorded so on a replica in sync.
    fn check_failure_before_ack(&self, range: ByteRange) {
        let Some(daemon) = &self.daemon else { return };
        let (in_sync, resyncing, members) = daemon.mirror.replica_sets();
        let survivors = self.in_sync_disks();
        for slot in members.difference(in_sync.union(resyncing)).iter() {
            let records = |found: &Found| {
                let member = found.superblock.members[slot.index()].as_ref();
                let stale = &found.maps.stale[slot.index()];
                member.is_none_or(|member| member.state != MemberState::InSync)
                    && REGIONS.touched(range).all(|region| stale[region.index()])
            };
            let recorded = survivors.iter().filter_map(|disk| self.find(*disk)).any(|found| records(&found));
            assert!(recorded, "a write is answered; that {slot} missed it is recorded nowhere");
        }
    }

    /// The operation that stands at `at` in the order of submission ends.
    pub fn complete(&mut self, at: usize, landing: Landing, result: Result<(), Errno>) {
        let Some(daemon) = &mut self.daemon else { return };
        let operation = daemon.operations.remove(at);
        self.land(&operation, landing);
        self.errors += u32::from(result.is_err());
        let image = &self.disks[operation.disk].image;
        let bytes = &image[operation.range.offset as usize..operation.range.end() as usize];
        let output = match operation.kind {
            Kind::Read(mut buffer) => {
                buffer[..bytes.len()].copy_from_slice(bytes);
                DeviceOutput::Read(buffer)
            }
            Kind::ProbeHole => DeviceOutput::Hole(bytes[0] == 0 && bytes[1..] == bytes[..bytes.len() - 1]),
            Kind::Write { payload, copy } => {
                assert!(payload.bytes() == copy, "a buffer changed while it was in flight");
                DeviceOutput::Done
            }
            Kind::Allocation => DeviceOutput::Allocation(vec![Extent { len: operation.range.len, flags: 0 }]),
            Kind::Zero | Kind::Flush | Kind::Cache => DeviceOutput::Done,
        };
        self.now = self.now.plus(1000);
        self.handle(Event::DeviceDone { op: operation.id, result: result.map(|()| output) });
        // Promise 4: no bit is cleared under a write in flight.
        if operation.range.offset >= VOLUME_BYTES {
            self.daemon
                .iter()
                .flat_map(|daemon| &daemon.operations)
                .for_each(|op| self.check_intent_before_data(op));
        }
    }

    fn land(&mut self, operation: &Operation, landing: Landing) {
        let image = &mut self.disks[operation.disk].image;
        let step = match landing {
            Landing::Nothing => return,
            Landing::Whole => 1,
            Landing::Torn => 2,
        };
        let target = &mut image[operation.range.offset as usize..operation.range.end() as usize];
        match &operation.kind {
            Kind::Write { copy, .. } => {
                // Whole sectors, counted from the start of the disk or, for smaller writes, of the write.
                for (to, from) in target.chunks_mut(512).zip(copy.chunks(512)).step_by(step) {
                    to.copy_from_slice(from);
                }
            }
            Kind::Zero => target.chunks_mut(512).step_by(step).for_each(|sector| sector.fill(0)),
            Kind::Read(_) | Kind::Flush | Kind::ProbeHole | Kind::Cache | Kind::Allocation => {}
        }
    }

    fn send(&mut self, pending: Pending, request: impl FnOnce(&BufferPool) -> Request) {
        let id = self.fresh_id();
        let Some(daemon) = &mut self.daemon else { return };
        daemon.requests.insert(id, pending);
        let request = request(&daemon.pool);
        self.handle(Event::Request { id: RequestId(id), request });
    }

    fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// A client writes.
    pub fn write(&mut self, range: ByteRange, fua: bool) {
        self.next_value += 1;
        let value = self.next_value;
        let begin = self.register.write_begins(range, value);
        self.send(Pending::Write(range, begin), |pool| {
            let mut data = pool.payload_for(range);
            data.bytes_mut().chunks_exact_mut(2).for_each(|pair| pair.copy_from_slice(&value.to_le_bytes()));
            Request::Write { offset: range.offset, data, fua }
        });
    }

    /// A client reads.
    pub fn read(&mut self, range: ByteRange) {
        let read = self.register.read_begins(range);
        self.send(Pending::Read(range, read), |_| Request::Read { range });
    }

    /// A client writes zeroes.
    pub fn zero(&mut self, range: ByteRange, may_unmap: bool, fua: bool) {
        let begin = self.register.write_begins(range, 0);
        self.send(Pending::Write(range, begin), |_| Request::WriteZeroes {
            range,
            may_unmap,
            fast: false,
            fua,
        });
    }

    /// A client does not need a range any more.
    pub fn trim(&mut self, range: ByteRange, fua: bool) {
        let begin = self.register.write_begins(range, 0);
        self.send(Pending::Trim(range, begin), |_| Request::Trim { range, fua });
    }

    /// A client flushes.
    pub fn flush(&mut self) {
        self.send(Pending::Flush, |_| Request::Flush);
    }

    fn reply(&mut self, id: u64, result: Result<Answer, RequestError>) {
        let Some(daemon) = &mut self.daemon else { return };
        let pending = daemon.requests.remove(&id).expect("a request is answered once");
        let stopping = daemon.stop.is_some() && result.as_ref().err() == Some(&RequestError::Stopping);
        assert!(result.is_ok() || self.errors > 0 || stopping, "{result:?} though no device failed");
        match pending {
            Pending::Read(range, read) => {
                if let Ok(answer) = result {
                    let data = answer.data();
                    let bytes = data.as_ref().map_or(&[][..], Payload::bytes);
                    self.register.read_ends(range, &read, bytes);
                }
            }
            Pending::Write(range, begin) => {
                if result.is_ok() && !range.is_empty() {
                    self.check_failure_before_ack(range);
                }
                self.register.write_ends(range, begin, result.is_ok());
            }
            Pending::Trim(range, begin) => self.register.write_ends(range, begin, false),
            Pending::Flush => {}
        }
    }

    /// Time passes: `ms`, or to what the core waits for where that is sooner.
    pub fn wait(&mut self, ms: u64) {
        let end = self.now.plus(ms * 1_000_000);
        let wanted = self.daemon.as_ref().and_then(|daemon| daemon.mirror.next_deadline());
        self.now = wanted.map_or(end, |at| at.min(end)).max(self.now);
        self.handle(Event::Tick);
    }

    /// A tick that nobody asked for.
    pub fn tick(&mut self) {
        self.handle(Event::Tick);
    }

    /// The operator does something to slot (or disk) `which`.
    pub fn operate(&mut self, kind: u8, which: usize, force: bool) {
        let id = self.fresh_id();
        let slot = ReplicaSlot::new(which);
        let (command, disk) = match kind {
            0 => (AdminCommand::Fail(slot), None),
            1 => (AdminCommand::Remove(slot), None),
            _ => {
                let disk = which % self.disks.len();
                let Some(daemon) = &self.daemon else { return };
                if daemon.attached.contains(&Some(disk))
                    || daemon.commands.values().any(|other| *other == Some(disk))
                {
                    return; // it is locked
                }
                let candidate = Candidate {
                    found: self.find(disk),
                    traits: self.disks[disk].traits,
                    path: format!("disk-{disk}"),
                    fresh_uuid: Uuid::from_u128(u128::from(id) << 32),
                    force,
                };
                (AdminCommand::Add(Box::new(candidate)), Some(disk))
            }
        };
        let Some(daemon) = &mut self.daemon else { return };
        daemon.commands.insert(id, disk);
        self.handle(Event::Admin { id: AdminId(id), command });
    }

    /// The operator stops the volume.
    pub fn stop(&mut self) {
        let id = self.fresh_id();
        let Some(daemon) = &mut self.daemon else { return };
        daemon.commands.insert(id, None);
        daemon.stop = Some(id);
        self.handle(Event::Admin { id: AdminId(id), command: AdminCommand::Stop });
    }

    /// The process is killed, and started again. What was in flight lands as the input says.
    pub fn kill(&mut self, input: &mut Input<'_>) {
        let Some(daemon) = self.daemon.take() else { return };
        for operation in daemon.operations {
            let landing = input.pick(&[Landing::Nothing, Landing::Whole, Landing::Torn]);
            self.land(&operation, landing);
        }
        self.register.crash();
        self.start();
    }

    /// Errors have stopped a while ago.
    pub fn check_settled(&self) {
        let Some(daemon) = &self.daemon else { return };
        assert!(daemon.requests.is_empty(), "{} requests are never answered", daemon.requests.len());
        assert!(daemon.commands.is_empty(), "{} commands are never answered", daemon.commands.len());
    }

    /// The volume has stopped: what is on the disks is right.
    pub fn check_stopped(&mut self) {
        let Some(daemon) = &self.daemon else { return };
        assert!(daemon.stopped.is_some(), "a stop is never answered");
        assert!(daemon.requests.is_empty() && daemon.operations.is_empty());
        assert_eq!(daemon.pool.used_bytes(), 0, "buffers are kept");
        if self.errors > 0 {
            return;
        }
        assert_eq!(daemon.stopped, Some(true), "not stopped though no device failed");
        let range = ByteRange::new(0, VOLUME_BYTES);
        for disk in self.in_sync_disks() {
            let image = self.disks[disk].image[..VOLUME_BYTES as usize].to_vec();
            assert!(image.chunks_exact(512).all(|sector| value_of(sector).is_some()));
            let read = self.register.read_begins(range);
            self.register.read_ends(range, &read, &image);
        }
    }
}
