//! The transmission phase on the server's side: a stream of requests, each judged by the rules of the specification
//! written down here a second time.
//!
//! What must hold:
//! - Each request is answered once: with its own cookie, by a command within the export, or by an error and the exact
//!   number of payload bytes to skip, so that the stream stays in step.
//! - A connection is closed for a wrong magic or for a payload that nobody would send, and for nothing else.
//! - What the client's codec encodes is what the server parses, and the other way round.

use nbdmirror::extent::{ContextSet, StatusContext};
use nbdmirror::nbd::client::{encode_extended_request, encode_request, parse_chunk, parse_simple_reply};
use nbdmirror::nbd::export::{Negotiated, ReplyMode};
use nbdmirror::nbd::session::{Command, HOLE_BYTES_MIN, Parsed, SKIP_BYTES_MAX, Session, Tag};
use nbdmirror::nbd::wire::{self, NbdError, Reader};

use super::handshake::export;
use super::input::Input;

/// A request's fields, as this side means them.
#[derive(Clone, Copy, Debug)]
struct Asked {
    kind: u16,
    flags: u16,
    tag: Tag,
    len: u64,
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let export = export(&mut input);
    let mode = input.pick(&[ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended]);
    let mut contexts = ContextSet::EMPTY;
    if mode != ReplyMode::Simple {
        let chosen = input.u8();
        StatusContext::all().filter(|context| chosen >> (context.index() % 8) & 1 != 0).for_each(|context| {
            contexts.insert(context);
        });
    }
    let session = Session::new(export, Negotiated { mode, contexts });
    while !input.is_empty() {
        let mut bytes = if input.one_in(4) { raw(&session, &mut input) } else { made(&session, &mut input) };
        let (magic, asked) = read(&session, &bytes);
        let header_bytes = bytes.len();
        assert!(session.parse(&bytes[..header_bytes - 1]).is_none());
        for id in 0..11u32 {
            // What follows: a length and contexts, where it is a BLOCK_STATUS that has a payload.
            let word = if id < 2 { u32::from(input.u8()) * (id * 4096) } else { u32::from(input.u8() % 11) };
            bytes.extend_from_slice(&word.to_be_bytes());
        }
        bytes.resize(Session::PARSE_BYTES_MAX, 0);
        let (parsed, taken) = session.parse(&bytes).expect("more bytes are never wanted at once");
        match &parsed {
            Parsed::Close(why) => {
                let endless = payload_bytes(&session, asked) > u64::from(SKIP_BYTES_MAX);
                assert!(magic != right_magic(&session) || endless, "closed without need: {why}");
                return;
            }
            Parsed::Disconnect => {
                assert!(magic == right_magic(&session) && asked.kind == wire::CMD_DISC);
                return;
            }
            Parsed::Command { .. } | Parsed::Refuse { .. } => assert_eq!(magic, right_magic(&session)),
        }
        check(&session, asked, &parsed, &bytes[header_bytes..], taken - header_bytes);
        reply(&session, asked.tag, &mut input);
    }
}

fn right_magic(session: &Session) -> u32 {
    match session.negotiated().mode {
        ReplyMode::Extended => 0x21e4_1c71,
        _ => 0x2560_9513,
    }
}

/// Bytes of payload behind a request.
fn payload_bytes(session: &Session, asked: Asked) -> u64 {
    let extended = session.negotiated().mode == ReplyMode::Extended;
    let says = extended && asked.flags & wire::CMD_FLAG_PAYLOAD_LEN != 0;
    if says || asked.kind == wire::CMD_WRITE { asked.len } else { 0 }
}

/// A header's bytes with the right magic: otherwise the stream ends here.
fn raw(session: &Session, input: &mut Input<'_>) -> Vec<u8> {
    let mut header = vec![0; session.header_bytes()];
    let bytes = input.bytes(header.len());
    header[..bytes.len()].copy_from_slice(bytes);
    if !input.one_in(16) {
        header[..4].copy_from_slice(&right_magic(session).to_be_bytes());
    }
    header
}

/// Near the limits: ends of the export, of the largest payload, of what is skipped, of the numbers.
fn made(session: &Session, input: &mut Input<'_>) -> Vec<u8> {
    let size_bytes = session.export().size_bytes;
    let kind = u16::from(input.u8() % 9);
    let flags = input.pick(&[0u16, 1, 2, 3, 4, 8, 16, 32, 33, 40, 0x8000]);
    let offset = input.number(size_bytes);
    let near_len =
        input.pick(&[u64::from(wire::PAYLOAD_BYTES_MAX), u64::from(SKIP_BYTES_MAX), size_bytes, 16]);
    let len = input.number(near_len);
    let cookie = u64::from(input.u16());
    let (header, len) = if session.negotiated().mode == ReplyMode::Extended {
        (encode_extended_request(kind, flags, cookie, offset, len).to_vec(), len)
    } else {
        (encode_request(kind, flags, cookie, offset, len as u32).to_vec(), u64::from(len as u32))
    };
    let (magic, asked) = read(session, &header);
    assert_eq!(magic, right_magic(session));
    let tag = Tag { cookie, offset };
    assert_eq!((asked.kind, asked.flags, asked.tag, asked.len), (kind, flags, tag, len));
    header
}

fn read(session: &Session, header: &[u8]) -> (u32, Asked) {
    let mut reader = Reader::new(header);
    let (magic, flags, kind) = (reader.u32(), reader.u16(), reader.u16());
    let (cookie, offset) = (reader.u64(), reader.u64());
    let extended = session.negotiated().mode == ReplyMode::Extended;
    let len = if extended { reader.u64() } else { reader.u32().map(u64::from) };
    assert!(reader.rest().is_empty());
    let fields = (|| {
        let tag = Tag { cookie: cookie?, offset: offset? };
        Some((magic?, Asked { kind: kind?, flags: flags?, tag, len: len? }))
    })();
    fields.expect("a header")
}

/// The specification's judgement, in 128 bits. `Err` has the errors that it allows.
fn judge(session: &Session, asked: Asked, contexts: ContextSet) -> Result<Command, &'static [NbdError]> {
    let Asked { kind, flags, tag: Tag { offset, .. }, len } = asked;
    let export = session.export();
    let mode = session.negotiated().mode;
    let flags_known = match kind {
        wire::CMD_READ if mode != ReplyMode::Simple => 1 | 4,
        wire::CMD_WRITE if mode == ReplyMode::Extended => 1 | 32,
        wire::CMD_READ | wire::CMD_WRITE | wire::CMD_FLUSH | wire::CMD_TRIM | wire::CMD_CACHE => 1,
        wire::CMD_WRITE_ZEROES => 1 | 2 | 16,
        wire::CMD_BLOCK_STATUS if mode == ReplyMode::Extended => 1 | 8 | 32,
        wire::CMD_BLOCK_STATUS => 1 | 8,
        _ => return Err(&[NbdError::Inval]),
    };
    if flags & !flags_known != 0 {
        return Err(&[NbdError::Inval]);
    }
    let writes = matches!(kind, wire::CMD_WRITE | wire::CMD_TRIM | wire::CMD_WRITE_ZEROES);
    if writes && export.read_only {
        return Err(&[NbdError::Perm]);
    }
    let fua = flags & wire::CMD_FLAG_FUA != 0;
    if kind == wire::CMD_FLUSH {
        return if (offset, len) == (0, 0) { Ok(Command::Flush) } else { Err(&[NbdError::Inval]) };
    }
    let has_data = matches!(kind, wire::CMD_READ | wire::CMD_WRITE);
    if has_data && len > u64::from(wire::PAYLOAD_BYTES_MAX) {
        return Err(&[NbdError::Inval, NbdError::Overflow]);
    }
    if kind == wire::CMD_BLOCK_STATUS && (contexts.is_empty() || len == 0) {
        return Err(&[NbdError::Inval]);
    }
    if u128::from(offset) + u128::from(len) > u128::from(export.size_bytes) {
        let stores = kind == wire::CMD_WRITE || kind == wire::CMD_WRITE_ZEROES;
        return Err(if stores { &[NbdError::NoSpc] } else { &[NbdError::Inval] });
    }
    Ok(match kind {
        wire::CMD_READ => Command::Read { offset, len: len as u32, df: flags & 4 != 0 },
        wire::CMD_WRITE => Command::Write { offset, len: len as u32, fua },
        wire::CMD_TRIM => Command::Trim { offset, len, fua },
        wire::CMD_CACHE => Command::Cache { offset, len },
        wire::CMD_BLOCK_STATUS => Command::BlockStatus { offset, len, contexts, one: flags & 8 != 0 },
        _ => {
            let (may_unmap, fast) = (flags & 2 == 0, flags & 16 != 0);
            Command::WriteZeroes { offset, len, may_unmap, fast, fua }
        }
    })
}

/// What a BLOCK_STATUS's payload says: a length and contexts. `None` where it is wrong.
fn status_payload(session: &Session, payload: &[u8]) -> Option<(u64, ContextSet)> {
    let selected = session.negotiated().contexts;
    let mut reader = Reader::new(payload);
    let len = reader.u64()?;
    let mut contexts = ContextSet::EMPTY;
    while let Some(id) = reader.u32() {
        let context = StatusContext::all().find(|context| context.index() as u32 == id)?;
        if !selected.contains(context) || contexts.contains(context) {
            return None;
        }
        contexts.insert(context);
    }
    (reader.rest().is_empty() && !contexts.is_empty()).then_some((len, contexts))
}

fn check(session: &Session, asked: Asked, parsed: &Parsed, behind: &[u8], taken: usize) {
    let payload_bytes = payload_bytes(session, asked);
    let judged = if asked.kind == wire::CMD_BLOCK_STATUS && payload_bytes > 0 {
        let payload = behind.get(..payload_bytes as usize);
        match payload.and_then(|payload| status_payload(session, payload)) {
            Some((len, contexts)) => judge(session, Asked { len, ..asked }, contexts),
            None => Err(&[NbdError::Inval][..]),
        }
    } else {
        judge(session, asked, session.negotiated().contexts)
    };
    match (judged, parsed) {
        (Ok(expected), Parsed::Command { tag, command }) => {
            assert_eq!((*tag, *command), (asked.tag, expected));
            let is_status = matches!(command, Command::BlockStatus { .. });
            assert_eq!(
                taken as u64,
                if is_status { payload_bytes } else { 0 },
                "the stream falls out of step"
            );
        }
        (Err(errors), Parsed::Refuse { tag, refusal, skip_payload_bytes }) => {
            assert!(errors.contains(&refusal.error), "{refusal:?} for {asked:?}");
            assert_eq!(*tag, asked.tag);
            let left = (u64::from(*skip_payload_bytes), taken);
            assert_eq!(left, (payload_bytes, 0), "the stream falls out of step");
        }
        (expected, parsed) => panic!("{asked:?}: {parsed:?} and not {expected:?}"),
    }
}

fn reply(session: &Session, tag: Tag, input: &mut Input<'_>) {
    let choice = input.index(NbdError::ALL.len() + 2);
    let extended = session.negotiated().mode == ReplyMode::Extended;
    let error = NbdError::ALL.get(choice).copied();
    let value = error.map_or(0, NbdError::value);
    if choice > NbdError::ALL.len() {
        return read_reply(session, tag, input);
    }
    let at = input.one_in(2).then_some(tag.offset);
    let bytes =
        error.map_or_else(|| session.encode_done(tag), |e| session.encode_error(tag, e, "a message", at));
    if session.negotiated().mode == ReplyMode::Simple {
        let reply = bytes[..].try_into().expect("16 bytes");
        assert_eq!(parse_simple_reply(&reply), Ok((tag.cookie, value)));
        return;
    }
    let (chunk, payload) = parse_chunk(&bytes, extended).expect("a chunk").expect("a whole one");
    assert_eq!((chunk.cookie, chunk.flags, chunk.offset), (tag.cookie, 1, extended.then_some(tag.offset)));
    assert_eq!(chunk.payload_bytes, payload.len() as u64);
    let expected = match (error, at) {
        (None, _) => wire::CHUNK_NONE,
        (Some(_), None) => wire::CHUNK_ERROR,
        (Some(_), Some(_)) => wire::CHUNK_ERROR_OFFSET,
    };
    assert_eq!(chunk.kind, expected);
    assert_eq!(Reader::new(payload).u32().unwrap_or(0), value);
}

/// Bytes with zeroes among them come out at the client as they went in.
fn read_reply(session: &Session, tag: Tag, input: &mut Input<'_>) {
    let mut data = Vec::new();
    for _ in 0..input.index(6) {
        let len = input.number(HOLE_BYTES_MIN as u64).min(40_000) as usize;
        data.resize(data.len() + len, input.u8() % 2);
    }
    let tag = Tag { offset: tag.offset % session.export().size_bytes, ..tag };
    let mut sent = Vec::new();
    session.encode_read(tag, input.one_in(4), &data, |head, range| {
        sent.extend_from_slice(&head);
        sent.extend_from_slice(&data[range]);
    });
    if session.negotiated().mode == ReplyMode::Simple {
        assert_eq!(&sent[16..], &data[..]);
        return;
    }
    let mut seen = Vec::new();
    let mut rest = &sent[..];
    while !rest.is_empty() {
        let extended = session.negotiated().mode == ReplyMode::Extended;
        let (chunk, tail) = parse_chunk(rest, extended).expect("a chunk").expect("a whole one");
        let (payload, tail) = tail.split_at(chunk.payload_bytes as usize);
        let mut reader = Reader::new(payload);
        match chunk.kind {
            wire::CHUNK_NONE => assert!(data.is_empty()),
            kind => {
                assert_eq!(reader.u64(), Some(tag.offset + seen.len() as u64));
                if kind == wire::CHUNK_OFFSET_HOLE {
                    let len = reader.u32().expect("a length");
                    seen.resize(seen.len() + len as usize, 0);
                } else {
                    seen.extend_from_slice(reader.rest());
                }
            }
        }
        assert_eq!(chunk.flags == 1, tail.is_empty());
        rest = tail;
    }
    assert_eq!(seen, data);
}
