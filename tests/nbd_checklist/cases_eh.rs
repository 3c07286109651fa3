//! EH: extended headers, and what only they can ask for.

use super::ground::{GIB, Ground, LARGE, MIB, SIZE, kept, pattern};
use super::link::{Link, Mode, REQUEST_MAGIC, cmd, flag, tf};
use super::raw::be64;
use super::reply::{Asked, chunk, err};

cases! {
    eh_01_a_read_is_answered_in_extended_form,
    eh_02_every_command_works,
    eh_03_a_write_without_payload_len,
    eh_04_payload_len_on_commands_without_a_payload,
    eh_05_lengths_beyond_the_export,
    eh_05_more_than_4_gib_in_one_request,
    eh_06_block_status_of_the_whole_export,
    eh_07_block_status_with_a_payload_filters,
    eh_07_block_status_payload_that_is_wrong,
    eh_08_a_compact_header_closes,
    eh_09_errors_echo_the_offset,
    eh_10_a_payload_beyond_the_maximum_allocates_nothing,
}

fn eh_01_a_read_is_answered_in_extended_form(ground: &Ground) {
    let mut link = ground.link();
    // `receive` knows no other magic here, and compares cookie and offset.
    for (offset, len) in [(0, 512), (4096, 65_536), (1, 1)] {
        assert!(link.read(offset, len) == kept(offset, len));
    }
    link.leave();
}

fn eh_02_every_command_works(ground: &Ground) {
    let offset = ground.range(MIB);
    let mut link = ground.link();
    for len in [1, 4096, MIB] {
        let data = pattern(2, offset, len);
        link.write(offset, &data);
        assert!(link.read(offset, len) == data);
    }
    link.done(cmd::FLUSH, 0, 0, 0);
    link.done(cmd::CACHE, 0, offset, MIB);
    link.done(cmd::TRIM, 0, offset, 65_536);
    link.done(cmd::WRITE_ZEROES, 0, offset, MIB);
    assert!(link.read(offset, MIB).iter().all(|byte| *byte == 0));
}

/// Behind the header come 128 FLUSH requests of 32 bytes, which are also 4096 bytes of payload: a server that refuses
/// the WRITE answers them all, a server that takes them for its payload none, and one that closes may do either.
fn eh_03_a_write_without_payload_len(ground: &Ground) {
    let offset = ground.range(4096);
    let mut link = ground.link();
    let write = link.cookie();
    let mut bytes = link.header(cmd::WRITE, 0, write, offset, 4096);
    link.expect(write, link.asked(cmd::WRITE, 0, offset, 4096));
    let flushes: Vec<u64> = (0..128).map(|_| link.cookie()).collect();
    for cookie in &flushes {
        bytes.extend(link.header(cmd::FLUSH, 0, *cookie, 0, 0));
        link.expect(*cookie, link.asked(cmd::FLUSH, 0, 0, 0));
    }
    let _ = link.raw.try_send(&bytes);
    while let Some(reply) = link.try_receive() {
        if reply.cookie != write {
            continue;
        }
        if reply.error == 0 {
            flushes.iter().for_each(|cookie| link.forget(*cookie));
        } else {
            assert_eq!(reply.error, err::EINVAL);
            link.receive_all();
        }
        link.usable();
        return;
    }
}

fn eh_04_payload_len_on_commands_without_a_payload(ground: &Ground) {
    let offset = ground.written(4, 65_536);
    let mut link = ground.link();
    for command in [cmd::READ, cmd::FLUSH, cmd::TRIM, cmd::WRITE_ZEROES, cmd::CACHE, 200] {
        for len in [1, 32, 4096, 65_536, 8 * MIB] {
            let cookie = link.cookie();
            link.send_as(cookie, command, flag::PAYLOAD_LEN, (offset, len), &vec![0x25; len as usize]);
            let error = link.receive().error;
            assert_eq!(error, err::EINVAL, "command {command} with a payload of {len} bytes");
            link.usable();
        }
    }
    assert!(link.read(offset, 65_536) == pattern(4, offset, 65_536));
}

fn eh_05_lengths_beyond_the_export(ground: &Ground) {
    let mut link = ground.link_with(&["base:allocation"]);
    for len in [1 << 33, (1 << 32) + 512, 1 << 63, u64::MAX - 511, u64::MAX] {
        for command in [cmd::WRITE_ZEROES, cmd::TRIM, cmd::READ, cmd::CACHE, cmd::BLOCK_STATUS] {
            for offset in [0, 512, SIZE - 512] {
                if offset < SIZE && len > SIZE - offset {
                    link.refused(command, 0, (offset, len), err::ANY);
                }
            }
        }
    }
    // Within the export, but no READ is that long.
    link.refused(cmd::READ, 0, (0, (1 << 32) + 512), err::ANY);
}

fn eh_05_more_than_4_gib_in_one_request(ground: &Ground) {
    let len = 4 * GIB + 512 * MIB;
    let mut link = ground.link();
    // In 32 bits the length would be 512 MiB, and the second place would not be reached.
    for command in [cmd::WRITE_ZEROES, cmd::TRIM, cmd::CACHE] {
        let places = [LARGE, LARGE + len - 4096];
        for at in places {
            link.write(at, &pattern(5, at, 4096));
        }
        let after = pattern(55, LARGE + len, 4096);
        link.write(LARGE + len, &after);
        link.done(command, 0, LARGE, len);
        if command == cmd::WRITE_ZEROES {
            assert!(places.iter().all(|at| link.read(*at, 4096) == [0; 4096]));
        }
        assert!(link.read(LARGE + len, 4096) == after);
    }
}

fn eh_06_block_status_of_the_whole_export(ground: &Ground) {
    let mut link = ground.link_with(&["base:allocation", "nbdmirror:state"]);
    let reply = link.call(cmd::BLOCK_STATUS, 0, 0, SIZE);
    assert_eq!((reply.error, reply.extents.len()), (0, 2));
    let statuses = reply.chunks.iter().filter(|(kind, _)| *kind == chunk::BLOCK_STATUS_EXT);
    assert_eq!(statuses.count(), 2, "{:?}", reply.chunks);
}

/// Sends BLOCK_STATUS with this payload; `contexts` are those that must answer.
fn filtered(link: &mut Link, offset: u64, len: u64, payload: &[u8], contexts: Vec<u32>) -> u64 {
    let cookie = link.cookie();
    let mut bytes = link.header(cmd::BLOCK_STATUS, flag::PAYLOAD_LEN, cookie, offset, payload.len() as u64);
    bytes.extend_from_slice(payload);
    link.expect(cookie, Asked { command: cmd::BLOCK_STATUS, flags: 0, offset, len, contexts });
    link.raw.send(&bytes);
    cookie
}

fn payload(len: u64, ids: &[u32]) -> Vec<u8> {
    let ids = ids.iter().flat_map(|id| id.to_be_bytes());
    len.to_be_bytes().into_iter().chain(ids).collect()
}

fn eh_07_block_status_with_a_payload_filters(ground: &Ground) {
    let names = ["base:allocation", "nbdmirror:state", "nbdmirror:stale/0"];
    let mut link = ground.link_with(&names);
    link.offers(tf::BLOCK_STATUS_PAYLOAD);
    let ids: Vec<u32> = link.contexts.iter().map(|(id, _)| *id).collect();
    for wanted in [&ids[..1], &ids[1..2], &ids[1..], &ids[..]] {
        for len in [4096, 3 * MIB, SIZE - 4096] {
            filtered(&mut link, 4096, len, &payload(len, wanted), wanted.to_vec());
            let reply = link.receive();
            assert_eq!(reply.error, 0);
            assert_eq!(reply.extents.len(), wanted.len());
        }
    }
    link.usable();
}

fn eh_07_block_status_payload_that_is_wrong(ground: &Ground) {
    let mut link = ground.link_with(&["base:allocation", "nbdmirror:state"]);
    let ids: Vec<u32> = link.contexts.iter().map(|(id, _)| *id).collect();
    let unknown = ids.iter().max().unwrap().wrapping_add(17);
    let good = payload(4096, &ids);
    let mut wrong =
        vec![payload(4096, &[unknown]), payload(4096, &[ids[0], unknown]), payload(SIZE + 1, &ids)];
    wrong.extend([good[..4].to_vec(), good[..7].to_vec(), good[..11].to_vec(), [&good[..], &[0]].concat()]);
    wrong.push(payload(4096, &vec![unknown; 10_000]));
    wrong.push(payload(u64::MAX, &ids[..1]));
    for payload in wrong {
        let len = if payload.len() < 8 { 0 } else { be64(&payload, 0) };
        filtered(&mut link, 0, len, &payload, ids.clone());
        let error = link.receive().error;
        assert_eq!(
            error,
            err::EINVAL,
            "a payload of {} bytes: {:?}",
            payload.len(),
            &payload[..payload.len().min(20)]
        );
        link.usable();
    }
}

fn eh_08_a_compact_header_closes(ground: &Ground) {
    let mut link = ground.link();
    let mut compact = link.header(cmd::READ, 0, 8, 0, 512);
    compact[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    link.raw.send(&compact);
    link.raw.expect_closed();
}

fn eh_09_errors_echo_the_offset(ground: &Ground) {
    let mut link = ground.link();
    // Success and error alike: `receive` compares the offset.
    let wrong =
        [(cmd::READ, SIZE, 512), (cmd::TRIM, SIZE + 77, 1), (cmd::WRITE_ZEROES, u64::MAX, 9), (200, 5, 5)];
    for (command, offset, len) in wrong {
        let reply = link.call(command, 0, offset, len);
        assert_ne!(reply.error, 0);
        let is_error = |(kind, _): &(u16, u64)| matches!(*kind, chunk::ERROR | chunk::ERROR_OFFSET);
        assert!(reply.chunks.iter().any(is_error), "{:?}", reply.chunks);
        link.usable();
    }
}

fn eh_10_a_payload_beyond_the_maximum_allocates_nothing(ground: &Ground) {
    const GROWTH_KIB_MAX: u64 = 64 << 10;
    let before = ground.rss_kib();
    let mut held = Vec::new();
    for command in [cmd::WRITE, cmd::READ, cmd::BLOCK_STATUS, cmd::FLUSH, 200] {
        for len in [1 << 31, 1 << 32, 1 << 33, 1 << 63, u64::MAX] {
            let mut link = Link::open(ground.haggling(), Mode::Extended, b"", &["base:allocation"]);
            let cookie = link.cookie();
            let header = link.header(command, flag::PAYLOAD_LEN, cookie, 0, len);
            link.expect(cookie, link.asked(command, 0, 0, len));
            link.raw.send(&header);
            // It hangs up, says so at once, or waits for what was announced.
            let _ = link.raw.try_send(&[0; 4096]);
            held.push(link);
        }
    }
    ground.unharmed();
    let grown = ground.rss_kib().saturating_sub(before);
    assert!(grown < GROWTH_KIB_MAX, "{} connections cost {grown} KiB", held.len());
    for mut link in held {
        link.raw.half_close();
        if let Some(reply) = link.try_receive() {
            assert_ne!(reply.error, 0);
        }
    }
}
