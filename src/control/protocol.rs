//! What goes over the admin socket: one JSON object a line, a request and its answer in turn.
//!
//! What must hold: names and meanings are documented in `docs/status-json.md`; they are only added to. A
//! request that the daemon does not understand is answered with an error, never guessed at.

use serde::{Deserialize, Serialize};

use super::failure::Failure;
use crate::engine::{DeviceKind, EngineStatus};
use crate::mirror::status::Status;

/// Longest request line, bytes.
pub const REQUEST_BYTES_MAX: usize = 16 << 10;
/// Longest answer line that a client takes, bytes.
pub const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// What an operator asks of a running volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The volume's state.
    Status,
    /// Stop using a replica.
    Fail {
        /// Its path, slot number or identity.
        replica: String,
    },
    /// Forget a replica.
    Remove {
        /// Its path, slot number or identity.
        replica: String,
    },
    /// Take a replica in.
    Add {
        /// Absolute path of the file or block device.
        path: String,
        /// Whatever it holds.
        #[serde(default)]
        force: bool,
    },
    /// Stop the volume cleanly and end the daemon. Answered when the volume has stopped.
    Stop,
}

/// The daemon's answer. Fields that do not apply are left out.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it was done.
    pub ok: bool,
    /// What was done or happens now, a line for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The state of the volume, for `status`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Box<VolumeStatus>>,
    /// Whether the volume was marked clean, for `stop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clean: Option<bool>,
    /// What is wrong, where it was not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What to do about that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// A running volume, as `nbdmirror status --json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Version of this schema; grows only when a field's meaning changes.
    pub schema: u32,
    /// The daemon.
    pub daemon: DaemonStatus,
    /// The engine.
    pub engine: EngineFigures,
    /// The volume and its replicas.
    pub volume: Status,
}

/// The engine that runs a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineFigures {
    /// Requests and commands are taken; false for a moment after the start.
    pub open: bool,
    /// Clients connected.
    pub connections: u64,
    /// Memory held for requests' payload, bytes.
    pub memory_bytes: u64,
    /// The replicas' open devices, in slot order.
    pub devices: Vec<DeviceFigures>,
}

/// A replica's open device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFigures {
    /// The replica's slot.
    pub slot: usize,
    /// Direct I/O; otherwise through the page cache, with fdatasync.
    pub direct: bool,
    /// File or block device.
    pub kind: DeviceKind,
}

impl VolumeStatus {
    /// Put together from what the daemon and its engine say.
    #[must_use]
    pub fn new(daemon: DaemonStatus, engine: EngineStatus) -> Self {
        let EngineStatus { open, volume, connections, memory_bytes, replicas } = engine;
        let device = |(slot, device): (usize, _)| {
            let crate::engine::DeviceStatus { direct, kind } = device;
            DeviceFigures { slot, direct, kind }
        };
        let attached = replicas.into_iter().enumerate().filter_map(|(slot, device)| Some((slot, device?)));
        let devices = attached.map(device).collect();
        let engine = EngineFigures { open, connections: connections as u64, memory_bytes, devices };
        Self { schema: STATUS_SCHEMA, daemon, engine, volume }
    }

    /// How the replica in `slot` is accessed, in words; nothing where its device is not open.
    #[must_use]
    pub fn access_in_words(&self, slot: usize) -> Option<&'static str> {
        let device = self.engine.devices.iter().find(|device| device.slot == slot)?;
        Some(if device.direct { "direct I/O" } else { "buffered" })
    }
}

/// The daemon that serves a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// Its version of nbdmirror.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Seconds since it began to serve.
    pub uptime_s: u64,
    /// Where clients connect, as NBD URIs.
    pub listen: Vec<String>,
    /// The control socket's path.
    pub control: String,
    /// Clients in the middle of their handshake.
    pub handshakes: u64,
}

/// The version of [`VolumeStatus`].
pub const STATUS_SCHEMA: u32 = 1;

impl Answer {
    /// Done; `message` says what happens now.
    #[must_use]
    pub fn done(message: impl Into<String>) -> Self {
        Self { ok: true, message: Some(message.into()), ..Self::default() }
    }
}

impl From<Failure> for Answer {
    fn from(failure: Failure) -> Self {
        Self { error: Some(failure.what), hint: failure.hint, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_documented_form() {
        for (line, request) in [
            (r#"{"command":"status"}"#, Request::Status),
            (r#"{"command":"stop"}"#, Request::Stop),
            (r#"{"command":"fail","replica":"1"}"#, Request::Fail { replica: "1".into() }),
            (r#"{"command":"remove","replica":"/a"}"#, Request::Remove { replica: "/a".into() }),
            (
                r#"{"command":"add","path":"/a","force":true}"#,
                Request::Add { path: "/a".into(), force: true },
            ),
        ] {
            assert_eq!(serde_json::from_str::<Request>(line).unwrap(), request);
            assert_eq!(serde_json::to_string(&request).unwrap(), line);
        }
        assert!(serde_json::from_str::<Request>(r#"{"command":"add","path":"/a"}"#).is_ok());
        for line in [
            "",
            "{}",
            "[]",
            r#"{"command":"erase"}"#,
            r#"{"command":"fail"}"#,
            r#"{"command":"fail","replica":"1","x":1}"#,
        ] {
            assert!(serde_json::from_str::<Request>(line).is_err(), "{line}");
        }
    }

    #[test]
    fn answers_leave_out_what_does_not_apply() {
        assert_eq!(
            serde_json::to_string(&Answer::done("it is")).unwrap(),
            r#"{"ok":true,"message":"it is"}"#
        );
        let refused = Answer::from(Failure::new("no").hint("do"));
        assert_eq!(serde_json::to_string(&refused).unwrap(), r#"{"ok":false,"error":"no","hint":"do"}"#);
    }
}
