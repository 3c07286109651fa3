//! AB: connections opened, cut off, held and filled with rubbish.

use super::ground::{EXPORT, Ground, MIB};
use super::link::{Link, Mode, cmd};
use super::raw::{FIXED_NEWSTYLE, NO_ZEROES, Raw, info_data, opt, option, option_header};
use crate::support::rng::Rng;

cases! {
    ab_01_50_connections_closed_at_once,
    ab_02_200_silent_connections,
    ab_03_200_sessions_dropped,
    ab_04_rubbish_instead_of_a_handshake,
    ab_05_rubbish_after_a_good_handshake,
    ab_08_slow_handshakes_and_half_requests_held,
    ab_09_resets_amid_64_reads,
    ab_16_500_lists_unread,
    ab_17_100_sessions_leave_nothing_behind,
    ab_18_half_close_during_the_handshake,
}

fn ab_01_50_connections_closed_at_once(ground: &Ground) {
    for _ in 0..25 {
        drop(ground.raw());
        drop(ground.raw_tcp());
    }
    // All at the same time, too.
    drop((0..50).map(|_| ground.raw()).collect::<Vec<Raw>>());
    ground.let_go();
}

fn ab_02_200_silent_connections(ground: &Ground) {
    const COST_KIB_MAX: u64 = 64 << 10;
    let before = ground.rss_kib();
    let mut held: Vec<Raw> = (0..100).map(|_| ground.raw()).collect();
    held.extend((0..100).map(|_| ground.raw_tcp().hello(FIXED_NEWSTYLE)));
    for _ in 0..5 {
        ground.unharmed();
    }
    let cost = ground.rss_kib().saturating_sub(before);
    assert!(cost < COST_KIB_MAX, "200 silent connections cost {cost} KiB");
    drop(held);
    ground.unharmed();
    ground.let_go();
}

fn ab_03_200_sessions_dropped(ground: &Ground) {
    let held: Vec<Link> = (0..200).map(|_| ground.link_in(Mode::Simple)).collect();
    ground.unharmed();
    drop(held);
    ground.let_go();
}

/// `len` bytes that are never a magic of the protocol.
fn rubbish(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
    bytes[0] = 0xf0;
    bytes
}

fn ab_04_rubbish_instead_of_a_handshake(ground: &Ground) {
    let mut rng = Rng::new(4);
    let hello = [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], &[7; 506]].concat();
    let all = [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(), hello, rubbish(&mut rng, 1 << 16)];
    for bytes in &all {
        for mut raw in [ground.raw(), ground.raw_tcp()] {
            raw.greeting();
            // The server may close before it has taken everything.
            let _ = raw.try_send(bytes);
            raw.expect_closed();
        }
    }
    // The flags are right, and rubbish stands where an option should.
    for bytes in &all {
        let mut raw = ground.haggling();
        let _ = raw.try_send(bytes);
        raw.expect_closed();
    }
}

fn ab_05_rubbish_after_a_good_handshake(ground: &Ground) {
    let mut rng = Rng::new(5);
    for mode in Mode::ALL {
        for _ in 0..4 {
            let mut link = ground.link_in(mode);
            let _ = link.raw.try_send(&rubbish(&mut rng, 1 << 16));
            link.raw.expect_closed();
        }
    }
}

fn ab_08_slow_handshakes_and_half_requests_held(ground: &Ground) {
    let mut handshakes = Vec::new();
    for index in 0..10 {
        let mut raw = ground.raw();
        raw.greeting();
        let mut bytes = (FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes().to_vec();
        bytes.extend(option(opt::GO, &info_data(EXPORT, &[])));
        raw.send(&bytes[..index * (bytes.len() - 1) / 10]);
        handshakes.push(raw);
    }
    let mut links = Vec::new();
    let offset = ground.range(MIB);
    for index in 0..10 {
        let mut link = ground.link_in(Mode::ALL[index % 3]);
        let bytes = link.encode(cmd::WRITE, 0, 8, (offset, 65_536), &[8; 65_536]);
        link.raw.send(&bytes[..1 + index * (bytes.len() - 2) / 9]);
        links.push(link);
    }
    for _ in 0..20 {
        ground.unharmed();
    }
    drop((handshakes, links));
    ground.let_go();
    assert!(ground.link_in(Mode::Simple).read(offset, 65_536).iter().all(|byte| *byte == 0));
}

fn ab_09_resets_amid_64_reads(ground: &Ground) {
    let offset = ground.written(9, 8 * MIB);
    for round in 0..10 {
        let raw = ground.raw_tcp().hello(FIXED_NEWSTYLE | NO_ZEROES);
        let mut link = Link::open(raw, Mode::ALL[round % 3], EXPORT, &[]);
        for index in 0..64 {
            link.send(cmd::READ, 0, offset + index * 131_072, 131_072);
        }
        if round % 2 == 1 {
            link.raw.take(1000);
        }
        link.raw.reset();
        ground.unharmed();
    }
    ground.let_go();
}

fn ab_16_500_lists_unread(ground: &Ground) {
    for _ in 0..4 {
        let mut raw = ground.haggling();
        let _ = raw.try_send(&option(opt::LIST, &[]).repeat(500));
        // Gone, with the answers unread.
    }
    ground.let_go();
}

fn ab_17_100_sessions_leave_nothing_behind(ground: &Ground) {
    const GROWTH_KIB_MAX: u64 = 8 << 10;
    let offset = ground.range(MIB);
    let session = |index: u64| {
        let mut link = ground.link_in(Mode::ALL[index as usize % 3]);
        link.write(offset, &vec![index as u8; 262_144]);
        assert!(link.read(offset, 262_144).iter().all(|byte| *byte == index as u8));
        link.done(cmd::FLUSH, 0, 0, 0);
        link.leave();
    };
    (0..30).for_each(session);
    ground.let_go();
    let before = ground.rss_kib();
    (0..100).for_each(session);
    ground.let_go();
    let grown = ground.rss_kib().saturating_sub(before);
    assert!(grown < GROWTH_KIB_MAX, "100 sessions leave {grown} KiB behind");
}

fn ab_18_half_close_during_the_handshake(ground: &Ground) {
    // Before a byte, after the flags, in an option's header, in its data, behind an option.
    let list = option(opt::LIST, &[]);
    for rest in [&[][..], &list[..7], &option_header(opt::GO, 100), &option(opt::GO, &[0; 9])[..20]] {
        let mut raw = ground.haggling();
        raw.send(rest);
        raw.half_close();
        raw.expect_closed();
    }
    let mut raw = ground.raw();
    raw.greeting();
    raw.half_close();
    raw.expect_closed();
    // What was asked whole is answered first, or the server is gone: both are in order.
    let mut raw = ground.haggling();
    raw.send(&list);
    raw.half_close();
    if raw.try_option_replies(opt::LIST).is_some() {
        raw.expect_closed();
    }
    ground.let_go();
}
