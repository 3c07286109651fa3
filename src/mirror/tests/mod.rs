//! The core by itself, over disks that are plain memory and answer in order: what each rule does in the
//! simplest case. Crashes, races and random worlds are the simulator's.

mod add;
mod admin;
mod answers;
mod block_status;
mod lives;
mod membership;

use nix::errno::Errno;
use uuid::Uuid;

use super::event::{
    Action, AdminCommand, AdminId, Answer, Candidate, DeviceOp, DeviceOutput, DeviceTraits, Event, OpId,
    Request, RequestError, RequestId,
};
use super::status::{Health, ReplicaState};
use super::{Mirror, MirrorConfig};
use crate::buffer::BufferPool;
use crate::extent::{ALLOCATION_HOLE, ALLOCATION_ZERO, Extent, push_extent};
use crate::format::Found;
use crate::format::assemble::{AssembleOptions, assemble};
use crate::format::create::{NewReplica, NewVolume, new_volume};
use crate::format::layout::Layout;
use crate::format::read::read_found;
use crate::format::superblock::{MemberState, Superblock};
use crate::units::{ByteRange, Nanos, REPLICAS_MAX, Regions, ReplicaSet, ReplicaSlot, SECOND_NS};

const VOLUME_BYTES: u64 = 1 << 20;
const REGIONS: Regions = Regions { volume_bytes: VOLUME_BYTES, region_bytes: 64 << 10 };

type Reply = Result<Answer, RequestError>;
/// Names operations.
type Pick<'a> = &'a dyn Fn(usize, &DeviceOp) -> bool;
/// Decides what an operation does instead of succeeding.
type Fault = Box<dyn FnMut(ReplicaSlot, &DeviceOp) -> Option<Errno>>;

struct World {
    mirror: Mirror,
    images: Vec<Vec<u8>>,
    /// Which image each slot has.
    image_of: [Option<usize>; REPLICAS_MAX],
    pool: BufferPool,
    now: Nanos,
    next_id: u64,
    queue: Vec<(OpId, ReplicaSlot, DeviceOp)>,
    replies: Vec<(RequestId, Reply)>,
    answers: Vec<Result<String, String>>,
    notices: Vec<String>,
    fault: Fault,
    log: Vec<(ReplicaSlot, String)>,
    adding: Option<usize>,
    /// Alignment of the next candidate.
    io_align: u32,
}

fn traits(bytes: usize) -> DeviceTraits {
    DeviceTraits { device_bytes: bytes as u64, io_align: 512, cheap_zero: true, cheap_allocated_zero: true }
}

fn found_on(image: &[u8], name: &str) -> Option<Found> {
    let mut read_at = |offset: crate::units::ReplicaOffset, buffer: &mut [u8]| {
        buffer.copy_from_slice(&image[offset.0 as usize..offset.0 as usize + buffer.len()]);
        Ok(())
    };
    read_found(name, image.len() as u64, &mut read_at).unwrap()
}

fn fresh_images(count: usize) -> Vec<Vec<u8>> {
    let bytes = Layout::device_bytes_min(REGIONS);
    let replicas = (0..count).map(|index| NewReplica {
        uuid: Uuid::from_u128(index as u128 + 100),
        path: format!("r{index}"),
        device_bytes: bytes,
    });
    let created = new_volume(NewVolume {
        name: "v".to_owned(),
        regions: REGIONS,
        now_unix_ns: 1,
        volume_uuid: Uuid::from_u128(1),
        generation: Uuid::from_u128(2),
        replicas: replicas.collect(),
        in_sync: true,
    })
    .unwrap();
    let mut images = vec![vec![0; bytes as usize]; count];
    for (index, image) in images.iter_mut().enumerate() {
        for (offset, bytes) in created.writes(index) {
            image[offset.0 as usize..offset.0 as usize + bytes.len()].copy_from_slice(&bytes);
        }
    }
    images
}

impl World {
    fn new(count: usize) -> Self {
        Self::open(fresh_images(count), &(0..count).collect::<Vec<_>>(), AssembleOptions::default())
    }

    /// Opens the volume over those of `images` that `present` names.
    fn open(images: Vec<Vec<u8>>, present: &[usize], options: AssembleOptions) -> Self {
        let mut world = Self::begin(images, present, options, ReplicaSet::EMPTY);
        world.drain();
        world
    }

    /// Begins to open the volume: no operation is carried out yet.
    fn begin(
        images: Vec<Vec<u8>>,
        present: &[usize],
        options: AssembleOptions,
        write_mostly: ReplicaSet,
    ) -> Self {
        let founds: Vec<Found> =
            present.iter().map(|index| found_on(&images[*index], &format!("r{index}")).unwrap()).collect();
        let assembly = assemble(&founds, options).unwrap();
        let mut config = MirrorConfig {
            read_only: options.read_only,
            write_mostly,
            traits: [None; REPLICAS_MAX],
            entropy: 77 + images[0].iter().map(|byte| u128::from(*byte)).sum::<u128>(),
            wall_clock_origin_ns: 0,
            intent_idle_ns: 5 * SECOND_NS,
            resync_jobs_max: 4,
            resync_burst_ns: 16_000_000,
            without_intent: false,
        };
        let mut image_of = [None; REPLICAS_MAX];
        for slot in ReplicaSlot::all() {
            if let Some(found) = assembly.found_of_slot[slot.index()] {
                image_of[slot.index()] = Some(present[found]);
                config.traits[slot.index()] = Some(traits(images[present[found]].len()));
            }
        }
        let pool = BufferPool::new(1 << 20);
        let mirror = Mirror::new(config, assembly, pool.clone());
        let mut world = Self {
            mirror,
            images,
            image_of,
            pool,
            now: Nanos(0),
            next_id: 0,
            queue: Vec::new(),
            replies: Vec::new(),
            answers: Vec::new(),
            notices: Vec::new(),
            fault: Box::new(|_, _| None),
            log: Vec::new(),
            adding: None,
            io_align: 512,
        };
        world.handle(Event::Tick);
        world
    }

    /// What stands on the replicas when the process dies now.
    fn crash(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.images)
    }

    fn handle(&mut self, event: Event) {
        let mut out = Vec::new();
        self.mirror.handle(self.now, event, &mut out);
        self.mirror.check_invariants();
        for action in out {
            match action {
                Action::Device { op, slot, request } => {
                    self.log.push((slot, describe(&request)));
                    self.queue.push((op, slot, request));
                }
                Action::Reply { id, result } => self.replies.push((id, result)),
                Action::Attach { slot, .. } => self.image_of[slot.index()] = self.adding.take(),
                Action::Detach { slot } => self.image_of[slot.index()] = None,
                Action::AdminDone { result, .. } => self.answers.push(result.map_err(|error| error.0)),
                Action::Notice(notice) => self.notices.push(notice.text),
            }
        }
    }

    /// Carries out the oldest operation.
    fn step(&mut self) -> bool {
        self.step_where(&|_, _| true)
    }

    /// Carries out the oldest of the operations that `pick` names; the others hang.
    fn step_where(&mut self, pick: Pick<'_>) -> bool {
        let Some(at) = self.queue.iter().position(|(_, slot, request)| pick(slot.index(), request)) else {
            return false;
        };
        let (op, slot, request) = self.queue.remove(at);
        self.now = self.now.plus(1000);
        let result = match (self.fault)(slot, &request) {
            Some(errno) => Err(errno),
            None => Ok(self.carry_out(slot, request)),
        };
        self.handle(Event::DeviceDone { op, result });
        true
    }

    fn carry_out(&mut self, slot: ReplicaSlot, request: DeviceOp) -> DeviceOutput {
        let image = &mut self.images[self.image_of[slot.index()].unwrap()];
        match request {
            DeviceOp::Read { offset, len, mut buffer } => {
                let at = offset.0 as usize;
                buffer[..len as usize].copy_from_slice(&image[at..at + len as usize]);
                return DeviceOutput::Read(buffer);
            }
            DeviceOp::Write { offset, data, .. } => {
                let at = offset.0 as usize;
                image[at..at + data.len].copy_from_slice(data.bytes());
            }
            DeviceOp::Zero { offset, len, .. } => {
                image[offset.0 as usize..(offset.0 + len) as usize].fill(0);
            }
            DeviceOp::ProbeHole { offset, len } => {
                let range = &image[offset.0 as usize..(offset.0 + len) as usize];
                return DeviceOutput::Hole(range.iter().all(|byte| *byte == 0));
            }
            DeviceOp::Allocation { offset, len } => {
                return DeviceOutput::Allocation(holes_in(image, ByteRange::new(offset.0, len)));
            }
            DeviceOp::Cache { .. } | DeviceOp::Flush => {}
        }
        DeviceOutput::Done
    }

    fn drain(&mut self) {
        self.drain_where(&|_, _| true);
    }

    fn drain_where(&mut self, pick: Pick<'_>) {
        while self.step_where(pick) {}
    }

    fn send(&mut self, request: Request) -> RequestId {
        self.next_id += 1;
        let id = RequestId(self.next_id);
        self.handle(Event::Request { id, request });
        id
    }

    fn write_request(&self, offset: u64, len: u64, byte: u8) -> Request {
        let mut data = self.pool.payload_for(ByteRange::new(offset, len));
        data.bytes_mut().fill(byte);
        Request::Write { offset, data, fua: false }
    }

    fn call(&mut self, request: Request) -> Reply {
        let id = self.send(request);
        self.drain();
        let at = self.replies.iter().position(|(other, _)| *other == id).expect("answered");
        self.replies.remove(at).1
    }

    fn write(&mut self, offset: u64, len: u64, byte: u8) -> Result<(), RequestError> {
        let request = self.write_request(offset, len, byte);
        self.call(request).map(|_| ())
    }

    fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        self.call(Request::Read { range: ByteRange::new(offset, len) })
            .unwrap()
            .data()
            .unwrap()
            .bytes()
            .to_vec()
    }

    fn send_admin(&mut self, command: AdminCommand) {
        self.next_id += 1;
        self.handle(Event::Admin { id: AdminId(self.next_id), command });
    }

    fn admin(&mut self, command: AdminCommand) -> Result<String, String> {
        self.send_admin(command);
        self.drain();
        self.answers.pop().expect("answered")
    }

    fn candidate(&mut self, image: usize, force: bool) -> AdminCommand {
        self.adding = Some(image);
        AdminCommand::Add(Box::new(Candidate {
            found: found_on(&self.images[image], "back"),
            traits: DeviceTraits { io_align: self.io_align, ..traits(self.images[image].len()) },
            path: "back".to_owned(),
            fresh_uuid: Uuid::from_u128(999),
            force,
        }))
    }

    fn add(&mut self, image: usize, force: bool) -> Result<String, String> {
        let command = self.candidate(image, force);
        self.admin(command)
    }

    fn reply_to(&mut self, id: RequestId) -> Option<Reply> {
        let at = self.replies.iter().position(|(other, _)| *other == id)?;
        Some(self.replies.remove(at).1)
    }

    fn wait(&mut self, ns: u64) {
        let end = self.now.plus(ns);
        while let Some(at) = self.mirror.next_deadline().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.handle(Event::Tick);
            self.drain();
        }
        self.now = self.now.max(end);
    }

    fn state(&self, slot: usize) -> ReplicaState {
        let status = self.mirror.status(self.now);
        status.replicas.iter().find(|replica| replica.slot == slot).unwrap().state
    }

    fn same_data(&self, one: usize, other: usize) -> bool {
        self.images[one][..VOLUME_BYTES as usize] == self.images[other][..VOLUME_BYTES as usize]
    }
}

/// Blocks of zeroes are holes.
fn holes_in(image: &[u8], range: ByteRange) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut at = range.offset;
    while at < range.end() {
        let block = ByteRange::new(at, 1).expanded_to(4096);
        let end = block.end().min(range.end());
        let zero = image[block.offset as usize..block.end() as usize].iter().all(|byte| *byte == 0);
        push_extent(&mut extents, end - at, if zero { ALLOCATION_HOLE | ALLOCATION_ZERO } else { 0 });
        at = end;
    }
    extents
}

/// The superblock that an operation writes.
fn superblock_in(request: &DeviceOp) -> Option<Superblock> {
    match request {
        DeviceOp::Write { data, .. } => Superblock::decode(data.bytes()).ok(),
        _ => None,
    }
}

fn writes_data(request: &DeviceOp) -> bool {
    matches!(request, DeviceOp::Write { offset, .. } if offset.0 < VOLUME_BYTES)
}

fn describe(request: &DeviceOp) -> String {
    let place = |offset: u64| if offset < VOLUME_BYTES { "data" } else { "meta" };
    match request {
        DeviceOp::Read { offset, .. } => format!("read {}", place(offset.0)),
        DeviceOp::Write { offset, .. } => format!("write {}", place(offset.0)),
        DeviceOp::Zero { .. } => "zero".to_owned(),
        DeviceOp::Flush => "flush".to_owned(),
        DeviceOp::ProbeHole { .. } => "probe".to_owned(),
        DeviceOp::Cache { .. } => "cache".to_owned(),
        DeviceOp::Allocation { .. } => "allocation".to_owned(),
    }
}

#[test]
fn what_is_written_is_read_from_both_and_unaligned_bytes_keep_their_neighbours() {
    let mut world = World::new(2);
    assert!(world.mirror.is_open());
    world.write(0, 4096, 1).unwrap();
    world.write(100, 3, 2).unwrap();
    world.write(510, 5000, 3).unwrap();
    let mut expected = vec![1; 100];
    expected.extend([2; 3]);
    expected.extend([1; 407]);
    expected.extend([3; 5000]);
    expected.extend([0; 90]);
    assert_eq!(world.read(0, 5600), expected);
    assert_eq!(world.read(511, 1), vec![3]);
    assert!(world.same_data(0, 1));
}

#[test]
fn zeroes_and_trims_read_as_zeroes_on_both_and_spare_the_neighbours() {
    let mut world = World::new(2);
    world.write(0, 32768, 7).unwrap();
    let range = ByteRange::new(100, 9000);
    world.call(Request::WriteZeroes { range, may_unmap: true, fast: false, fua: true }).unwrap();
    assert_eq!(world.read(0, 100), vec![7; 100]);
    assert_eq!(world.read(100, 9000), vec![0; 9000]);
    assert_eq!(world.read(9100, 100), vec![7; 100]);
    world.call(Request::Trim { range: ByteRange::new(16000, 8192), fua: false }).unwrap();
    assert_eq!(world.read(12288, 4096), vec![7; 4096]);
    assert_eq!(world.read(16384, 4096), vec![0; 4096]);
    assert!(world.same_data(0, 1));
}

#[test]
fn promise_1_the_first_write_to_a_region_waits_for_its_intent_bit() {
    let mut world = World::new(2);
    world.log.clear();
    let request = world.write_request(0, 4096, 1);
    world.send(request);
    assert!(world.log.iter().all(|(_, what)| what == "write meta") && world.log.len() == 2);
    world.drain();
    let request = world.write_request(4096, 4096, 1);
    world.log.clear();
    world.send(request);
    assert!(world.log.iter().all(|(_, what)| what == "write data") && world.log.len() == 2, "dirty already");
}

#[test]
fn the_benchmark_switch_leaves_intent_bits_out() {
    let mut world = World::new(2);
    world.mirror.config.without_intent = true;
    world.log.clear();
    world.write(0, 4096, 1).unwrap();
    assert!(world.log.iter().all(|(_, what)| what == "write data") && world.log.len() == 2);
    assert!(!world.mirror.maps.intent.any());
}

#[test]
fn with_the_benchmark_switch_a_write_that_fails_everywhere_is_an_error() {
    let mut world = World::new(2);
    world.mirror.config.without_intent = true;
    world.fault = Box::new(|_, request| matches!(request, DeviceOp::Write { .. }).then_some(Errno::EIO));
    assert_eq!(world.write(0, 4096, 1).unwrap_err(), RequestError::Io);
    world.fault = Box::new(|_, _| None);
    world.write(0, 4096, 2).unwrap();
    assert_eq!(world.read(0, 4096), vec![2; 4096]);
}

#[test]
fn promise_2_a_failed_replica_is_recorded_before_the_write_is_answered() {
    let mut world = World::new(2);
    world.write(0, 4096, 1).unwrap();
    let slot = ReplicaSlot::new(1);
    world.fault = Box::new(move |on, request| {
        (on == slot && matches!(request, DeviceOp::Write { .. })).then_some(Errno::EIO)
    });
    let request = world.write_request(0, 4096, 2);
    world.send(request);
    while world.replies.is_empty() {
        assert!(world.step());
    }
    let survivor = found_on(&world.images[0], "r0").unwrap();
    assert_eq!(survivor.superblock.members[1].as_ref().unwrap().state, MemberState::Faulty);
    assert!(survivor.maps.stale[1][0]);
    assert!(
        survivor.superblock.event_count > found_on(&world.images[1], "r1").unwrap().superblock.event_count
    );
    assert_eq!(world.read(0, 4096), vec![2; 4096]);
    assert_eq!(world.mirror.status(world.now).health, Health::Degraded);
}

#[test]
fn promise_6_the_last_replica_in_sync_is_never_failed() {
    let mut world = World::new(2);
    world.admin(AdminCommand::Fail(ReplicaSlot::new(0))).unwrap();
    assert!(world.admin(AdminCommand::Fail(ReplicaSlot::new(1))).unwrap_err().contains("last"));
    assert!(world.admin(AdminCommand::Remove(ReplicaSlot::new(1))).unwrap_err().contains("last"));
    world.write(0, 100, 1).unwrap();
    world.fault = Box::new(|_, request| matches!(request, DeviceOp::Write { .. }).then_some(Errno::ENOSPC));
    assert_eq!(world.write(0, 100, 2), Err(RequestError::NoSpace));
    assert_eq!(world.state(1), ReplicaState::InSync);
}

#[test]
fn a_replica_that_was_away_gets_only_what_it_missed() {
    let mut world = World::new(2);
    world.write(0, 300_000, 1).unwrap();
    world.wait(30 * SECOND_NS);
    assert_eq!(world.mirror.status(world.now).dirty_bytes, 0, "idle regions become clean");
    world.admin(AdminCommand::Fail(ReplicaSlot::new(1))).unwrap();
    world.write(70_000, 10, 2).unwrap();
    let text = world.add(1, false).unwrap();
    assert!(text.contains("65536 bytes to copy"), "{text}");
    world.wait(2 * SECOND_NS);
    assert_eq!(world.state(1), ReplicaState::InSync);
    assert!(world.same_data(0, 1));
    assert_eq!(world.mirror.status(world.now).health, Health::Healthy);
}

#[test]
fn a_new_replica_gets_everything() {
    let mut images = fresh_images(2);
    images.push(vec![0xee; Layout::device_bytes_min(REGIONS) as usize + 8192]);
    let bytes = images[0].len() + 8192;
    images[2].truncate(bytes);
    let tail = images[2].len() - 8192;
    images[2][tail..].fill(0);
    let mut world = World::open(images, &[0, 1], AssembleOptions::default());
    world.write(5000, 100_000, 9).unwrap();
    let text = world.add(2, false).unwrap();
    assert!(text.contains("1048576 bytes"), "{text}");
    world.wait(2 * SECOND_NS);
    assert_eq!(world.state(2), ReplicaState::InSync);
    assert!(world.same_data(0, 2));
    world.admin(AdminCommand::Remove(ReplicaSlot::new(0))).unwrap();
    assert!(found_on(&world.images[0], "r0").is_none(), "its superblocks are wiped");
    assert_eq!(world.mirror.status(world.now).replicas.len(), 2);
}

#[test]
fn after_an_unclean_stop_only_dirty_regions_are_synced_and_reads_wait_for_that() {
    let mut world = World::new(2);
    world.write(0, 4096, 1).unwrap();
    world.wait(30 * SECOND_NS);
    world.write(200_000, 4096, 2).unwrap();
    let mut images = std::mem::take(&mut world.images);
    images[1][200_000] = 99; // as if the write had not reached it
    let mut world = World::open(images, &[0, 1], AssembleOptions::default());
    assert_eq!(world.mirror.status(world.now).unclean_bytes_at_start, 65536);
    assert_eq!(world.read(200_000, 1), vec![2]);
    world.wait(SECOND_NS);
    assert!(world.same_data(0, 1));
}

#[test]
fn a_clean_stop_leaves_nothing_to_sync() {
    let mut world = World::new(3);
    world.write(0, 400_000, 1).unwrap();
    world.admin(AdminCommand::Fail(ReplicaSlot::new(2))).unwrap();
    world.write(500_000, 4096, 3).unwrap();
    assert_eq!(world.admin(AdminCommand::Stop).unwrap(), "stopped, clean");
    let images = std::mem::take(&mut world.images);
    let mut world = World::open(images, &[0, 1, 2], AssembleOptions::default());
    assert_eq!(world.mirror.status(world.now).unclean_bytes_at_start, 0);
    world.wait(2 * SECOND_NS);
    assert_eq!(world.state(2), ReplicaState::InSync);
    assert!(world.same_data(0, 2) && world.same_data(0, 1));
}

#[test]
fn a_read_error_is_answered_from_the_other_replica() {
    let mut world = World::new(2);
    world.write(0, 4096, 5).unwrap();
    let slot = ReplicaSlot::new(0);
    world.fault = Box::new(move |on, request| {
        (on == slot && matches!(request, DeviceOp::Read { .. })).then_some(Errno::EIO)
    });
    for _ in 0..10 {
        assert_eq!(world.read(0, 4096), vec![5; 4096]);
    }
    assert_eq!(world.state(0), ReplicaState::InSync);
}

#[test]
fn promise_9_a_flush_that_failed_everywhere_is_not_forgotten() {
    let mut world = World::new(2);
    world.write(0, 4096, 5).unwrap();
    world.fault = Box::new(|_, request| matches!(request, DeviceOp::Flush).then_some(Errno::EIO));
    assert!(world.call(Request::Flush).is_err());
    world.fault = Box::new(|_, _| None);
    assert!(world.call(Request::Flush).is_err(), "a later success proves nothing");
    let told = world.notices.iter().filter(|text| text.contains("no replica in sync can be flushed"));
    assert_eq!(told.count(), 1);
    assert_eq!(world.mirror.status(world.now).health, Health::Failed);
}

#[test]
fn a_hung_replica_that_is_failed_by_the_operator_holds_up_nobody() {
    let mut world = World::new(2);
    world.write(0, 4096, 5).unwrap();
    let request = world.write_request(0, 4096, 6);
    let id = world.send(request);
    // Replica 1 hangs: its operation stays in the queue and only the other's are carried out.
    let hung: Vec<_> = {
        let (hung, rest) =
            std::mem::take(&mut world.queue).into_iter().partition(|(_, on, _)| on.index() == 1);
        world.queue = rest;
        hung
    };
    world.drain();
    assert!(world.replies.is_empty());
    world.admin(AdminCommand::Fail(ReplicaSlot::new(1))).unwrap();
    assert!(world.replies.iter().any(|(other, result)| *other == id && result.is_ok()));
    let again = world.add(1, false).unwrap_err();
    assert!(again.contains("in flight"), "{again}");
    world.queue = hung;
    world.drain();
    world.add(1, false).unwrap();
    world.wait(SECOND_NS);
    assert!(world.same_data(0, 1));
}
