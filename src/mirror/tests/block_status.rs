//! BLOCK_STATUS, CACHE and fast zeroing: what each is answered in the simplest cases.

use super::answers::{AT, half_written};
use super::*;
use crate::extent::{
    ContextSet, STALE_STALE, STATE_DIRTY, STATE_OUT_OF_SYNC, STATE_SYNCING, STATE_UNSYNCED, StatusContext,
};

const REGION: u64 = REGIONS.region_bytes;
const HOLE: u32 = ALLOCATION_HOLE | ALLOCATION_ZERO;
const ALL: ByteRange = ByteRange { offset: 0, len: VOLUME_BYTES };

fn slot(index: usize) -> ReplicaSlot {
    ReplicaSlot::new(index)
}

fn question(context: StatusContext, range: ByteRange, one: bool) -> Request {
    Request::BlockStatus { range, contexts: [context].into_iter().collect(), one }
}

fn extents_in(reply: Reply) -> Vec<(u64, u32)> {
    let Ok(Answer::Status(mut contexts)) = reply else { panic!("not a status: {reply:?}") };
    assert_eq!(contexts.len(), 1);
    contexts.remove(0).extents.into_iter().map(|extent| (extent.len, extent.flags)).collect()
}

impl World {
    fn ask(&mut self, context: StatusContext, range: ByteRange, one: bool) -> Vec<(u64, u32)> {
        let reply = self.call(question(context, range, one));
        extents_in(reply)
    }

    /// Asks and carries out nothing.
    fn ask_now(&mut self, context: StatusContext) -> Vec<(u64, u32)> {
        let id = self.send(question(context, ALL, false));
        extents_in(self.reply_to(id).expect("answered at once"))
    }

    fn operations(&self, what: &str) -> Vec<usize> {
        self.log.iter().filter(|(_, name)| name == what).map(|(slot, _)| slot.index()).collect()
    }

    /// Replica 1 comes back without a fast way to zero.
    fn slow_zeroing(&mut self, cheap_zero: bool) {
        self.admin(AdminCommand::Fail(slot(1))).unwrap();
        let mut command = self.candidate(1, false);
        let AdminCommand::Add(candidate) = &mut command else { unreachable!() };
        (candidate.traits.cheap_zero, candidate.traits.cheap_allocated_zero) = (cheap_zero, false);
        self.admin(command).unwrap();
        self.wait(20 * SECOND_NS);
        assert_eq!(self.state(1), ReplicaState::InSync);
    }
}

#[test]
fn dirty_regions_are_shown_until_they_are_swept() {
    let mut world = World::new(2);
    assert_eq!(world.ask(StatusContext::State, ALL, false), [(VOLUME_BYTES, 0)]);
    world.write(REGION + 5, 10, 1).unwrap();
    world.write(3 * REGION - 1, 2, 1).unwrap();
    let expected = [(REGION, 0), (3 * REGION, STATE_DIRTY), (VOLUME_BYTES - 4 * REGION, 0)];
    assert_eq!(world.ask(StatusContext::State, ALL, false), expected);
    assert_eq!(world.ask(StatusContext::State, ALL, true), expected[..1]);
    let odd = ByteRange::new(REGION - 3, 10);
    assert_eq!(world.ask(StatusContext::State, odd, false), [(3, 0), (7, STATE_DIRTY)]);
    let tail = ByteRange::new(VOLUME_BYTES - 1, 1);
    assert_eq!(world.ask(StatusContext::State, tail, false), [(1, 0)]);
    world.wait(20 * SECOND_NS);
    assert_eq!(world.ask(StatusContext::State, ALL, false), [(VOLUME_BYTES, 0)]);
    assert!(matches!(
        world.call(question(StatusContext::State, ByteRange::new(7, 0), false)),
        Ok(Answer::Done)
    ));
}

#[test]
fn what_a_replica_that_is_away_misses_is_shown_and_what_is_being_copied() {
    let mut world = World::new(2);
    world.admin(AdminCommand::Fail(slot(1))).unwrap();
    world.write(3 * REGION, 4096, 1).unwrap();
    world.wait(20 * SECOND_NS);
    let with = |flag| vec![(3 * REGION, 0), (REGION, flag), (VOLUME_BYTES - 4 * REGION, 0)];
    assert_eq!(world.ask(StatusContext::Stale(slot(1)), ALL, false), with(STALE_STALE));
    for other in [0, 5] {
        assert_eq!(world.ask(StatusContext::Stale(slot(other)), ALL, false), [(VOLUME_BYTES, 0)]);
    }
    let behind = STATE_DIRTY | STATE_OUT_OF_SYNC;
    assert_eq!(world.ask(StatusContext::State, ALL, false), with(behind));
    let command = world.candidate(1, false);
    world.send_admin(command);
    world.drain_where(&|_, request| !matches!(request, DeviceOp::ProbeHole { .. }));
    assert_eq!(world.ask_now(StatusContext::State), with(behind | STATE_SYNCING));
    world.drain();
    world.wait(20 * SECOND_NS);
    assert_eq!(world.ask(StatusContext::State, ALL, false), [(VOLUME_BYTES, 0)]);
    assert_eq!(world.ask(StatusContext::Stale(slot(1)), ALL, false), [(VOLUME_BYTES, 0)]);
}

#[test]
fn every_context_that_is_asked_for_is_answered_in_order() {
    let mut world = World::new(2);
    let contexts: ContextSet = StatusContext::all().collect();
    let Ok(Answer::Status(answer)) = world.call(Request::BlockStatus { range: ALL, contexts, one: true })
    else {
        panic!("not a status")
    };
    assert!(answer.iter().map(|element| element.context).eq(StatusContext::all()));
    assert!(answer.iter().all(|element| element.extents.len() == 1));
}

#[test]
fn unsynced_regions_are_data_and_nobody_waits_for_them() {
    let mut world = World::begin(half_written(), &[0, 1], AssembleOptions::default(), ReplicaSet::EMPTY);
    let copies =
        |request: &DeviceOp| matches!(request, DeviceOp::ProbeHole { .. } | DeviceOp::Allocation { .. });
    world.drain_where(&|_, request| !copies(request));
    let region = AT / REGION;
    let with = |flag, others| {
        vec![(region * REGION, others), (REGION, flag), (VOLUME_BYTES - (region + 1) * REGION, others)]
    };
    let state = STATE_DIRTY | STATE_UNSYNCED | STATE_SYNCING;
    assert_eq!(world.ask_now(StatusContext::State), with(state, 0));
    let id = world.send(question(StatusContext::Allocation, ALL, false));
    world.drain_where(&|_, request| !matches!(request, DeviceOp::ProbeHole { .. }));
    assert_eq!(extents_in(world.reply_to(id).expect("the sync has not begun")), with(0, HOLE));
}

#[test]
fn holes_are_those_of_a_replica_that_may_be_read() {
    let mut world = World::new(2);
    world.write(5000, 10, 1).unwrap();
    world.write(3 * REGION, 4096, 1).unwrap();
    let rest = VOLUME_BYTES - 3 * REGION - 4096;
    let expected = [(4096, HOLE), (4096, 0), (3 * REGION - 8192, HOLE), (4096, 0), (rest, HOLE)];
    assert_eq!(world.ask(StatusContext::Allocation, ALL, false), expected);
    assert_eq!(world.ask(StatusContext::Allocation, ALL, true), expected[..1]);
    let odd = ByteRange::new(8000, 1000);
    assert_eq!(world.ask(StatusContext::Allocation, odd, false), [(192, 0), (808, HOLE)]);
    // Replica 0 misses a write and comes back: it has a hole there still, and is not asked.
    world.admin(AdminCommand::Fail(slot(0))).unwrap();
    world.write(7 * REGION, 4096, 1).unwrap();
    let command = world.candidate(0, false);
    world.send_admin(command);
    let probe = |request: &DeviceOp| matches!(request, DeviceOp::ProbeHole { .. });
    world.drain_where(&|_, request| !probe(request));
    assert_eq!(world.state(0), ReplicaState::Resyncing);
    world.log.clear();
    let id = world.send(question(StatusContext::Allocation, ByteRange::new(7 * REGION, 8192), false));
    world.drain_where(&|_, request| !probe(request));
    assert_eq!(extents_in(world.reply_to(id).unwrap()), [(4096, 0), (4096, HOLE)]);
    assert_eq!(world.operations("allocation"), [1]);
}

#[test]
fn who_cannot_say_where_its_holes_are_is_no_worse_for_that() {
    let mut world = World::new(2);
    let asked = |request: &DeviceOp| matches!(request, DeviceOp::Allocation { .. });
    world.fault = Box::new(move |on, request| (on.index() == 0 && asked(request)).then_some(Errno::EIO));
    assert_eq!(world.ask(StatusContext::Allocation, ALL, false), [(VOLUME_BYTES, HOLE)]);
    world.fault = Box::new(move |_, request| asked(request).then_some(Errno::EIO));
    assert_eq!(world.ask(StatusContext::Allocation, ALL, false), [(VOLUME_BYTES, 0)]);
    assert_eq!((world.state(0), world.state(1)), (ReplicaState::InSync, ReplicaState::InSync));
    // One that hangs is failed: the other one is asked.
    world.fault = Box::new(|_, _| None);
    let id = world.send(question(StatusContext::Allocation, ALL, false));
    let hung = world.queue[0].1;
    world.send_admin(AdminCommand::Fail(hung));
    world.drain_where(&|on, _| on != hung.index());
    assert_eq!(extents_in(world.reply_to(id).unwrap()), [(VOLUME_BYTES, HOLE)]);
    world.drain();
}

#[test]
fn a_hole_is_not_shown_where_a_write_is_in_flight() {
    let mut world = World::new(2);
    world.write(0, 8192, 1).unwrap();
    let range = ByteRange::new(0, 8192);
    let id = world.send(Request::WriteZeroes { range, may_unmap: true, fast: false, fua: false });
    world.drain_where(&|on, request| on == 0 || !matches!(request, DeviceOp::Zero { .. }));
    let asked = world.send(question(StatusContext::Allocation, range, false));
    world.drain_where(&|on, _| on == 0);
    assert!(
        world.reply_to(asked).is_none(),
        "replica 1 may fail, replica 0 too, and a sync bring the data back"
    );
    world.drain();
    assert!(world.reply_to(id).unwrap().is_ok());
    assert_eq!(extents_in(world.reply_to(asked).unwrap()), [(8192, HOLE)]);
}

#[test]
fn a_hole_is_not_shown_while_it_could_be_taken_back() {
    let mut world = World::new(2);
    world.write(AT, 4096, 1).unwrap();
    world.fault = Box::new(|_, request| superblock_in(request).is_some().then_some(Errno::EIO));
    world.send_admin(AdminCommand::Fail(slot(0)));
    world.drain();
    let region = AT / REGION;
    let expected = [(region * REGION, HOLE), (REGION, 0), (VOLUME_BYTES - (region + 1) * REGION, HOLE)];
    assert_eq!(world.ask(StatusContext::Allocation, ALL, false), expected);
}

#[test]
fn fast_zeroing_is_refused_at_once_where_it_would_not_be_fast() {
    for cheap_zero in [false, true] {
        let mut world = World::new(2);
        world.slow_zeroing(cheap_zero);
        world.write(0, 8192, 1).unwrap();
        world.wait(20 * SECOND_NS);
        let range = ByteRange::new(0, 8192);
        for may_unmap in [false, true] {
            world.log.clear();
            let id = world.send(Request::WriteZeroes { range, may_unmap, fast: true, fua: true });
            let refused = !(may_unmap && cheap_zero);
            if refused {
                assert_eq!(world.reply_to(id).expect("at once").unwrap_err(), RequestError::NotSupported);
                assert!(world.log.is_empty() && world.mirror.status(world.now).dirty_bytes == 0);
            }
            world.drain();
            let byte = u8::from(refused);
            assert!(world.read(0, 8192).iter().all(|read| *read == byte));
        }
        world.call(Request::WriteZeroes { range, may_unmap: false, fast: false, fua: false }).unwrap();
        assert!(world.read(0, 8192).iter().all(|read| *read == 0));
    }
}

#[test]
fn a_prefetch_goes_where_the_read_will_go_and_its_failure_is_nobodys() {
    let mut world = World::new(2);
    for at in 0..8 {
        world.read(at * REGION, 512);
        world.log.clear();
        let range = ByteRange::new(at * REGION + 7, 40_000);
        world.fault = Box::new(|_, request| matches!(request, DeviceOp::Cache { .. }).then_some(Errno::EIO));
        assert!(matches!(world.call(Request::Cache { range }), Ok(Answer::Done)));
        // Whose turn it would be otherwise: the two take turns.
        world.read(15 * REGION + at * 512, 512);
        world.log.retain(|(_, name)| name == "cache");
        world.read(range.offset, 4096);
        assert_eq!(world.operations("cache"), world.operations("read data"));
    }
    assert_eq!((world.state(0), world.state(1)), (ReplicaState::InSync, ReplicaState::InSync));
    assert!(world.call(Request::Cache { range: ByteRange::new(5, 0) }).is_ok());
    assert!(world.call(Request::Cache { range: ALL }).is_ok());
    world.send_admin(AdminCommand::Stop);
    assert_eq!(world.call(Request::Cache { range: ALL }).unwrap_err(), RequestError::Stopping);
    let late = world.call(question(StatusContext::State, ALL, false));
    assert_eq!(late.unwrap_err(), RequestError::Stopping);
}

/// A volume served read-only (so that it is open at once) from one replica.
fn large_mirror(regions: Regions) -> Mirror {
    let bytes = Layout::device_bytes_min(regions);
    let replica = NewReplica { uuid: Uuid::from_u128(100), path: "r0".to_owned(), device_bytes: bytes };
    let created = new_volume(NewVolume {
        name: "v".to_owned(),
        regions,
        now_unix_ns: 1,
        volume_uuid: Uuid::from_u128(1),
        generation: Uuid::from_u128(2),
        replicas: vec![replica],
        in_sync: true,
    })
    .unwrap();
    let written: Vec<(u64, Vec<u8>)> =
        created.writes(0).map(|(offset, bytes)| (offset.0, bytes.to_vec())).collect();
    let mut read_at = |offset: crate::units::ReplicaOffset, buffer: &mut [u8]| {
        buffer.fill(0);
        let range = ByteRange::new(offset.0, buffer.len() as u64);
        for (start, bytes) in
            written.iter().filter(|(start, bytes)| range.overlaps(ByteRange::new(*start, bytes.len() as u64)))
        {
            let (from, to) = (range.offset.max(*start), range.end().min(start + bytes.len() as u64));
            let source = &bytes[(from - start) as usize..(to - start) as usize];
            buffer[(from - range.offset) as usize..(to - range.offset) as usize].copy_from_slice(source);
        }
        Ok(())
    };
    let found = read_found("r0", bytes, &mut read_at).unwrap().unwrap();
    let options = AssembleOptions { read_only: true, ..AssembleOptions::default() };
    let mut config = MirrorConfig {
        read_only: true,
        write_mostly: ReplicaSet::EMPTY,
        traits: [None; REPLICAS_MAX],
        entropy: 1,
        wall_clock_origin_ns: 0,
        intent_idle_ns: 5 * SECOND_NS,
        resync_jobs_max: 4,
        resync_burst_ns: 16_000_000,
        without_intent: false,
    };
    config.traits[0] = Some(DeviceTraits { device_bytes: bytes, ..traits(4096) });
    let assembly = assemble(&[found], options).unwrap();
    Mirror::new(config, assembly, BufferPool::new(1 << 20))
}

/// A figure, not a check: `cargo test --release --lib figure -- --ignored --nocapture`.
#[test]
#[ignore = "prints how long questions about large volumes take"]
fn figure_of_large_volumes() {
    for (volume_bytes, region_bytes) in [(64 << 40, 64 << 20), (1 << 40, 64 << 10)] {
        let regions = Regions { volume_bytes, region_bytes };
        for every in [u64::MAX, 5000, 2] {
            let mut mirror = large_mirror(regions);
            let dirty: Vec<_> = (0..regions.count()).filter(|region| region % every == every / 2).collect();
            dirty.iter().for_each(|region| mirror.maps.intent.set(*region as usize, true));
            let contexts: ContextSet =
                StatusContext::all().filter(|c| *c != StatusContext::Allocation).collect();
            let mut out = Vec::new();
            let request =
                Request::BlockStatus { range: ByteRange::new(0, volume_bytes), contexts, one: false };
            let begin = std::time::Instant::now();
            mirror.handle(Nanos(10), Event::Request { id: RequestId(1), request }, &mut out);
            let took = begin.elapsed();
            let Some(Action::Reply { result: Ok(Answer::Status(answer)), .. }) = out.pop() else { panic!() };
            let state = &answer[0].extents;
            let reached: u64 = state.iter().map(|extent| extent.len).sum();
            println!(
                "{} TiB in regions of {} KiB, one in {every} dirty: {took:?}, {} extents, {} GiB told of",
                volume_bytes >> 40,
                region_bytes >> 10,
                state.len(),
                reached >> 30
            );
        }
    }
}
