//! CMD: how a connection ends, and requests that come in pieces.

use std::time::Duration;

use super::ground::{Ground, pattern};
use super::link::{EXTENDED_REQUEST_MAGIC, Link, Mode, REQUEST_MAGIC, cmd};

cases! {
    cmd_40_disc_has_no_reply_and_closes,
    cmd_41_disc_behind_32_writes,
    cmd_42_disc_whatever_else_it_says,
    cmd_46_a_bad_request_magic_closes,
    cmd_50_a_payload_in_small_pieces,
    cmd_51_a_header_byte_by_byte,
    cmd_52_half_close_behind_16_reads,
    cmd_53_half_close_behind_writes,
}

fn cmd_40_disc_has_no_reply_and_closes(ground: &Ground) {
    let mut link = ground.link();
    link.usable();
    link.leave();
    // The first request of all.
    ground.link().leave();
}

/// The sends of 32 WRITEs, each to its own place; cookies and places.
fn thirty_two_writes(link: &mut Link, ground: &Ground, seed: u64) -> Vec<(u64, u64)> {
    let offset = ground.range(32 * 8192);
    let places = (0..32).map(|index| offset + index * 8192);
    places.map(|at| (link.send_write(0, at, &pattern(seed, at, 4096)), at)).collect()
}

fn cmd_41_disc_behind_32_writes(ground: &Ground) {
    let mut link = ground.link();
    let writes = thirty_two_writes(&mut link, ground, 41);
    let header = link.header(cmd::DISC, 0, 1, 0, 0);
    link.raw.send(&header);
    let replies = link.receive_until_closed();
    let mut other = ground.link();
    for (cookie, at) in writes {
        let data = other.read(at, 4096);
        if replies.get(&cookie).is_none_or(|reply| reply.error == 0) {
            assert!(data == pattern(41, at, 4096), "a WRITE before DISC was not carried out");
        }
    }
}

fn cmd_42_disc_whatever_else_it_says(ground: &Ground) {
    for (flags, offset, len) in [(0, 1, 0), (0, 0, 512), (1, u64::MAX, (1 << 32) - 1), (0xffdf, 7, 7)] {
        let mut link = ground.link();
        let header = link.header(cmd::DISC, flags, u64::MAX, offset, len);
        link.raw.send(&header);
        link.raw.expect_closed();
    }
}

fn cmd_46_a_bad_request_magic_closes(ground: &Ground) {
    let other = if ground.mode == Mode::Extended { REQUEST_MAGIC } else { EXTENDED_REQUEST_MAGIC };
    for magic in [0, other, REQUEST_MAGIC ^ 1, REQUEST_MAGIC.swap_bytes(), u32::MAX] {
        let mut link = ground.link();
        let mut header = link.header(cmd::READ, 0, 1, 0, 512);
        header[..4].copy_from_slice(&magic.to_be_bytes());
        link.raw.send(&header);
        link.raw.expect_closed();
    }
}

fn cmd_50_a_payload_in_small_pieces(ground: &Ground) {
    let offset = ground.range(16_384);
    let data = pattern(50, offset, 16_384);
    let mut link = ground.link();
    let cookie = link.cookie();
    let bytes = link.encode(cmd::WRITE, 0, cookie, (offset, 16_384), &data);
    link.expect(cookie, link.asked(cmd::WRITE, 0, offset, 16_384));
    for piece in bytes.chunks(64) {
        link.raw.send(piece);
        std::thread::sleep(Duration::from_micros(500));
    }
    link.receive().ok();
    assert!(link.read(offset, 16_384) == data);
}

fn cmd_51_a_header_byte_by_byte(ground: &Ground) {
    let mut link = ground.link();
    for _ in 0..3 {
        let cookie = link.cookie();
        link.expect(cookie, link.asked(cmd::READ, 0, 512, 512));
        for byte in link.header(cmd::READ, 0, cookie, 512, 512) {
            link.raw.send(&[byte]);
            std::thread::sleep(Duration::from_micros(200));
        }
        assert!(link.receive().ok() == super::ground::kept(512, 512));
    }
}

/// How many of the replies still come is the server's own affair.
fn cmd_52_half_close_behind_16_reads(ground: &Ground) {
    let offset = ground.written(52, 16 * 65_536);
    let mut link = ground.link();
    let reads: Vec<(u64, u64)> = (0..16)
        .map(|index| (link.send(cmd::READ, 0, offset + index * 65_536, 65_536), offset + index * 65_536))
        .collect();
    link.raw.half_close();
    let replies = link.receive_until_closed();
    println!("CMD-52: {} of 16 replies came", replies.len());
    for (cookie, at) in reads {
        if let Some(reply) = replies.get(&cookie) {
            assert!(reply.clone().ok() == pattern(52, at, 65_536));
        }
    }
}

fn cmd_53_half_close_behind_writes(ground: &Ground) {
    let mut link = ground.link();
    let writes = thirty_two_writes(&mut link, ground, 53);
    link.raw.half_close();
    let replies = link.receive_until_closed();
    let mut other = ground.link();
    for (cookie, at) in writes {
        assert!(replies.get(&cookie).is_none_or(|reply| reply.error == 0));
        assert!(other.read(at, 4096) == pattern(53, at, 4096), "a WRITE that came whole was not carried out");
    }
}
