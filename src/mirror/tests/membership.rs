//! Replicas that come and go while something else happens: joins, lost flushes, metadata that cannot be recorded.

use super::*;

/// Replica 1 was away, missed region 0, and is coming back; no job has begun.
fn coming_back() -> World {
    let mut world = World::new(2);
    world.admin(AdminCommand::Fail(ReplicaSlot::new(1))).unwrap();
    world.write(0, 4096, 1).unwrap();
    let command = world.candidate(1, false);
    world.send_admin(command);
    world
}

#[test]
fn a_replica_does_not_join_with_a_write_that_only_it_took() {
    let mut world = coming_back();
    let joins = |request: &DeviceOp| {
        superblock_in(request).is_some_and(|superblock| {
            superblock.members[1].as_ref().is_some_and(|member| member.state == MemberState::InSync)
        })
    };
    while !world.queue.iter().any(|(_, _, request)| joins(request)) {
        assert!(world.step());
    }
    // The commit that makes it in sync is under way.
    world.fault = Box::new(|slot, request| (slot.index() == 0 && writes_data(request)).then_some(Errno::EIO));
    let request = world.write_request(200_000, 4096, 9);
    let id = world.send(request);
    world.drain_where(&|_, request| superblock_in(request).is_none());
    world.drain();
    assert!(world.reply_to(id).is_some_and(|reply| reply.is_err()));
    world.fault = Box::new(|_, _| None);
    world.wait(10 * SECOND_NS);
    assert_eq!(world.state(1), ReplicaState::InSync);
    assert!(world.same_data(0, 1));
}

#[test]
fn what_the_last_replica_in_sync_lost_in_a_flush_is_not_kept_by_one_that_joins() {
    let mut world = coming_back();
    let copies = |request: &DeviceOp| matches!(request, DeviceOp::ProbeHole { .. });
    world.drain_where(&|_, request| !copies(request));
    let request = world.write_request(200_000, 4096, 9);
    let id = world.send(request);
    world.drain_where(&|_, request| !copies(request));
    assert!(world.reply_to(id).is_some_and(|reply| reply.is_ok()));
    world.fault = Box::new(|slot, request| {
        (slot.index() == 0 && matches!(request, DeviceOp::Flush)).then_some(Errno::EIO)
    });
    let id = world.send(Request::Flush);
    world.drain_where(&|_, request| !copies(request));
    assert!(world.reply_to(id).is_some_and(|reply| reply.is_err()));
    world.images[0][200_000..204_096].fill(0); // what its cache lost
    world.drain();
    world.wait(10 * SECOND_NS);
    assert_eq!(world.state(1), ReplicaState::InSync);
    assert!(world.same_data(0, 1));
}

#[test]
fn a_superblock_retry_that_waits_for_pages_asks_for_no_ticks() {
    let mut world = World::new(2);
    world.write(0, 4096, 1).unwrap();
    world.fault = Box::new(|_, request| superblock_in(request).is_some().then_some(Errno::EIO));
    world.send_admin(AdminCommand::Fail(ReplicaSlot::new(1)));
    world.drain();
    assert_eq!(world.mirror.status(world.now).health, Health::Failed);
    let command = world.candidate(1, false);
    world.send_admin(command);
    // Its pages hang.
    world.now = world.now.plus(2 * SECOND_NS);
    world.handle(Event::Tick);
    let next = world.mirror.next_deadline();
    assert!(next.is_none_or(|at| at > world.now), "{next:?} at {:?}", world.now);
    world.fault = Box::new(|_, _| None);
    world.drain();
    world.wait(2 * SECOND_NS);
    assert_eq!(world.state(1), ReplicaState::InSync);
}

#[test]
fn a_resync_that_only_waits_for_bad_regions_does_not_search_the_maps_at_each_event() {
    let mut world = coming_back();
    world.fault = Box::new(|slot, request| {
        let bad = matches!(request, DeviceOp::Read { offset, .. } if offset.0 < 4096);
        (slot.index() == 0 && bad).then_some(Errno::EIO)
    });
    world.drain();
    world.wait(SECOND_NS);
    assert_eq!(world.state(1), ReplicaState::Resyncing);
    assert!(world.mirror.resync.exhausted);
    world.write(200_000, 4096, 2).unwrap();
    assert!(world.mirror.resync.exhausted, "writes that all replicas take need no copy");
    world.fault = Box::new(|_, _| None);
    world.wait(10 * SECOND_NS);
    assert_eq!(world.state(1), ReplicaState::InSync);
    assert!(world.same_data(0, 1));
}

#[test]
fn a_replica_joins_though_flushes_of_the_last_one_in_sync_keep_failing() {
    let mut world = coming_back();
    let copies = |request: &DeviceOp| matches!(request, DeviceOp::ProbeHole { .. });
    world.fault = Box::new(|slot, request| {
        (slot.index() == 0 && matches!(request, DeviceOp::Flush)).then_some(Errno::EIO)
    });
    world.drain_where(&|_, request| !copies(request));
    assert!(world.mirror.stale_count[1] == 1);
    for _ in 0..200 {
        let id = world.send(Request::Flush);
        world.step();
        if world.reply_to(id).is_some_and(|reply| reply.is_ok()) {
            break;
        }
    }
    world.drain();
    assert!(world.call(Request::Flush).is_ok(), "the other one vouches now");
    assert_eq!(world.state(0), ReplicaState::Faulty);
    assert_eq!(world.state(1), ReplicaState::InSync);
}

/// Beyond the fault model: the newest superblock rots on every replica.
#[test]
fn a_copy_with_the_count_of_a_superblock_that_rotted_everywhere_is_an_old_copy() {
    let mut world = World::new(2);
    world.write(0, 4096, 5).unwrap();
    let mut images = world.crash();
    let old = images[0].clone();
    for image in &mut images {
        let newest = found_on(image, "r").unwrap().superblock.event_count;
        let layout = Layout { regions: REGIONS, device_bytes: image.len() as u64 };
        let at = layout.superblock_offset(newest % 2).0 as usize;
        image[at..at + 512].fill(0xdb);
    }
    let mut world = World::open(images, &[0, 1], AssembleOptions::default());
    world.write(0, 4096, 6).unwrap();
    let mut images = world.crash();
    images[0] = old;
    let mut world = World::open(images, &[0, 1], AssembleOptions::default());
    assert_eq!(world.read(0, 1), [6]);
    world.wait(SECOND_NS);
    assert!(world.same_data(0, 1));
}

#[test]
fn a_resync_makes_room_for_clients_whose_requests_ended_before_it_looked() {
    let mut world = World::new(2);
    world.admin(AdminCommand::Fail(ReplicaSlot::new(1))).unwrap();
    world.write(0, VOLUME_BYTES, 1).unwrap();
    let command = world.candidate(1, false);
    world.send_admin(command);
    let copies = |world: &World| world.mirror.resync.active.len();
    while copies(&world) == 0 {
        assert!(world.step());
    }
    let asked_at = world.now;
    // Each of them has ended, and its answer made the client ask again, before the next event.
    let mut steps = 0;
    while copies(&world) > 0 {
        world.mirror.resync.pace.client_came(world.now);
        world.now = world.now.plus(SECOND_NS / 2000);
        assert!(world.step());
        steps += 1;
    }
    assert!(steps > 16 && world.mirror.anything_to_copy(), "it rests: {steps} steps");
    let rest_ends = world.mirror.resync.deadline().unwrap();
    assert!(rest_ends > world.now && world.queue.is_empty());
    assert_eq!(world.mirror.next_deadline().map(|at| at <= rest_ends), Some(true));
    // A reader's region does not wait.
    world.mirror.want_region(crate::units::RegionIndex(15));
    world.mirror.work.push_back(super::super::Work::Pump);
    world.handle(Event::Tick);
    assert_eq!(copies(&world), 1);
    world.drain();
    world.wait(SECOND_NS);
    assert_eq!(world.state(1), ReplicaState::InSync);
    assert!(world.same_data(0, 1) && world.now > asked_at);
}

#[test]
fn what_was_copied_from_one_that_left_unsynced_is_copied_again_from_the_last() {
    let mut world = World::new(3);
    world.admin(AdminCommand::Fail(ReplicaSlot::new(2))).unwrap();
    world.write(0, 4096, 1).unwrap();
    // A copy to replica 2 waits for a write, which fails everywhere and leaves something on replica 0.
    let request = world.write_request(0, 4096, 2);
    let id = world.send(request);
    let command = world.candidate(2, false);
    world.send_admin(command);
    world.drain_where(&|_, request| !writes_data(request));
    world.fault = Box::new(|on, request| (on.index() < 2 && writes_data(request)).then_some(Errno::ENOSPC));
    while world.replies.iter().all(|(other, _)| *other != id) {
        assert!(world.step());
    }
    assert_eq!(world.reply_to(id).unwrap().unwrap_err(), RequestError::NoSpace);
    world.images[0][..4096].fill(2);
    // That is copied to replica 2. Then the sync of the two fails on both, and replica 0 leaves.
    world.drain();
    assert_eq!((world.state(0), world.state(1)), (ReplicaState::Faulty, ReplicaState::InSync));
    world.fault = Box::new(|_, _| None);
    world.wait(10 * SECOND_NS);
    assert_eq!(world.state(2), ReplicaState::InSync);
    assert!(world.same_data(1, 2));
}
