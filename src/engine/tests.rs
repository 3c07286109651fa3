//! The data plane without its loop: what must come out right in whatever order a turn's steps fall.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::client::Client;
use super::data_plane::DataPlane;
use super::handle::{Counted, EngineConfig, Mailbox};
use super::receive::{Into, Receive};
use super::ring::Ring;
use super::{Access, MEMORY_BYTES_MAX_DEFAULT, ReplicaDevice};
use crate::format::assemble::{AssembleOptions, assemble};
use crate::format::create::{NewReplica, NewVolume, new_volume};
use crate::format::read::read_found;
use crate::mirror::MirrorConfig;
use crate::nbd::export::{Export, Negotiated};
use crate::nbd::session::Session;
use crate::units::{Nanos, REPLICAS_MAX, Regions, ReplicaSet};

const VOLUME_BYTES: u64 = 1 << 20;

/// A data plane over a new volume of one replica, not opened yet.
fn data_plane(dir: &Path) -> DataPlane {
    let path = dir.join("a");
    std::fs::File::create(&path).unwrap().set_len(2 << 20).unwrap();
    let device = ReplicaDevice::open(&path, Access::ReadWrite).unwrap();
    let device_bytes = device.traits.device_bytes;
    let created = new_volume(NewVolume {
        name: "test".to_owned(),
        regions: Regions { volume_bytes: VOLUME_BYTES, region_bytes: 64 << 10 },
        now_unix_ns: 1,
        volume_uuid: Uuid::from_u128(1),
        generation: Uuid::from_u128(2),
        replicas: vec![NewReplica { uuid: Uuid::from_u128(3), path: "a".to_owned(), device_bytes }],
        in_sync: true,
    })
    .unwrap();
    for (offset, bytes) in created.writes(0) {
        device.write_at(offset, &bytes).unwrap();
    }
    let read = &mut |offset, bytes: &mut [u8]| device.read_at(offset, bytes);
    let found = read_found("a", device_bytes, read).unwrap().unwrap();
    let mirror = MirrorConfig {
        read_only: false,
        write_mostly: ReplicaSet::EMPTY,
        traits: Default::default(),
        entropy: 4,
        wall_clock_origin_ns: 5,
        intent_idle_ns: 5_000_000_000,
        resync_jobs_max: 4,
        resync_burst_ns: 16_000_000,
        without_intent: false,
    };
    let mut devices: [Option<ReplicaDevice>; REPLICAS_MAX] = Default::default();
    devices[found.superblock.slot.index()] = Some(device);
    let assembly = assemble(&[found], AssembleOptions::default()).unwrap();
    let memory_bytes_max = MEMORY_BYTES_MAX_DEFAULT;
    let config = EngineConfig { mirror, assembly, devices, memory_bytes_max, client_idle_ns_max: None };
    DataPlane::new(Ring::new().unwrap(), config, Arc::new(Mailbox::new().unwrap()))
}

/// A connection in the transmission phase.
fn client(theirs: UnixStream) -> Client {
    let export = Export {
        name: "test".to_owned(),
        description: String::new(),
        size_bytes: VOLUME_BYTES,
        read_only: false,
        replicas: ReplicaSet::EMPTY,
    };
    let session = Session::new(Arc::new(export), Negotiated::default());
    let counted = Counted::new(&Arc::default());
    Client::new(theirs.into(), session, "test".to_owned(), counted, Nanos(0))
}

/// A receive brings half a header, so the turn is to end with the next one. Then, in the same turn, a send of the
/// same connection fails.
#[test]
fn a_connection_given_up_between_a_turns_parse_and_its_receive_is_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut data_plane = data_plane(dir.path());
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let key = data_plane.clients.insert(client(theirs));
    data_plane.parse(key, false);
    assert_eq!(data_plane.receivers, [key]);
    data_plane.break_off(key);
    data_plane.settle();
    assert_eq!(data_plane.clients.len(), 0);
}

/// libnbd sends a WRITE's header and its payload by two calls; who sleeps between them is woken twice for one request.
#[test]
fn the_rest_of_a_small_write_is_waited_for_awake_as_the_next_request_is() {
    let dir = tempfile::tempdir().unwrap();
    for (len, answers) in [(4096_u32, 1), (1 << 20, 0)] {
        let mut data_plane = data_plane(dir.path());
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let key = data_plane.clients.insert(client(theirs));
        data_plane.answers_before = 1;
        let mut buffer = data_plane.pool.take(4096);
        buffer[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
        buffer[4..24].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0]);
        buffer[24..28].copy_from_slice(&len.to_be_bytes());
        data_plane
            .received(Receive { connection: key, fd: -1, into: Into::Buffer { buffer, filled: 0 } }, 28);
        assert_eq!(data_plane.answers, answers, "{len} bytes");
        data_plane.break_off(key);
        data_plane.settle();
    }
}
