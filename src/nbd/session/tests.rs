//! The transmission phase's lines of the NBD checklist, by their IDs. `docs/error-table.md` holds the table of
//! refusals; `tests/nbd_protocol.rs` compares it with the code.

use super::*;
use crate::extent::StatusContext;
use crate::nbd::client::encode_request;
use crate::units::{ReplicaSet, ReplicaSlot};

mod extended;
mod replies;

const SIZE_BYTES: u64 = 8 << 30;
const COOKIE: u64 = 0x1122_3344_5566_7788;
const FUA: u16 = wire::CMD_FLAG_FUA;
const NO_HOLE: u16 = wire::CMD_FLAG_NO_HOLE;
const FAST_ZERO: u16 = wire::CMD_FLAG_FAST_ZERO;
const COMMANDS: [u16; 6] = [
    wire::CMD_READ,
    wire::CMD_WRITE,
    wire::CMD_FLUSH,
    wire::CMD_TRIM,
    wire::CMD_WRITE_ZEROES,
    wire::CMD_CACHE,
];
/// Those with a range.
const RANGED: [u16; 5] =
    [wire::CMD_READ, wire::CMD_WRITE, wire::CMD_TRIM, wire::CMD_WRITE_ZEROES, wire::CMD_CACHE];

fn session_of(read_only: bool, mode: ReplyMode, contexts: &[StatusContext]) -> Session {
    let export = Export {
        name: "vol".to_owned(),
        description: String::new(),
        size_bytes: SIZE_BYTES,
        read_only,
        replicas: ReplicaSet::EMPTY,
    };
    let negotiated = Negotiated { mode, contexts: contexts.iter().copied().collect() };
    Session::new(Arc::new(export), negotiated)
}

fn session(read_only: bool) -> Session {
    session_of(read_only, ReplyMode::Simple, &[])
}

/// Parses a whole request, of which all is taken but a WRITE's payload.
fn parse_with(session: &Session, request: &[u8]) -> Parsed {
    for end in 0..request.len() {
        assert!(session.parse(&request[..end]).is_none(), "it needs more than {end} bytes");
    }
    let (parsed, taken) = session.parse(request).unwrap();
    assert_eq!(taken, request.len());
    parsed
}

fn parse(kind: u16, flags: u16, offset: u64, len: u32) -> Parsed {
    parse_with(&session(false), &encode_request(kind, flags, COOKIE, offset, len))
}

fn command_or_error(parsed: Parsed, payload_bytes: u32) -> Result<Command, NbdError> {
    match parsed {
        Parsed::Command { tag, command } => {
            assert_eq!(tag.cookie, COOKIE);
            Ok(command)
        }
        Parsed::Refuse { tag, refusal, skip_payload_bytes } => {
            assert_eq!((tag.cookie, skip_payload_bytes), (COOKIE, payload_bytes));
            Err(refusal.error)
        }
        other => panic!("{other:?}"),
    }
}

/// The command, or the error.
fn check(kind: u16, flags: u16, offset: u64, len: u32) -> Result<Command, NbdError> {
    command_or_error(parse(kind, flags, offset, len), if kind == wire::CMD_WRITE { len } else { 0 })
}

#[test]
fn cmd_01_02_15_17_19_23_28_38_good_requests() {
    let offset = 513;
    assert_eq!(check(wire::CMD_READ, 0, offset, 1), Ok(Command::Read { offset, len: 1, df: false }));
    assert_eq!(check(wire::CMD_FLUSH, 0, 0, 0), Ok(Command::Flush));
    assert_eq!(check(wire::CMD_CACHE, 0, offset, 1), Ok(Command::Cache { offset, len: 1 }));
    for (flags, fua) in [(0, false), (FUA, true)] {
        assert_eq!(check(wire::CMD_WRITE, flags, offset, 1), Ok(Command::Write { offset, len: 1, fua }));
        assert_eq!(check(wire::CMD_TRIM, flags, offset, 1), Ok(Command::Trim { offset, len: 1, fua }));
        for (more, may_unmap, fast) in [
            (0, true, false),
            (NO_HOLE, false, false),
            (FAST_ZERO, true, true),
            (NO_HOLE | FAST_ZERO, false, true),
        ] {
            assert_eq!(
                check(wire::CMD_WRITE_ZEROES, flags | more, offset, 1),
                Ok(Command::WriteZeroes { offset, len: 1, may_unmap, fast, fua })
            );
        }
    }
}

#[test]
fn cmd_03_cookies_are_opaque() {
    for cookie in [0, 1, 1 << 63, u64::MAX] {
        let request = encode_request(wire::CMD_READ, 0, cookie, 0, 1);
        let Parsed::Command { tag, .. } = parse_with(&session(false), &request) else { panic!("refused") };
        assert_eq!(tag.cookie, cookie);
        assert_eq!(session(false).encode_done(tag)[8..], cookie.to_be_bytes());
    }
}

#[test]
fn cmd_04_05_07_20_26_the_end_of_the_export() {
    for kind in RANGED {
        assert!(check(kind, 0, SIZE_BYTES - 512, 512).is_ok());
        let stores = matches!(kind, wire::CMD_WRITE | wire::CMD_WRITE_ZEROES);
        let error = if stores { NbdError::NoSpc } else { NbdError::Inval };
        assert_eq!(check(kind, 0, SIZE_BYTES - 512, 513), Err(error));
        assert_eq!(check(kind, 0, SIZE_BYTES, 1), Err(error));
        assert_eq!(check(kind, 0, SIZE_BYTES + 1, 0), Err(error));
    }
}

#[test]
fn cmd_06_09_overflow_of_offset_and_length() {
    for kind in RANGED {
        for (offset, len) in [(u64::MAX, 1), (u64::MAX, 0), (u64::MAX - 511, 512), (u64::MAX - 10, 1 << 20)] {
            assert!(check(kind, 0, offset, len).is_err());
        }
    }
}

#[test]
fn cmd_10_11_12_13_14_zero_length_requests_are_accepted() {
    for kind in RANGED {
        assert!(check(kind, 0, 0, 0).is_ok());
        assert!(check(kind, 0, SIZE_BYTES, 0).is_ok());
    }
}

#[test]
fn cmd_16_flush_with_a_range_is_refused_in_step() {
    assert_eq!(check(wire::CMD_FLUSH, 0, 1, 0), Err(NbdError::Inval));
    assert_eq!(check(wire::CMD_FLUSH, 0, 0, 1), Err(NbdError::Inval));
}

#[test]
fn cmd_18_fua_is_accepted_on_every_command() {
    for kind in COMMANDS {
        assert!(check(kind, FUA, 0, 0).is_ok());
    }
}

#[test]
fn cmd_25_31_32_33_flags_that_do_not_apply_are_refused() {
    for kind in COMMANDS {
        let allowed = if kind == wire::CMD_WRITE_ZEROES { FUA | NO_HOLE | FAST_ZERO } else { FUA };
        for bit in 0..16 {
            let flags = 1 << bit;
            assert_eq!(check(kind, flags, 0, 0).is_ok(), flags & allowed != 0, "{kind} {bit}");
            assert_eq!(check(kind, flags | FUA, 0, 0).is_ok(), flags & allowed != 0, "{kind} {bit}");
        }
    }
    assert_eq!(check(wire::CMD_WRITE, 1 << 9, 0, 4096), Err(NbdError::Inval));
}

#[test]
fn cmd_29_30_49_unknown_commands_are_refused_without_a_payload() {
    for kind in [wire::CMD_BLOCK_STATUS, wire::CMD_RESIZE, 9, 200, u16::MAX] {
        assert_eq!(check(kind, 0, 0, 4096), Err(NbdError::Inval));
    }
}

#[test]
fn cmd_27_long_trims_and_zeroes_are_served() {
    for kind in [wire::CMD_TRIM, wire::CMD_WRITE_ZEROES, wire::CMD_CACHE] {
        assert!(check(kind, 0, 0, u32::MAX).is_ok());
    }
}

#[test]
fn cmd_34_35_36_37_ab_11_12_the_longest_payloads() {
    let max = wire::PAYLOAD_BYTES_MAX;
    for kind in [wire::CMD_READ, wire::CMD_WRITE] {
        assert!(check(kind, 0, 0, max).is_ok());
        assert_eq!(check(kind, 0, 0, max + 1), Err(NbdError::Inval));
    }
    assert_eq!(check(wire::CMD_READ, 0, 0, u32::MAX), Err(NbdError::Inval));
    assert_eq!(check(wire::CMD_WRITE, 0, 0, SKIP_BYTES_MAX), Err(NbdError::Inval));
    assert!(matches!(parse(wire::CMD_WRITE, 0, 0, SKIP_BYTES_MAX + 1), Parsed::Close(_)));
    assert!(matches!(parse(wire::CMD_WRITE, 0, 0, u32::MAX), Parsed::Close(_)));
}

#[test]
fn cmd_40_42_disconnect_whatever_else_the_request_says() {
    assert_eq!(parse(wire::CMD_DISC, 0, 0, 0), Parsed::Disconnect);
    assert_eq!(parse(wire::CMD_DISC, u16::MAX, u64::MAX, u32::MAX), Parsed::Disconnect);
}

#[test]
fn cmd_46_other_magics_close() {
    let mut request = encode_request(wire::CMD_READ, 0, 1, 0, 1);
    request[..4].copy_from_slice(&wire::EXTENDED_REQUEST_MAGIC.to_be_bytes());
    assert!(matches!(parse_with(&session(false), &request), Parsed::Close(_)));
}

#[test]
fn cmd_55_offsets_above_4_gib_are_whole() {
    let offset = (4 << 30) + 512;
    assert_eq!(check(wire::CMD_READ, 0, offset, 512), Ok(Command::Read { offset, len: 512, df: false }));
}

#[test]
fn tf_06_a_read_only_export_refuses_writes_and_skips_their_payload() {
    for kind in [wire::CMD_WRITE, wire::CMD_TRIM, wire::CMD_WRITE_ZEROES] {
        let parsed = parse_with(&session(true), &encode_request(kind, 0, COOKIE, 0, 4096));
        let skip_payload_bytes = if kind == wire::CMD_WRITE { 4096 } else { 0 };
        assert_eq!(command_or_error(parsed, skip_payload_bytes), Err(NbdError::Perm));
    }
    for kind in [wire::CMD_READ, wire::CMD_FLUSH, wire::CMD_CACHE] {
        let parsed = parse_with(&session(true), &encode_request(kind, FUA, COOKIE, 0, 0));
        assert!(matches!(parsed, Parsed::Command { .. }));
    }
}

#[test]
fn cmd_54_replies_are_simple() {
    let session = session(false);
    let tag = Tag { cookie: 1, offset: 77 };
    let success = *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x01";
    assert_eq!(session.encode_done(tag)[..], success);
    for error in NbdError::ALL {
        let reply = session.encode_error(Tag { cookie: COOKIE, offset: 0 }, error, "why", Some(5));
        assert_eq!(reply.len(), wire::SIMPLE_REPLY_BYTES);
        assert_eq!(reply[4..8], error.value().to_be_bytes());
        assert_eq!(reply[8..], COOKIE.to_be_bytes());
    }
    let mut pieces = Vec::new();
    session.encode_read(tag, false, &[0; 100_000], |head, range| pieces.push((head.to_vec(), range)));
    assert_eq!(pieces, [(success.to_vec(), 0..100_000)]);
}

#[test]
fn a_session_is_small_and_can_change_threads() {
    fn assert_send_clone<T: Send + Clone + 'static>() {}
    assert_send_clone::<Session>();
    assert!(size_of::<Session>() <= 64);
}
