//! Replies in chunks: content, errors, status.

use super::*;
use crate::extent::{ContextExtents, EXTENTS_MAX, Extent};
use crate::nbd::client::{Chunk, parse_chunk};
use crate::nbd::wire::Reader;

const TAG: Tag = Tag { cookie: COOKIE, offset: 8192 };
const MODES: [ReplyMode; 2] = [ReplyMode::Structured, ReplyMode::Extended];

/// Takes a reply apart into chunks and their payloads; holds what every chunk must keep.
fn chunks(session: &Session, mut bytes: &[u8]) -> Vec<(Chunk, Vec<u8>)> {
    let extended = session.negotiated().mode == ReplyMode::Extended;
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (chunk, rest) = parse_chunk(bytes, extended).unwrap().unwrap();
        assert_eq!(chunk.cookie, COOKIE);
        assert_eq!(chunk.offset, extended.then_some(TAG.offset));
        let (payload, rest) = rest.split_at(chunk.payload_bytes as usize);
        found.push((chunk, payload.to_vec()));
        bytes = rest;
    }
    let dones: Vec<bool> = found.iter().map(|(chunk, _)| chunk.flags == wire::CHUNK_FLAG_DONE).collect();
    let last = dones.len() - 1;
    assert!(dones.iter().enumerate().all(|(index, done)| *done == (index == last)), "{dones:?}");
    found
}

fn read(session: &Session, df: bool, data: &[u8]) -> Vec<(Chunk, Vec<u8>)> {
    let mut bytes = Vec::new();
    session.encode_read(TAG, df, data, |head, range| {
        assert!(!head.spilled(), "no allocation");
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(&data[range]);
    });
    chunks(session, &bytes)
}

#[test]
fn sr_01_04_05_09_eh_01_reads_are_content_chunks_that_cover_the_request() {
    let mut data = vec![0; 100 << 10];
    data[40 << 10] = 1;
    data[99 << 10..].fill(7);
    for mode in MODES {
        let session = session_of(false, mode, &[]);
        let found = read(&session, false, &data);
        let kinds: Vec<u16> = found.iter().map(|(chunk, _)| chunk.kind).collect();
        let (hole, bytes) = (wire::CHUNK_OFFSET_HOLE, wire::CHUNK_OFFSET_DATA);
        assert_eq!(kinds, [hole, bytes, hole, bytes]);
        let mut at = 0;
        for (chunk, payload) in found {
            let mut reader = Reader::new(&payload);
            assert_eq!(reader.u64(), Some(TAG.offset + at as u64));
            if chunk.kind == hole {
                let len = reader.u32().unwrap() as usize;
                assert!(reader.rest().is_empty() && data[at..at + len].iter().all(|byte| *byte == 0));
                at += len;
            } else {
                assert_eq!(reader.rest(), &data[at..at + reader.rest().len()]);
                at += reader.rest().len();
            }
        }
        assert_eq!(at, data.len());
        let whole = read(&session, true, &data);
        assert_eq!(whole.len(), 1);
        assert_eq!((whole[0].0.kind, &whole[0].1[8..]), (bytes, &data[..]));
        let zeroes = read(&session, true, &data[..4096]);
        assert_eq!((zeroes.len(), zeroes[0].0.kind), (1, bytes));
        assert_eq!(read(&session, false, &data[..4096])[0].0.kind, hole);
    }
}

#[test]
fn sr_07_10_eh_02_success_without_bytes_is_none_with_done() {
    for mode in MODES {
        let session = session_of(false, mode, &[]);
        let found = chunks(&session, &session.encode_done(TAG));
        assert_eq!((found.len(), found[0].0.kind, found[0].1.len()), (1, wire::CHUNK_NONE, 0));
        assert_eq!(read(&session, false, &[])[0].0.kind, wire::CHUNK_NONE);
        assert_eq!(read(&session, true, &[])[0].0.kind, wire::CHUNK_NONE);
    }
}

#[test]
fn sr_02_03_06_eh_09_errors_have_a_message_and_perhaps_an_offset() {
    for mode in MODES {
        let session = session_of(false, mode, &[]);
        for error in NbdError::ALL {
            for (at, kind) in [(None, wire::CHUNK_ERROR), (Some(9000), wire::CHUNK_ERROR_OFFSET)] {
                let found = chunks(&session, &session.encode_error(TAG, error, "a reason", at));
                assert_eq!((found.len(), found[0].0.kind), (1, kind));
                let mut reader = Reader::new(&found[0].1);
                assert_eq!((reader.u32(), reader.u16()), (Some(error.value()), Some(8)));
                assert_eq!(reader.bytes(8), Some(&b"a reason"[..]));
                assert_eq!((reader.u64(), reader.rest().len()), (at, 0));
            }
        }
    }
}

fn extents(list: &[(u64, u32)]) -> Vec<Extent> {
    list.iter().map(|(len, flags)| Extent { len: *len, flags: *flags }).collect()
}

/// A status chunk's context and extents.
fn status(chunk: &Chunk, payload: &[u8]) -> (u32, Vec<(u64, u64)>) {
    let mut reader = Reader::new(payload);
    let id = reader.u32().unwrap();
    let mut found = Vec::new();
    if chunk.kind == wire::CHUNK_BLOCK_STATUS_EXT {
        let count = reader.u32().unwrap();
        while let Some(len) = reader.u64() {
            found.push((len, reader.u64().unwrap()));
        }
        assert_eq!(count as usize, found.len());
    } else {
        assert_eq!(chunk.kind, wire::CHUNK_BLOCK_STATUS);
        while let Some(len) = reader.u32() {
            found.push((len.into(), reader.u32().unwrap().into()));
        }
    }
    assert!(reader.rest().is_empty() && !found.is_empty());
    (id, found)
}

fn statuses(mode: ReplyMode, len: u64, one: bool, answer: &[ContextExtents]) -> Vec<(u32, Vec<(u64, u64)>)> {
    let session = session_of(false, mode, &[]);
    let found = chunks(&session, &session.encode_status(TAG, len, one, answer));
    found.iter().map(|(chunk, payload)| status(chunk, payload)).collect()
}

#[test]
fn bs_01_02_eh_06_one_status_chunk_a_context() {
    let answer = [
        ContextExtents { context: StatusContext::Allocation, extents: extents(&[(4096, 3), (8192, 0)]) },
        ContextExtents {
            context: StatusContext::Stale(ReplicaSlot::new(1)),
            extents: extents(&[(12288, 1)]),
        },
    ];
    for mode in MODES {
        let found = statuses(mode, 12288, false, &answer);
        assert_eq!(found, [(0, vec![(4096, 3), (8192, 0)]), (3, vec![(12288, 1)])]);
        // REQ_ONE: one extent, not longer than the request, whatever the core says.
        let found = statuses(mode, 10000, true, &answer);
        assert_eq!(found, [(0, vec![(4096, 3)]), (3, vec![(10000, 1)])]);
    }
}

#[test]
fn bs_09_long_extents_are_cut_for_32_bits_only() {
    let list = [(4096, 0), (5 << 30, 1), (4096, 0)];
    let answer = [ContextExtents { context: StatusContext::State, extents: extents(&list) }];
    let found = statuses(ReplyMode::Structured, 8 << 30, false, &answer);
    assert_eq!(found, [(1, vec![(4096, 0), (0xffff_f000, 1)])]);
    let found = statuses(ReplyMode::Extended, 8 << 30, false, &answer);
    assert_eq!(found, [(1, vec![(4096, 0), (5 << 30, 1), (4096, 0)])]);
}

#[test]
fn nt_13_the_number_of_extents_is_bounded() {
    assert_eq!((extents_max(1 << 40, false), extents_max(1 << 40, true)), (EXTENTS_MAX as u64, 1));
    assert_eq!((extents_max(1, false), extents_max(8192, false)), (2, 4));
    let many: Vec<_> = (0..3 * EXTENTS_MAX as u32).map(|index| (4096, index % 2)).collect();
    let answer = [ContextExtents { context: StatusContext::State, extents: extents(&many) }];
    for mode in MODES {
        assert_eq!(statuses(mode, 1 << 40, false, &answer)[0].1.len(), EXTENTS_MAX);
    }
}
