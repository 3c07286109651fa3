//! CMD: the end of the export, lengths of zero, lengths that overflow, lengths that are too long.

use super::ground::{GIB, Ground, LARGE, MIB, SIZE, pattern};
use super::link::{Link, Mode, cmd, flag, tf};
use super::reply::err;

cases! {
    cmd_04_the_last_block,
    cmd_05_read_past_the_end,
    cmd_06_read_that_overflows,
    cmd_07_write_past_the_end,
    cmd_08_a_write_across_the_end_changes_nothing,
    cmd_09_writes_that_overflow,
    cmd_10_read_of_no_bytes,
    cmd_11_write_of_no_bytes,
    cmd_12_trim_of_no_bytes,
    cmd_13_write_zeroes_of_no_bytes,
    cmd_14_cache_of_no_bytes,
    cmd_20_trim_past_the_end,
    cmd_26_write_zeroes_past_the_end,
    cmd_27_trims_and_zeroes_longer_than_a_payload,
    cmd_34_a_read_of_32_mib,
    cmd_35_a_write_of_32_mib,
    cmd_36_a_write_of_32_mib_and_a_byte,
    cmd_37_a_read_of_32_mib_and_a_byte,
    cmd_38_single_bytes,
    cmd_39_requests_off_the_minimum_block,
    cmd_55_offsets_above_4_gib,
}

/// Ranges that end past the end, wholly or in part.
const PAST: [(u64, u64); 6] =
    [(SIZE, 1), (SIZE, 4096), (SIZE - 1, 2), (SIZE - 512, 1024), (SIZE + 4096, 512), (1 << 62, 4096)];

/// Ranges whose end is beyond 2^64.
const OVERFLOWING: [(u64, u64); 5] = [
    (u64::MAX, 1),
    (u64::MAX, 4096),
    (u64::MAX - 511, 512),
    (u64::MAX - 4095, 8192),
    (u64::MAX - MIB + 1, 2 * MIB),
];

fn cmd_04_the_last_block(ground: &Ground) {
    let mut link = ground.link();
    for len in [1, 512, 4096] {
        let data = pattern(4 + len, SIZE - len, len);
        link.write(SIZE - len, &data);
        assert!(link.read(SIZE - len, len) == data);
    }
}

fn cmd_05_read_past_the_end(ground: &Ground) {
    let mut link = ground.link();
    for range in PAST {
        link.refused(cmd::READ, 0, range, &[err::EINVAL]);
    }
}

fn cmd_06_read_that_overflows(ground: &Ground) {
    let mut link = ground.link();
    for range in OVERFLOWING {
        link.refused(cmd::READ, 0, range, err::ANY);
    }
}

fn cmd_07_write_past_the_end(ground: &Ground) {
    let mut link = ground.link();
    for range in PAST {
        link.refused(cmd::WRITE, 0, range, &[err::ENOSPC]);
        link.refused(cmd::WRITE, flag::FUA, range, &[err::ENOSPC]);
    }
    // A payload of many pieces is skipped whole.
    link.refused(cmd::WRITE, 0, (SIZE - MIB, 8 * MIB), &[err::ENOSPC]);
}

fn cmd_08_a_write_across_the_end_changes_nothing(ground: &Ground) {
    let mut link = ground.link();
    let before = pattern(8, SIZE - MIB, MIB);
    link.write(SIZE - MIB, &before);
    for (offset, len) in [(SIZE - 512, 513), (SIZE - 4096, 8192), (SIZE - MIB, MIB + 1)] {
        link.refused(cmd::WRITE, 0, (offset, len), &[err::ENOSPC]);
        assert!(link.read(SIZE - MIB, MIB) == before);
    }
}

fn cmd_09_writes_that_overflow(ground: &Ground) {
    let mut link = ground.link();
    for range in OVERFLOWING {
        for command in [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES, cmd::CACHE] {
            link.refused(command, 0, range, err::ANY);
        }
    }
}

/// What a server says to a request of no bytes is its own affair; it does not hang up.
fn no_bytes(ground: &Ground, command: u16) {
    let mut link = ground.link();
    for offset in [0, 1, 4096, SIZE, SIZE + 1, u64::MAX] {
        for flags in [0, flag::FUA] {
            let cookie = link.cookie();
            link.send_as(cookie, command, flags, (offset, 0), &[]);
            let reply = link.receive();
            assert!(reply.data.is_empty());
            assert!(reply.error == 0 || err::ANY.contains(&reply.error));
            link.usable();
        }
    }
}

fn cmd_10_read_of_no_bytes(ground: &Ground) {
    no_bytes(ground, cmd::READ);
}

fn cmd_11_write_of_no_bytes(ground: &Ground) {
    no_bytes(ground, cmd::WRITE);
}

fn cmd_12_trim_of_no_bytes(ground: &Ground) {
    no_bytes(ground, cmd::TRIM);
}

fn cmd_13_write_zeroes_of_no_bytes(ground: &Ground) {
    no_bytes(ground, cmd::WRITE_ZEROES);
}

fn cmd_14_cache_of_no_bytes(ground: &Ground) {
    no_bytes(ground, cmd::CACHE);
}

fn cmd_20_trim_past_the_end(ground: &Ground) {
    let mut link = ground.link();
    for range in PAST {
        link.refused(cmd::TRIM, 0, range, &[err::EINVAL]);
    }
}

fn cmd_26_write_zeroes_past_the_end(ground: &Ground) {
    let mut link = ground.link();
    let before = pattern(26, SIZE - 8192, 8192);
    link.write(SIZE - 8192, &before);
    for range in PAST {
        for flags in [0, flag::NO_HOLE] {
            link.refused(cmd::WRITE_ZEROES, flags, range, &[err::ENOSPC]);
        }
        assert!(link.read(SIZE - 8192, 8192) == before);
    }
}

fn cmd_27_trims_and_zeroes_longer_than_a_payload(ground: &Ground) {
    let mut link = ground.link();
    for len in [32 * MIB + 1, 100 * MIB, GIB, (1 << 32) - 1] {
        for command in [cmd::TRIM, cmd::WRITE_ZEROES] {
            link.write(LARGE + len - 4096, &[7; 4096]);
            let error = link.call(command, 0, LARGE, len).error;
            assert!([0, err::EOVERFLOW, err::EINVAL].contains(&error), "command {command}: {error}");
            if command == cmd::WRITE_ZEROES && error == 0 {
                assert!(link.read(LARGE + len - 4096, 4096).iter().all(|byte| *byte == 0));
            }
            link.usable();
        }
    }
}

fn cmd_34_a_read_of_32_mib(ground: &Ground) {
    let offset = ground.written(34, 32 * MIB);
    assert!(ground.link().read(offset, 32 * MIB) == pattern(34, offset, 32 * MIB));
}

fn cmd_35_a_write_of_32_mib(ground: &Ground) {
    let offset = ground.range(32 * MIB + 2) + 1;
    let data = pattern(35, offset, 32 * MIB);
    let mut link = ground.link();
    link.write(offset, &data);
    assert!(ground.link().read(offset, 32 * MIB) == data);
    assert_eq!([link.read(offset - 1, 1)[0], link.read(offset + 32 * MIB, 1)[0]], [0, 0]);
}

fn cmd_36_a_write_of_32_mib_and_a_byte(ground: &Ground) {
    let len = 32 * MIB + 1;
    let offset = ground.range(len);
    let mut link = ground.link();
    let cookie = link.cookie();
    let bytes = link.encode(cmd::WRITE, 0, cookie, (offset, len), &vec![0x36; len as usize]);
    link.expect(cookie, link.asked(cmd::WRITE, 0, offset, len));
    // It may hang up before it has read all.
    let _ = link.raw.try_send(&bytes);
    link.refused_or_closed();
}

fn cmd_37_a_read_of_32_mib_and_a_byte(ground: &Ground) {
    let mut link = ground.link();
    link.send(cmd::READ, 0, LARGE, 32 * MIB + 1);
    link.refused_or_closed();
}

/// Writes and reads back ranges off every alignment, and looks at what is around them.
fn unaligned(link: &mut Link, ground: &Ground) {
    for (at, len) in [(1, 1), (511, 2), (4095, 2), (3, 4090), (4097, 8191), (1023, 70_001)] {
        let offset = ground.written(38, 100_000);
        let mut expected = pattern(38, offset, 100_000);
        let data = pattern(3838, offset + at, len);
        link.write(offset + at, &data);
        expected[at as usize..(at + len) as usize].copy_from_slice(&data);
        assert!(link.read(offset + at, len) == data);
        assert!(link.read(offset, 100_000) == expected, "around {len} bytes at {at}");
    }
}

fn cmd_38_single_bytes(ground: &Ground) {
    let mut link = ground.link();
    assert_eq!(link.block_sizes[0], 1, "the smallest block");
    unaligned(&mut link, ground);
}

/// This server announces a smallest block of one byte, so no request is off it; clients that never asked for sizes get
/// the same.
fn cmd_39_requests_off_the_minimum_block(ground: &Ground) {
    if ground.mode == Mode::Simple {
        let mut raw = ground.haggling();
        raw.option(super::raw::opt::EXPORT_NAME, b"");
        raw.take(10);
        let mut link = Link::in_transmission(raw, Mode::Simple, SIZE, tf::HAS_FLAGS);
        unaligned(&mut link, ground);
    } else {
        unaligned(&mut ground.link(), ground);
    }
}

fn cmd_55_offsets_above_4_gib(ground: &Ground) {
    let mut link = ground.link();
    // In 32 bits all three would fall on the same place.
    let low = LARGE + 777;
    let places = [low, low + 4 * GIB];
    for (index, offset) in places.into_iter().enumerate() {
        link.write(offset, &pattern(55 + index as u64, offset, 5000));
    }
    for (index, offset) in places.into_iter().enumerate() {
        assert!(link.read(offset, 5000) == pattern(55 + index as u64, offset, 5000), "at {offset}");
    }
    link.done(cmd::WRITE_ZEROES, 0, places[1], 5000);
    assert!(link.read(places[0], 5000) == pattern(55, places[0], 5000));
    assert!(link.read(places[1], 5000) == [0; 5000]);
}
