//! The NBD protocol as others see it: properties over arbitrary bytes, the error table in `docs/`, and the
//! project's own client against a small server in memory.

// Helpers outside `#[test]` functions are tests too.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nbdmirror::extent::StatusContext;
use nbdmirror::nbd::client;
use nbdmirror::nbd::export::{Export, Negotiated, ReplyMode};
use nbdmirror::nbd::handshake::{ANSWER_BYTES_MAX, Handshake, OPTIONS_MAX, Step, TlsMode};
use nbdmirror::nbd::session::{Command, Parsed, SKIP_BYTES_MAX, Session};
use nbdmirror::nbd::wire::{self, NbdError};
use nbdmirror::units::{ReplicaSet, ReplicaSlot};
use proptest::prelude::*;

const NAME: &str = "vol";
const SIZE_BYTES: u64 = 1 << 20;

fn export(read_only: bool) -> Arc<Export> {
    Arc::new(Export {
        name: NAME.to_owned(),
        description: "a mirror".to_owned(),
        size_bytes: SIZE_BYTES,
        read_only,
        replicas: ReplicaSet::only(ReplicaSlot::new(0)),
    })
}

/// A session with everything negotiated that there is in this mode.
fn session(read_only: bool, mode: ReplyMode) -> Session {
    let contexts = match mode {
        ReplyMode::Simple => vec![],
        _ => vec![StatusContext::Allocation, StatusContext::Stale(ReplicaSlot::new(0))],
    };
    Session::new(export(read_only), Negotiated { mode, contexts: contexts.into_iter().collect() })
}

const MODES: [ReplyMode; 3] = [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended];

/// A request in this mode's form; the length is cut where the form has 32 bits of it.
fn encode_request(mode: ReplyMode, kind: u16, flags: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
    if mode == ReplyMode::Extended {
        client::encode_extended_request(kind, flags, cookie, offset, len).to_vec()
    } else {
        client::encode_request(kind, flags, cookie, offset, len as u32).to_vec()
    }
}

// ---- The handshake over arbitrary bytes ----

/// How a handshake went, without the parts that cannot be compared.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    consumed: usize,
    end: &'static str,
    reason: String,
    out: Vec<u8>,
}

/// Feeds `bytes` in pieces of the given lengths (over and over), until an end or the last byte.
fn run_in_pieces(bytes: &[u8], piece_lens: &[usize]) -> Outcome {
    let mut handshake = Handshake::new(export(false), TlsMode::Off);
    let mut out = Vec::new();
    let mut consumed = 0;
    let mut lens = piece_lens.iter().cycle();
    while consumed < bytes.len() {
        let len = lens.next().copied().unwrap_or(bytes.len()).min(bytes.len() - consumed);
        let progress = handshake.receive(&bytes[consumed..consumed + len], &mut out);
        consumed += progress.consumed;
        let (end, reason) = match progress.step {
            Step::NeedMore => {
                assert_eq!(progress.consumed, len);
                continue;
            }
            Step::Transmission(_) => ("transmission", String::new()),
            Step::StartTls => ("starttls", String::new()),
            Step::Close(reason) => ("close", reason),
        };
        return Outcome { consumed, end, reason, out };
    }
    Outcome { consumed, end: "need more", reason: String::new(), out }
}

/// Checks that what the server sent is well formed; gives the option replies' (option, kind).
fn check_replies(outcome: &Outcome) -> Vec<(u32, u32)> {
    let mut replies = Vec::new();
    let mut rest = &outcome.out[..];
    while let Some((header, tail)) = rest.split_first_chunk::<{ wire::OPTION_REPLY_HEADER_BYTES }>() {
        let Ok(reply) = client::parse_option_reply(header) else { break };
        let (data, tail) = tail.split_at(reply.data_bytes as usize);
        match reply.kind {
            wire::REP_ACK => assert!(data.is_empty()),
            wire::REP_SERVER => assert_eq!(data, b"\0\0\0\x03vol"),
            wire::REP_INFO => check_info(data),
            wire::REP_META_CONTEXT => {
                let name = std::str::from_utf8(&data[4..]).unwrap();
                assert!(["base:allocation", "nbdmirror:state", "nbdmirror:stale/0"].contains(&name));
            }
            kind => {
                assert!(kind & wire::REP_ERROR_BIT != 0 && wire::reply_name(kind) != "unknown");
                assert!(data.len() <= wire::STRING_BYTES_MAX && std::str::from_utf8(data).is_ok());
            }
        }
        replies.push((reply.option, reply.kind));
        rest = tail;
    }
    if outcome.end == "transmission" && !rest.is_empty() {
        // EXPORT_NAME's answer has no header.
        assert!(matches!(rest.len(), 10 | 134));
    } else {
        assert!(rest.is_empty());
    }
    replies
}

fn check_info(data: &[u8]) {
    let (kind, body) = data.split_at(2);
    match u16::from_be_bytes([kind[0], kind[1]]) {
        wire::INFO_EXPORT => assert_eq!(body.len(), 10),
        wire::INFO_NAME => assert_eq!(body, NAME.as_bytes()),
        wire::INFO_DESCRIPTION => assert_eq!(body, b"a mirror"),
        wire::INFO_BLOCK_SIZE => assert_eq!(body.len(), 12),
        other => panic!("unexpected information {other}"),
    }
}

/// Options as clients send them, and as they should not.
fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let code = prop_oneof![0_u32..13, any::<u32>()];
    let name =
        prop_oneof![Just(NAME.as_bytes().to_vec()), Just(vec![]), prop::collection::vec(any::<u8>(), 0..9)];
    let query = (name, prop::collection::vec(0_u16..6, 0..6))
        .prop_map(|(name, wanted)| client::encode_info_query(&name, &wanted));
    let context = prop_oneof![Just("base:"), Just("base:allocation"), Just("nbdmirror:"), Just("x:y")];
    let contexts = prop::collection::vec(context, 0..4).prop_map(|queries| {
        let mut data = [&3_u32.to_be_bytes()[..], NAME.as_bytes()].concat();
        data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
        for query in queries {
            data.extend_from_slice(&(query.len() as u32).to_be_bytes());
            data.extend_from_slice(query.as_bytes());
        }
        data
    });
    let data = prop_oneof![Just(vec![]), query, contexts, prop::collection::vec(any::<u8>(), 0..40)];
    (code, data).prop_map(|(code, data)| client::encode_option(code, &data))
}

/// A client's side of a handshake: mostly sensible, sometimes damaged in one byte.
fn any_hello() -> impl Strategy<Value = Vec<u8>> {
    let options = prop::collection::vec(any_option(), 0..8);
    let damage = prop::option::weighted(0.3, (any::<prop::sample::Index>(), any::<u8>()));
    (0_u32..4, options, damage).prop_map(|(flags, options, damage)| {
        let mut bytes = flags.to_be_bytes().to_vec();
        bytes.extend(options.concat());
        if let Some((index, byte)) = damage {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hs_11_any_split_gives_the_same(bytes in any_hello(), lens in prop::collection::vec(1_usize..30, 1..8)) {
        let whole = run_in_pieces(&bytes, &[]);
        prop_assert_eq!(&whole, &run_in_pieces(&bytes, &lens));
        prop_assert_eq!(&whole, &run_in_pieces(&bytes, &[1]));
    }

    #[test]
    fn ab_14_replies_to_any_options_are_well_formed(bytes in any_hello()) {
        let outcome = run_in_pieces(&bytes, &[]);
        let replies = check_replies(&outcome);
        prop_assert!(outcome.out.len() <= OPTIONS_MAX as usize * ANSWER_BYTES_MAX);
        if outcome.end == "need more" {
            prop_assert_eq!(outcome.consumed, bytes.len());
        }
        for (option, kind) in replies {
            // Nothing is ever granted that is not served.
            if kind == wire::REP_ACK {
                let served = matches!(option, 2 | 3 | 6..=11);
                prop_assert!(served, "{}", wire::option_name(option));
            }
        }
    }

    #[test]
    fn ab_04_rubbish_never_gets_in(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let outcome = run_in_pieces(&bytes, &[]);
        prop_assert!(outcome.end != "transmission");
        prop_assert_eq!(outcome.out.len(), 0);
    }

    #[test]
    fn ab_05_13_any_request_is_answered_or_closed(
        mode in prop::sample::select(&MODES[..]),
        rubbish in prop::array::uniform32(any::<u8>()),
        good_magic in prop::bool::weighted(0.9),
        kind in prop_oneof![0_u16..10, any::<u16>()],
        flags in prop_oneof![0_u16..64, any::<u16>()],
        offset in prop_oneof![0..2 * SIZE_BYTES, any::<u64>()],
        len in prop_oneof![0..100_u64, 0..2 * SIZE_BYTES, any::<u64>()],
        payload in prop::collection::vec(prop_oneof![Just(0), any::<u8>()], Session::PARSE_BYTES_MAX),
        read_only: bool,
    ) {
        let session = session(read_only, mode);
        let mut bytes = encode_request(mode, kind, flags, 7, offset, len);
        let header_bytes = bytes.len();
        prop_assert_eq!(header_bytes, session.header_bytes());
        if !good_magic {
            bytes = rubbish[..header_bytes].to_vec();
        }
        bytes.extend_from_slice(&payload);
        let parsed = session.parse(&bytes);
        let (parsed, taken) = parsed.expect("no request wants more bytes at once");
        let status_payload = kind == wire::CMD_BLOCK_STATUS && flags & wire::CMD_FLAG_PAYLOAD_LEN != 0;
        let len = if mode == ReplyMode::Extended { len } else { u64::from(len as u32) };
        let has_payload = if mode == ReplyMode::Extended {
            kind == wire::CMD_WRITE || flags & wire::CMD_FLAG_PAYLOAD_LEN != 0
        } else {
            kind == wire::CMD_WRITE
        };
        match parsed {
            Parsed::Command { tag, command } => {
                prop_assert_eq!((tag.cookie, tag.offset), (7, offset));
                let payload_bytes = if status_payload { len as usize } else { 0 };
                prop_assert_eq!(taken, header_bytes + payload_bytes);
                check_command(command, read_only);
            }
            Parsed::Refuse { tag, skip_payload_bytes, refusal } => {
                prop_assert_eq!((tag.cookie, tag.offset, taken), (7, offset, header_bytes));
                prop_assert_eq!(u64::from(skip_payload_bytes), if has_payload { len } else { 0 });
                prop_assert!(skip_payload_bytes <= SKIP_BYTES_MAX);
                let within = |at| at >= offset && at - offset < len;
                prop_assert!(refusal.at.is_none_or(within) || status_payload);
            }
            Parsed::Disconnect => prop_assert_eq!(kind, wire::CMD_DISC),
            Parsed::Close(_) => {
                let endless = has_payload && len > u64::from(SKIP_BYTES_MAX);
                prop_assert!(!good_magic || endless);
            }
        }
    }
}

fn check_command(command: Command, read_only: bool) {
    let (offset, len) = match command {
        Command::Read { offset, len, .. } | Command::Write { offset, len, .. } => (offset, u64::from(len)),
        Command::WriteZeroes { offset, len, .. }
        | Command::Trim { offset, len, .. }
        | Command::Cache { offset, len } => (offset, len),
        Command::BlockStatus { offset, len, contexts, .. } => {
            assert!(!contexts.is_empty() && len > 0);
            (offset, len)
        }
        Command::Flush => (0, 0),
    };
    assert!(offset <= SIZE_BYTES && len <= SIZE_BYTES - offset);
    assert!(!(command.writes() && read_only));
}

// ---- docs/error-table.md ----

/// A row of the table of wrong requests.
#[derive(Debug)]
struct Row {
    command: u16,
    read_only: bool,
    mode: ReplyMode,
    contexts: bool,
    flags: u16,
    offset: u64,
    len: u64,
    answer: String,
}

fn command_code(text: &str) -> u16 {
    match text.strip_prefix("command ") {
        Some(number) => number.parse().unwrap(),
        None => (0..16).find(|code| wire::command_name(*code) == text).unwrap(),
    }
}

fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
        None => text.parse().unwrap(),
    }
}

/// Rows whose first and third cell stand in backticks: the request and the example.
fn table_rows() -> Vec<Row> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/error-table.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut rows = Vec::new();
    for line in text.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, command, _, example, answer, ..] = cells[..] else { continue };
        let Some(command) = command.strip_prefix('`').and_then(|text| text.strip_suffix('`')) else {
            continue;
        };
        let mut row = Row {
            command: command_code(command),
            read_only: false,
            mode: ReplyMode::Simple,
            contexts: false,
            flags: 0,
            offset: 0,
            len: 0,
            answer: answer.to_owned(),
        };
        for part in example.trim_matches('`').split(", ") {
            match part.split_once(' ') {
                Some(("flags", value)) => row.flags = number(value).try_into().unwrap(),
                Some(("offset", value)) => row.offset = number(value),
                Some(("length", value)) => row.len = number(value),
                _ if part == "read-only" => row.read_only = true,
                _ if part == "structured" => row.mode = ReplyMode::Structured,
                _ if part == "extended" => row.mode = ReplyMode::Extended,
                _ if part == "contexts" => row.contexts = true,
                _ => panic!("what is {part:?} in {line:?}?"),
            }
        }
        rows.push(row);
    }
    rows
}

fn answer(row: &Row) -> &'static str {
    let Row { command, read_only, mode, contexts, flags, offset, len, .. } = *row;
    let all = session(read_only, mode);
    let session = if contexts {
        all
    } else {
        Session::new(export(read_only), Negotiated { mode, ..Default::default() })
    };
    let header = encode_request(mode, command, flags, 1, offset, len);
    let bytes = [&header[..], &[0; 64]].concat();
    match session.parse(&bytes).unwrap().0 {
        Parsed::Command { .. } => "success",
        Parsed::Refuse { refusal, .. } => refusal.error.name(),
        Parsed::Disconnect | Parsed::Close(_) => "connection closed",
    }
}

#[test]
fn the_error_table_says_what_the_code_does() {
    let rows = table_rows();
    assert!(rows.len() >= 35, "the table was not found");
    for row in &rows {
        assert_eq!(answer(row), row.answer, "{row:?}");
    }
}

#[test]
fn the_code_gives_no_error_that_the_table_does_not_have() {
    let listed: BTreeSet<(u16, String)> =
        table_rows().into_iter().map(|row| (row.command, row.answer)).collect();
    let lens = [0, 1, 512, 1 << 20, (32 << 20) + 1, (64 << 20) + 1, u64::from(u32::MAX)];
    let offsets = [0, 1, SIZE_BYTES - 1, SIZE_BYTES, SIZE_BYTES + 1, u64::MAX];
    for (command, mode) in (0..9).chain([200]).flat_map(|command| MODES.map(|mode| (command, mode))) {
        for flags in 0..64 {
            for (len, offset) in lens.iter().flat_map(|len| offsets.map(|offset| (*len, offset))) {
                for (read_only, contexts) in [(false, false), (true, true)] {
                    let row =
                        Row { command, read_only, mode, contexts, flags, offset, len, answer: String::new() };
                    let got = answer(&row);
                    let closes = mode == ReplyMode::Extended && got == "connection closed"; // for any command
                    let known = closes || got == "success" || listed.contains(&(command, got.to_owned()));
                    assert!(known, "{} {row:?}: {got}", wire::command_name(command));
                }
            }
        }
    }
}

// ---- The client against a server in memory ----

/// Serves one connection from memory, one request at a time.
fn serve_in_memory(mut stream: UnixStream, export: &Arc<Export>) -> std::io::Result<()> {
    let mut disk = vec![0_u8; export.size_bytes as usize];
    stream.write_all(&Handshake::greeting())?;
    let mut handshake = Handshake::new(Arc::clone(export), TlsMode::Off);
    let session = loop {
        // One byte at a time, so that nothing of the transmission is read too early.
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        let mut out = Vec::new();
        let progress = handshake.receive(&byte, &mut out);
        stream.write_all(&out)?;
        match progress.step {
            Step::NeedMore => {}
            Step::Transmission(session) => break session,
            Step::StartTls | Step::Close(_) => return Ok(()),
        }
    };
    loop {
        let mut header = [0; wire::REQUEST_BYTES];
        stream.read_exact(&mut header)?;
        match session.parse(&header).unwrap().0 {
            Parsed::Close(_) | Parsed::Disconnect => return Ok(()),
            Parsed::Refuse { tag, refusal, skip_payload_bytes } => {
                stream.read_exact(&mut vec![0; skip_payload_bytes as usize])?;
                stream.write_all(&session.encode_error(tag, refusal.error, refusal.message, refusal.at))?;
            }
            Parsed::Command { tag, command } => {
                let read = carry_out(command, &mut disk, &mut stream)?;
                stream.write_all(&session.encode_done(tag))?;
                stream.write_all(&disk[read])?;
            }
        }
    }
}

/// Does it and gives the range of the disk to send.
fn carry_out(
    command: Command,
    disk: &mut [u8],
    stream: &mut UnixStream,
) -> std::io::Result<std::ops::Range<usize>> {
    let range = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
    match command {
        Command::Read { offset, len, .. } => return Ok(range(offset, len.into())),
        Command::Write { offset, len, .. } => stream.read_exact(&mut disk[range(offset, len.into())])?,
        Command::WriteZeroes { offset, len, .. } => disk[range(offset, len)].fill(0),
        Command::Trim { .. } | Command::Cache { .. } | Command::Flush => {}
        Command::BlockStatus { .. } => unreachable!("nothing was negotiated"),
    }
    Ok(0..0)
}

fn with_server(read_only: bool, client: impl FnOnce(&mut UnixStream)) {
    let (mut near, far) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || serve_in_memory(far, &export(read_only)));
    client(&mut near);
    drop(near);
    let _ = server.join().unwrap();
}

/// Sends a request and gives the error's number and the data.
fn ask(stream: &mut UnixStream, request: &[u8], payload: &[u8], data_bytes: usize) -> (u64, u32, Vec<u8>) {
    stream.write_all(request).unwrap();
    stream.write_all(payload).unwrap();
    let mut reply = [0; wire::SIMPLE_REPLY_BYTES];
    stream.read_exact(&mut reply).unwrap();
    let (cookie, error) = client::parse_simple_reply(&reply).unwrap();
    let mut data = vec![0; if error == 0 { data_bytes } else { 0 }];
    stream.read_exact(&mut data).unwrap();
    (cookie, error, data)
}

#[test]
fn cmd_02_07_33_the_client_writes_reads_and_survives_errors() {
    with_server(false, |stream| {
        let connected = client::connect(stream, NAME).unwrap();
        assert_eq!(connected.size_bytes, SIZE_BYTES);
        assert_eq!(connected.transmission_flags, export(false).transmission_flags(Negotiated::default()));
        let data = vec![0xa5; 1024];
        let at = SIZE_BYTES - 512;
        let write_past_end = client::encode_request(wire::CMD_WRITE, 0, 1, at, 1024);
        assert_eq!(ask(stream, &write_past_end, &data, 0), (1, NbdError::NoSpc.value(), vec![]));
        let write_bad_flag = client::encode_request(wire::CMD_WRITE, 1 << 9, 2, 0, 1024);
        assert_eq!(ask(stream, &write_bad_flag, &data, 0), (2, NbdError::Inval.value(), vec![]));
        let write = client::encode_request(wire::CMD_WRITE, wire::CMD_FLAG_FUA, 3, 100, 1024);
        assert_eq!(ask(stream, &write, &data, 0), (3, 0, vec![]));
        let read = client::encode_request(wire::CMD_READ, 0, u64::MAX, 99, 1026);
        let (cookie, error, read) = ask(stream, &read, &[], 1026);
        assert_eq!((cookie, error), (u64::MAX, 0));
        assert_eq!(read, [&[0][..], &data[..], &[0][..]].concat());
        let last = client::encode_request(wire::CMD_READ, 0, 5, at, 512);
        assert_eq!(ask(stream, &last, &[], 512).2, vec![0; 512]);
        stream.write_all(&client::encode_request(wire::CMD_DISC, 0, 6, 0, 0)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    });
}

#[test]
fn opt_16_the_client_is_told_of_an_unknown_export() {
    with_server(false, |stream| {
        let error = client::connect(stream, "other").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
        assert!(error.to_string().contains("ERR_UNKNOWN"), "{error}");
    });
}

#[test]
fn tf_06_the_client_sees_a_read_only_export() {
    with_server(true, |stream| {
        let connected = client::connect(stream, "").unwrap();
        assert!(connected.transmission_flags & wire::FLAG_READ_ONLY != 0);
        let zero = client::encode_request(wire::CMD_WRITE_ZEROES, 0, 1, 0, 512);
        assert_eq!(ask(stream, &zero, &[], 0).1, NbdError::Perm.value());
    });
}

#[test]
fn the_client_refuses_a_server_that_speaks_rubbish() {
    let (mut near, mut far) = UnixStream::pair().unwrap();
    far.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    let error = client::connect(&mut near, NAME).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
}
