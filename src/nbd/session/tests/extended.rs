//! Structured and extended requests: flags, payloads, BLOCK_STATUS.

use super::*;
use crate::nbd::client::encode_extended_request;

const PAYLOAD_LEN: u16 = wire::CMD_FLAG_PAYLOAD_LEN;
const REQ_ONE: u16 = wire::CMD_FLAG_REQ_ONE;
const DF: u16 = wire::CMD_FLAG_DF;
const STALE_3: fn() -> StatusContext = || StatusContext::Stale(ReplicaSlot::new(3));

fn extended(contexts: &[StatusContext]) -> Session {
    session_of(false, ReplyMode::Extended, contexts)
}

fn ask(session: &Session, kind: u16, flags: u16, offset: u64, len: u64) -> Result<Command, NbdError> {
    let parsed = parse_with(session, &encode_extended_request(kind, flags, COOKIE, offset, len));
    command_or_error(parsed, if flags & PAYLOAD_LEN != 0 { len as u32 } else { 0 })
}

#[test]
fn eh_01_02_05_extended_requests_have_64_bits_of_length() {
    let session = extended(&[]);
    assert_eq!(session.header_bytes(), 32);
    assert_eq!(ask(&session, wire::CMD_READ, 0, 5, 9), Ok(Command::Read { offset: 5, len: 9, df: false }));
    let write = ask(&session, wire::CMD_WRITE, PAYLOAD_LEN | FUA, 5, 9);
    assert_eq!(write, Ok(Command::Write { offset: 5, len: 9, fua: true }));
    let len = 5 << 30;
    assert_eq!(ask(&session, wire::CMD_TRIM, 0, 0, len), Ok(Command::Trim { offset: 0, len, fua: false }));
    assert_eq!(ask(&session, wire::CMD_CACHE, 0, 0, len), Ok(Command::Cache { offset: 0, len }));
    let zeroes = Command::WriteZeroes { offset: 0, len, may_unmap: true, fast: false, fua: false };
    assert_eq!(ask(&session, wire::CMD_WRITE_ZEROES, 0, 0, len), Ok(zeroes));
    for len in [1 << 33, 1 << 63, u64::MAX] {
        let over = [(wire::CMD_READ, NbdError::Inval), (wire::CMD_TRIM, NbdError::Inval)];
        for (kind, error) in over.into_iter().chain([(wire::CMD_WRITE_ZEROES, NbdError::NoSpc)]) {
            assert_eq!(ask(&session, kind, 0, 1, len), Err(error));
        }
    }
}

#[test]
fn eh_03_a_write_without_payload_len_has_its_payload_all_the_same() {
    let request = encode_extended_request(wire::CMD_WRITE, FUA, COOKIE, 512, 9);
    let write = Command::Write { offset: 512, len: 9, fua: true };
    assert_eq!(command_or_error(parse_with(&extended(&[]), &request), 0), Ok(write));
    let past_end = encode_extended_request(wire::CMD_WRITE, 0, COOKIE, SIZE_BYTES, 9);
    assert_eq!(command_or_error(parse_with(&extended(&[]), &past_end), 9), Err(NbdError::NoSpc));
}

#[test]
fn eh_04_payload_len_on_others_is_refused_and_its_payload_skipped() {
    for kind in [wire::CMD_READ, wire::CMD_FLUSH, wire::CMD_TRIM, wire::CMD_WRITE_ZEROES, wire::CMD_CACHE, 99]
    {
        for len in [0, 1, 512] {
            assert_eq!(ask(&extended(&[]), kind, PAYLOAD_LEN, 0, len), Err(NbdError::Inval));
        }
    }
    // The compact header has no such flag: nothing follows.
    assert_eq!(check(wire::CMD_READ, PAYLOAD_LEN, 0, 512), Err(NbdError::Inval));
    assert_eq!(check(wire::CMD_WRITE, PAYLOAD_LEN, 0, 512), Err(NbdError::Inval));
}

#[test]
fn eh_08_compact_requests_close() {
    let request = [&encode_request(wire::CMD_READ, 0, 1, 0, 1)[..], &[0; 4]].concat();
    assert!(matches!(parse_with(&extended(&[]), &request), Parsed::Close(_)));
}

#[test]
fn eh_10_payloads_that_nobody_sends_close() {
    let session = extended(&[]);
    let max = u64::from(wire::PAYLOAD_BYTES_MAX);
    assert!(ask(&session, wire::CMD_WRITE, PAYLOAD_LEN, 0, max).is_ok());
    assert_eq!(ask(&session, wire::CMD_WRITE, PAYLOAD_LEN, 0, max + 1), Err(NbdError::Inval));
    for kind in [wire::CMD_WRITE, wire::CMD_READ, wire::CMD_BLOCK_STATUS] {
        for len in [u64::from(SKIP_BYTES_MAX) + 1, 1 << 32, u64::MAX] {
            let request = encode_extended_request(kind, PAYLOAD_LEN, COOKIE, 0, len);
            assert!(matches!(parse_with(&session, &request), Parsed::Close(_)));
        }
    }
}

#[test]
fn sr_04_cmd_32_df_is_for_reads_with_structured_replies() {
    for (mode, expected) in [(ReplyMode::Simple, false), (ReplyMode::Structured, true)] {
        let session = session_of(false, mode, &[]);
        let parsed = parse_with(&session, &encode_request(wire::CMD_READ, DF, COOKIE, 0, 512));
        let read = Command::Read { offset: 0, len: 512, df: true };
        assert_eq!(command_or_error(parsed, 0) == Ok(read), expected);
        for kind in
            [wire::CMD_WRITE, wire::CMD_TRIM, wire::CMD_WRITE_ZEROES, wire::CMD_CACHE, wire::CMD_FLUSH]
        {
            let parsed = parse_with(&session, &encode_request(kind, DF, COOKIE, 0, 0));
            assert_eq!(command_or_error(parsed, 0), Err(NbdError::Inval));
        }
    }
}

#[test]
fn bs_02_03_07_08_cmd_49_block_status() {
    let contexts = [StatusContext::Allocation, STALE_3()];
    let session = session_of(false, ReplyMode::Structured, &contexts);
    let ask = |session: &Session, flags, offset, len| {
        let request = encode_request(wire::CMD_BLOCK_STATUS, flags, COOKIE, offset, len);
        command_or_error(parse_with(session, &request), 0)
    };
    let expected =
        |one| Command::BlockStatus { offset: 512, len: 4096, contexts: contexts.into_iter().collect(), one };
    for (flags, one) in [(0, false), (FUA, false), (REQ_ONE, true), (REQ_ONE | FUA, true)] {
        assert_eq!(ask(&session, flags, 512, 4096), Ok(expected(one)));
    }
    for bit in [1, 2, 4, 5, 6, 15] {
        assert_eq!(ask(&session, 1 << bit, 512, 4096), Err(NbdError::Inval));
    }
    for (offset, len) in [(0, 0), (SIZE_BYTES, 1), (SIZE_BYTES - 1, 2), (u64::MAX, 1)] {
        assert_eq!(ask(&session, 0, offset, len), Err(NbdError::Inval));
    }
    assert!(ask(&session_of(true, ReplyMode::Structured, &contexts), 0, 0, 1).is_ok());
    assert_eq!(ask(&session_of(false, ReplyMode::Structured, &[]), 0, 0, 1), Err(NbdError::Inval));
}

fn status_payload(len: u64, ids: &[u32]) -> Vec<u8> {
    let mut payload = len.to_be_bytes().to_vec();
    ids.iter().for_each(|id| payload.extend_from_slice(&id.to_be_bytes()));
    payload
}

fn status_request(flags: u16, offset: u64, payload: &[u8]) -> Vec<u8> {
    let flags = flags | PAYLOAD_LEN;
    let len = payload.len() as u64;
    let mut request = encode_extended_request(wire::CMD_BLOCK_STATUS, flags, COOKIE, offset, len).to_vec();
    request.extend_from_slice(payload);
    request
}

#[test]
fn eh_06_07_block_status_with_a_payload_filters_contexts() {
    let session = extended(&[StatusContext::Allocation, StatusContext::State, STALE_3()]);
    let len = 6 << 30; // more than 32 bits
    for (ids, contexts) in [
        (&[5][..], vec![STALE_3()]),
        (&[1, 0], vec![StatusContext::Allocation, StatusContext::State]),
        (&[0, 1, 5], vec![StatusContext::Allocation, StatusContext::State, STALE_3()]),
    ] {
        let request = status_request(REQ_ONE, 512, &status_payload(len, ids));
        let expected =
            Command::BlockStatus { offset: 512, len, contexts: contexts.into_iter().collect(), one: true };
        assert_eq!(command_or_error(parse_with(&session, &request), 0), Ok(expected));
    }
    // Without one all that was selected is told.
    let all = ask(&session, wire::CMD_BLOCK_STATUS, 0, 0, SIZE_BYTES).unwrap();
    assert!(matches!(all, Command::BlockStatus { contexts, .. } if contexts.iter().count() == 3));
}

#[test]
fn eh_07_wrong_payloads_of_block_status_are_refused_in_step() {
    let session = extended(&[StatusContext::Allocation, STALE_3()]);
    let refused = |session: &Session, request: &[u8]| {
        let (parsed, taken) = session.parse(request).unwrap();
        assert_eq!(taken, 32);
        assert_eq!(command_or_error(parsed, request.len() as u32 - 32), Err(NbdError::Inval));
    };
    for ids in [&[1][..], &[2], &[99], &[0, 0], &[0, 5, 5], &[u32::MAX], &[]] {
        refused(&session, &status_request(0, 0, &status_payload(4096, ids)));
    }
    for len in [0, SIZE_BYTES + 1, u64::MAX] {
        refused(&session, &status_request(0, 0, &status_payload(len, &[0])));
    }
    for bytes in [1, 7, 8, 9, 13, 52, 4096] {
        refused(&session, &status_request(0, 0, &vec![0; bytes]));
    }
    refused(&session, &status_request(DF, 0, &status_payload(4096, &[0])));
    refused(&extended(&[]), &status_request(0, 0, &status_payload(4096, &[0])));
    assert_eq!(ask(&session, wire::CMD_BLOCK_STATUS, PAYLOAD_LEN, 0, 0), Err(NbdError::Inval));
}

#[test]
fn sr_02_nt_21_refusals_say_where() {
    let session = session_of(false, ReplyMode::Structured, &[]);
    for (offset, len, at) in [
        (SIZE_BYTES - 512, 1024, Some(SIZE_BYTES)),
        (SIZE_BYTES + 7, 1, Some(SIZE_BYTES + 7)),
        (u64::MAX, 512, None), // leaves 64 bits
        (SIZE_BYTES + 1, 0, None),
        (0, u32::MAX, None), // too long
    ] {
        let request = encode_request(wire::CMD_READ, 0, COOKIE, offset, len);
        let Parsed::Refuse { refusal, .. } = parse_with(&session, &request) else { panic!("let through") };
        assert_eq!(refusal.at, at);
        assert!(!refusal.message.is_empty() && refusal.message.len() <= wire::STRING_BYTES_MAX);
    }
}
