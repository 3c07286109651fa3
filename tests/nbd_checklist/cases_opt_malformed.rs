//! OPT: options whose lengths and data do not fit together.

use super::ground::{EXPORT, Ground};
use super::raw::{
    FIXED_NEWSTYLE, NO_ZEROES, info, info_data, meta_data, opt, option, option_header, rep, string,
};

cases! {
    opt_23_a_name_length_beyond_the_data,
    opt_24_go_with_too_short_data,
    opt_25_a_request_count_that_does_not_fit,
    opt_26_a_name_over_4096_bytes,
    opt_27_a_name_with_a_nul_is_no_name_of_ours,
    opt_28_a_name_that_is_not_utf_8,
    opt_29_paths_are_names_like_others,
    opt_43_a_bad_option_magic_closes,
    opt_44_option_length_of_4_gib_allocates_nothing,
    opt_45_options_cut_off_at_every_byte,
}

/// INFO and GO with this data are refused with `expected`, and the next option is answered.
fn refused(ground: &Ground, data: &[u8], expected: &[u32]) {
    let mut raw = ground.haggling();
    for code in [opt::INFO, opt::GO] {
        let kind = raw.ask_one(code, data);
        assert!(expected.contains(&kind), "option {code} with {} bytes: {kind:#x}", data.len());
        raw.in_step();
    }
}

fn opt_23_a_name_length_beyond_the_data(ground: &Ground) {
    for claimed in [EXPORT.len() as u32 + 3, 4096, 4097, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1, u32::MAX] {
        let data = [&claimed.to_be_bytes()[..], EXPORT, &[0, 0]].concat();
        refused(ground, &data, &[rep::ERR_INVALID]);
    }
}

fn opt_24_go_with_too_short_data(ground: &Ground) {
    for len in 0..6 {
        refused(ground, &vec![0; len], &[rep::ERR_INVALID]);
    }
    // The count of information requests is missing, or half of it.
    refused(ground, &string(EXPORT), &[rep::ERR_INVALID]);
    refused(ground, &[&string(EXPORT)[..], &[0]].concat(), &[rep::ERR_INVALID]);
}

fn opt_25_a_request_count_that_does_not_fit(ground: &Ground) {
    for (count, requests) in [(1_u16, 0), (2, 1), (u16::MAX, 1), (0, 1), (1, 2), (0x8000, 3)] {
        let mut data = string(EXPORT);
        data.extend_from_slice(&count.to_be_bytes());
        data.extend(vec![0; 2 * requests]);
        refused(ground, &data, &[rep::ERR_INVALID]);
    }
    for odd in [1, 3] {
        let mut data = info_data(EXPORT, &[info::NAME, info::BLOCK_SIZE]);
        data.truncate(data.len() - odd);
        refused(ground, &data, &[rep::ERR_INVALID]);
    }
}

fn opt_26_a_name_over_4096_bytes(ground: &Ground) {
    for len in [4097, 10_000, 200_000, 2 << 20] {
        for code in [opt::INFO, opt::GO] {
            let mut raw = ground.haggling();
            // The server may close at once.
            let _ = raw.try_send(&option(code, &info_data(&vec![b'x'; len], &[])));
            if let Some(replies) = raw.try_option_replies(code) {
                assert!(rep::is_error(replies[0].kind), "a name of {len} bytes: {:#x}", replies[0].kind);
                raw.in_step();
            }
        }
    }
}

fn opt_27_a_name_with_a_nul_is_no_name_of_ours(ground: &Ground) {
    for name in [&b"tested\0"[..], b"\0", b"\0tested", b"tes\0ted", b"tested\0../x"] {
        refused(ground, &info_data(name, &[]), &[rep::ERR_UNKNOWN, rep::ERR_INVALID]);
    }
}

fn opt_28_a_name_that_is_not_utf_8(ground: &Ground) {
    for name in [&b"\xff"[..], b"tested\xc0\xaf", b"\xed\xa0\x80", &[0x80; 300]] {
        refused(ground, &info_data(name, &[]), &[rep::ERR_UNKNOWN, rep::ERR_INVALID]);
    }
}

fn opt_29_paths_are_names_like_others(ground: &Ground) {
    for name in [&b"../tested"[..], b"/tested", b"./tested", b"tested/..", b"/etc/passwd", b"..", b".", b"/"]
    {
        refused(ground, &info_data(name, &[]), &[rep::ERR_UNKNOWN]);
    }
}

fn opt_43_a_bad_option_magic_closes(ground: &Ground) {
    for at in 0..8 {
        let mut raw = ground.haggling();
        let mut bytes = option(opt::LIST, &[]);
        bytes[at] ^= 0x20;
        raw.send(&bytes);
        raw.expect_closed();
    }
}

fn opt_44_option_length_of_4_gib_allocates_nothing(ground: &Ground) {
    const GROWTH_KIB_MAX: u64 = 32 << 10;
    let before = ground.rss_kib();
    let mut held = Vec::new();
    for code in (0..14).chain([4711, u32::MAX]) {
        for len in [u32::MAX, u32::MAX - 15, 1 << 31, 1 << 30] {
            let mut raw = ground.haggling();
            raw.send(&option_header(code, len));
            // More than the server would take if it kept what it was promised; it may close before that.
            let _ = raw.try_send(&vec![0; 200_000]);
            held.push(raw);
        }
    }
    let grown = ground.rss_kib().saturating_sub(before);
    assert!(grown < GROWTH_KIB_MAX, "{} connections cost {grown} KiB", held.len());
    ground.unharmed();
    drop(held);
    ground.let_go();
}

fn opt_45_options_cut_off_at_every_byte(ground: &Ground) {
    let mut bytes = (FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec();
    bytes.extend(option(opt::GO, &info_data(EXPORT, &[info::BLOCK_SIZE])));
    for end in 0..bytes.len() {
        let mut raw = ground.raw();
        raw.greeting();
        raw.send(&bytes[..end]);
        raw.half_close();
        raw.expect_closed();
    }
    let meta = option(opt::SET_META_CONTEXT, &meta_data(EXPORT, &["base:allocation", "x-nobody:thing"]));
    for end in 1..meta.len() {
        let mut raw = ground.haggling();
        raw.option(opt::STRUCTURED_REPLY, &[]);
        raw.try_option_replies(opt::STRUCTURED_REPLY).unwrap();
        raw.send(&meta[..end]);
        // Gone without a word.
        drop(raw);
    }
    ground.let_go();
}
