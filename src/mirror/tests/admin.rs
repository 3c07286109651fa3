//! Operators' commands at bad moments: stop while metadata fails, candidates that hang or want another alignment.

use super::*;

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
