//! HS: the handshake up to the client's flags, and EXPORT_NAME.

use std::time::{Duration, Instant};

use super::ground::{EXPORT, Ground, MIB, SIZE, kept};
use super::link::{Link, Mode, cmd, tf};
use super::raw::{FIXED_NEWSTYLE, NO_ZEROES, Raw, be16, be64, info_data, opt, option, option_header};

cases! {
    hs_01_the_greeting_is_two_magics_and_flags,
    hs_02_fixed_newstyle_is_set,
    hs_03_no_other_handshake_flags,
    hs_04_the_server_waits_for_the_client,
    hs_05_export_name_without_padding,
    hs_06_export_name_with_padding,
    hs_07_unknown_client_flags_close,
    hs_08_client_flag_2_closes,
    hs_09_a_client_without_fixed_newstyle_can_use_export_name,
    hs_10_a_client_with_no_zeroes_alone_gets_10_bytes,
    hs_11_a_handshake_byte_by_byte,
    hs_12_small_replies_over_tcp_are_not_delayed,
    hs_13_export_name_of_an_unknown_export_closes,
    hs_14_a_name_over_4096_bytes_closes,
    hs_15_a_handshake_and_a_read_in_one_piece,
}

fn hs_01_the_greeting_is_two_magics_and_flags(ground: &Ground) {
    ground.raw().greeting();
    ground.raw_tcp().greeting();
}

fn hs_02_fixed_newstyle_is_set(ground: &Ground) {
    assert_ne!(ground.raw().greeting() & FIXED_NEWSTYLE as u16, 0);
}

fn hs_03_no_other_handshake_flags(ground: &Ground) {
    assert_eq!(ground.raw().greeting() & !(FIXED_NEWSTYLE | NO_ZEROES) as u16, 0);
}

fn hs_04_the_server_waits_for_the_client(ground: &Ground) {
    let mut raw = ground.raw();
    raw.greeting();
    raw.expect_quiet();
}

/// Takes the answer to EXPORT_NAME and uses the connection.
fn in_transmission(mut raw: Raw, padding: usize) {
    let answer = raw.take(10);
    let (size, flags) = (be64(&answer, 0), be16(&answer, 8));
    assert_eq!(size, SIZE);
    if padding > 0 {
        assert!(raw.take(padding).iter().all(|byte| *byte == 0), "the padding is not zero");
    }
    let mut link = Link::in_transmission(raw, Mode::Simple, size, flags);
    link.usable();
    link.leave();
}

fn hs_05_export_name_without_padding(ground: &Ground) {
    for name in [EXPORT, b""] {
        let mut raw = ground.haggling();
        raw.option(opt::EXPORT_NAME, name);
        in_transmission(raw, 0);
    }
}

fn hs_06_export_name_with_padding(ground: &Ground) {
    let mut raw = ground.raw().hello(FIXED_NEWSTYLE);
    raw.option(opt::EXPORT_NAME, EXPORT);
    in_transmission(raw, 124);
}

fn hs_07_unknown_client_flags_close(ground: &Ground) {
    for bit in 3..32 {
        let mut raw = ground.raw().hello(FIXED_NEWSTYLE | NO_ZEROES | 1 << bit);
        raw.expect_closed();
    }
}

fn hs_08_client_flag_2_closes(ground: &Ground) {
    for flags in [4, 5, 6, 7] {
        ground.raw().hello(flags).expect_closed();
    }
}

fn hs_09_a_client_without_fixed_newstyle_can_use_export_name(ground: &Ground) {
    let mut raw = ground.raw().hello(0);
    raw.option(opt::EXPORT_NAME, EXPORT);
    in_transmission(raw, 124);
}

fn hs_10_a_client_with_no_zeroes_alone_gets_10_bytes(ground: &Ground) {
    let mut raw = ground.raw().hello(NO_ZEROES);
    raw.option(opt::EXPORT_NAME, EXPORT);
    in_transmission(raw, 0);
}

fn hs_11_a_handshake_byte_by_byte(ground: &Ground) {
    for mut raw in [ground.raw(), ground.raw_tcp()] {
        raw.greeting();
        let mut bytes = FIXED_NEWSTYLE.to_be_bytes().to_vec();
        bytes.extend(option(opt::INFO, &info_data(EXPORT, &[0, 1, 2, 3])));
        bytes.extend(option(opt::LIST, &[]));
        for byte in bytes {
            raw.send(&[byte]);
        }
        assert!(raw.try_option_replies(opt::INFO).unwrap().len() > 1);
        assert_eq!(raw.try_option_replies(opt::LIST).unwrap().len(), 2);
        raw.option(opt::EXPORT_NAME, EXPORT);
        in_transmission(raw, 124);
    }
}

/// With Nagle's algorithm on the server's side the second of two small replies waits for the first one's
/// acknowledgement, which Linux delays for 40 ms: that is 4 s here. Without it a round takes well under a millisecond.
fn hs_12_small_replies_over_tcp_are_not_delayed(ground: &Ground) {
    let offset = ground.written(12, MIB);
    let raw = ground.raw_tcp().hello(FIXED_NEWSTYLE | NO_ZEROES);
    let mut link = Link::open(raw, Mode::Simple, EXPORT, &[]);
    let mut fastest = Duration::MAX;
    for _attempt in 0..3 {
        let started = Instant::now();
        for round in 0..100 {
            link.send(cmd::READ, 0, 512, 1);
            link.send_write(0, offset + round * 4096, &[1; 4096]);
            assert_eq!(link.receive_all().len(), 2);
        }
        fastest = fastest.min(started.elapsed());
    }
    assert!(fastest < Duration::from_millis(2500), "200 small replies take {fastest:?}");
}

fn hs_13_export_name_of_an_unknown_export_closes(ground: &Ground) {
    for name in [&b"nothing"[..], b"Tested", b"tested ", b"\xff\xfe", b"tested\0", &[b'x'; 4096]] {
        let mut raw = ground.haggling();
        raw.option(opt::EXPORT_NAME, name);
        raw.expect_closed();
    }
}

fn hs_14_a_name_over_4096_bytes_closes(ground: &Ground) {
    for len in [4097, 100_000, 40 << 20] {
        let mut raw = ground.haggling();
        // The server may close before it has read all.
        let _ = raw.try_send(&option(opt::EXPORT_NAME, &vec![b'x'; len]));
        raw.expect_closed();
    }
    let mut raw = ground.haggling();
    raw.send(&option_header(opt::EXPORT_NAME, u32::MAX));
    raw.half_close();
    raw.expect_closed();
}

fn hs_15_a_handshake_and_a_read_in_one_piece(ground: &Ground) {
    for mut raw in [ground.raw(), ground.raw_tcp()] {
        let mut bytes = (FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec();
        bytes.extend(option(opt::GO, &info_data(EXPORT, &[])));
        let mut link = Link::in_transmission(ground.raw(), Mode::Simple, SIZE, tf::HAS_FLAGS);
        bytes.extend(link.header(cmd::READ, 0, 77, 4096, 1000));
        raw.greeting();
        raw.send(&bytes);
        let replies = raw.try_option_replies(opt::GO).unwrap();
        assert!(replies.len() >= 2, "{replies:?}");
        link.raw = raw;
        link.expect(77, link.asked(cmd::READ, 0, 4096, 1000));
        assert!(link.receive().ok() == kept(4096, 1000));
        link.leave();
    }
}
