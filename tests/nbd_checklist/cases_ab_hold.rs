//! AB: requests cut off or held back half-way, replies not read, lengths that nobody means.

use super::ground::{Ground, MIB, pattern};
use super::link::{Link, cmd};
use super::reply::err;

cases! {
    ab_06_a_request_cut_off_at_every_byte,
    ab_07_a_write_cut_off_in_its_payload,
    ab_10_gone_with_64_writes_in_flight,
    ab_11_a_write_of_4_gib_without_a_payload,
    ab_12_a_read_of_4_gib,
    ab_15_a_client_that_never_reads,
    ab_19_32_mib_writes_half_sent_on_4_connections,
}

const U32_MAX: u64 = u32::MAX as u64;

fn ab_06_a_request_cut_off_at_every_byte(ground: &Ground) {
    let offset = ground.range(4096);
    for command in [cmd::READ, cmd::WRITE, cmd::TRIM] {
        let link = ground.link();
        let header = link.encode(command, 0, 6, (offset, 512), &[]);
        link.leave();
        for end in 0..header.len() {
            let mut link = ground.link();
            link.raw.send(&header[..end]);
            if end % 2 == 0 {
                link.raw.half_close();
                link.raw.expect_closed();
            }
        }
    }
    ground.let_go();
}

fn ab_07_a_write_cut_off_in_its_payload(ground: &Ground) {
    const LEN: u64 = 2 * MIB;
    let offset = ground.written(7, LEN + 131_072);
    let before = pattern(7, offset, LEN + 131_072);
    let at = offset + 65_536;
    for sent in [0, 1, 511, 512, 4096, 65_535, MIB, LEN - 1] {
        let mut link = ground.link();
        let bytes = link.encode(cmd::WRITE, 0, 7, (at, LEN), &vec![0xee; LEN as usize]);
        let header_bytes = bytes.len() - LEN as usize;
        link.raw.send(&bytes[..header_bytes + sent as usize]);
        if sent % 2 == 0 {
            link.raw.half_close();
            link.raw.expect_closed();
        }
        drop(link);
        ground.let_go();
        let after = ground.link().read(offset, LEN + 131_072);
        // `docs/error-table.md`: a WRITE whose payload did not come whole is not carried out.
        assert!(after == before, "{sent} bytes of {LEN} came, and something changed");
    }
}

fn ab_10_gone_with_64_writes_in_flight(ground: &Ground) {
    const STEP: u64 = 32_768;
    let offset = ground.written(10, 64 * STEP);
    for round in 0..4 {
        let before = ground.link().read(offset, 64 * STEP);
        let mut link = ground.link();
        // The second half of each step is the neighbour.
        let places = (0..64).map(|index| offset + index * STEP);
        for at in places.clone() {
            link.send_write(0, at, &pattern(1000 + round, at, STEP / 2));
        }
        drop(link);
        ground.let_go();
        let after = ground.link().read(offset, 64 * STEP);
        for _ in 0..4 {
            assert!(ground.link().read(offset, 64 * STEP) == after, "reads do not agree");
        }
        for at in places {
            let (from, new) = ((at - offset) as usize, pattern(1000 + round, at, STEP / 2));
            for sector in (0..STEP as usize).step_by(512) {
                let [was, is] = [&before, &after].map(|all| &all[from + sector..from + sector + 512]);
                let is_new = sector < new.len() && is == &new[sector..sector + 512];
                assert!(is == was || is_new, "a sector at {at}+{sector} is neither old nor new");
            }
        }
    }
}

fn ab_11_a_write_of_4_gib_without_a_payload(ground: &Ground) {
    const GROWTH_KIB_MAX: u64 = 64 << 10;
    let before = ground.rss_kib();
    let mut held = Vec::new();
    for _ in 0..20 {
        let mut link = ground.link();
        let header = link.encode(cmd::WRITE, 0, 11, (0, U32_MAX), &[]);
        link.raw.send(&header);
        held.push(link);
    }
    ground.unharmed();
    let grown = ground.rss_kib().saturating_sub(before);
    assert!(grown < GROWTH_KIB_MAX, "20 announcements of 4 GiB cost {grown} KiB");
    drop(held);
    ground.let_go();
}

fn ab_12_a_read_of_4_gib(ground: &Ground) {
    for offset in [0, 512, MIB] {
        let mut link = ground.link();
        link.send(cmd::READ, 0, offset, U32_MAX);
        if let Some(reply) = link.try_receive() {
            assert!(err::ANY.contains(&reply.error), "{}", reply.error);
            link.usable();
        }
    }
}

fn ab_15_a_client_that_never_reads(ground: &Ground) {
    const LEN: u64 = 131_072;
    let offset = ground.written(15, 32 * MIB);
    let mut link = ground.link();
    let reads: Vec<(u64, u64)> = (0..256)
        .map(|index| (link.send(cmd::READ, 0, offset + index * LEN, LEN), offset + index * LEN))
        .collect();
    for _ in 0..5 {
        ground.unharmed();
    }
    let expected = pattern(15, offset, 32 * MIB);
    let replies = link.receive_all();
    for (cookie, at) in reads {
        let from = (at - offset) as usize;
        assert!(replies[&cookie].clone().ok() == expected[from..from + LEN as usize]);
    }
    link.usable();
}

/// Connections that have sent a part of a WRITE of 32 MiB each.
pub(crate) fn half_sent(ground: &Ground, count: usize, sent: usize) -> Vec<Link> {
    let offset = ground.range(32 * MIB);
    let mut held = Vec::new();
    for _ in 0..count {
        let mut link = ground.link();
        let cookie = link.cookie();
        let mut bytes = link.encode(cmd::WRITE, 0, cookie, (offset, 32 * MIB), &[]);
        bytes.resize(bytes.len() + sent, 0x19);
        link.expect(cookie, link.asked(cmd::WRITE, 0, offset, 32 * MIB));
        // A server that is out of memory for requests may not take it now; the socket's buffer does.
        link.raw.send(&bytes);
        held.push(link);
    }
    held
}

fn ab_19_32_mib_writes_half_sent_on_4_connections(ground: &Ground) {
    let held = half_sent(ground, 4, 100_000);
    for _ in 0..10 {
        ground.unharmed();
    }
    // One of them goes on, and is served whole.
    let mut held = held.into_iter();
    let mut first = held.next().unwrap();
    first.raw.send(&vec![0x19; 32 * MIB as usize - 100_000]);
    assert_eq!(first.receive().error, 0);
    first.usable();
    drop(held);
    drop(first);
    ground.let_go();
}
