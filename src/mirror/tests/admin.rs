//! Operators' commands at bad moments: stop while metadata fails, candidates that hang or want another alignment.

use super::*;

#[test]
fn a_stop_whose_flush_is_under_way_when_pages_fail_is_answered_once() {
    let mut world = World::new(2);
    world.fault = Box::new(|_, request| {
        (matches!(request, DeviceOp::Write { .. }) && !writes_data(request)).then_some(Errno::EIO)
    });
    assert!(world.write(0, 4096, 1).is_err());
    world.send_admin(AdminCommand::Stop);
    while world.answers.is_empty() {
        assert!(world.step());
    }
    world.drain();
    assert_eq!(world.answers.len(), 1);
    assert!(world.answers[0].is_err());
}

#[test]
fn a_candidate_with_a_larger_alignment_raises_it_before_it_is_prepared() {
    let mut images = fresh_images(2);
    images.push(vec![0; Layout::device_bytes_min(REGIONS) as usize]);
    let mut world = World::open(images, &[0, 1], AssembleOptions::default());
    world.io_align = 4096;
    let command = world.candidate(2, false);
    world.send_admin(command);
    // The candidate's superblock slots are being wiped; this write waits for its intent bit meanwhile.
    let request = world.write_request(512, 512, 1);
    let id = world.send(request);
    world.drain();
    assert!(world.reply_to(id).is_some_and(|reply| reply.is_ok()));
    world.wait(SECOND_NS);
    assert!(world.same_data(0, 2));
}

#[test]
fn a_replica_taken_back_is_not_failed_for_what_it_gave_up_before() {
    let mut world = World::new(2);
    world.write(0, 4096, 5).unwrap();
    let request = world.write_request(0, 4096, 6);
    world.send(request);
    let hangs = |slot: usize, request: &DeviceOp| slot == 0 && writes_data(request);
    world.send_admin(AdminCommand::Fail(ReplicaSlot::new(1)));
    world.drain_where(&|slot, request| !hangs(slot, request));
    let command = world.candidate(1, false);
    world.send_admin(command);
    world.drain_where(&|slot, request| !hangs(slot, request));
    assert_eq!(world.state(1), ReplicaState::Resyncing);
    world.drain();
    world.wait(SECOND_NS);
    assert_eq!(world.state(1), ReplicaState::InSync);
    assert!(world.same_data(0, 1));
}

#[test]
fn a_stop_does_not_wait_for_a_candidate_that_hangs() {
    let mut images = fresh_images(2);
    images.push(vec![0; Layout::device_bytes_min(REGIONS) as usize]);
    let mut world = World::open(images, &[0, 1], AssembleOptions::default());
    let command = world.candidate(2, false);
    world.send_admin(command);
    world.send_admin(AdminCommand::Stop);
    world.drain_where(&|slot, _| slot != 2);
    assert_eq!(world.answers.len(), 2, "{:?}", world.answers);
    assert!(world.answers[0].is_err() && world.answers[1].is_ok(), "{:?}", world.answers);
    world.drain();
}

#[test]
fn a_replica_that_hangs_while_the_volume_stops_can_be_failed() {
    let mut world = World::new(2);
    let request = world.write_request(0, 4096, 6);
    world.send(request);
    world.send_admin(AdminCommand::Stop);
    world.drain_where(&|slot, _| slot != 1);
    assert!(world.answers.is_empty());
    world.send_admin(AdminCommand::Fail(ReplicaSlot::new(1)));
    world.drain_where(&|slot, _| slot != 1);
    assert_eq!(world.answers.len(), 2, "{:?}", world.answers);
    assert!(world.answers.iter().all(Result::is_ok), "{:?}", world.answers);
}

#[test]
fn a_copy_taken_while_the_volume_ran_is_not_in_sync_after_a_clean_stop() {
    let mut world = World::new(2);
    world.write(0, 4096, 1).unwrap();
    let copy = world.images[1].clone();
    world.write(200_000, 4096, 2).unwrap();
    assert_eq!(world.admin(AdminCommand::Stop).unwrap(), "stopped, clean");
    let mut images = world.crash();
    images[1] = copy;
    let mut world = World::open(images, &[0, 1], AssembleOptions::default());
    world.wait(2 * SECOND_NS);
    assert!(world.same_data(0, 1));
}
