//! The NBD protocol and the on-disk format: requests parsed, replies encoded, pages and superblocks with checksums.
#![allow(clippy::unwrap_used, unreachable_pub, missing_docs, reason = "a benchmark")]

mod support;

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use nbdmirror::format::bitmap::{RegionMaps, decode_page, encode_page};
use nbdmirror::nbd::client::encode_request;
use nbdmirror::nbd::export::{Export, Negotiated, ReplyMode};
use nbdmirror::nbd::session::{Session, Tag};
use nbdmirror::nbd::wire::NbdError;
use nbdmirror::units::{BLOCK_BYTES, ReplicaSet};
use support::ThreadTime;
use uuid::Uuid;

const READ: u16 = 0;

fn session(mode: ReplyMode) -> Session {
    let export = Export {
        name: "v".to_owned(),
        description: String::new(),
        size_bytes: 1 << 40,
        read_only: false,
        replicas: ReplicaSet::EMPTY,
    };
    Session::new(Arc::new(export), Negotiated { mode, ..Default::default() })
}

fn protocol(criterion: &mut Criterion<ThreadTime>) {
    let simple = session(ReplyMode::Simple);
    let structured = session(ReplyMode::Structured);
    let request = encode_request(READ, 0, 7, 1 << 30, 4096);
    criterion.bench_function("parse a request", |bencher| {
        bencher.iter(|| simple.parse(black_box(&request)));
    });
    let tag = Tag { cookie: 7, offset: 1 << 30 };
    criterion.bench_function("encode a simple reply", |bencher| {
        bencher.iter(|| black_box(simple.encode_done(black_box(tag))));
    });
    criterion.bench_function("encode an error chunk", |bencher| {
        bencher.iter(|| black_box(structured.encode_error(black_box(tag), NbdError::Io, "it failed", None)));
    });
    for (name, data) in [("data", vec![1; 4096]), ("zeroes", vec![0; 4096])] {
        criterion.bench_function(&format!("encode a structured read, 4 KiB of {name}"), |bencher| {
            bencher.iter(|| {
                structured.encode_read(black_box(tag), false, &data, |head, range| {
                    black_box((head, range));
                });
            });
        });
    }
}

fn checksums(criterion: &mut Criterion<ThreadTime>) {
    let uuid = Uuid::from_u128(1);
    let mut maps = RegionMaps::clear(10_000);
    let mut page = vec![0; BLOCK_BYTES as usize];
    criterion.bench_function("encode a bitmap page", |bencher| {
        bencher.iter(|| encode_page(uuid, 0, black_box(&maps), &mut page));
    });
    criterion.bench_function("decode a bitmap page", |bencher| {
        bencher.iter(|| decode_page(uuid, 0, black_box(&page), &mut maps));
    });
}

criterion_group!(name = benches; config = support::criterion(); targets = protocol, checksums);
criterion_main!(benches);
