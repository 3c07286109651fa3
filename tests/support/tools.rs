//! The tools of others, run to their end with a time limit.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::daemon::{Said, folder};
use super::skip;

/// How long a tool may take, seconds, as `timeout` wants it.
const TOOL_S_MAX: &str = "180";
/// Folders with tools that an ordinary user's `PATH` may lack.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Whether a program of this name is installed.
pub(crate) fn have(tool: &str) -> bool {
    FOLDERS.iter().any(|folder| Path::new(folder).join(tool).exists())
}

/// The first of `tools` that is not installed.
pub(crate) fn missing<'a>(tools: &[&'a str]) -> Option<&'a str> {
    tools.iter().copied().find(|tool| !have(tool))
}

/// Whether one of `tools` is not installed: the test is skipped then.
pub(crate) fn lacks(tools: &[&str]) -> bool {
    let tool = missing(tools);
    if let Some(tool) = tool {
        skip(&format!("{tool} is not installed"));
    }
    tool.is_some()
}

/// Whether this user is root.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A command that finds tools in [`FOLDERS`] too.
fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:{}", FOLDERS.join(":"))).stdin(Stdio::null());
    command
}

/// Runs a tool to its end.
pub(crate) fn run<I: AsRef<OsStr>>(tool: &str, args: impl IntoIterator<Item = I>) -> Said {
    let output = command("timeout").args(["-k", "5", TOOL_S_MAX, tool]).args(args).output();
    let output = output.expect("coreutils' timeout runs");
    Said {
        status: output.status,
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A tool that runs beside the test; killed when dropped.
#[derive(Debug)]
pub(crate) struct Beside(pub(crate) Child);

impl Beside {
    /// Starts it; what it prints goes to `log`.
    pub(crate) fn start<I: AsRef<OsStr>>(tool: &str, args: impl IntoIterator<Item = I>, log: &Path) -> Self {
        let out = std::fs::File::create(log).unwrap();
        let err = out.try_clone().unwrap();
        let child = command(tool).args(args).stdout(out).stderr(err).spawn();
        Self(child.unwrap_or_else(|error| panic!("{tool}: {error}")))
    }

    /// Waits until it ends by itself; whether with success.
    pub(crate) fn wait(&mut self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.success();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("still running after {within:?}");
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // Best effort: it may be gone already. SIGTERM first, so that FUSE mounts are undone.
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let deadline = Instant::now() + Duration::from_secs(5);
            while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until `done`; fails the test after `within`.
pub(crate) fn wait_for(what: &str, within: Duration, done: impl Fn() -> bool) {
    let deadline = Instant::now() + within;
    while !done() {
        assert!(Instant::now() < deadline, "no {what} after {within:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A small filesystem of its own (tmpfs); unmounted when dropped. Root alone can have one.
#[derive(Debug)]
pub(crate) struct SmallFilesystem(TempDir);

impl SmallFilesystem {
    /// One of `size_mib` MiB.
    pub(crate) fn new(size_mib: u64) -> Self {
        let dir = folder();
        let size = format!("size={size_mib}m");
        let args = ["-t", "tmpfs", "-o", &size, "nbdmirror-test"].map(OsStr::new);
        run("mount", args.into_iter().chain([dir.path().as_os_str()])).ok();
        Self(dir)
    }

    /// Its root.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallFilesystem {
    fn drop(&mut self) {
        // Lazily: a daemon that is being killed may hold a file a moment longer.
        let _ = run("umount", ["-l".as_ref(), self.0.path().as_os_str()]);
    }
}

/// A disk with faults: nbdkit behind a Unix socket, shown as a file by nbdfuse, that can be a replica.
#[derive(Debug)]
pub(crate) struct FaultyDisk {
    // Dropped in this order: the file first, the server after it.
    _fuse: Beside,
    _server: Beside,
    dir: TempDir,
    /// The file that is the disk.
    pub(crate) path: PathBuf,
    /// The raw file behind it.
    pub(crate) backing: PathBuf,
}

impl FaultyDisk {
    /// What must be installed and accessible for such a disk; the reason where it is not.
    pub(crate) fn unavailable() -> Option<String> {
        if let Some(tool) = missing(&["nbdkit", "nbdfuse", "fusermount3"]) {
            return Some(format!("{tool} is not installed"));
        }
        let fuse = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
        fuse.err().map(|error| format!("/dev/fuse: {error}"))
    }

    /// A disk of `size_bytes` with nbdkit filters; `parameters` sees the disk's folder and gives the filters' parameters.
    pub(crate) fn new(size_bytes: u64, filters: &[&str], parameters: impl Fn(&Path) -> Vec<String>) -> Self {
        let dir = folder();
        let [socket, path, backing] = ["s", "disk.img", "backing.img"].map(|name| dir.path().join(name));
        std::fs::File::create(&backing).unwrap().set_len(size_bytes).unwrap();
        let mut args: Vec<String> = ["-f", "-t", "16", "-U"].map(String::from).to_vec();
        args.push(socket.display().to_string());
        args.extend(filters.iter().map(|filter| format!("--filter={filter}")));
        args.extend(["file".to_owned(), backing.display().to_string()]);
        args.extend(parameters(dir.path()));
        let server = Beside::start("nbdkit", args, &dir.path().join("nbdkit.log"));
        wait_for("nbdkit", Duration::from_secs(10), || socket.exists());
        std::fs::File::create(&path).unwrap();
        let fuse_args = [path.as_os_str(), "--unix".as_ref(), socket.as_os_str()];
        let fuse = Beside::start("nbdfuse", fuse_args, &dir.path().join("nbdfuse.log"));
        let shown = || std::fs::metadata(&path).is_ok_and(|file| file.len() == size_bytes);
        wait_for("nbdfuse", Duration::from_secs(10), shown);
        Self { _fuse: fuse, _server: server, dir, path, backing }
    }

    /// A path in the disk's folder.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}
