//! A folder to work in, the binary under test, and daemons that end with their test.
#![allow(dead_code, reason = "each test binary uses its own part of this module")]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The binary under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_nbdmirror");
/// Nothing here takes longer, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A folder of its own, with a runtime directory in it.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
}

/// What a command said.
pub(crate) struct Said {
    what: String,
    code: Option<i32>,
    pub(crate) stdout: String,
    stderr: String,
}

/// A running `serve`; killed if it is still there in the end.
pub(crate) struct Daemon {
    child: Child,
    /// What it said when it had started.
    pub(crate) banner: String,
}

pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// With a volume of 4 MiB on `a` and `b`.
    pub(crate) fn with_volume() -> Self {
        let bench = Self::new();
        bench.run(&["create", "--size", "4M", "a", "b"]).succeeds();
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn runtime_dir(&self) -> PathBuf {
        self.path("run")
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        self.command_of(Path::new(BINARY), args)
    }

    pub(crate) fn command_of(&self, binary: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(binary);
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("NBDMIRROR_RUNTIME_DIR", self.runtime_dir())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    /// Runs a verb that ends by itself.
    pub(crate) fn run(&self, args: &[&str]) -> Said {
        let mut child = self
            .command(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start the binary");
        let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let read = |pipe: &mut dyn Read| {
            let mut text = String::new();
            pipe.read_to_string(&mut text).unwrap();
            text
        };
        let (stdout, stderr, code) = std::thread::scope(|scope| {
            let stdout = scope.spawn(move || read(&mut stdout));
            let stderr = scope.spawn(move || read(&mut stderr));
            let code = wait(&mut child, args);
            (stdout.join().unwrap(), stderr.join().unwrap(), code)
        });
        Said { what: args.join(" "), code, stdout, stderr }
    }

    /// Starts `serve` and waits until it serves.
    pub(crate) fn serve(&self, args: &[&str]) -> Daemon {
        let log = File::create(self.path("log")).unwrap();
        let mut child = self
            .command(&[&["serve"], args].concat())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("start the binary");
        let mut banner = String::new();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        // The last line of the banner; an empty read means that it has ended.
        while !banner.contains("Look with") {
            if lines.read_line(&mut banner).unwrap() == 0 {
                let log = std::fs::read_to_string(self.path("log")).unwrap();
                panic!("serve {args:?} ended: {banner}{log}");
            }
        }
        banner.push_str(&std::fs::read_to_string(self.path("log")).unwrap());
        // Read to its end, so that the daemon never waits for us.
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        Daemon { child, banner }
    }

    pub(crate) fn status_json(&self, volume: &str) -> serde_json::Value {
        serde_json::from_str(&self.run(&["status", volume, "--json"]).succeeds().stdout).unwrap()
    }

    pub(crate) fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        let since = Instant::now();
        while !condition() {
            assert!(since.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Does `act` and checks that the files are the same in the end, byte by byte.
    pub(crate) fn untouched(&self, names: &[&str], act: impl FnOnce()) {
        let read =
            || -> Vec<Vec<u8>> { names.iter().map(|name| std::fs::read(self.path(name)).unwrap()).collect() };
        let before = read();
        act();
        for ((name, before), after) in names.iter().zip(before).zip(read()) {
            assert!(before == after, "{name} was changed");
        }
    }

    /// A sparse file.
    pub(crate) fn file(&self, name: &str, bytes: u64) {
        File::create(self.path(name)).unwrap().set_len(bytes).unwrap();
    }

    pub(crate) fn open(&self, name: &str) -> File {
        OpenOptions::new().read(true).write(true).open(self.path(name)).unwrap()
    }

    pub(crate) fn overwrite(&self, name: &str, offset: u64, bytes: &[u8]) {
        self.open(name).write_all_at(bytes, offset).unwrap();
    }

    pub(crate) fn file_len(&self, name: &str) -> u64 {
        std::fs::metadata(self.path(name)).unwrap().len()
    }

    /// Bytes that a file takes on disk.
    pub(crate) fn allocated(&self, name: &str) -> u64 {
        std::fs::metadata(self.path(name)).unwrap().blocks() * 512
    }

    /// A DOS partition table with one partition.
    pub(crate) fn make_partition_table(&self, name: &str) {
        let mut sector = [0_u8; 512];
        sector[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x10, 0, 0]);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        self.overwrite(name, 0, &sector);
    }
}

fn wait(child: &mut Child, args: &[&str]) -> Option<i32> {
    let since = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if since.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("{args:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Said {
    fn all(&self) -> String {
        format!("$ nbdmirror {}\n{}{}(exit code {:?})", self.what, self.stdout, self.stderr, self.code)
    }

    #[track_caller]
    pub(crate) fn exits_with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}", self.all());
        self
    }

    #[track_caller]
    pub(crate) fn succeeds(self) -> Self {
        self.exits_with(0)
    }

    /// Fails in order: with a message, and neither by a panic nor by a signal.
    #[track_caller]
    pub(crate) fn fails(self) -> Self {
        assert!(matches!(self.code, Some(1 | 2)), "{}", self.all());
        assert!(self.code == Some(2) || self.stderr.contains("nbdmirror: "), "{}", self.all());
        assert!(!self.stderr.contains("panicked"), "{}", self.all());
        self
    }

    #[track_caller]
    pub(crate) fn says(self, word: &str) -> Self {
        assert!(self.stdout.contains(word) || self.stderr.contains(word), "`{word}` in {}", self.all());
        self
    }

    #[track_caller]
    pub(crate) fn does_not_say(self, word: &str) -> Self {
        assert!(!self.stdout.contains(word) && !self.stderr.contains(word), "no `{word}` in {}", self.all());
        self
    }

    #[track_caller]
    pub(crate) fn is(self, stdout: &str) -> Self {
        assert_eq!(self.stdout, stdout);
        self
    }
}

impl Daemon {
    pub(crate) fn signal(&self, signal: &str) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let signal: nix::sys::signal::Signal = format!("SIG{signal}").parse().unwrap();
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Waits for its end; gives what it said and logged when it started.
    #[track_caller]
    pub(crate) fn ended_with(mut self, code: i32) -> String {
        assert_eq!(wait(&mut self.child, &["serve"]), Some(code));
        std::mem::take(&mut self.banner)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
