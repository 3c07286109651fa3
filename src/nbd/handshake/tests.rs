//! The handshake's lines of the NBD checklist, by their IDs.

use super::*;
use crate::nbd::client::{encode_info_query, encode_option};
use crate::units::ReplicaSlot;

mod negotiated;
mod tls;

const NAME: &str = "vol";

fn export() -> Arc<Export> {
    Arc::new(Export {
        name: NAME.to_owned(),
        description: "a mirror".to_owned(),
        size_bytes: 5 << 30,
        read_only: false,
        replicas: [0, 2].map(ReplicaSlot::new).into_iter().collect(),
    })
}

/// A reply to an option, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Reply {
    option: u32,
    kind: u32,
    data: Vec<u8>,
}

fn parse_replies(bytes: &[u8]) -> Vec<Reply> {
    let mut reader = Reader::new(bytes);
    let mut replies = Vec::new();
    while !reader.rest().is_empty() {
        assert_eq!(reader.u64(), Some(wire::OPTION_REPLY_MAGIC));
        let (option, kind) = (reader.u32().unwrap(), reader.u32().unwrap());
        let len = reader.u32().unwrap() as usize;
        replies.push(Reply { option, kind, data: reader.bytes(len).unwrap().to_vec() });
    }
    replies
}

fn kinds(bytes: &[u8]) -> Vec<u32> {
    parse_replies(bytes).iter().map(|reply| reply.kind).collect()
}

/// A client's bytes: flags, then options.
fn hello(flags: u32, options: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = flags.to_be_bytes().to_vec();
    for (code, data) in options {
        bytes.extend_from_slice(&encode_option(*code, data));
    }
    bytes
}

fn run(bytes: &[u8]) -> (Progress, Vec<u8>) {
    let mut out = Vec::new();
    let progress = Handshake::new(export(), TlsMode::Off).receive(bytes, &mut out);
    (progress, out)
}

/// Runs options on one connection that must still be haggling afterwards; gives the replies.
fn haggle(options: &[(u32, Vec<u8>)]) -> Vec<Reply> {
    let (progress, out) = run(&hello(3, options));
    assert!(matches!(progress.step, Step::NeedMore), "{:?}", progress.step);
    parse_replies(&out)
}

fn haggle_kinds(options: &[(u32, Vec<u8>)]) -> Vec<u32> {
    haggle(options).iter().map(|reply| reply.kind).collect()
}

fn assert_closes(bytes: &[u8]) {
    let (progress, _) = run(bytes);
    assert!(matches!(progress.step, Step::Close(_)), "{:?}", progress.step);
}

fn list() -> (u32, Vec<u8>) {
    (wire::OPT_LIST, vec![])
}

fn info(wanted: &[u16]) -> (u32, Vec<u8>) {
    (wire::OPT_INFO, encode_info_query(NAME.as_bytes(), wanted))
}

fn go(wanted: &[u16]) -> (u32, Vec<u8>) {
    (wire::OPT_GO, encode_info_query(NAME.as_bytes(), wanted))
}

#[test]
fn hs_01_02_03_greeting() {
    assert_eq!(&Handshake::greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
}

#[test]
fn hs_04_nothing_is_sent_before_the_client_speaks() {
    let (progress, out) = run(&[]);
    assert!(matches!(progress.step, Step::NeedMore));
    let (_, out_after_flags) = run(&hello(3, &[]));
    assert!(out.is_empty() && out_after_flags.is_empty());
}

#[test]
fn hs_05_06_09_10_export_name_with_and_without_padding() {
    for (flags, reply_bytes) in [(0, 134), (1, 134), (2, 10), (3, 10)] {
        let (progress, out) = run(&hello(flags, &[(wire::OPT_EXPORT_NAME, NAME.into())]));
        assert!(matches!(progress.step, Step::Transmission(_)));
        assert_eq!(out.len(), reply_bytes);
        assert_eq!(out[..8], (5_u64 << 30).to_be_bytes());
        assert_eq!(out[8..10], export().transmission_flags(Negotiated::default()).to_be_bytes());
        assert!(out[10..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn hs_07_08_unknown_client_flags_close() {
    for bit in 2..32 {
        assert_closes(&hello(3 | 1 << bit, &[list()]));
    }
}

#[test]
fn hs_11_one_byte_at_a_time() {
    let bytes = hello(3, &[list(), go(&[])]);
    let (_, whole) = run(&bytes);
    let mut handshake = Handshake::new(export(), TlsMode::Off);
    let mut out = Vec::new();
    for (index, byte) in bytes.iter().enumerate() {
        let progress = handshake.receive(&[*byte], &mut out);
        assert_eq!(progress.consumed, 1);
        let is_last = index + 1 == bytes.len();
        assert_eq!(matches!(progress.step, Step::Transmission(_)), is_last);
    }
    assert_eq!(out, whole);
}

#[test]
fn hs_13_14_export_name_unknown_or_too_long_closes() {
    assert_closes(&hello(3, &[(wire::OPT_EXPORT_NAME, b"other".to_vec())]));
    // The header is enough: the name is never waited for.
    let mut bytes = hello(3, &[(wire::OPT_EXPORT_NAME, vec![b'x'; wire::STRING_BYTES_MAX + 1])]);
    bytes.truncate(wire::CLIENT_FLAGS_BYTES + wire::OPTION_HEADER_BYTES);
    assert_closes(&bytes);
}

#[test]
fn hs_15_what_follows_go_is_left_for_transmission() {
    let mut bytes = hello(3, &[go(&[])]);
    let handshake_bytes = bytes.len();
    bytes.extend_from_slice(b"requests");
    let (progress, _) = run(&bytes);
    assert_eq!(progress.consumed, handshake_bytes);
    assert!(matches!(progress.step, Step::Transmission(_)));
}

#[test]
fn opt_01_02_03_04_unknown_options_are_refused_and_skipped() {
    let mut options = Vec::new();
    for code in [0, wire::OPT_PEEK_EXPORT, 99, u32::MAX] {
        for data_bytes in [0, 1, 15, 100_000] {
            options.push((code, vec![0x49; data_bytes]));
        }
    }
    options.extend((0..20).map(|code| (1000 + code, vec![])));
    let replies = haggle(&options);
    assert_eq!(replies.len(), options.len());
    for (reply, (code, _)) in replies.iter().zip(&options) {
        assert_eq!((reply.option, reply.kind), (*code, wire::REP_ERR_UNSUP));
    }
}

#[test]
fn opt_05_06_abort_is_acknowledged_with_and_without_data() {
    for data in [vec![], vec![7; 300]] {
        let (progress, out) = run(&hello(3, &[(wire::OPT_ABORT, data)]));
        assert!(matches!(progress.step, Step::Close(_)));
        assert_eq!(kinds(&out), [wire::REP_ACK]);
    }
}

#[test]
fn opt_08_10_list_names_the_export() {
    let replies = haggle(&[list()]);
    assert_eq!(replies[0].kind, wire::REP_SERVER);
    assert_eq!(replies[0].data, b"\0\0\0\x03vol");
    assert_eq!(replies[1], Reply { option: wire::OPT_LIST, kind: wire::REP_ACK, data: vec![] });
    assert_eq!(replies.len(), 2);
}

#[test]
fn opt_09_list_with_data_is_invalid() {
    assert_eq!(
        haggle_kinds(&[(wire::OPT_LIST, vec![0; 5]), list()]),
        [wire::REP_ERR_INVALID, wire::REP_SERVER, wire::REP_ACK]
    );
}

#[test]
fn opt_14_info_gives_the_export_and_haggling_goes_on() {
    let replies = haggle(&[info(&[])]);
    assert_eq!(replies.len(), 2);
    assert_eq!(replies[0].kind, wire::REP_INFO);
    let mut expected = wire::INFO_EXPORT.to_be_bytes().to_vec();
    expected.extend_from_slice(&(5_u64 << 30).to_be_bytes());
    expected.extend_from_slice(&export().transmission_flags(Negotiated::default()).to_be_bytes());
    assert_eq!(replies[0].data, expected);
    assert_eq!(replies[1].kind, wire::REP_ACK);
}

#[test]
fn opt_15_17_tf_05_go_repeats_info_and_ends_without_padding() {
    let wanted = [wire::INFO_BLOCK_SIZE, wire::INFO_NAME, wire::INFO_DESCRIPTION];
    let from_info = haggle(&[info(&wanted)]);
    for flags in [0, 1, 2, 3] {
        let (progress, out) = run(&hello(flags, &[go(&wanted)]));
        assert!(matches!(progress.step, Step::Transmission(_)));
        let from_go = parse_replies(&out);
        assert_eq!(from_go.len(), from_info.len());
        for (go, info) in from_go.iter().zip(&from_info) {
            assert_eq!((go.option, go.kind, &go.data), (wire::OPT_GO, info.kind, &info.data));
        }
    }
}

#[test]
fn opt_16_27_28_29_unknown_exports() {
    for name in [&b"other"[..], b"vol\0", b"\xff\xfe\xfd", b"../../etc/passwd", b"/vol", b"vol "] {
        for code in [wire::OPT_INFO, wire::OPT_GO] {
            let options = [(code, encode_info_query(name, &[wire::INFO_NAME])), list()];
            assert_eq!(haggle_kinds(&options), [wire::REP_ERR_UNKNOWN, wire::REP_SERVER, wire::REP_ACK]);
        }
    }
}

#[test]
fn opt_18_19_information_comes_once_and_unknown_types_are_ignored() {
    let mut wanted = vec![wire::INFO_BLOCK_SIZE; 3];
    wanted.extend([wire::INFO_EXPORT, 77, wire::INFO_EXPORT, wire::INFO_NAME, u16::MAX, wire::INFO_NAME]);
    let infos: Vec<Vec<u8>> = haggle(&[info(&wanted)])
        .into_iter()
        .filter(|reply| reply.kind == wire::REP_INFO)
        .map(|reply| reply.data[..2].to_vec())
        .collect();
    let expected = [wire::INFO_EXPORT, wire::INFO_NAME, wire::INFO_BLOCK_SIZE];
    assert_eq!(infos, expected.map(|info| info.to_be_bytes().to_vec()));
}

#[test]
fn opt_20_block_sizes() {
    let replies = haggle(&[info(&[wire::INFO_BLOCK_SIZE])]);
    let sizes: Vec<u32> =
        replies[1].data[2..].chunks(4).map(|bytes| u32::from_be_bytes(bytes.try_into().unwrap())).collect();
    assert_eq!(sizes, [1, 4096, 32 << 20]);
}

#[test]
fn opt_21_name_is_the_canonical_one_and_an_empty_description_is_left_out() {
    let query = (wire::OPT_INFO, encode_info_query(b"", &[wire::INFO_NAME, wire::INFO_DESCRIPTION]));
    let replies = haggle(std::slice::from_ref(&query));
    assert_eq!(replies[1].data, b"\0\x01vol");
    assert_eq!(replies[2].data, b"\0\x02a mirror");
    let plain = Arc::new(Export { description: String::new(), ..(*export()).clone() });
    let mut out = Vec::new();
    let _ = Handshake::new(plain, TlsMode::Off).receive(&hello(3, &[query]), &mut out);
    assert_eq!(kinds(&out), [wire::REP_INFO, wire::REP_INFO, wire::REP_ACK]);
}

#[test]
fn opt_23_24_25_malformed_info_and_go_are_invalid_and_in_step() {
    let long_name = [&u32::MAX.to_be_bytes()[..], b"vol\0\0"].concat();
    let name_past_data = [&4_u32.to_be_bytes()[..], b"vol", &[0; 2]].concat();
    let mut few = encode_info_query(b"vol", &[0, 1]);
    few.truncate(few.len() - 1);
    let mut many = encode_info_query(b"vol", &[0, 1]);
    many.push(0);
    let no_count = [&3_u32.to_be_bytes()[..], b"vol"].concat();
    let short = [0, 3, 5].map(|len| vec![0; len]);
    for data in [long_name, name_past_data, few, many, no_count].into_iter().chain(short) {
        for code in [wire::OPT_INFO, wire::OPT_GO] {
            assert_eq!(
                haggle_kinds(&[(code, data.clone()), list()]),
                [wire::REP_ERR_INVALID, wire::REP_SERVER, wire::REP_ACK],
                "{data:?}"
            );
        }
    }
}

#[test]
fn opt_26_names_over_4096_bytes_are_refused_in_step() {
    let long = encode_info_query(&[b'x'; wire::STRING_BYTES_MAX + 1], &[]);
    let huge = encode_info_query(&vec![b'x'; 1 << 20], &[]);
    assert_eq!(
        haggle_kinds(&[(wire::OPT_GO, long), (wire::OPT_INFO, huge), list()]),
        [wire::REP_ERR_INVALID, wire::REP_ERR_TOO_BIG, wire::REP_SERVER, wire::REP_ACK]
    );
}

#[test]
fn opt_25_the_largest_legal_info_is_served() {
    let longest = Arc::new(Export { name: "x".repeat(wire::STRING_BYTES_MAX), ..(*export()).clone() });
    let data = encode_info_query(longest.name.as_bytes(), &[wire::INFO_NAME; u16::MAX as usize]);
    assert_eq!(data.len(), OPTION_DATA_BYTES_MAX);
    let mut out = Vec::new();
    let progress =
        Handshake::new(longest, TlsMode::Off).receive(&hello(3, &[(wire::OPT_INFO, data)]), &mut out);
    assert!(matches!(progress.step, Step::NeedMore));
    assert_eq!(kinds(&out), [wire::REP_INFO, wire::REP_INFO, wire::REP_ACK]);
}

#[test]
fn opt_43_bad_option_magic_closes() {
    let mut bytes = hello(3, &[list()]);
    bytes[4] ^= 1;
    assert_closes(&bytes);
}

#[test]
fn opt_44_a_length_of_4_gib_allocates_nothing_and_closes() {
    for code in [wire::OPT_EXPORT_NAME, wire::OPT_ABORT, wire::OPT_LIST, wire::OPT_GO, 99] {
        let mut bytes = hello(3, &[(code, vec![])]);
        let at = bytes.len() - 4;
        bytes[at..].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_closes(&bytes);
    }
}

#[test]
fn opt_44_skipped_data_is_not_kept() {
    let mut handshake = Handshake::new(export(), TlsMode::Off);
    let mut out = Vec::new();
    let bytes = hello(3, &[(wire::OPT_GO, vec![0; 16 << 20]), (99, vec![0; 15 << 20])]);
    for piece in bytes.chunks(65_536) {
        assert!(matches!(handshake.receive(piece, &mut out).step, Step::NeedMore));
        assert!(handshake.pending.capacity() <= 2 * OPTION_DATA_BYTES_MAX);
    }
    assert_eq!(kinds(&out), [wire::REP_ERR_TOO_BIG, wire::REP_ERR_UNSUP]);
}

#[test]
fn opt_44_option_data_is_bounded_over_the_whole_handshake() {
    let mut handshake = Handshake::new(export(), TlsMode::Off);
    let mut out = Vec::new();
    let mebibyte = encode_option(99, &vec![0; 1 << 20]);
    let _ = handshake.receive(&hello(3, &[]), &mut out);
    for _ in 0..32 {
        assert!(matches!(handshake.receive(&mebibyte, &mut out).step, Step::NeedMore));
    }
    assert!(matches!(handshake.receive(&mebibyte, &mut out).step, Step::Close(_)));
}

#[test]
fn opt_45_truncated_options_wait() {
    let bytes = hello(3, &[go(&[])]);
    for end in 0..bytes.len() {
        let (progress, out) = run(&bytes[..end]);
        assert!(matches!(progress.step, Step::NeedMore));
        assert!(out.is_empty());
    }
}

#[test]
fn opt_51_200_options_are_answered_and_a_flood_is_cut_off() {
    assert_eq!(haggle_kinds(&vec![info(&[]); 200]).len(), 400);
    let flood = vec![list(); OPTIONS_MAX as usize + 1];
    let (progress, out) = run(&hello(3, &flood));
    assert!(matches!(progress.step, Step::Close(_)));
    assert_eq!(kinds(&out).len(), 2 * OPTIONS_MAX as usize);
}

#[test]
fn ab_04_rubbish_closes_at_once() {
    for rubbish in
        [&b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03"]
    {
        assert_closes(rubbish);
    }
}

#[test]
fn nt_03_shutdown_refuses_options_but_not_abort() {
    let mut handshake = Handshake::new(export(), TlsMode::Off);
    handshake.begin_shutdown();
    let mut out = Vec::new();
    let options = [list(), info(&[]), go(&[]), (99, vec![1; 9]), (wire::OPT_ABORT, vec![])];
    let progress = handshake.receive(&hello(3, &options), &mut out);
    assert!(matches!(progress.step, Step::Close(_)));
    let refused = wire::REP_ERR_SHUTDOWN;
    assert_eq!(kinds(&out), [refused, refused, refused, refused, wire::REP_ACK]);

    let mut handshake = Handshake::new(export(), TlsMode::Off);
    handshake.begin_shutdown();
    let mut out = Vec::new();
    let progress = handshake.receive(&hello(3, &[(wire::OPT_EXPORT_NAME, vec![])]), &mut out);
    assert!(matches!(progress.step, Step::Close(_)) && out.is_empty());
}

#[test]
fn after_the_end_nothing_is_taken() {
    let mut handshake = Handshake::new(export(), TlsMode::Off);
    let mut out = Vec::new();
    let _ = handshake.receive(&hello(3, &[go(&[])]), &mut out);
    let out_bytes = out.len();
    let progress = handshake.receive(&hello(3, &[go(&[])]), &mut out);
    assert!(matches!(progress.step, Step::Close(_)));
    assert_eq!((progress.consumed, out.len()), (0, out_bytes));
}
