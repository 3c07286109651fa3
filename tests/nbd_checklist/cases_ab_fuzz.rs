//! AB: random requests and random options. The seed is printed; `NBD_SEED=...` replays it.

use super::ground::{EXPORT, Ground, MIB, SIZE};
use super::link::{Mode, cmd, flag};
use super::raw::{Raw, info_data, meta_data, opt, option_header, rep};
use crate::support::rng::Rng;

cases! {
    ab_13_400_random_requests,
    ab_14_150_random_options,
}

fn rng(default: u64) -> Rng {
    let given = std::env::var("NBD_SEED").ok();
    let seed = given.map_or(default, |text| text.parse().expect("NBD_SEED is a number"));
    println!("seed {seed} (replay with NBD_SEED={seed})");
    Rng::new(seed)
}

/// A request that is valid or nearly so, and that can harm nothing but the `len` bytes at `offset`.
struct Shot {
    command: u16,
    flags: u16,
    range: (u64, u64),
    payload: Vec<u8>,
}

const AREA: u64 = 4 * MIB;

fn shot(rng: &mut Rng, area: u64, mode: Mode) -> Shot {
    let command = match rng.below(20) {
        0 => rng.next() as u16,
        1 => rng.below(16) as u16,
        _ => rng.pick(&[
            cmd::READ,
            cmd::WRITE,
            cmd::FLUSH,
            cmd::TRIM,
            cmd::CACHE,
            cmd::WRITE_ZEROES,
            cmd::BLOCK_STATUS,
        ]),
    };
    let command = if command == cmd::DISC { cmd::READ } else { command };
    let mut flags = 0;
    if rng.chance(40) {
        flags = if rng.chance(20) { rng.next() as u16 } else { 1 << rng.below(7) };
    }
    let offset = match rng.below(10) {
        0 => rng.pick(&[SIZE, SIZE + 1, 1 << 62, u64::MAX, u64::MAX - 511]),
        1 => SIZE - 1 - rng.below(8192),
        _ => area + rng.below(AREA / 2) / 512 * rng.pick(&[512, 512, 511]),
    };
    let has_payload = command == cmd::WRITE || (mode == Mode::Extended && flags & flag::PAYLOAD_LEN != 0);
    let len = match rng.below(8) {
        0 => 0,
        1 => 1 + rng.below(700),
        2 if !has_payload && (mode == Mode::Extended) => rng.pick(&[1 << 33, 1 << 63, u64::MAX]),
        // Beyond the end from wherever it begins, or refused for its length.
        3 if !has_payload && command == cmd::READ => u32::MAX.into(),
        _ => 512 * (1 + rng.below(128)),
    };
    let payload = if has_payload { vec![0xf1; len as usize] } else { Vec::new() };
    Shot { command, flags, range: (offset, len), payload }
}

fn ab_13_400_random_requests(ground: &Ground) {
    let mut rng = rng(13);
    let area = ground.range(AREA);
    let mut link = ground.link();
    for _volley in 0..40 {
        for _ in 0..10 {
            let shot = shot(&mut rng, area, ground.mode);
            let cookie = link.cookie();
            link.send_as(cookie, shot.command, shot.flags, shot.range, &shot.payload);
        }
        if rng.chance(10) {
            // The last one is out of step: the server answers what it wants to of the others, and closes.
            let mut header = link.header(cmd::READ, 0, 1, 0, 512);
            header[rng.below(4) as usize] ^= 1 << rng.below(8);
            link.raw.send(&header);
            link.receive_until_closed();
            link = ground.link();
        } else {
            link.receive_all();
            link.usable();
        }
    }
}

/// An option's data: rubbish, or what would be right with a byte changed, too much or too little.
fn option_data(rng: &mut Rng) -> Vec<u8> {
    let mut data = match rng.below(6) {
        0 => Vec::new(),
        1 => (0..rng.below(300)).map(|_| rng.next() as u8).collect(),
        2 => (0..rng.below(20_000)).map(|_| rng.next() as u8).collect(),
        3 => info_data(EXPORT, &[0, 1, 2, 3]),
        4 => meta_data(EXPORT, &["base:allocation", "base:", "nbdmirror:state"]),
        _ => EXPORT.to_vec(),
    };
    if rng.chance(50) && !data.is_empty() {
        let at = rng.below(data.len() as u64) as usize;
        match rng.below(3) {
            0 => data[at] ^= 1 << rng.below(8),
            1 => data.truncate(at),
            _ => data.insert(at, rng.next() as u8),
        }
    }
    data
}

fn ab_14_150_random_options(ground: &Ground) {
    let mut rng = rng(14);
    for _ in 0..150 {
        let mut raw = ground.haggling();
        if rng.chance(60) {
            raw.ask_one(rng.pick(&[opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS]), &[]);
        }
        let code = if rng.chance(85) { rng.below(13) as u32 } else { rng.next() as u32 };
        let data = option_data(&mut rng);
        let claimed = if rng.chance(90) { data.len() as u32 } else { rng.next() as u32 >> rng.below(32) };
        let _ = raw.try_send(&[&option_header(code, claimed)[..], &data].concat());
        if claimed as usize == data.len() {
            answered(raw, code);
        } else {
            // Out of step: whatever it comes to, it comes to an end.
            raw.half_close();
            raw.rest();
        }
    }
    ground.let_go();
}

/// The option is answered in order, or the server closes.
fn answered(mut raw: Raw, code: u32) {
    if code == opt::EXPORT_NAME {
        raw.half_close();
        let answer = raw.rest();
        assert!(matches!(answer.len(), 0 | 10), "{} bytes in answer to EXPORT_NAME", answer.len());
        return;
    }
    let Some(replies) = raw.try_option_replies(code) else { return };
    let granted = replies.last().unwrap().kind == rep::ACK;
    let over = granted && matches!(code, opt::GO | opt::ABORT | opt::STARTTLS);
    if !over {
        raw.in_step();
    }
}
