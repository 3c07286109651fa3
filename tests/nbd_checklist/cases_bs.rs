//! BS: BLOCK_STATUS, with extents of 32 and of 64 bits. The rules of the chunks themselves are in `reply.rs`.

use super::ground::{Ground, MIB, SIZE, pattern};
use super::link::{Link, cmd, flag};
use super::reply::{Extent, err};

cases! {
    bs_01_one_chunk_for_each_context,
    bs_02_req_one_is_one_extent,
    bs_03_past_the_end,
    bs_04_what_is_called_zero_reads_as_zero,
    bs_05_written_data_is_not_called_zero,
    bs_05_zeroed_and_trimmed_data_is_told_truly,
    bs_06_only_hole_and_zero,
    bs_07_no_bytes_and_fua,
    bs_08_wrong_flags,
    bs_09_extents_are_multiples_of_512,
}

const BASE: &str = "base:allocation";
const HOLE: u64 = 1;
const ZERO: u64 = 2;

/// The extents of the only context.
fn status(link: &mut Link, flags: u16, offset: u64, len: u64) -> Vec<Extent> {
    let reply = link.call(cmd::BLOCK_STATUS, flags, offset, len);
    assert_eq!(reply.error, 0, "the error of BLOCK_STATUS of {len} bytes at {offset}");
    reply.extents.into_iter().next().expect("a context").1
}

/// The extents of the whole export: first byte, bytes, status.
fn walk(link: &mut Link) -> Vec<(u64, u64, u64)> {
    const STEP: u64 = (1 << 32) - 65_536;
    let mut found = Vec::new();
    let mut at = 0;
    while at < SIZE {
        for extent in status(link, 0, at, STEP.min(SIZE - at)) {
            found.push((at, extent.len, extent.status));
            at += extent.len;
        }
        assert!(found.len() < 100_000, "no end of extents");
    }
    assert_eq!(at, SIZE);
    found
}

fn bs_01_one_chunk_for_each_context(ground: &Ground) {
    let offset = ground.written(1, MIB);
    let mut link = ground.link_with(&[BASE]);
    for (at, len) in [(0, 4096), (0, MIB), (512, 512), (1, 1), (12_345, 70_000)] {
        status(&mut link, 0, offset + at, len);
    }
    let mut link = ground.link_with(&["nbdmirror:state", BASE, "nbdmirror:stale/0", "nbdmirror:stale/1"]);
    assert_eq!(link.contexts.len(), 4, "{:?}", link.contexts);
    let reply = link.call(cmd::BLOCK_STATUS, 0, offset, MIB);
    assert_eq!((reply.error, reply.extents.len()), (0, 4));
    link.usable();
}

fn bs_02_req_one_is_one_extent(ground: &Ground) {
    let offset = ground.written(2, MIB);
    let mut link = ground.link_with(&[BASE, "nbdmirror:state"]);
    // Into the written range and out of it on both sides.
    for (from, len) in
        [(offset - 4096, 8192), (offset, 512), (offset, 4 * MIB), (0, SIZE / 2), (offset + 1, 1)]
    {
        // More than one extent, or one longer than the request, fails the reply's check.
        assert_eq!(link.call(cmd::BLOCK_STATUS, flag::REQ_ONE, from, len).error, 0);
    }
}

fn bs_03_past_the_end(ground: &Ground) {
    let mut link = ground.link_with(&[BASE]);
    for range in [(SIZE, 512), (SIZE - 512, 1024), (u64::MAX, 512), (SIZE - MIB, (1 << 32) - 1)] {
        link.refused(cmd::BLOCK_STATUS, 0, range, &[err::EINVAL]);
        link.refused(cmd::BLOCK_STATUS, flag::REQ_ONE, range, &[err::EINVAL]);
    }
}

fn bs_04_what_is_called_zero_reads_as_zero(ground: &Ground) {
    let offset = ground.written(4, MIB);
    let mut link = ground.link_with(&[BASE]);
    link.done(cmd::WRITE_ZEROES, 0, offset + 65_536, 65_536);
    link.done(cmd::TRIM, 0, offset + 262_144, 65_536);
    link.write(offset + MIB / 2 + 77, &[1]);
    let extents = walk(&mut link);
    assert!(extents.iter().any(|(_, _, status)| status & ZERO != 0), "nothing of a new volume is zero");
    for (at, len, _) in extents.into_iter().filter(|(_, _, status)| status & ZERO != 0) {
        // Long ones at both ends and in the middle.
        let piece = len.min(MIB);
        for from in [at, at + (len - piece) / 2, at + len - piece] {
            let data = link.read(from, piece);
            assert!(data.iter().all(|byte| *byte == 0), "{piece} bytes at {from} of an extent that is zero");
        }
    }
}

/// The union of the status of a range, bit by bit.
fn any(link: &mut Link, offset: u64, len: u64) -> u64 {
    let (mut at, mut bits) = (offset, 0);
    while at < offset + len {
        for extent in status(link, 0, at, offset + len - at) {
            if at < offset + len {
                bits |= extent.status;
            }
            at += extent.len;
        }
    }
    bits
}

fn bs_05_written_data_is_not_called_zero(ground: &Ground) {
    let mut link = ground.link_with(&[BASE]);
    for (at, len) in [(0, 4096), (4096, 65_536), (100, 1), (511, 2), (70_000, 200_000)] {
        let offset = ground.range(MIB);
        // Known to be a hole before, so an answer remembered from then would be found out.
        assert_ne!(any(&mut link, offset, MIB) & ZERO, 0);
        link.write(offset + at, &pattern(5, offset + at, len));
        assert_eq!(any(&mut link, offset + at, len) & ZERO, 0, "{len} bytes at {at}");
        let mut other = ground.link_with(&[BASE]);
        assert_eq!(any(&mut other, offset + at, len) & ZERO, 0, "{len} bytes at {at}, on a new connection");
    }
}

fn bs_05_zeroed_and_trimmed_data_is_told_truly(ground: &Ground) {
    let mut link = ground.link_with(&[BASE]);
    for (command, flags) in [(cmd::WRITE_ZEROES, 0), (cmd::TRIM, 0), (cmd::WRITE_ZEROES, flag::NO_HOLE)] {
        let offset = ground.written(55, MIB);
        link.done(command, flags, offset + 131_072, 262_144);
        for (at, len) in [(0, 131_072), (393_216, MIB - 393_216)] {
            assert_eq!(any(&mut link, offset + at, len), 0, "data beside it, {len} bytes at {at}");
        }
        let bits = any(&mut link, offset + 131_072, 262_144);
        // A range that was provisioned without being written may be called a hole: filesystems do not tell the two apart.
        assert_eq!(bits & !(HOLE | ZERO), 0);
        if bits & ZERO != 0 {
            assert!(link.read(offset + 131_072, 262_144).iter().all(|byte| *byte == 0));
        }
    }
}

fn bs_06_only_hole_and_zero(ground: &Ground) {
    let extents = walk(&mut ground.link_with(&[BASE]));
    assert!(extents.iter().all(|(_, _, status)| status & !(HOLE | ZERO) == 0));
}

fn bs_07_no_bytes_and_fua(ground: &Ground) {
    let mut link = ground.link_with(&[BASE]);
    for (flags, offset) in [(0, 0), (flag::REQ_ONE, 4096), (0, SIZE)] {
        let error = link.call(cmd::BLOCK_STATUS, flags, offset, 0).error;
        assert!(error == 0 || err::ANY.contains(&error));
        link.usable();
    }
    status(&mut link, flag::FUA, 0, MIB);
    status(&mut link, flag::FUA | flag::REQ_ONE, 0, MIB);
}

fn bs_08_wrong_flags(ground: &Ground) {
    let mut link = ground.link_with(&[BASE]);
    for bit in [1, 2, 4].into_iter().chain(6..16) {
        link.refused(cmd::BLOCK_STATUS, 1 << bit, (0, 4096), &[err::EINVAL]);
    }
}

fn bs_09_extents_are_multiples_of_512(ground: &Ground) {
    let offset = ground.written(9, MIB);
    let mut link = ground.link_with(&[BASE, "nbdmirror:state", "nbdmirror:stale/0"]);
    link.done(cmd::WRITE_ZEROES, 0, offset + 65_000, 131_073);
    let reply = link.call(cmd::BLOCK_STATUS, 0, offset - 65_536, MIB + 131_072);
    assert_eq!(reply.error, 0);
    for (id, extents) in reply.extents {
        assert!(extents.iter().all(|extent| extent.len % 512 == 0), "context {id}: {extents:?}");
    }
}
