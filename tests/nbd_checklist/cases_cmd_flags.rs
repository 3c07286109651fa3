//! CMD: commands and flags that do not exist, or not together.

use super::ground::{Ground, pattern};
use super::link::{Mode, cmd, flag, tf};
use super::reply::err;

cases! {
    cmd_25_fast_zero_where_it_does_not_belong,
    cmd_29_unknown_commands,
    cmd_30_resize_is_not_offered,
    cmd_31_unknown_flags_on_read,
    cmd_32_known_flags_on_the_wrong_command,
    cmd_33_a_write_with_a_wrong_flag_writes_nothing,
    cmd_49_block_status_without_a_context,
}

const RANGE: (u64, u64) = (512, 4096);

fn cmd_25_fast_zero_where_it_does_not_belong(ground: &Ground) {
    let mut link = ground.link();
    if link.flags & tf::SEND_FAST_ZERO == 0 {
        link.refused(cmd::WRITE_ZEROES, flag::FAST_ZERO, RANGE, &[err::EINVAL]);
    }
    for command in [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::CACHE] {
        link.refused(command, flag::FAST_ZERO, RANGE, &[err::EINVAL]);
    }
    link.refused(cmd::FLUSH, flag::FAST_ZERO, (0, 0), &[err::EINVAL]);
}

fn cmd_29_unknown_commands(ground: &Ground) {
    let mut link = ground.link();
    for command in [9, 10, 200, 255, 256, 0x8000, u16::MAX] {
        for range in [(0, 0), RANGE, (u64::MAX, (1 << 32) - 1)] {
            link.refused(command, 0, range, &[err::EINVAL]);
        }
    }
}

fn cmd_30_resize_is_not_offered(ground: &Ground) {
    let mut link = ground.link();
    for range in [(0, 0), (0, 4096), (4096, 0)] {
        link.refused(cmd::RESIZE, 0, range, &[err::EINVAL]);
    }
    assert_eq!(ground.link().size, link.size);
}

fn cmd_31_unknown_flags_on_read(ground: &Ground) {
    let mut link = ground.link();
    for bit in 6..16 {
        link.refused(cmd::READ, 1 << bit, RANGE, &[err::EINVAL]);
        link.refused(cmd::READ, 1 << bit | flag::FUA, RANGE, &[err::EINVAL]);
    }
    if ground.mode != Mode::Extended {
        link.refused(cmd::READ, flag::PAYLOAD_LEN, RANGE, &[err::EINVAL]);
    }
}

fn cmd_32_known_flags_on_the_wrong_command(ground: &Ground) {
    let mut link = ground.link();
    let wrong = [
        (cmd::READ, &[flag::NO_HOLE, flag::REQ_ONE][..]),
        (cmd::FLUSH, &[flag::NO_HOLE, flag::DF, flag::REQ_ONE]),
        (cmd::TRIM, &[flag::NO_HOLE, flag::DF, flag::REQ_ONE]),
        (cmd::CACHE, &[flag::NO_HOLE, flag::DF, flag::REQ_ONE]),
        (cmd::WRITE_ZEROES, &[flag::DF, flag::REQ_ONE]),
    ];
    for (command, flags) in wrong {
        for flag in flags {
            let range = if command == cmd::FLUSH { (0, 0) } else { RANGE };
            link.refused(command, *flag, range, &[err::EINVAL]);
        }
    }
    if ground.mode == Mode::Simple {
        link.refused(cmd::READ, flag::DF, RANGE, &[err::EINVAL]);
    }
}

fn cmd_33_a_write_with_a_wrong_flag_writes_nothing(ground: &Ground) {
    let offset = ground.written(33, 65_536);
    let mut link = ground.link();
    for bit in (1..16).filter(|bit| *bit != 5) {
        for len in [512, 65_536] {
            link.refused(cmd::WRITE, 1 << bit, (offset, len), &[err::EINVAL]);
            assert!(link.read(offset, 65_536) == pattern(33, offset, 65_536), "bit {bit}");
        }
    }
}

fn cmd_49_block_status_without_a_context(ground: &Ground) {
    let mut link = ground.link();
    for flags in [0, flag::REQ_ONE, flag::FUA] {
        link.refused(cmd::BLOCK_STATUS, flags, RANGE, &[err::EINVAL]);
    }
}
