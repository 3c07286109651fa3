//! Promise 5: answers that must not change, over crashes, read-only starts and lost sources.

use super::*;

pub(super) const AT: u64 = 200_000;

/// What a crash left: replica 1 has an unacknowledged write at `AT` (9), replica 0 has not (0).
pub(super) fn half_written() -> Vec<Vec<u8>> {
    let mut world = World::new(2);
    let request = world.write_request(AT, 4096, 9);
    world.send(request);
    world.drain_where(&|slot, request| slot == 1 || !writes_data(request));
    assert!(world.replies.is_empty());
    world.crash()
}

#[test]
fn a_read_after_a_crash_waits_until_the_loss_of_the_source_is_recorded() {
    let mut world = World::begin(half_written(), &[0, 1], AssembleOptions::default(), ReplicaSet::EMPTY);
    world.drain_where(&|_, request| !matches!(request, DeviceOp::ProbeHole { .. }));
    assert!(world.mirror.is_open());
    let id = world.send(Request::Read { range: ByteRange::new(AT, 1) });
    world.send_admin(AdminCommand::Fail(ReplicaSlot::new(0)));
    world.drain_where(&|_, request| !matches!(request, DeviceOp::Write { .. }));
    let early = world.reply_to(id);
    // The process dies here: both count as in sync, and replica 0 is the source.
    let images = world.images.clone();
    let mut after = World::open(images, &[0, 1], AssembleOptions::default());
    if let Some(reply) = early {
        assert_eq!(reply.unwrap().data().unwrap().bytes(), after.read(AT, 1));
        return;
    }
    world.drain();
    assert_eq!(world.reply_to(id).unwrap().unwrap().data().unwrap().bytes(), [9]);
}

#[test]
fn a_read_of_a_dirty_region_fails_where_the_loss_of_a_replica_cannot_be_recorded() {
    let mut world = World::new(2);
    world.write(AT, 4096, 1).unwrap();
    world.fault = Box::new(|_, request| superblock_in(request).is_some().then_some(Errno::EIO));
    world.send_admin(AdminCommand::Fail(ReplicaSlot::new(0)));
    let id = world.send(Request::Read { range: ByteRange::new(AT, 1) });
    world.drain();
    assert_eq!(world.reply_to(id).unwrap().unwrap_err(), RequestError::Io);
    assert!(world.call(Request::Read { range: ByteRange::new(0, 1) }).is_ok(), "a clean region is read");
    world.fault = Box::new(|_, _| None);
    world.wait(2 * SECOND_NS);
    assert_eq!(world.read(AT, 1), [1]);
}

#[test]
fn a_region_is_synced_from_the_replica_that_a_read_only_start_answered_from() {
    let read_only = AssembleOptions { read_only: true, ..AssembleOptions::default() };
    for write_mostly in [ReplicaSet::EMPTY, ReplicaSet::only(ReplicaSlot::new(0))] {
        let mut world = World::begin(half_written(), &[0, 1], read_only, write_mostly);
        let first = world.read(AT, 1);
        let mut world = World::begin(world.crash(), &[0, 1], AssembleOptions::default(), write_mostly);
        assert_eq!(world.read(AT, 1), first);
    }
}

#[test]
fn a_read_only_volume_writes_nothing_and_keeps_its_source_when_that_is_gone() {
    let read_only = AssembleOptions { read_only: true, ..AssembleOptions::default() };
    let mut world = World::begin(half_written(), &[0, 1], read_only, ReplicaSet::EMPTY);
    assert_eq!(world.read(AT, 1), [0]);
    world.fault = Box::new(|slot, _| (slot.index() == 0).then_some(Errno::ENODEV));
    for _ in 0..100 {
        assert!(world.call(Request::Read { range: ByteRange::new(AT, 1) }).is_err());
        assert_eq!(world.read(0, 1), [0], "a clean region is read from the other");
    }
    assert!(world.log.iter().all(|(_, what)| what.starts_with("read")), "{:?}", world.log);
    world.fault = Box::new(|_, _| None);
    assert_eq!(world.read(AT, 1), [0]);
}

#[test]
fn a_read_only_volume_counts_what_a_stale_replica_missed() {
    // Found by fuzzing (tests/fuzz/crashes/assemble-read-only-stale-count): the count stayed 0.
    let degraded = AssembleOptions { degraded: true, ..AssembleOptions::default() };
    let mut world = World::open(fresh_images(2), &[0], degraded);
    world.write(AT, 1, 1).unwrap();
    let read_only = AssembleOptions { read_only: true, ..AssembleOptions::default() };
    let world = World::begin(world.crash(), &[0, 1], read_only, ReplicaSet::EMPTY);
    assert_eq!(world.mirror.stale_count[1], 1);
}

#[test]
fn a_sync_waits_for_reads_that_began_before_the_region_was_unsynced() {
    let mut world = World::new(2);
    let at = 196_608;
    world.write(at, 8192, 1).unwrap();
    // One read hangs on each replica; a write beside them fails everywhere.
    let range = ByteRange::new(at, 4096);
    let reads = [Request::Read { range }, Request::Read { range }].map(|request| world.send(request));
    let hangs = |request: &DeviceOp| matches!(request, DeviceOp::Read { len, .. } if *len == 4096);
    assert!(world.queue.iter().any(|(_, slot, _)| slot.index() == 1), "{:?}", world.queue);
    world.fault = Box::new(|_, request| writes_data(request).then_some(Errno::ENOSPC));
    let request = world.write_request(at + 4096, 4096, 2);
    let write = world.send(request);
    let failed = |slot, request: &DeviceOp| slot < 2 && writes_data(request);
    assert!(world.step_where(&failed) && world.step_where(&failed));
    assert_eq!(world.reply_to(write).unwrap().unwrap_err(), RequestError::NoSpace);
    world.fault = Box::new(|_, _| None);
    world.log.clear();
    world.drain_where(&|_, request| !hangs(request));
    assert!(!world.log.iter().any(|(_, what)| what == "write data" || what == "zero"), "{:?}", world.log);
    world.drain();
    for read in reads {
        assert_eq!(world.reply_to(read).unwrap().unwrap().data().unwrap().bytes(), [1; 4096]);
    }
    assert!(world.same_data(0, 1));
}

#[test]
fn a_sync_after_a_crash_writes_its_source_too() {
    // The daemon before may have died between a flush of the source that failed (and lost what it was to flush)
    // and its record: only a new write makes that durable.
    let mut world = World::begin(half_written(), &[0, 1], AssembleOptions::default(), ReplicaSet::EMPTY);
    world.drain();
    let after = |slot: usize| {
        let log: Vec<&str> =
            world.log.iter().filter(|(s, _)| s.index() == slot).map(|(_, what)| &what[..]).collect();
        log[log.len() - 2..].join(", ")
    };
    assert_eq!((&after(0)[..], &after(1)[..]), ("zero, flush", "zero, flush"));
}
