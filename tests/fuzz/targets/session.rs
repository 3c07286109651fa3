//! The transmission phase on the server's side: a stream of requests, each judged by the rules of the specification
//! written down here a second time.
//!
//! What must hold:
//! - Each request is answered once: with its own cookie, by a command within the export, or by an error and the exact
//!   number of payload bytes to skip, so that the stream stays in step.
//! - A connection is closed for a wrong magic or for a payload that nobody would send, and for nothing else.
//! - What the client's codec encodes is what the server parses, and the other way round.

use nbdmirror::nbd::client::{encode_request, parse_simple_reply};
use nbdmirror::nbd::session::{Command, Parsed, SKIP_BYTES_MAX, Session};
use nbdmirror::nbd::wire::{self, NbdError, Reader};

use super::handshake::export;
use super::input::Input;

/// A request's fields, as this side means them.
#[derive(Clone, Copy, Debug)]
struct Asked {
    kind: u16,
    flags: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let session = Session::new(export(&mut input));
    while !input.is_empty() {
        let header =
            if input.one_in(4) { raw(&mut input) } else { made(&mut input, session.export().size_bytes) };
        let (magic, asked) = read(&header);
        let parsed = session.parse(&header);
        match &parsed {
            Parsed::Close(why) => {
                let endless = asked.kind == wire::CMD_WRITE && asked.len > SKIP_BYTES_MAX;
                assert!(magic != wire::REQUEST_MAGIC || endless, "closed without need: {why}");
                return;
            }
            Parsed::Disconnect => {
                assert!(magic == wire::REQUEST_MAGIC && asked.kind == wire::CMD_DISC);
                return;
            }
            Parsed::Command { .. } | Parsed::Refuse { .. } => assert_eq!(magic, wire::REQUEST_MAGIC),
        }
        check(&session, asked, &parsed);
        reply(&session, asked.cookie, &mut input);
    }
}

/// 28 bytes with the right magic: otherwise the stream ends here.
fn raw(input: &mut Input<'_>) -> [u8; wire::REQUEST_BYTES] {
    let mut header = [0; wire::REQUEST_BYTES];
    let bytes = input.bytes(wire::REQUEST_BYTES);
    header[..bytes.len()].copy_from_slice(bytes);
    if !input.one_in(16) {
        header[..4].copy_from_slice(&wire::REQUEST_MAGIC.to_be_bytes());
    }
    header
}

/// Near the limits: ends of the export, of the largest payload, of what is skipped, of the numbers.
fn made(input: &mut Input<'_>, size_bytes: u64) -> [u8; wire::REQUEST_BYTES] {
    let kind = u16::from(input.u8() % 9);
    let flags = input.pick(&[0u16, 1, 2, 3, 4, 0x8000]);
    let offset = input.number(size_bytes);
    let near_len = input.pick(&[u64::from(wire::PAYLOAD_BYTES_MAX), u64::from(SKIP_BYTES_MAX), size_bytes]);
    let len = input.number(near_len) as u32;
    let cookie = u64::from(input.u16());
    let header = encode_request(kind, flags, cookie, offset, len);
    let (magic, asked) = read(&header);
    assert_eq!(magic, wire::REQUEST_MAGIC);
    assert_eq!(
        (asked.kind, asked.flags, asked.cookie, asked.offset, asked.len),
        (kind, flags, cookie, offset, len)
    );
    header
}

fn read(header: &[u8; wire::REQUEST_BYTES]) -> (u32, Asked) {
    let mut reader = Reader::new(header);
    let (magic, flags, kind) = (reader.u32(), reader.u16(), reader.u16());
    let (cookie, offset, len) = (reader.u64(), reader.u64(), reader.u32());
    let fields = (|| {
        Some((magic?, Asked { kind: kind?, flags: flags?, cookie: cookie?, offset: offset?, len: len? }))
    })();
    fields.expect("28 bytes")
}

/// The specification's judgement, in 128 bits. `Err` has the errors that it allows.
fn judge(session: &Session, asked: Asked) -> Result<Command, &'static [NbdError]> {
    let Asked { kind, flags, offset, len, .. } = asked;
    let export = session.export();
    let flags_known = if kind == wire::CMD_WRITE_ZEROES { 3 } else { 1 };
    let writes = matches!(kind, wire::CMD_WRITE | wire::CMD_TRIM | wire::CMD_WRITE_ZEROES);
    if !writes && !matches!(kind, wire::CMD_READ | wire::CMD_FLUSH) || flags & !flags_known != 0 {
        return Err(&[NbdError::Inval]);
    }
    if writes && export.read_only {
        return Err(&[NbdError::Perm]);
    }
    let fua = flags & wire::CMD_FLAG_FUA != 0;
    if kind == wire::CMD_FLUSH {
        return if (offset, len) == (0, 0) { Ok(Command::Flush) } else { Err(&[NbdError::Inval]) };
    }
    let has_payload = matches!(kind, wire::CMD_READ | wire::CMD_WRITE);
    if has_payload && len > wire::PAYLOAD_BYTES_MAX {
        return Err(&[NbdError::Inval, NbdError::Overflow]);
    }
    if u128::from(offset) + u128::from(len) > u128::from(export.size_bytes) {
        return Err(if kind == wire::CMD_WRITE || kind == wire::CMD_WRITE_ZEROES {
            &[NbdError::NoSpc]
        } else {
            &[NbdError::Inval]
        });
    }
    Ok(match kind {
        wire::CMD_READ => Command::Read { offset, len },
        wire::CMD_WRITE => Command::Write { offset, len, fua },
        wire::CMD_TRIM => Command::Trim { offset, len, fua },
        _ => Command::WriteZeroes { offset, len, may_unmap: flags & wire::CMD_FLAG_NO_HOLE == 0, fua },
    })
}

fn check(session: &Session, asked: Asked, parsed: &Parsed) {
    match (judge(session, asked), parsed) {
        (Ok(expected), Parsed::Command { cookie, command }) => {
            assert_eq!((*cookie, *command), (asked.cookie, expected));
        }
        (Err(errors), Parsed::Refuse { cookie, error, skip_payload_bytes }) => {
            assert!(errors.contains(error), "{error:?} for {asked:?}");
            assert_eq!(*cookie, asked.cookie);
            let payload = if asked.kind == wire::CMD_WRITE { asked.len } else { 0 };
            assert_eq!(*skip_payload_bytes, payload, "the stream falls out of step");
        }
        (expected, parsed) => panic!("{asked:?}: {parsed:?} and not {expected:?}"),
    }
}

fn reply(session: &Session, cookie: u64, input: &mut Input<'_>) {
    let choice = input.index(NbdError::ALL.len() + 1);
    let result = NbdError::ALL.get(choice).map_or(Ok(()), |error| Err(*error));
    let value = result.map_or_else(NbdError::value, |()| 0);
    assert_eq!(parse_simple_reply(&session.encode_reply(cookie, result)), Ok((cookie, value)));
}
