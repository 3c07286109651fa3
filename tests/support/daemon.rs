//! A volume in a folder of its own and the real binary that serves it.
//!
//! ```text
//! Volume::new ──create──► replica files      start ──► Daemon ──kill / stop / drop──► gone
//!                             ▲                                        │
//!                             └──────────────── start again ◄──────────┘
//! ```
//!
//! What must hold: a daemon never outlives its [`Daemon`]; what it printed is shown when a test fails on it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nbdmirror::mirror::status::{Health, ReplicaState, ReplicaStatus, Status};
use tempfile::TempDir;

use super::nbd::Client;

/// How long a daemon may take until it serves, and to stop.
const START_MAX: Duration = Duration::from_secs(30);
/// How long a verb may take.
const VERB_S_MAX: &str = "60";
/// The volume's name in all tests.
pub(crate) const NAME: &str = "tested";

/// The path of the binary under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_nbdmirror");

/// What a finished command said.
#[derive(Debug)]
pub(crate) struct Said {
    /// How it ended.
    pub(crate) status: ExitStatus,
    /// Standard output.
    pub(crate) out: String,
    /// Standard error.
    pub(crate) err: String,
}

impl Said {
    /// Standard output of a command that must have succeeded.
    pub(crate) fn ok(self) -> String {
        assert!(self.status.success(), "failed ({}):\n{}{}", self.status, self.out, self.err);
        self.out
    }

    /// Standard error of a command that must have failed in order: an exit code (no signal, no time-out), a message.
    pub(crate) fn refused(self) -> String {
        let code = self.status.code();
        assert!(
            matches!(code, Some(1..=100)),
            "should have been refused, ended {}:\n{}{}",
            self.status,
            self.out,
            self.err
        );
        assert!(!self.err.trim().is_empty(), "refused without a message");
        assert!(!self.err.contains("panicked"), "panicked:\n{}", self.err);
        self.err
    }
}

/// Runs the binary's verb with these arguments to its end.
pub(crate) fn nbdmirror<I: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = I>) -> Said {
    let output = Command::new("timeout")
        .args(["-k", "5", VERB_S_MAX, BINARY])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("coreutils' timeout runs");
    Said {
        status: output.status,
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A volume's replicas and how it is served; the folder goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Volume {
    /// Where everything of this test stands.
    pub(crate) dir: TempDir,
    /// The volume's size, bytes.
    pub(crate) size_bytes: u64,
    /// The replicas to serve.
    pub(crate) replicas: Vec<PathBuf>,
    /// Further arguments of `serve`.
    pub(crate) serve_args: Vec<String>,
}

impl Volume {
    /// Creates a volume of `size_bytes` on two new files, with further arguments of `create`.
    pub(crate) fn new(size_bytes: u64, create_args: &[&str]) -> Self {
        let dir = folder();
        let replicas = ["a.img", "b.img"].map(|name| dir.path().join(name)).to_vec();
        Self::on(dir, size_bytes, replicas, create_args)
    }

    /// Creates a volume of `size_bytes` on `replicas`.
    pub(crate) fn on(dir: TempDir, size_bytes: u64, replicas: Vec<PathBuf>, create_args: &[&str]) -> Self {
        let volume = Self { dir, size_bytes, replicas, serve_args: Vec::new() };
        let mut args: Vec<String> = ["create", "--name", NAME, "--size"].map(String::from).to_vec();
        args.push(size_bytes.to_string());
        args.extend(create_args.iter().map(|arg| (*arg).to_owned()));
        args.extend(volume.replicas.iter().map(|path| path.display().to_string()));
        nbdmirror(args).ok();
        volume
    }

    /// A path in the volume's folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Serves the volume; fails the test where that does not work.
    pub(crate) fn start(&self) -> Daemon {
        self.try_start(&[])
            .unwrap_or_else(|said| panic!("serve ended {}:\n{}{}", said.status, said.out, said.err))
    }

    /// Serves the volume with further arguments; what the daemon said where it ends before it serves.
    pub(crate) fn try_start(&self, args: &[&str]) -> Result<Daemon, Said> {
        let (socket, control) = (self.path("nbd.sock"), self.path("control.sock"));
        let (out, err) = (self.path("serve.out"), self.path("serve.err"));
        let mut command = Command::new(BINARY);
        command.arg("serve").args(args).args(&self.serve_args);
        command.arg("--listen").arg(format!("unix:{}", socket.display())).arg("--control").arg(&control);
        command.args(&self.replicas).stdin(Stdio::null());
        command.stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        let mut daemon = Daemon { child: command.spawn().unwrap(), socket, control, out, err };
        let deadline = Instant::now() + START_MAX;
        loop {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                return Err(Said { status, out: read_text(&daemon.out), err: read_text(&daemon.err) });
            }
            if Client::connect(&daemon.socket, "").is_ok() {
                return Ok(daemon);
            }
            assert!(Instant::now() < deadline, "does not serve after {START_MAX:?}:\n{}", daemon.printed());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asserts that two replicas hold the same bytes over the volume's size.
    pub(crate) fn assert_identical(&self) {
        for other in &self.replicas[1..] {
            assert_same_bytes(&self.replicas[0], other, self.size_bytes);
        }
    }
}

/// Asserts that the first `len` bytes of two files are the same.
pub(crate) fn assert_same_bytes(left: &Path, right: &Path, len: u64) {
    const CHUNK: u64 = 1 << 20;
    let (a, b) = (File::open(left).unwrap(), File::open(right).unwrap());
    let (mut bytes_a, mut bytes_b) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let mut offset = 0;
    while offset < len {
        let n = CHUNK.min(len - offset) as usize;
        a.read_exact_at(&mut bytes_a[..n], offset).unwrap();
        b.read_exact_at(&mut bytes_b[..n], offset).unwrap();
        if bytes_a[..n] != bytes_b[..n] {
            let at = bytes_a.iter().zip(&bytes_b).position(|(x, y)| x != y).unwrap();
            panic!("{} and {} differ at byte {}", left.display(), right.display(), offset + at as u64);
        }
        offset += n as u64;
    }
}

/// A folder for one test, in `TMPDIR`.
pub(crate) fn folder() -> TempDir {
    tempfile::Builder::new().prefix("nbdmirror-").tempdir().unwrap()
}

fn read_text(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    /// Where it serves NBD.
    pub(crate) socket: PathBuf,
    /// Its control socket.
    pub(crate) control: PathBuf,
    out: PathBuf,
    err: PathBuf,
}

impl Daemon {
    /// A new connection to the volume.
    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.socket, "")
            .unwrap_or_else(|error| panic!("connect: {error}\n{}", self.printed()))
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The URI at which other tools find the volume by its name.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///{NAME}?socket={}", self.socket.display())
    }

    /// Everything it printed so far.
    pub(crate) fn printed(&self) -> String {
        format!("{}{}", read_text(&self.out), read_text(&self.err))
    }

    /// Kills it at once (SIGKILL) and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Stops it by SIGTERM; it must end with status 0.
    pub(crate) fn terminate(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.wait_for_success();
    }

    /// Stops it with the `stop` verb; it must end with status 0.
    pub(crate) fn stop(mut self) {
        nbdmirror(["stop".as_ref(), "--control".as_ref(), self.control.as_os_str()]).ok();
        self.wait_for_success();
    }

    fn wait_for_success(&mut self) {
        let deadline = Instant::now() + START_MAX;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "ended {status}:\n{}", self.printed());
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("does not end after {START_MAX:?}:\n{}", self.printed());
    }

    /// `fail`, `add` or `remove` with this replica.
    pub(crate) fn verb(&self, verb: &str, replica: &Path) -> Said {
        nbdmirror([verb.as_ref(), "--control".as_ref(), self.control.as_os_str(), replica.as_os_str()])
    }

    /// What `status --json` shows.
    pub(crate) fn status(&self) -> Status {
        let args = ["status".as_ref(), "--json".as_ref(), "--control".as_ref(), self.control.as_os_str()];
        let text = nbdmirror(args).ok();
        let mut json: serde_json::Value = serde_json::from_str(&text).expect("status --json prints JSON");
        serde_json::from_value(json["volume"].take())
            .unwrap_or_else(|error| panic!("{error}: not a status: {text}"))
    }

    /// The status of the replica whose file has this name.
    pub(crate) fn replica(&self, file_name: &str) -> ReplicaStatus {
        let status = self.status();
        let found = status.replicas.iter().find(|replica| replica.path.ends_with(file_name));
        found.unwrap_or_else(|| panic!("no replica {file_name} in {status:?}")).clone()
    }

    /// Polls the status until `done` says so.
    pub(crate) fn wait_until(&self, what: &str, within: Duration, done: impl Fn(&Status) -> bool) -> Status {
        let deadline = Instant::now() + within;
        loop {
            let status = self.status();
            if done(&status) {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "not {what} after {within:?}: {status:#?}\n{}",
                self.printed()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until every replica is in sync and nothing is left to be synced.
    pub(crate) fn wait_in_sync(&self) -> Status {
        self.wait_until("in sync", Duration::from_secs(120), |status| {
            status.health == Health::Healthy
                && status.unsynced_bytes == 0
                && status.resync.is_none()
                && status.replicas.iter().all(|replica| replica.state == ReplicaState::InSync)
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Best effort: it may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the daemon printed:\n{}", self.printed());
        }
    }
}
