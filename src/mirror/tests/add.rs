//! `add`, refused: what a candidate is told, and that nothing of it or of the volume is touched by a refusal.

use super::*;

/// Two replicas in sync and, as image 2, what `change` makes of a replica of a volume of its own.
fn world_with(change: impl FnOnce(&mut Vec<u8>)) -> World {
    let mut images = fresh_images(2);
    let mut third = vec![0; Layout::device_bytes_min(REGIONS) as usize];
    change(&mut third);
    images.push(third);
    World::open(images, &[0, 1], AssembleOptions::default())
}

/// Asserts that image `image` is refused with these words, and that its bytes stay.
fn assert_refused(world: &mut World, image: usize, force: bool, words: &str) {
    let before = world.images[image].clone();
    let text = world.add(image, force).unwrap_err();
    assert!(text.contains(words), "{text}");
    assert!(world.images[image] == before, "a refused candidate was written to");
    assert!(world.image_of.iter().filter(|attached| **attached == Some(image)).count() <= 1);
    world.adding = None;
}

#[test]
fn a_candidate_that_is_too_small_is_told_how_large_it_must_be() {
    let mut world = world_with(|image| {
        image.pop();
    });
    let need = Layout::device_bytes_min(REGIONS);
    assert_refused(&mut world, 2, true, &format!("has {} bytes, the volume needs {need}", need - 1));
}

#[test]
fn another_volumes_replica_is_taken_in_with_force_only() {
    let mut world = world_with(|image| {
        let created = new_volume(NewVolume {
            name: "elsewhere".to_owned(),
            regions: REGIONS,
            now_unix_ns: 1,
            volume_uuid: Uuid::from_u128(4711),
            generation: Uuid::from_u128(5),
            replicas: vec![NewReplica {
                uuid: Uuid::from_u128(700),
                path: "x".to_owned(),
                device_bytes: image.len() as u64,
            }],
            in_sync: true,
        })
        .unwrap();
        for (offset, bytes) in created.writes(0) {
            image[offset.0 as usize..offset.0 as usize + bytes.len()].copy_from_slice(&bytes);
        }
    });
    world.write(0, 4096, 9).unwrap();
    assert_refused(&mut world, 2, false, "belongs to another volume, elsewhere");
    world.add(2, true).unwrap();
    world.wait(SECOND_NS);
    assert_eq!(world.state(2), ReplicaState::InSync);
    assert!(world.same_data(0, 2));
}

#[test]
fn a_copy_of_a_replica_in_use_is_refused() {
    let mut world = world_with(|_| {});
    world.images[2] = world.images[1].clone();
    assert_refused(&mut world, 2, false, "is in use already");
    assert_refused(&mut world, 2, true, "is in use already");
}

#[test]
fn a_replica_that_failed_is_taken_back_when_its_operations_have_ended() {
    let mut world = World::new(2);
    let request = world.write_request(0, 4096, 6);
    world.send(request);
    // Its intent page is written; the data write to replica 1 hangs.
    world.drain_where(&|slot, request| !(slot == 1 && writes_data(request)));
    world.send_admin(AdminCommand::Fail(ReplicaSlot::new(1)));
    world.drain_where(&|slot, request| !(slot == 1 && writes_data(request)));
    let command = world.candidate(1, false);
    world.send_admin(command);
    world.drain_where(&|slot, request| !(slot == 1 && writes_data(request)));
    let text = world.answers.last().unwrap().clone().unwrap_err();
    assert!(text.contains("still has 1 operations in flight"), "{text}");
    world.drain();
    world.add(1, false).unwrap();
    world.wait(SECOND_NS);
    assert!(world.same_data(0, 1));
}

#[test]
fn one_that_went_its_own_way_is_taken_in_with_force_only_and_keeps_its_place() {
    let mut both = World::new(2);
    both.write(0, 4096, 1).unwrap();
    let images = both.crash();
    let degraded = AssembleOptions { degraded: true, ..AssembleOptions::default() };
    // Each is used without the other.
    let alone = |images: Vec<Vec<u8>>, index: usize| {
        let mut world = World::open(images, &[index], degraded);
        world.write(0, 4096, 10 + index as u8).unwrap();
        world
    };
    let other = alone(images.clone(), 1).crash();
    let mut world = alone(images, 0);
    world.images[1] = other[1].clone();
    assert_refused(&mut world, 1, false, "`nbdmirror add --force` overwrites it");
    let command = world.candidate(1, true);
    world.send_admin(command);
    world.send_admin(AdminCommand::Remove(ReplicaSlot::new(1)));
    assert!(world.answers.last().unwrap().as_ref().is_err_and(|text| text.contains("just being added")));
    world.drain();
    assert!(world.answers.last().unwrap().is_ok(), "{:?}", world.answers);
    world.wait(SECOND_NS);
    assert_eq!((world.image_of[1], world.state(1)), (Some(1), ReplicaState::InSync));
    assert!(world.same_data(0, 1));
}

#[test]
fn a_ninth_replica_is_refused() {
    let mut images = fresh_images(REPLICAS_MAX);
    images.push(vec![0; images[0].len()]);
    let mut world = World::open(images, &(0..REPLICAS_MAX).collect::<Vec<_>>(), AssembleOptions::default());
    assert_refused(&mut world, REPLICAS_MAX, false, "eight replicas already");
}

#[test]
fn a_read_only_volume_keeps_its_replicas_and_can_be_stopped() {
    let read_only = AssembleOptions { read_only: true, ..AssembleOptions::default() };
    let mut world = World::open(fresh_images(2), &[0, 1], read_only);
    for command in [
        AdminCommand::Fail(ReplicaSlot::new(1)),
        AdminCommand::Remove(ReplicaSlot::new(1)),
        world.candidate(1, true),
    ] {
        let text = world.admin(command).unwrap_err();
        assert!(text.contains("read-only"), "{text}");
    }
    world.admin(AdminCommand::Stop).unwrap();
}

#[test]
fn candidates_wait_for_what_is_in_flight_and_a_stop_gives_them_up() {
    let mut world = world_with(|_| {});
    let request = world.write_request(512, 512, 1);
    world.send(request); // keeps 512 and is not to be caught in flight by a larger alignment
    world.io_align = 4096;
    let command = world.candidate(2, false);
    world.send_admin(command);
    assert!(world.answers.is_empty());
    world.send_admin(AdminCommand::Stop);
    world.drain();
    assert_eq!(world.answers.len(), 2, "{:?}", world.answers);
    assert!(world.answers[0].as_ref().is_err_and(|text| text.contains("stopping")), "{:?}", world.answers);
    assert!(world.answers[1].is_ok(), "{:?}", world.answers);
}

#[test]
fn a_replica_that_is_being_prepared_cannot_be_failed_or_removed_yet() {
    let mut world = world_with(|_| {});
    let command = world.candidate(2, false);
    world.send_admin(command);
    // A new one is no member before it is prepared.
    for command in [AdminCommand::Fail(ReplicaSlot::new(2)), AdminCommand::Remove(ReplicaSlot::new(2))] {
        world.send_admin(command);
        let text = world.answers.last().unwrap().clone().unwrap_err();
        assert!(text.contains("no such replica"), "{text}");
    }
    world.drain();
    world.wait(SECOND_NS);
    assert_eq!(world.state(2), ReplicaState::InSync);
}
