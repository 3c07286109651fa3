//! TF: transmission flags.

use super::ground::{EXPORT, Ground};
use super::link::{Link, Mode, cmd, tf};
use super::raw::{FIXED_NEWSTYLE, NO_ZEROES, be16, be64, opt};
use super::reply::err;

cases! {
    tf_01_has_flags,
    tf_02_fast_zero_needs_write_zeroes,
    tf_03_no_undefined_flags,
    tf_04_no_df_without_structured_replies,
    tf_05_size_and_flags_are_the_same_everywhere,
    tf_06_a_read_only_export_refuses_writes,
    tf_07_flush_and_fua_are_offered,
}

fn tf_01_has_flags(ground: &Ground) {
    for mode in Mode::ALL {
        ground.link_in(mode).offers(tf::HAS_FLAGS);
    }
}

fn tf_02_fast_zero_needs_write_zeroes(ground: &Ground) {
    for mode in Mode::ALL {
        let link = ground.link_in(mode);
        assert!(link.flags & tf::SEND_FAST_ZERO == 0 || link.flags & tf::SEND_WRITE_ZEROES != 0);
    }
}

fn tf_03_no_undefined_flags(ground: &Ground) {
    for mode in Mode::ALL {
        for contexts in [&[][..], &["base:allocation"]] {
            if mode == Mode::Simple && !contexts.is_empty() {
                continue;
            }
            let link = Link::open(ground.haggling(), mode, EXPORT, contexts);
            assert_eq!(link.flags >> 13, 0, "undefined flags: {:#x}", link.flags);
            assert_eq!(link.flags & tf::SEND_RESIZE, 0, "RESIZE: {:#x}", link.flags);
            if mode != Mode::Extended {
                assert_eq!(link.flags & tf::BLOCK_STATUS_PAYLOAD, 0, "{mode:?}: {:#x}", link.flags);
            }
        }
    }
}

fn tf_04_no_df_without_structured_replies(ground: &Ground) {
    assert_eq!(ground.link_in(Mode::Simple).flags & tf::SEND_DF, 0);
}

fn tf_05_size_and_flags_are_the_same_everywhere(ground: &Ground) {
    let first = ground.link_in(Mode::Simple);
    for _ in 0..3 {
        let other = ground.link_in(Mode::Simple);
        assert_eq!((other.size, other.flags), (first.size, first.flags));
    }
    let tcp = Link::open(ground.raw_tcp().hello(FIXED_NEWSTYLE), Mode::Simple, b"", &[]);
    assert_eq!((tcp.size, tcp.flags), (first.size, first.flags));
    let mut raw = ground.raw().hello(FIXED_NEWSTYLE | NO_ZEROES);
    raw.option(opt::EXPORT_NAME, EXPORT);
    let answer = raw.take(10);
    assert_eq!((be64(&answer, 0), be16(&answer, 8)), (first.size, first.flags));
}

/// On a daemon of its own.
fn tf_06_a_read_only_export_refuses_writes(_: &Ground) {
    let ground = Ground::new(Mode::Simple).read_only();
    for mode in Mode::ALL {
        let mut link = ground.link_in(mode);
        link.offers(tf::READ_ONLY);
        for command in [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES] {
            for range in [(512, 512), (0, 4096), (1000, 100_000)] {
                link.refused(command, 0, range, &[err::EPERM]);
            }
        }
        // What does not write is served.
        link.done(cmd::FLUSH, 0, 0, 0);
        link.done(cmd::READ, 0, 0, 4096);
        link.leave();
    }
    ground.let_go();
}

fn tf_07_flush_and_fua_are_offered(ground: &Ground) {
    for mode in Mode::ALL {
        let link = ground.link_in(mode);
        for flag in [tf::SEND_FLUSH, tf::SEND_FUA, tf::CAN_MULTI_CONN, tf::SEND_TRIM, tf::SEND_WRITE_ZEROES] {
            link.offers(flag);
        }
    }
}
