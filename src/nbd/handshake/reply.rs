//! Replies to options, put together.

use crate::nbd::wire;

/// Appends a reply; its data in parts.
pub(super) fn put_reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let data_bytes: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data_bytes as u32).to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// Appends an acknowledgement.
pub(super) fn put_ack(out: &mut Vec<u8>, option: u32) {
    put_reply(out, option, wire::REP_ACK, &[]);
}

/// Appends a refusal with a message for people.
pub(super) fn put_refusal(out: &mut Vec<u8>, option: u32, kind: u32, message: &str) {
    assert!(kind & wire::REP_ERROR_BIT != 0);
    put_reply(out, option, kind, &[message.as_bytes()]);
}

/// Appends a piece of information.
pub(super) fn put_info(out: &mut Vec<u8>, option: u32, info: u16, parts: &[&[u8]]) {
    let info = info.to_be_bytes();
    let mut all: smallvec::SmallVec<[&[u8]; 4]> = smallvec::smallvec![&info[..]];
    all.extend_from_slice(parts);
    put_reply(out, option, wire::REP_INFO, &all);
}
