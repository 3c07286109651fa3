//! HS: the handshake up to the client's flags, and EXPORT_NAME.

use std::time::{Duration, Instant};

use super::ground::{EXPORT, Ground, SIZE, kept};
use super::link::{Link, Mode, cmd, flag, tf};
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

/// With Nagle's algorithm on the server's side the second of two small replies waits for the acknowledgement of the
/// first, which Linux delays for 40 ms as long as nobody reads: 4 s in 100 rounds. Without it TCP is about as fast as a
/// Unix socket; the fastest of a few tries counts.
fn hs_12_small_replies_over_tcp_are_not_delayed(ground: &Ground) {
    const DELAY_MAX: Duration = Duration::from_secs(2);
    let offset = ground.range(4096);
    let unix = ground.haggling();
    let tcp = ground.raw_tcp().hello(FIXED_NEWSTYLE | NO_ZEROES);
    let [mut unix, mut tcp] = [unix, tcp].map(|raw| Link::open(raw, Mode::Simple, EXPORT, &[]));
    let mut attempts = (0..4).map(|_| {
        let direct = rounds(&mut unix, offset, 0);
        rounds(&mut tcp, offset, 17 + 16).saturating_sub(direct)
    });
    let delay = attempts.find(|delay| *delay < DELAY_MAX);
    println!("HS-12: 100 rounds over TCP take {delay:?} more");
    assert!(delay.is_some(), "100 pairs of small replies take more than {DELAY_MAX:?} more over TCP");
}

/// A READ and a durable WRITE whose reply comes later, a hundred times; nothing is read before `unread` bytes have come.
fn rounds(link: &mut Link, offset: u64, unread: usize) -> Duration {
    let started = Instant::now();
    for _ in 0..100 {
        link.send(cmd::READ, 0, 512, 1);
        link.send_write(flag::FUA, offset, &[12; 512]);
        if unread > 0 {
            link.raw.wait_unread(unread);
        }
        assert_eq!(link.receive_all().len(), 2);
    }
    started.elapsed()
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
