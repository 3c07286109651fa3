//! OPT: INFO and GO.

use super::ground::{EXPORT, Ground, SIZE};
use super::link::{Link, Mode, cmd, tf};
use super::raw::{OptionReply, Raw, be16, be32, be64, check_string, info, info_data, opt, rep};

cases! {
    opt_14_info_gives_the_export,
    opt_15_nothing_follows_the_acknowledgement_of_go,
    opt_16_an_unknown_export_is_unknown,
    opt_17_go_repeats_what_info_said,
    opt_18_unknown_information_requests_are_ignored,
    opt_19_information_comes_once,
    opt_20_block_sizes_are_sound,
    opt_21_name_and_description_are_strings,
    opt_22_go_without_block_sizes_is_served,
    opt_51_two_hundred_infos,
}

/// The data of the information of this kind, without the kind.
fn of_kind(replies: &[OptionReply], kind: u16) -> Option<Vec<u8>> {
    let found = replies.iter().find(|reply| reply.kind == rep::INFO && be16(&reply.data, 0) == kind)?;
    Some(found.data[2..].to_vec())
}

/// What is said of an export that must be known.
fn known(raw: &mut Raw, code: u32, name: &[u8], wanted: &[u16]) -> Vec<OptionReply> {
    let mut replies = raw.ask(code, &info_data(name, wanted));
    assert_eq!(replies.pop().unwrap().kind, rep::ACK);
    assert!(of_kind(&replies, info::EXPORT).is_some(), "no INFO_EXPORT");
    replies
}

fn opt_14_info_gives_the_export(ground: &Ground) {
    let mut raw = ground.haggling();
    for name in [EXPORT, b""] {
        let export = of_kind(&known(&mut raw, opt::INFO, name, &[]), info::EXPORT).unwrap();
        assert_eq!(be64(&export, 0), SIZE);
        assert_ne!(be16(&export, 8) & tf::HAS_FLAGS, 0);
    }
    raw.in_step();
}

fn opt_15_nothing_follows_the_acknowledgement_of_go(ground: &Ground) {
    for flags in [1, 3] {
        let mut link = Link::open(ground.raw().hello(flags), Mode::Simple, EXPORT, &[]);
        // The next bytes are the reply to a request: padding would be taken for its magic.
        link.usable();
        link.raw.expect_quiet();
        link.leave();
    }
}

fn opt_16_an_unknown_export_is_unknown(ground: &Ground) {
    let mut raw = ground.haggling();
    for name in [&b"nothing"[..], b"TESTED", b"tested ", b"teste", &[b'x'; 4096]] {
        for code in [opt::INFO, opt::GO] {
            assert_eq!(raw.ask_one(code, &info_data(name, &[0, 1, 2, 3])), rep::ERR_UNKNOWN);
            raw.in_step();
        }
    }
}

fn opt_17_go_repeats_what_info_said(ground: &Ground) {
    for mode in Mode::ALL {
        for wanted in [&[][..], &[info::BLOCK_SIZE], &[info::NAME, info::DESCRIPTION], &[0, 1, 2, 3]] {
            let mut raw = ground.haggling();
            if let Some(code) = mode.option() {
                assert_eq!(raw.ask_one(code, &[]), rep::ACK);
            }
            let mut before = known(&mut raw, opt::INFO, EXPORT, wanted);
            let mut after = known(&mut raw, opt::GO, EXPORT, wanted);
            before.sort_by_key(|reply| reply.data.clone());
            after.sort_by_key(|reply| reply.data.clone());
            assert_eq!(before, after, "{mode:?} {wanted:?}");
        }
    }
}

fn opt_18_unknown_information_requests_are_ignored(ground: &Ground) {
    let mut raw = ground.haggling();
    // `ask` refuses information of unknown types.
    known(&mut raw, opt::INFO, EXPORT, &[4, 77, 0x7fff, 0x8000, u16::MAX]);
    let every: Vec<u16> = (4..=u16::MAX).collect();
    known(&mut raw, opt::INFO, EXPORT, &every);
    raw.in_step();
    known(&mut raw, opt::GO, EXPORT, &[u16::MAX]);
}

fn opt_19_information_comes_once(ground: &Ground) {
    let mut raw = ground.haggling();
    for wanted in [vec![0, 1, 2, 3], [1, 3, 0, 2].repeat(16)] {
        let replies = raw.ask(opt::INFO, &info_data(EXPORT, &wanted));
        let mut kinds: Vec<u16> = replies
            .iter()
            .filter(|reply| reply.kind == rep::INFO)
            .map(|reply| be16(&reply.data, 0))
            .collect();
        kinds.sort_unstable();
        let count = kinds.len();
        kinds.dedup();
        assert_eq!(kinds.len(), count, "{kinds:?}");
        raw.in_step();
    }
}

fn opt_20_block_sizes_are_sound(ground: &Ground) {
    let replies = known(&mut ground.haggling(), opt::INFO, EXPORT, &[info::BLOCK_SIZE]);
    let sizes = of_kind(&replies, info::BLOCK_SIZE).expect("the block sizes that were asked for");
    let (min, preferred, max) = (be32(&sizes, 0), be32(&sizes, 4), be32(&sizes, 8));
    assert!(min.is_power_of_two() && min <= 1 << 16, "minimum {min}");
    assert!(preferred.is_power_of_two() && preferred >= min.max(512), "preferred {preferred}");
    assert!(max == u32::MAX || (max >= preferred && max % min == 0), "maximum {max}");
    assert!(max >= 32 << 20, "maximum {max}: clients rely on 32 MiB");
    assert_eq!(SIZE % u64::from(min), 0);
}

fn opt_21_name_and_description_are_strings(ground: &Ground) {
    let replies = known(&mut ground.haggling(), opt::INFO, b"", &[info::NAME, info::DESCRIPTION]);
    // The name differs from what was asked for, so it may not be left out.
    assert_eq!(of_kind(&replies, info::NAME).as_deref(), Some(EXPORT));
    check_string(&of_kind(&replies, info::DESCRIPTION).unwrap_or_default());
}

fn opt_22_go_without_block_sizes_is_served(ground: &Ground) {
    let mut raw = ground.haggling();
    let replies = known(&mut raw, opt::GO, EXPORT, &[]);
    let export = of_kind(&replies, info::EXPORT).unwrap();
    let mut link = Link::in_transmission(raw, Mode::Simple, be64(&export, 0), be16(&export, 8));
    assert_eq!(link.call(cmd::READ, 0, 1, 1).error, 0);
}

fn opt_51_two_hundred_infos(ground: &Ground) {
    let mut raw = ground.haggling();
    for _ in 0..200 {
        raw.option(opt::INFO, &info_data(EXPORT, &[0, 1, 2, 3]));
        match raw.try_option_replies(opt::INFO) {
            Some(replies) => assert_eq!(replies.last().unwrap().kind, rep::ACK),
            // A server may take it for abuse.
            None => return,
        }
    }
    raw.in_step();
}
