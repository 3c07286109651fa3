//! What the engine's tests share: a volume on two files, an engine over it, and clients in the transmission phase.
#![allow(dead_code, reason = "each test binary uses its own part of this module")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nbdmirror::engine::{
    self, Access, Connection, Engine, EngineConfig, EngineHandle, ReplicaDevice, StopReport,
};
use nbdmirror::format::assemble::{AssembleOptions, assemble};
use nbdmirror::format::create::{NewReplica, NewVolume, new_volume};
use nbdmirror::format::read::read_found;
use nbdmirror::mirror::MirrorConfig;
use nbdmirror::nbd::export::{Export, Negotiated};
use nbdmirror::nbd::session::Session;
use nbdmirror::units::{REPLICAS_MAX, Regions, ReplicaSet, ReplicaSlot};
use uuid::Uuid;

pub(crate) const VOLUME_BYTES: u64 = 64 << 20;
pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;

pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) engine: Engine,
    pub(crate) export: Arc<Export>,
}

pub(crate) fn open_replica(dir: &Path, name: &str) -> ReplicaDevice {
    let path = dir.join(name);
    if !path.exists() {
        std::fs::File::create(&path).unwrap().set_len(VOLUME_BYTES + (1 << 20)).unwrap();
    }
    ReplicaDevice::open(&path, Access::ReadWrite).unwrap()
}

/// Hands one end of a new socket pair to the engine.
pub(crate) fn hand_over(handle: &EngineHandle, export: &Arc<Export>, leftover: Vec<u8>) -> Client {
    hand_over_as(handle, export, Negotiated::default(), leftover)
}

fn hand_over_as(
    handle: &EngineHandle,
    export: &Arc<Export>,
    negotiated: Negotiated,
    leftover: Vec<u8>,
) -> Client {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    ours.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
    let session = Session::new(Arc::clone(export), negotiated);
    handle.connect(Connection { fd: theirs.into(), session, leftover, peer: "test".to_owned() });
    Client { stream: ours }
}

impl World {
    pub(crate) fn new(memory_bytes_max: u64) -> Self {
        Self::new_in(tempfile::tempdir().unwrap(), memory_bytes_max)
    }

    /// With its replicas in that directory.
    pub(crate) fn new_in(dir: tempfile::TempDir, memory_bytes_max: u64) -> Self {
        let devices = ["a", "b"].map(|name| open_replica(dir.path(), name));
        let new_replica = |device: &ReplicaDevice| NewReplica {
            uuid: Uuid::new_v4(),
            path: device.path.display().to_string(),
            device_bytes: device.traits.device_bytes,
        };
        let created = new_volume(NewVolume {
            name: "test".to_owned(),
            regions: Regions { volume_bytes: VOLUME_BYTES, region_bytes: 64 << 10 },
            now_unix_ns: 1,
            volume_uuid: Uuid::new_v4(),
            generation: Uuid::new_v4(),
            replicas: devices.iter().map(new_replica).collect(),
            in_sync: true,
        })
        .unwrap();
        for (index, device) in devices.iter().enumerate() {
            for (offset, bytes) in created.writes(index) {
                device.write_at(offset, &bytes).unwrap();
            }
            device.sync().unwrap();
        }
        Self::start(dir, devices, memory_bytes_max)
    }

    pub(crate) fn start(dir: tempfile::TempDir, devices: [ReplicaDevice; 2], memory_bytes_max: u64) -> Self {
        let found = devices.each_ref().map(|device| {
            let read = &mut |offset, bytes: &mut [u8]| device.read_at(offset, bytes);
            read_found(&device.path.display().to_string(), device.traits.device_bytes, read).unwrap().unwrap()
        });
        let mut by_slot: [Option<ReplicaDevice>; REPLICAS_MAX] = Default::default();
        for (device, found) in devices.into_iter().zip(&found) {
            by_slot[found.superblock.slot.index()] = Some(device);
        }
        let mirror = MirrorConfig {
            read_only: false,
            write_mostly: ReplicaSet::EMPTY,
            traits: Default::default(),
            entropy: Uuid::new_v4().as_u128(),
            wall_clock_origin_ns: 2,
            intent_idle_ns: 5_000_000_000,
            resync_jobs_max: 4,
            resync_burst_ns: 16_000_000,
            without_intent: false,
        };
        let assembly = assemble(&found, AssembleOptions::default()).unwrap();
        let config =
            EngineConfig { mirror, assembly, devices: by_slot, memory_bytes_max, client_idle_ns_max: None };
        let export = Export {
            name: "test".to_owned(),
            description: String::new(),
            size_bytes: VOLUME_BYTES,
            read_only: false,
            replicas: [0, 1].map(ReplicaSlot::new).into_iter().collect(),
        };
        Self { dir, engine: engine::start(config).unwrap(), export: Arc::new(export) }
    }

    /// A client that has chosen how replies look.
    pub(crate) fn connect_as(&self, negotiated: Negotiated) -> Client {
        hand_over_as(&self.engine.handle, &self.export, negotiated, Vec::new())
    }

    pub(crate) fn connect_with(&self, leftover: Vec<u8>) -> Client {
        hand_over(&self.engine.handle, &self.export, leftover)
    }

    pub(crate) fn connect(&self) -> Client {
        self.connect_with(Vec::new())
    }

    pub(crate) fn connections(&self) -> usize {
        self.engine.handle.status().blocking_recv().unwrap().connections
    }

    pub(crate) fn wait_for_connections(&self, count: usize) {
        for _ in 0..2000 {
            if self.connections() == count {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{} connections, not {count}", self.connections());
    }

    /// Stops and gives both replicas' data back: they must be equal.
    pub(crate) fn stop(self) -> (tempfile::TempDir, StopReport, Vec<u8>) {
        let told = self.engine.handle.stop();
        let report = self.engine.join().unwrap();
        assert_eq!(told.blocking_recv().unwrap(), report);
        let data = |name: &str| {
            let mut bytes = std::fs::read(self.dir.path().join(name)).unwrap();
            bytes.truncate(VOLUME_BYTES as usize);
            bytes
        };
        let (a, b) = (data("a"), data("b"));
        assert!(a == b, "the replicas differ");
        (self.dir, report, a)
    }
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
}

pub(crate) fn header(kind: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

impl Client {
    pub(crate) fn send(&mut self, kind: u16, flags: u16, cookie: u64, offset: u64, len: u32, payload: &[u8]) {
        let mut bytes = header(kind, flags, cookie, offset, len).to_vec();
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).unwrap();
    }

    /// A reply's cookie and error.
    pub(crate) fn reply(&mut self) -> (u64, u32) {
        let mut bytes = [0; 16];
        self.stream.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        (u64::from_be_bytes(bytes[8..].try_into().unwrap()), error)
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        self.send(WRITE, 0, offset, offset, data.len() as u32, data);
        assert_eq!(self.reply(), (offset, 0));
    }

    pub(crate) fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.send(READ, 0, !offset, offset, len as u32, &[]);
        assert_eq!(self.reply(), (!offset, 0));
        self.payload(len)
    }

    pub(crate) fn payload(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn do_simple(&mut self, kind: u16, flags: u16, offset: u64, len: u32) {
        self.send(kind, flags, 77, offset, len, &[]);
        assert_eq!(self.reply(), (77, 0));
    }

    pub(crate) fn expect_end(&mut self) {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("not closed: {other:?}"),
        }
    }
}
