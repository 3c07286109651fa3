//! Structured replies, extended headers and metadata contexts on the real binary, by the IDs of the NBD checklist.

// Helpers outside `#[test]` functions are tests too.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::collections::HashMap;
use std::time::Duration;

use support::daemon::{Daemon, Volume};
use support::nbd_chunks::*;
use support::rng::Rng;
use support::skip;
use support::tools::{missing, run};

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 64 * MIB;
const CONTEXTS: [&str; 4] = ["base:allocation", "nbdmirror:state", "nbdmirror:stale/0", "nbdmirror:stale/1"];
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

fn served() -> (Volume, Daemon) {
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let daemon = volume.start();
    (volume, daemon)
}

/// A client of each kind that has replies in chunks.
fn clients(daemon: &Daemon) -> [ChunkClient; 2] {
    [
        Haggle::connect(&daemon.socket).structured().with_contexts(&CONTEXTS).go(),
        Haggle::connect(&daemon.socket).extended().with_contexts(&CONTEXTS).go(),
    ]
}

/// Bytes that are not zero anywhere.
fn pattern(seed: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| 1 + ((seed + at / 512 + at) % 251) as u8).collect()
}

fn error<T: std::fmt::Debug>(result: Result<T, Failed>) -> (u32, Option<u64>) {
    let failed = result.unwrap_err();
    assert!(!failed.message.is_empty());
    (failed.error, failed.at)
}

#[test]
fn opt_30_to_41_46_to_50_options_on_one_connection() {
    let (_volume, daemon) = served();
    let mut haggle = Haggle::connect(&daemon.socket);
    assert_eq!(haggle.last(OPT_SET_CONTEXT, &context_query("", &CONTEXTS)), ERR_INVALID);
    assert_eq!(haggle.last(OPT_STRUCTURED, &[0; 7]), ERR_INVALID);
    assert_eq!(haggle.last(OPT_STRUCTURED, &[]), ACK);
    assert_eq!(haggle.last(OPT_STRUCTURED, &[]), ACK);
    let names =
        |found: Vec<(u32, String)>| -> Vec<String> { found.into_iter().map(|(_, name)| name).collect() };
    assert_eq!(names(haggle.contexts(OPT_LIST_CONTEXT, &[])), CONTEXTS);
    assert_eq!(names(haggle.contexts(OPT_LIST_CONTEXT, &["base:"])), CONTEXTS[..1]);
    assert_eq!(names(haggle.contexts(OPT_LIST_CONTEXT, &["nbdmirror:", "x:y"])), CONTEXTS[1..]);
    assert_eq!(names(haggle.contexts(OPT_LIST_CONTEXT, &["qemu:"])), [""; 0]);
    assert_eq!(names(haggle.contexts(OPT_SET_CONTEXT, &["base:", "nbdmirror:nothing", "x:y"])), [""; 0]);
    assert_eq!(haggle.last(OPT_SET_CONTEXT, &[0, 0, 0, 9]), ERR_INVALID);
    assert_eq!(haggle.last(OPT_SET_CONTEXT, &context_query("other", &CONTEXTS)), ERR_UNKNOWN);
    let many: Vec<String> = (0..5000).map(|index| format!("x-test:{index}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(names(haggle.contexts(OPT_SET_CONTEXT, &many)), [""; 0]);
    assert_eq!(names(haggle.contexts(OPT_SET_CONTEXT, &CONTEXTS)), CONTEXTS);
    assert_eq!(haggle.last(OPT_LIST, &[]), ACK);
    assert_eq!(haggle.last(OPT_INFO, &info_query("")), ACK);
    assert_eq!(haggle.contexts(OPT_SET_CONTEXT, &["nbdmirror:state"]), [(1, CONTEXTS[1].to_owned())]);
    assert_eq!(haggle.last(OPT_EXTENDED, &[1]), ERR_INVALID);
    let mut client = haggle.go();
    assert_eq!(client.size, VOLUME_BYTES);
    assert!(client.flags & (1 << 7) != 0 && client.flags & (1 << 12) == 0, "DF, no BLOCK_STATUS_PAYLOAD");
    // The last selection counts.
    assert_eq!(client.status(0, 0, 4096).unwrap().iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1]);

    let mut haggle = Haggle::connect(&daemon.socket).extended();
    assert_eq!(haggle.last(OPT_STRUCTURED, &[]), ERR_EXT_HEADER_REQD);
    assert_eq!(haggle.last(OPT_EXTENDED, &[]), ACK);
    let client = haggle.go();
    assert!(client.flags & (1 << 12) == 0, "no contexts, no payload (NT-17)");
    let client = Haggle::connect(&daemon.socket).extended().with_contexts(&CONTEXTS[..1]).go();
    assert!(client.flags & (1 << 12) != 0);

    // OPT-50, TF-05
    let mut by_name = Haggle::connect(&daemon.socket).structured().with_contexts(&CONTEXTS).export_name();
    let by_go = Haggle::connect(&daemon.socket).structured().with_contexts(&CONTEXTS).go();
    assert_eq!((by_name.size, by_name.flags), (by_go.size, by_go.flags));
    assert_eq!(by_name.read(0, 0, 512).unwrap(), [0; 512]);
    assert_eq!(by_name.status(0, 0, 512).unwrap().len(), CONTEXTS.len());
}

#[test]
fn sr_01_04_05_09_10_11_eh_01_02_reads_and_writes() {
    let (_volume, daemon) = served();
    for mut client in clients(&daemon) {
        let mut expected = vec![0; VOLUME_BYTES as usize];
        client.do_it(ZEROES, FUA, 0, VOLUME_BYTES).unwrap();
        for (index, (offset, len)) in
            [(0, 4096), (123, 1000), (MIB - 1, 70_000), (5 * MIB, 3 * MIB), (VOLUME_BYTES - 512, 512)]
                .into_iter()
                .enumerate()
        {
            let data = pattern(index as u64, len);
            client.write(offset, &data).unwrap();
            expected[offset as usize..][..data.len()].copy_from_slice(&data);
        }
        for flags in [0, DF, FUA] {
            for (offset, len) in
                [(0, 1), (0, 65_536), (512, 8192), (77, 300_001), (4 * MIB, 8 * MIB), (32 * MIB, 32 * MIB)]
            {
                let chunks = client.call(READ, flags, offset, len, &[]);
                let data = content(offset, len, &chunks).unwrap();
                assert!(data == expected[offset as usize..][..len as usize], "flags {flags} {offset}+{len}");
                assert!(flags & DF == 0 || chunks.len() == 1, "one content chunk");
                for chunk in chunks.iter().filter(|_| offset % 512 == 0 && len % 512 == 0) {
                    let hole = chunk.kind == CHUNK_HOLE;
                    assert!(hole || (chunk.payload.len() - 8).is_multiple_of(512));
                }
            }
        }
        // Zeroes are not sent.
        let zeroes = client.call(READ, 0, 32 * MIB, 16 * MIB, &[]);
        assert_eq!((zeroes.len(), zeroes[0].kind), (1, CHUNK_HOLE));
        // Zero length.
        assert_eq!(client.call(READ, 0, 0, 0, &[])[0].kind, CHUNK_NONE);
        client.write(0, &[]).unwrap();
        // EH-03: QEMU leaves PAYLOAD_LEN out.
        client.call(WRITE, 0, 4096, 512, &[9; 512]);
        assert_eq!(client.read(0, 4096, 512).unwrap(), [9; 512]);
        for (kind, len) in [(FLUSH, 0), (TRIM, 8192), (ZEROES, 8192), (CACHE, 8192), (CACHE, 0)] {
            client.do_it(kind, FUA, 0, len).unwrap();
        }
    }
}

#[test]
fn sr_02_03_06_eh_04_05_09_errors_are_chunks_and_the_connection_goes_on() {
    let (_volume, daemon) = served();
    for (mut client, extended) in clients(&daemon).into_iter().zip([false, true]) {
        let end = VOLUME_BYTES;
        assert_eq!(error(client.read(0, end - 512, 1024)), (EINVAL, Some(end)));
        assert_eq!(error(client.read(0, u64::MAX, 512)), (EINVAL, None));
        assert_eq!(error(client.read(1 << 9, 0, 512)), (EINVAL, None));
        assert_eq!(error(client.read(0, 0, 32 * MIB + 1)), (EINVAL, None));
        assert_eq!(error(client.write(end - 512, &[1; 1024])), (ENOSPC, Some(end)));
        assert_eq!(error(client.do_it(ZEROES, 0, end, 1)), (ENOSPC, Some(end)));
        assert_eq!(error(client.do_it(TRIM, 0, end, 1)), (EINVAL, Some(end)));
        assert_eq!(error(client.do_it(CACHE, 0, end, 1)), (EINVAL, Some(end)));
        assert_eq!(error(client.do_it(CACHE, DF, 0, 1)), (EINVAL, None));
        assert_eq!(error(client.do_it(FLUSH, 0, 5, 0)), (EINVAL, None));
        assert_eq!(error(client.do_it(200, 0, 7, 7)), (EINVAL, None));
        assert_eq!(error(client.status(0, end - 512, 1024)), (EINVAL, Some(end)));
        assert_eq!(error(client.status(0, 0, 0)), (EINVAL, None));
        assert_eq!(error(client.status(1 << 9, 0, 512)), (EINVAL, None));
        if extended {
            for len in [1 << 33, 1 << 63, u64::MAX] {
                assert_eq!(error(client.do_it(ZEROES, 0, 512, len)).0, ENOSPC);
                assert_eq!(error(client.do_it(TRIM, 0, 512, len)).0, EINVAL);
                assert_eq!(error(client.read(0, 512, len)).0, EINVAL);
                assert_eq!(error(client.status(0, 512, len)).0, EINVAL);
            }
            for kind in [READ, FLUSH, TRIM, ZEROES, CACHE, 99] {
                let chunks = client.call(kind, PAYLOAD_LEN, 0, 1000, &[0x21; 1000]);
                assert_eq!(failure(&chunks).unwrap_err().error, EINVAL);
            }
        }
        assert_eq!(client.read(0, end - 512, 512).unwrap(), [0; 512]);
    }
}

#[test]
fn sr_08_pipelined_requests_are_each_answered_once() {
    let (_volume, daemon) = served();
    for mut client in clients(&daemon) {
        let payload_flag = if client.flags & (1 << 12) != 0 { PAYLOAD_LEN } else { 0 };
        let mut rng = Rng::new(8);
        let mut expected = HashMap::new();
        const SLOT: u64 = 256 << 10;
        for slot in 0..64 {
            let data = pattern(slot, 1 + rng.below(SLOT - 1));
            client.send(WRITE, payload_flag, slot * SLOT, data.len() as u64, &data);
            expected.insert(slot, data);
        }
        for _ in 0..64 {
            failure(&client.receive().unwrap().1).unwrap();
        }
        let mut asked = HashMap::new();
        for slot in 0..64 {
            let cookie = client.send(READ, 0, slot * SLOT, expected[&slot].len() as u64, &[]);
            asked.insert(cookie, slot);
            client.send(STATUS, 0, slot * SLOT, SLOT, &[]);
            client.send(CACHE, 0, slot * SLOT, SLOT, &[]);
        }
        for _ in 0..3 * 64 {
            let (cookie, chunks) = client.receive().unwrap();
            failure(&chunks).unwrap();
            if let Some(slot) = asked.remove(&cookie) {
                let data = &expected[&slot];
                assert!(content(slot * SLOT, data.len() as u64, &chunks).unwrap() == *data);
            }
        }
        assert!(asked.is_empty());
    }
}

/// What a walk through the whole export says for each context number.
fn walk(client: &mut ChunkClient, id: u32, flags: u16) -> Extents {
    let mut at = 0;
    let mut all = Extents::new();
    while at < VOLUME_BYTES {
        let found = client.status(flags, at, VOLUME_BYTES - at).unwrap();
        let (_, extents) = found.into_iter().find(|(found, _)| *found == id).unwrap();
        assert!(flags & REQ_ONE == 0 || extents.len() == 1);
        for (len, flags) in extents {
            at += len;
            match all.last_mut() {
                Some((last_len, last)) if *last == flags => *last_len += len,
                _ => all.push((len, flags)),
            }
        }
    }
    assert_eq!(at, VOLUME_BYTES);
    all
}

#[test]
fn bs_01_to_06_09_eh_06_the_status_of_the_whole_export() {
    let (_volume, daemon) = served();
    for mut client in clients(&daemon) {
        client.write(MIB, &pattern(1, MIB)).unwrap();
        client.write(20 * MIB + 300, &pattern(2, 100)).unwrap();
        client.do_it(FLUSH, 0, 0, 0).unwrap();
        for flags in [0, REQ_ONE, FUA] {
            let extents = walk(&mut client, 0, flags);
            let mut at = 0;
            for (len, status) in &extents {
                assert!(*status <= 3 && len % 512 == 0);
                if status & 2 != 0 {
                    for from in (at..at + len).step_by(16 << 20) {
                        let data = client.read(0, from, (16 * MIB).min(at + len - from)).unwrap();
                        assert!(data.iter().all(|byte| *byte == 0), "ZERO at {at}+{len} is not");
                    }
                }
                let data = [(MIB, MIB), (20 * MIB + 300, 100)];
                let overlaps = data.iter().any(|(offset, bytes)| at < offset + bytes && *offset < at + len);
                assert!(!overlaps || status & 2 == 0, "data at {at}+{len} is said to be zero");
                at += len;
            }
            assert!(extents.len() >= 3, "a sparse volume shows holes: {extents:?}");
        }
        // All contexts, each once; REQ_ONE keeps to the request.
        let found = client.status(REQ_ONE, 4096, 8192).unwrap();
        assert_eq!(found.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!(found.iter().all(|(_, extents)| extents.len() == 1 && extents[0].0 <= 8192));
        // Nothing is stale on a healthy mirror; what was just written is dirty.
        assert_eq!(
            (walk(&mut client, 2, 0), walk(&mut client, 3, 0)),
            (vec![(VOLUME_BYTES, 0)], vec![(VOLUME_BYTES, 0)])
        );
        let state = walk(&mut client, 1, 0);
        assert!(
            state.iter().any(|(_, flags)| *flags == 1) && state.iter().all(|(_, flags)| *flags <= 1),
            "{state:?}"
        );
        client.do_it(TRIM, 0, 0, VOLUME_BYTES).unwrap();
    }
}

#[test]
fn bs_the_contexts_show_what_a_failed_replica_misses() {
    let (volume, daemon) = served();
    let [_, mut client] = clients(&daemon);
    client.write(0, &pattern(1, 4096)).unwrap();
    client.do_it(FLUSH, 0, 0, 0).unwrap();
    daemon.verb("fail", &volume.replicas[1]).ok();
    client.write(40 * MIB, &pattern(2, 4096)).unwrap();
    let stale = walk(&mut client, 3, 0);
    let mut at = 0;
    for (len, flags) in stale {
        let written = at <= 40 * MIB && 40 * MIB < at + len;
        assert!(!written || flags == 1, "what was written without it is stale on it");
        at += len;
    }
    assert_eq!(walk(&mut client, 2, 0), [(VOLUME_BYTES, 0)]);
    assert!(walk(&mut client, 1, 0).iter().any(|(_, flags)| flags & 2 != 0), "out of sync");
    daemon.verb("add", &volume.replicas[1]).ok();
    daemon.wait_in_sync();
    assert_eq!(walk(&mut client, 3, 0), [(VOLUME_BYTES, 0)]);
}

#[test]
fn eh_07_block_status_with_a_payload() {
    let (_volume, daemon) = served();
    let mut client = Haggle::connect(&daemon.socket).extended().with_contexts(&CONTEXTS[..3]).go();
    for ids in [&[2][..], &[0, 1], &[2, 0, 1]] {
        let found = client.status_of(0, VOLUME_BYTES, ids).unwrap();
        let mut sorted = ids.to_vec();
        sorted.sort_unstable();
        assert_eq!(found.iter().map(|(id, _)| *id).collect::<Vec<_>>(), sorted);
    }
    for ids in [&[3][..], &[99], &[0, 0], &[], &[0, 1, 2, 0, 1, 2]] {
        assert_eq!(error(client.status_of(0, 4096, ids)).0, EINVAL);
    }
    assert_eq!(error(client.status_of(0, 0, &[0])).0, EINVAL);
    assert_eq!(error(client.status_of(0, VOLUME_BYTES + 1, &[0])), (EINVAL, Some(VOLUME_BYTES)));
    let chunks = client.call(STATUS, PAYLOAD_LEN, 0, 70_000, &vec![0; 70_000]);
    assert_eq!(failure(&chunks).unwrap_err().error, EINVAL);
    // A payload in pieces.
    client.send(STATUS, PAYLOAD_LEN, 0, 12, &[0, 0, 0]);
    std::thread::sleep(Duration::from_millis(20));
    use std::io::Write as _;
    client.stream.write_all(&[0, 0, 0, 16, 0, 0, 0, 0, 1]).unwrap();
    failure(&client.receive().unwrap().1).unwrap();
    let mut without = Haggle::connect(&daemon.socket).extended().go();
    assert_eq!(error(without.status_of(0, 4096, &[0])).0, EINVAL);
}

#[test]
fn eh_08_10_what_cannot_be_followed_closes_the_connection() {
    let (_volume, daemon) = served();
    let extended = || Haggle::connect(&daemon.socket).extended().go();
    let mut client = extended();
    client.send(WRITE, PAYLOAD_LEN, 0, 1 << 40, &[]);
    client.expect_end();
    let mut client = extended();
    use std::io::Write as _;
    client.stream.write_all(&[&[0x25, 0x60, 0x95, 0x13][..], &[0; 28]].concat()).unwrap();
    client.expect_end();
    assert_eq!(extended().read(0, 0, 512).unwrap(), [0; 512], "nothing was written");
}

#[test]
fn cmd_24_nt_20_fast_zero_succeeds_with_zeroes_or_changes_nothing() {
    let (_volume, daemon) = served();
    const FAST_ZERO: u16 = 16;
    const NO_HOLE: u16 = 2;
    for mut client in clients(&daemon) {
        for flags in [FAST_ZERO, FAST_ZERO | NO_HOLE] {
            let data = pattern(3, MIB);
            client.write(0, &data).unwrap();
            let expected = match client.do_it(ZEROES, flags, 0, MIB) {
                Ok(()) => vec![0; MIB as usize],
                Err(failed) => {
                    assert_eq!(failed.error, ENOTSUP);
                    data
                }
            };
            assert!(client.read(0, 0, MIB).unwrap() == expected);
            client.do_it(ZEROES, flags & NO_HOLE, 0, MIB).unwrap();
            assert!(client.read(DF, 0, MIB).unwrap().iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn nt_03_while_the_volume_stops_requests_are_refused_and_those_in_flight_answered() {
    let (volume, daemon) = served();
    let [mut slow, mut late] = clients(&daemon);
    // One client has asked for a lot and does not read it: the stop waits for it, for a while.
    slow.write(0, &pattern(1, 32 * MIB)).unwrap();
    const READS: usize = 2; // a connection's share of the memory: both are in flight
    for _ in 0..READS {
        slow.send(READ, DF, 0, 32 * MIB, &[]);
    }
    while !is_readable(&slow) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let stopping = std::thread::spawn(move || daemon.stop());
    // The other one goes on writing until it is refused.
    let refused = loop {
        match late.write(40 * MIB, &[5; 4096]) {
            Ok(()) => std::thread::sleep(Duration::from_millis(5)),
            Err(failed) => break failed,
        }
    };
    assert_eq!(refused.error, ESHUTDOWN);
    // In step, and refused whatever it is: also what has a payload.
    assert_eq!(error(late.write(0, &[5; 100_000])).0, ESHUTDOWN);
    assert_eq!(error(late.read(0, 0, 512)).0, ESHUTDOWN);
    assert_eq!(error(late.do_it(FLUSH, 0, 0, 0)).0, ESHUTDOWN);
    assert_eq!(error(late.read(0, VOLUME_BYTES, 512)).0, EINVAL);
    let expected = pattern(1, 32 * MIB);
    for _ in 0..READS {
        let (_, chunks) = slow.receive().unwrap();
        assert!(content(0, 32 * MIB, &chunks).unwrap() == expected);
    }
    stopping.join().unwrap();
    late.expect_end();
    volume.assert_identical();
}

/// Whether something has come from the server.
fn is_readable(client: &ChunkClient) -> bool {
    let mut poll =
        [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&client.stream), nix::poll::PollFlags::POLLIN)];
    nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO).unwrap() > 0
}

#[test]
fn other_peoples_clients_see_the_contexts() {
    let tools = ["nbdinfo", "nbdcopy", "qemu-img", "qemu-io"];
    if let Some(tool) = missing(&tools) {
        return skip(&format!("{tool} is not installed"));
    }
    let (volume, daemon) = served();
    let mut client = daemon.client();
    client.write(MIB, &pattern(1, MIB)).unwrap();
    client.flush().unwrap();
    let uri = daemon.uri();
    let map = |context: &str| run("nbdinfo", [&format!("--map={context}"), &uri]).ok();
    let allocation = map("base:allocation");
    assert!(allocation.contains("hole,zero") && allocation.contains("data"), "{allocation}");
    assert!(map("nbdmirror:state").lines().count() >= 2);
    assert_eq!(map("nbdmirror:stale/0").lines().count(), 1);
    let info = run("nbdinfo", [&uri]).ok();
    for word in CONTEXTS.into_iter().chain(["can_df: true", "can_fast_zero: true", "can_cache: true"]) {
        assert!(info.contains(word), "{word} is not in:\n{info}");
    }
    assert!(info.contains("block_status_payload: true") || !info.contains("block_status_payload"), "{info}");
    let json = run("qemu-img", ["map", "--output=json", "-f", "raw", &uri]).ok();
    assert!(json.contains("\"zero\": true") && json.contains("\"data\": true"), "{json}");
    let copy = volume.path("copy.img");
    run("nbdcopy", [uri.as_ref(), copy.as_os_str()]).ok();
    support::daemon::assert_same_bytes(&copy, &volume.replicas[0], VOLUME_BYTES);
    run("qemu-io", ["-f", "raw", "-c", "read -P 0 0 1M", "-c", "write -z 1M 512k", "-c", "map", &uri]).ok();
    daemon.stop();
    volume.assert_identical();
}
