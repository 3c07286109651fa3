//! What one life of a replica leaves to the next, and replicas that no flush can vouch for.

use super::*;
use crate::extent::StatusContext;

fn is_flush(request: &DeviceOp) -> bool {
    matches!(request, DeviceOp::Flush)
}

fn slot(index: usize) -> ReplicaSlot {
    ReplicaSlot::new(index)
}

fn writes_meta(request: &DeviceOp) -> bool {
    matches!(request, DeviceOp::Write { .. }) && !writes_data(request)
}

/// Reads one byte while the operations that `pick` does not name hang.
fn read_while(world: &mut World, offset: u64, pick: Pick<'_>) -> u8 {
    let id = world.send(Request::Read { range: ByteRange::new(offset, 1) });
    world.drain_where(pick);
    world.reply_to(id).expect("answered").unwrap().data().unwrap().bytes()[0]
}

#[test]
fn a_replica_whose_flush_failed_answers_no_reads_while_the_others_flush_is_under_way() {
    let mut world = World::new(2);
    world.write(0, 4096, 5).unwrap();
    world.fault = Box::new(|on, request| (on.index() == 1 && is_flush(request)).then_some(Errno::EIO));
    world.send(Request::Flush);
    assert!(world.step_where(&|on, request| on == 1 && is_flush(request)));
    world.images[1][..4096].fill(0); // what its cache lost
    for _ in 0..20 {
        assert_eq!(read_while(&mut world, 0, &|_, request| !is_flush(request)), 5);
    }
    world.drain();
    assert_eq!(world.state(1), ReplicaState::Faulty);
}

#[test]
fn a_replica_that_lost_a_flush_leaves_when_another_one_joins() {
    let mut world = World::new(2);
    world.admin(AdminCommand::Fail(slot(1))).unwrap();
    world.write(0, 4096, 1).unwrap();
    world.fault = Box::new(|on, request| (on.index() == 0 && is_flush(request)).then_some(Errno::EIO));
    assert!(world.call(Request::Flush).is_err());
    // Its page cache still has what its disk has not: the copy gets it.
    world.add(1, false).unwrap();
    for _ in 0..20 {
        world.wait(SECOND_NS / 10);
        if world.state(1) == ReplicaState::InSync {
            break;
        }
    }
    assert_eq!(world.state(1), ReplicaState::InSync);
    assert_eq!(world.read(0, 1), [1]);
    world.images[0][..4096].fill(0); // the pages are evicted
    for _ in 0..20 {
        assert_eq!(world.read(0, 1), [1]);
    }
    // Killed here, the next start must not sync from it either.
    let mut world = World::open(world.crash(), &[0, 1], AssembleOptions::default());
    assert_eq!(world.read(0, 1), [1]);
}

#[test]
fn that_nobody_can_be_flushed_is_said_once_and_not_again_of_one_that_comes() {
    let mut world = World::new(2);
    world.admin(AdminCommand::Fail(slot(1))).unwrap();
    world.write(0, 4096, 1).unwrap();
    world.fault = Box::new(|_, request| is_flush(request).then_some(Errno::EIO));
    assert!(world.call(Request::Flush).is_err());
    world.add(1, false).unwrap();
    world.wait(SECOND_NS / 10);
    assert_eq!(world.state(1), ReplicaState::Faulty);
    let told = world.notices.iter().filter(|text| text.contains("no replica in sync can be flushed"));
    assert_eq!(told.count(), 1);
}

#[test]
fn a_replica_whose_flush_failed_does_not_join() {
    let mut world = World::new(2);
    world.admin(AdminCommand::Fail(slot(0))).unwrap();
    world.write(0, 4096, 1).unwrap();
    let joins = |request: &DeviceOp| {
        superblock_in(request).is_some_and(|superblock| {
            superblock.members[0].as_ref().is_some_and(|member| member.state == MemberState::InSync)
        })
    };
    let command = world.candidate(0, false);
    world.send_admin(command);
    // The page without its last stale bit is under way; what it is told to flush now, it loses.
    while world.mirror.stale_count[0] > 0 || world.queue.iter().all(|(_, _, r)| !writes_meta(r)) {
        assert!(world.step());
    }
    assert!(!world.queue.iter().any(|(_, _, request)| joins(request)));
    world.fault = Box::new(|on, request| (on.index() == 0 && is_flush(request)).then_some(Errno::EIO));
    let id = world.send(Request::Flush);
    assert!(world.step_where(&|on, request| on == 0 && is_flush(request)));
    world.drain_where(&|_, request| !is_flush(request));
    assert_ne!(world.state(0), ReplicaState::InSync);
    world.drain();
    assert!(world.reply_to(id).is_some_and(|reply| reply.is_ok()));
    assert_eq!(world.state(0), ReplicaState::Faulty);
}

#[test]
fn a_copy_that_a_replica_gave_up_is_not_counted_when_it_is_taken_back() {
    let mut world = World::new(3);
    for index in [1, 2] {
        world.admin(AdminCommand::Fail(slot(index))).unwrap();
    }
    world.write(0, 4096, 1).unwrap();
    // A write in flight keeps the region until both are coming back: one job copies it to both.
    let request = world.write_request(0, 4096, 2);
    world.send(request);
    let others = |on: usize, request: &DeviceOp| !writes_data(request) || on != 0;
    for index in [1, 2] {
        let command = world.candidate(index, false);
        world.send_admin(command);
        world.drain_where(&others);
    }
    while !world.queue.iter().any(|(_, on, request)| on.index() == 1 && writes_data(request)) {
        assert!(world.step());
    }
    assert!(world.queue.iter().any(|(_, on, request)| on.index() == 2 && writes_data(request)));
    // Replica 1 gives its part up (it fails, late) and comes back, while replica 2's hangs.
    world.fault = Box::new(|on, request| (on.index() == 1 && writes_data(request)).then_some(Errno::EIO));
    world.send_admin(AdminCommand::Fail(slot(1)));
    let others = |on: usize, request: &DeviceOp| !writes_data(request) || on != 2;
    world.drain_where(&others);
    world.fault = Box::new(|_, _| None);
    let command = world.candidate(1, false);
    world.send_admin(command);
    world.drain_where(&others);
    assert_eq!(world.state(1), ReplicaState::Resyncing);
    world.drain();
    world.wait(2 * SECOND_NS);
    assert_eq!(world.state(1), ReplicaState::InSync);
    assert!(world.same_data(0, 1));
}

#[test]
fn a_read_that_goes_on_elsewhere_waits_until_the_loss_of_its_replica_is_recorded() {
    let at = 200_000;
    let mut world = World::begin(
        fresh_images(2),
        &[0, 1],
        AssembleOptions::default(),
        ReplicaSet::only(slot(1)), // so that reads go to replica 0
    );
    world.drain();
    world.write(at, 4096, 9).unwrap();
    let id = world.send(Request::Read { range: ByteRange::new(at, 1) });
    let reads = |request: &DeviceOp| matches!(request, DeviceOp::Read { .. });
    world.fault = Box::new(|_, request| is_flush(request).then_some(Errno::EIO));
    let flush = world.send(Request::Flush);
    world.drain_where(&|_, request| !reads(request));
    assert!(world.reply_to(flush).expect("answered").is_err());
    world.images[1][at as usize..at as usize + 4096].fill(0); // what replica 1 lost; replica 0 did not
    world.fault = Box::new(|_, _| None);
    world.send_admin(AdminCommand::Fail(slot(0)));
    world.drain_where(&|on, request| on == 1 && !writes_meta(request));
    if let Some(reply) = world.reply_to(id) {
        let early = reply.unwrap().data().unwrap().bytes().to_vec();
        // The process dies here: both count as in sync, and replica 0 is the source.
        let mut after = World::open(world.crash(), &[0, 1], AssembleOptions::default());
        assert_eq!(early, after.read(at, 1));
        return;
    }
    world.drain();
    assert!(world.reply_to(id).expect("answered").is_ok());
}

#[test]
fn a_stale_bit_is_durable_before_the_ack_though_an_older_commit_of_its_page_ends_late() {
    let mut world = World::new(2);
    let is_page = |request: &DeviceOp| writes_meta(request) && superblock_in(request).is_none();
    let advance = |world: &mut World, ns: u64| {
        let end = world.now.plus(ns);
        while let Some(at) = world.mirror.next_deadline().filter(|at| *at <= end) {
            world.now = world.now.max(at);
            world.handle(Event::Tick);
            world.drain_where(&|_, request| !is_page(request));
        }
        world.now = world.now.max(end);
    };
    world.write(100_000, 4096, 1).unwrap();
    world.wait(4 * SECOND_NS);
    world.write(0, 4096, 1).unwrap();
    // The commit that clears the first region hangs; meanwhile the second one is cleared in memory.
    advance(&mut world, 5 * SECOND_NS);
    assert!(world.queue.iter().any(|(_, _, request)| is_page(request)));
    assert!(!world.mirror.maps.intent.any());
    world.send_admin(AdminCommand::Fail(slot(1)));
    world.drain_where(&|_, request| !is_page(request));
    assert!(world.answers.pop().expect("answered").is_ok());
    let request = world.write_request(0, 4096, 2);
    world.send(request);
    // The old commit ends, and the next one hangs.
    assert!(world.step_where(&|on, request| on == 0 && is_page(request)));
    let request = world.write_request(8192, 4096, 3);
    let id = world.send(request);
    world.drain_where(&|_, request| !is_page(request));
    let acked = world.reply_to(id).is_some();
    assert!(!acked || found_on(&world.images[0], "r0").unwrap().maps.stale[1][0]);
    world.drain();
    assert!(acked || world.reply_to(id).is_some_and(|reply| reply.is_ok()));
}

#[test]
fn a_replica_that_misses_nothing_is_recorded_as_resyncing_before_it_joins() {
    for commits in 0..4 {
        let mut world = World::new(3);
        world.admin(AdminCommand::Fail(slot(0))).unwrap();
        let command = world.candidate(0, false);
        world.send_admin(command);
        // The process dies with replica 1 one commit behind replica 2.
        for _ in 0..commits {
            world.drain_where(&|on, request| on != 1 || superblock_in(request).is_none());
            world.step();
        }
        world.drain_where(&|on, request| on != 1 || superblock_in(request).is_none());
        let mut world = World::open(world.crash(), &[0, 1, 2], AssembleOptions::default());
        world.wait(SECOND_NS);
        for index in 0..3 {
            assert_eq!(world.state(index), ReplicaState::InSync, "replica {index}, {commits} commits");
        }
    }
}

#[test]
fn where_a_synced_region_can_be_flushed_nowhere_its_source_stays() {
    let mut world = World::new(2);
    world.write(0, 4096, 1).unwrap();
    let mut images = world.crash();
    images[1][..4096].fill(0); // as if the write had not reached it
    let mut world = World::begin(images, &[0, 1], AssembleOptions::default(), ReplicaSet::EMPTY);
    world.fault = Box::new(|_, request| is_flush(request).then_some(Errno::EIO));
    assert_eq!(world.read(0, 1), [1]);
    // One of the two had to go. The copy on replica 1 stands in its cache only; the source had it before.
    assert_eq!((world.state(0), world.state(1)), (ReplicaState::InSync, ReplicaState::Faulty));
}

/// Replica 0 has answered no read yet when its flush fails and its page cache drops what it was to flush; the flush of
/// replica 1 hangs.
fn flush_fails_below_a_read(world: &mut World, at: usize) {
    world.fault = Box::new(|on, request| (on.index() == 0 && is_flush(request)).then_some(Errno::EIO));
    world.send(Request::Flush);
    assert!(world.queue.iter().any(|(_, on, request)| on.index() == 0 && reads_data(request)));
    assert!(world.step_where(&|on, request| on == 0 && is_flush(request)));
    world.images[0][at..at + 4096].fill(0);
}

fn reads_data(request: &DeviceOp) -> bool {
    matches!(request, DeviceOp::Read { offset, .. } | DeviceOp::Allocation { offset, .. } if offset.0 < VOLUME_BYTES)
}

/// Two replicas, of which the first one is read.
fn world_that_reads_the_first() -> World {
    let mut world =
        World::begin(fresh_images(2), &[0, 1], AssembleOptions::default(), ReplicaSet::only(slot(1)));
    world.drain();
    world.write(0, 4096, 5).unwrap();
    world
}

#[test]
fn a_read_that_was_in_flight_when_its_replicas_flush_failed_is_answered_from_another() {
    let mut world = world_that_reads_the_first();
    let id = world.send(Request::Read { range: ByteRange::new(0, 1) });
    flush_fails_below_a_read(&mut world, 0);
    world.drain_where(&|_, request| !is_flush(request));
    assert_eq!(world.reply_to(id).expect("answered").unwrap().data().unwrap().bytes(), [5]);
}

#[test]
fn no_hole_is_believed_of_a_replica_whose_flush_has_failed_since_it_was_asked() {
    let mut world = world_that_reads_the_first();
    let contexts = [StatusContext::Allocation].into_iter().collect();
    let id = world.send(Request::BlockStatus { range: ByteRange::new(0, 8192), contexts, one: false });
    flush_fails_below_a_read(&mut world, 0);
    world.drain_where(&|_, request| !is_flush(request));
    let Answer::Status(answer) = world.reply_to(id).expect("answered").unwrap() else { panic!() };
    let extents: Vec<_> = answer[0].extents.iter().map(|extent| (extent.len, extent.flags)).collect();
    assert_eq!(extents, [(4096, 0), (4096, ALLOCATION_HOLE | ALLOCATION_ZERO)]);
}

#[test]
fn the_neighbours_of_a_write_are_not_filled_from_a_replica_whose_flush_has_failed() {
    let mut world = world_that_reads_the_first();
    let request = world.write_request(100, 10, 6);
    let id = world.send(request);
    flush_fails_below_a_read(&mut world, 0);
    world.drain_where(&|_, request| !is_flush(request));
    world.drain();
    assert!(world.reply_to(id).expect("answered").is_ok());
    assert_eq!(world.read(99, 12), [5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 5]);
}

#[test]
fn a_region_is_not_copied_from_a_source_whose_flush_has_failed() {
    let at = 5 * REGIONS.region_bytes;
    let mut world = World::new(2);
    world.write(0, at + 4096, 1).unwrap();
    let mut world = World::begin(world.crash(), &[0, 1], AssembleOptions::default(), ReplicaSet::EMPTY);
    while !world.mirror.is_open() {
        assert!(world.step());
    }
    // More regions than jobs: this write comes before the copy of its region.
    let request = world.write_request(at, 4096, 7);
    let id = world.send(request);
    world.drain_where(&|_, request| writes_data(request));
    assert!(world.reply_to(id).expect("answered").is_ok());
    let is_read_there =
        |request: &DeviceOp| matches!(request, DeviceOp::Read { offset, .. } if offset.0 == at);
    world.drain_where(&|_, request| !is_read_there(request));
    flush_fails_below_a_read(&mut world, at as usize);
    world.drain_where(&|_, request| !is_flush(request));
    world.drain();
    assert_eq!(world.read(at, 1), [7]);
}
