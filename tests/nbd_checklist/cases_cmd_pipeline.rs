//! CMD: many requests in flight.

use std::collections::HashMap;

use super::ground::{Ground, SIZE, pattern};
use super::link::{Mode, cmd, flag};
use super::reply::err;
use crate::support::rng::Rng;

cases! {
    cmd_43_64_reads_in_flight,
    cmd_44_a_mix_of_200_requests_in_flight,
    cmd_45_the_same_cookie_twice,
}

fn cmd_43_64_reads_in_flight(ground: &Ground) {
    let offset = ground.written(43, 64 * 4096);
    let mut link = ground.link();
    let reads: Vec<(u64, u64)> = (0..64)
        .map(|index| (link.send(cmd::READ, 0, offset + index * 4096, 4096), offset + index * 4096))
        .collect();
    let replies = link.receive_all();
    assert_eq!(replies.len(), 64);
    for (cookie, at) in reads {
        assert!(replies[&cookie].clone().ok() == pattern(43, at, 4096));
    }
}

/// What the reply to a request of the mix must be.
enum Due {
    Data(Vec<u8>),
    Done,
    Refused(&'static [u32]),
}

fn cmd_44_a_mix_of_200_requests_in_flight(ground: &Ground) {
    // Reads see data written before; everything that writes has a place of its own.
    let written = ground.written(44, 200 * 4096);
    let fresh = ground.range(200 * 4096);
    let mut rng = Rng::new(44);
    let mut link = ground.link();
    let mut due = HashMap::new();
    let mut wrote = Vec::new();
    for index in 0..200 {
        let (old, new) = (written + index * 4096, fresh + index * 4096);
        let (cookie, expected) = match rng.below(8) {
            0 | 1 => (link.send(cmd::READ, 0, old, 4096), Due::Data(pattern(44, old, 4096))),
            2 => {
                wrote.push(new);
                (link.send_write(0, new, &pattern(444, new, 4096)), Due::Done)
            }
            3 => (link.send(cmd::WRITE_ZEROES, flag::NO_HOLE, new, 4096), Due::Done),
            4 => (link.send(cmd::TRIM, 0, new, 4096), Due::Done),
            5 => (link.send(cmd::FLUSH, 0, 0, 0), Due::Done),
            6 => (link.send_write(0, SIZE, &[6; 4096]), Due::Refused(&[err::ENOSPC])),
            _ => (link.send(200, 0, old, 4096), Due::Refused(&[err::EINVAL])),
        };
        due.insert(cookie, expected);
    }
    let replies = link.receive_all();
    assert_eq!(replies.len(), 200);
    for (cookie, expected) in due {
        let reply = replies[&cookie].clone();
        match expected {
            Due::Data(data) => assert!(reply.ok() == data),
            Due::Done => assert_eq!(reply.error, 0),
            Due::Refused(errors) => assert!(errors.contains(&reply.error), "{}", reply.error),
        }
    }
    for at in wrote {
        assert!(link.read(at, 4096) == pattern(444, at, 4096));
    }
}

fn cmd_45_the_same_cookie_twice(ground: &Ground) {
    let offset = ground.range(8192);
    let mut link = ground.link();
    let alike = [cmd::FLUSH, cmd::TRIM, cmd::WRITE_ZEROES, 200];
    for command in alike.into_iter().chain((ground.mode == Mode::Simple).then_some(cmd::READ)) {
        let range = if command == cmd::FLUSH { (0, 0) } else { (offset, 4096) };
        for _ in 0..2 {
            link.send_as(45, command, 0, range, &[]);
        }
        let errors = [link.receive().error, link.receive().error];
        assert_eq!(errors[0], errors[1], "command {command}");
        link.usable();
    }
}
