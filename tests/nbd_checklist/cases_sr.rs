//! SR: replies in chunks, structured and extended alike. The rules of the chunks themselves are in `reply.rs`.

use super::ground::{Ground, MIB, SIZE, pattern};
use super::link::{Link, cmd, flag, tf};
use super::reply::{PAYLOAD_MAX, Reply, chunk, err};

cases! {
    sr_01_a_read_comes_in_chunks_that_cover_it,
    sr_01_a_sparse_range_comes_as_a_hole,
    sr_02_read_past_the_end_is_an_error_chunk,
    sr_03_a_wrong_flag_is_an_error_chunk,
    sr_04_df_up_to_64_kib_is_one_chunk,
    sr_05_df_on_a_large_read,
    sr_06_every_error_is_an_error_chunk,
    sr_07_success_without_content_has_no_payload,
    sr_08_64_reads_and_writes_in_flight,
    sr_09_no_chunk_is_larger_than_the_maximum,
    sr_10_a_read_of_no_bytes,
    sr_11_chunks_of_an_aligned_read_are_aligned,
}

/// One MiB of which every other 64 KiB is written, and what it holds.
fn half_sparse(ground: &Ground, seed: u64) -> (u64, Vec<u8>) {
    let offset = ground.range(MIB);
    let mut link = ground.link();
    let mut expected = vec![0; MIB as usize];
    for at in (0..MIB).step_by(131_072) {
        let data = pattern(seed, offset + at, 65_536);
        link.write(offset + at, &data);
        expected[at as usize..at as usize + 65_536].copy_from_slice(&data);
    }
    (offset, expected)
}

fn is_content(kind: u16) -> bool {
    matches!(kind, chunk::OFFSET_DATA | chunk::OFFSET_HOLE)
}

/// The reply to a request that must fail with one of `errors`, in a chunk that says so.
fn error_chunk(reply: &Reply, errors: &[u32]) {
    assert!(errors.contains(&reply.error), "error {}", reply.error);
    let has_error = reply.chunks.iter().any(|(kind, _)| matches!(*kind, chunk::ERROR | chunk::ERROR_OFFSET));
    assert!(has_error, "the error came without an error chunk: {:?}", reply.chunks);
}

fn sr_01_a_read_comes_in_chunks_that_cover_it(ground: &Ground) {
    let (offset, expected) = half_sparse(ground, 1);
    let mut link = ground.link();
    for (at, len) in [(0, MIB), (0, 512), (1, 1), (65_000, 1000), (12_345, 500_000), (65_536, 65_536)] {
        let reply = link.call(cmd::READ, 0, offset + at, len);
        assert!(reply.chunks.iter().any(|(kind, _)| is_content(*kind)), "{:?}", reply.chunks);
        assert!(reply.ok() == expected[at as usize..(at + len) as usize], "{len} bytes at {at}");
    }
}

/// What a replica holds as a hole is not sent as zeroes.
fn sr_01_a_sparse_range_comes_as_a_hole(ground: &Ground) {
    let mut link = ground.link();
    let never_written = link.call(cmd::READ, 0, ground.range(MIB), MIB);
    assert!(never_written.chunks.iter().all(|(kind, _)| *kind != chunk::OFFSET_DATA));
    assert!(never_written.ok().iter().all(|byte| *byte == 0));
    let offset = ground.written(101, MIB);
    link.done(cmd::WRITE_ZEROES, 0, offset + 131_072, 131_072);
    let reply = link.call(cmd::READ, 0, offset, MIB);
    assert!(reply.chunks.iter().any(|(kind, _)| *kind == chunk::OFFSET_HOLE), "{:?}", reply.chunks);
    let data = reply.ok();
    assert!(data[131_072..262_144].iter().all(|byte| *byte == 0));
    assert!(data[262_144..] == pattern(101, offset + 262_144, MIB - 262_144));
}

fn sr_02_read_past_the_end_is_an_error_chunk(ground: &Ground) {
    let mut link = ground.link();
    for (offset, len) in [(SIZE, 1), (SIZE - 512, 1024), (u64::MAX, 512), (SIZE - MIB, 2 * MIB)] {
        let reply = link.call(cmd::READ, 0, offset, len);
        error_chunk(&reply, &[err::EINVAL]);
        assert!(reply.chunks.iter().all(|(kind, _)| !is_content(*kind)), "{:?}", reply.chunks);
        link.usable();
    }
}

fn sr_03_a_wrong_flag_is_an_error_chunk(ground: &Ground) {
    let mut link = ground.link();
    for flags in [flag::NO_HOLE, flag::REQ_ONE, flag::FAST_ZERO, 1 << 6, 1 << 15] {
        error_chunk(&link.call(cmd::READ, flags, 0, 4096), &[err::EINVAL]);
        link.usable();
    }
}

fn sr_04_df_up_to_64_kib_is_one_chunk(ground: &Ground) {
    let (offset, expected) = half_sparse(ground, 4);
    let mut link = ground.link();
    link.offers(tf::SEND_DF);
    for (at, len) in [(0, 65_536), (65_536, 65_536), (32_768, 65_536), (1, 1), (65_000, 65_001), (0, 512)] {
        let reply = link.call(cmd::READ, flag::DF, offset + at, len);
        assert_eq!(reply.chunks.iter().filter(|(kind, _)| is_content(*kind)).count(), 1);
        assert!(reply.ok() == expected[at as usize..(at + len) as usize], "{len} bytes at {at}");
    }
}

fn sr_05_df_on_a_large_read(ground: &Ground) {
    let (offset, expected) = half_sparse(ground, 5);
    let mut link = ground.link();
    for len in [65_537, MIB, 8 * MIB, 32 * MIB] {
        let reply = link.call(cmd::READ, flag::DF, offset, len);
        let contents = reply.chunks.iter().filter(|(kind, _)| is_content(*kind)).count();
        if reply.error == err::EOVERFLOW {
            assert_eq!(contents, 0, "content beside EOVERFLOW");
        } else {
            assert_eq!(contents, 1);
            let data = reply.ok();
            let both = data.len().min(expected.len());
            assert!(data[..both] == expected[..both]);
        }
        link.usable();
    }
}

fn sr_06_every_error_is_an_error_chunk(ground: &Ground) {
    let mut link = ground.link();
    let cookie = link.send_write(0, SIZE - 512, &[6; 4096]);
    let reply = link.receive();
    assert_eq!(reply.cookie, cookie);
    error_chunk(&reply, &[err::ENOSPC]);
    let wrong =
        [(200, 0, 512), (cmd::TRIM, SIZE, 512), (cmd::WRITE_ZEROES, SIZE, 512), (cmd::RESIZE, 0, 512)];
    for (command, offset, len) in wrong {
        error_chunk(&link.call(command, 0, offset, len), &[err::EINVAL, err::ENOSPC]);
        link.usable();
    }
}

fn sr_07_success_without_content_has_no_payload(ground: &Ground) {
    let offset = ground.range(8192);
    let mut link = ground.link();
    link.send_write(0, offset, &[7; 4096]);
    let mut replies = vec![link.receive()];
    let others = [(cmd::FLUSH, 0, 0), (cmd::TRIM, offset, 4096), (cmd::WRITE_ZEROES, offset, 4096)];
    for (command, at, len) in others.into_iter().chain([(cmd::CACHE, offset, 4096)]) {
        replies.push(link.call(command, 0, at, len));
    }
    for reply in replies {
        assert_eq!(reply.error, 0);
        assert!(reply.chunks.is_empty() || reply.chunks == [(chunk::NONE, 0)], "{:?}", reply.chunks);
    }
}

fn sr_08_64_reads_and_writes_in_flight(ground: &Ground) {
    let (sparse, expected) = half_sparse(ground, 8);
    let fresh = ground.range(64 * 16_384);
    let mut link = ground.link();
    let mut reads = Vec::new();
    for index in 0..64 {
        let at = index * 16_384;
        reads.push((link.send(cmd::READ, 0, sparse + at, 16_384), at as usize));
        link.send_write(0, fresh + at, &pattern(88, fresh + at, 16_384));
    }
    let replies = link.receive_all();
    assert_eq!(replies.len(), 128);
    assert!(replies.values().all(|reply| reply.error == 0));
    for (cookie, at) in reads {
        assert!(replies[&cookie].data == expected[at..at + 16_384]);
    }
    assert!(link.read(fresh, 64 * 16_384) == pattern(88, fresh, 64 * 16_384));
}

fn sr_09_no_chunk_is_larger_than_the_maximum(ground: &Ground) {
    let offset = ground.written(9, 32 * MIB);
    let mut link = ground.link();
    let reply = link.call(cmd::READ, 0, offset, 32 * MIB);
    let largest = u64::from(link.block_sizes[2]).min(PAYLOAD_MAX);
    assert!(reply.chunks.iter().all(|(_, len)| *len <= largest + 8), "{:?}", reply.chunks);
    assert!(reply.ok() == pattern(9, offset, 32 * MIB));
}

fn sr_10_a_read_of_no_bytes(ground: &Ground) {
    let mut link: Link = ground.link();
    for flags in [0, flag::DF, flag::FUA] {
        for offset in [0, 4097, SIZE] {
            let reply = link.call(cmd::READ, flags, offset, 0);
            assert!(reply.data.is_empty() && !reply.chunks.is_empty());
            link.usable();
        }
    }
}

fn sr_11_chunks_of_an_aligned_read_are_aligned(ground: &Ground) {
    let (offset, _) = half_sparse(ground, 11);
    let mut link = ground.link();
    for (at, len) in [(0, MIB), (512, 262_144), (4096, 4096), (65_024, 1024)] {
        let reply = link.call(cmd::READ, 0, offset + at, len);
        for (kind, bytes) in reply.chunks {
            assert!(kind != chunk::OFFSET_DATA || (bytes - 8) % 512 == 0, "a chunk of {} bytes", bytes - 8);
        }
    }
}
