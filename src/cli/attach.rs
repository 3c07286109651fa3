//! Makes a volume a block device of this machine: `nbdmirror attach`.
//!
//! ```text
//!   attach ─► the same program with --in-background ─► attached ─► one line to the first ─► keeps the device
//!                     │ failed: says why, status 1                     └─► prints it, ends
//! ```
//!
//! What must hold: when the command returns, the device is there and its keeper holds on to nothing of the terminal.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

use clap::Args;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use tracing_subscriber::EnvFilter;

use super::size::pretty;
use super::{Outcome, print};
use crate::attach::device::Device;
use crate::attach::source::Source;
use crate::attach::{Attached, CONNECTIONS_MAX, Options, attach};
use crate::control::activation;
use crate::control::failure::Failure;
use crate::control::log;
use crate::control::runtime_dir::{RUNTIME_DIR_VARIABLE, prepare_runtime_dir, runtime_dir};

const TIMEOUT_S_MAX: u64 = 24 * 60 * 60;
const DEAD_TIMEOUT_S_MAX: u64 = 7 * 24 * 60 * 60;

const AFTER_HELP: &str = "\
Examples:
  nbdmirror attach vol                           as the first free device, which it prints
  nbdmirror attach vol /dev/nbd0
  nbdmirror attach vol /dev/nbd0 --connections 4
  nbdmirror attach nbd://192.0.2.7/vol /dev/nbd1 --dead-timeout 60
  nbdmirror attach vol /dev/nbd0 --foreground    for a systemd unit (Type=notify)

A keeper stays in the background and connects again when the daemon was restarted; reads and
writes wait meanwhile, up to --dead-timeout. Attaching a device to its volume again replaces
dead connections. With one connection a slow answer is waited for as long as it takes; several
let several CPUs work, but the kernel then takes an answer later than --timeout for a dead
connection.
Needs root and the kernel's nbd module (`modprobe nbd`).";

#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Attach {
    /// Name of a running volume; or the NBD URI of any server: nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH.
    #[arg(value_name = "VOLUME")]
    source: Source,
    /// /dev/nbdN; the kernel chooses the first free one if it is left out.
    device: Option<Device>,
    /// Connections of the device.
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(CONNECTIONS_MAX)))]
    connections: u32,
    /// Give up a connection that owes an answer for so long, and ask again on another one; 0: never [default: 0 with
    /// one connection, 60 with several or without a keeper].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=TIMEOUT_S_MAX))]
    timeout: Option<u64>,
    /// Fail reads and writes that have waited so long for any connection at all.
    #[arg(long, value_name = "SECONDS", default_value_t = 300,
        value_parser = clap::value_parser!(u64).range(0..=DEAD_TIMEOUT_S_MAX))]
    dead_timeout: u64,
    /// Logical block size of the device, bytes: 512, 1024, 2048 or 4096.
    #[arg(long, value_name = "BYTES", default_value_t = 512, value_parser = block_size)]
    block_size: u64,
    /// Stay, and log to standard error.
    #[arg(long)]
    foreground: bool,
    /// Leave nobody behind who brings dead connections back.
    #[arg(long, conflicts_with = "foreground")]
    no_keeper: bool,
    /// What the command starts to become the keeper.
    #[arg(long, hide = true)]
    in_background: bool,
}

fn block_size(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(bytes @ (512 | 1024 | 2048 | 4096)) => Ok(bytes),
        _ => Err("give 512, 1024, 2048 or 4096".to_owned()),
    }
}

impl Attach {
    pub(super) fn run(self) -> Outcome {
        if self.connections > 1 && self.timeout == Some(0) {
            return Err(Failure::new("with several connections the kernel always gives up late ones")
                .hint("give a --timeout, or --connections 1"));
        }
        if self.foreground || self.no_keeper || self.in_background {
            self.attach_here()
        } else {
            start_in_background()
        }
    }

    fn attach_here(self) -> Outcome {
        let filter = EnvFilter::try_from_default_env();
        log::to_stderr(filter.unwrap_or_else(|_| EnvFilter::new("warn,nbdmirror=info")));
        let options = Options {
            connections: self.connections,
            timeout_s: self.timeout,
            dead_timeout_s: self.dead_timeout,
            block_bytes: self.block_size,
            keeper: !self.no_keeper,
        };
        let what = self.source.to_string();
        let mut attached = attach(self.source, self.device, options)?;
        let line = in_words(&attached, &what);
        let keeper = attached.keeper.take();
        if self.foreground && keeper.is_none() {
            return Err(Failure::new(format!("{line}, which another process does"))
                .hint("end that first, or leave --foreground out"));
        }
        let log =
            if self.in_background && keeper.is_some() { leave_terminal(attached.device)? } else { None };
        print(&format!("{line}\n"))?;
        let Some(keeper) = keeper else { return Ok(()) };
        if self.in_background {
            _ = File::open("/dev/null").map(dup2_stdout);
        } else {
            activation::notify("READY=1");
        }
        keeper.run(log.as_ref())
    }
}

fn in_words(attached: &Attached, what: &str) -> String {
    let access = if attached.read_only() { "read-only" } else { "read-write" };
    let plural = if attached.connections == 1 { "" } else { "s" };
    let done = match (attached.again, attached.kept) {
        (false, _) => "",
        (true, false) => ", connected again",
        (true, true) => ", connected again and kept as before",
    };
    format!(
        "{} is {what}: {}, {access}, {} connection{plural}{done}",
        attached.device.path().display(),
        pretty(attached.export.size_bytes),
        attached.connections
    )
}

/// Starts the keeper and waits until it has attached the device.
fn start_in_background() -> Outcome {
    let failed = |error: std::io::Error| Failure::new(format!("cannot start the keeper: {error}"));
    let mut arguments = std::env::args_os().skip(1);
    let verb = arguments.next().unwrap_or_default();
    let mut child = Command::new(std::env::current_exe().map_err(failed)?)
        .arg(verb)
        .arg("--in-background")
        .args(arguments)
        // It leaves this folder.
        .env(RUNTIME_DIR_VARIABLE, std::path::absolute(runtime_dir()).map_err(failed)?)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).map_err(failed)?;
    }
    if line.is_empty() {
        // It has said why.
        let status = child.wait().map_err(failed)?;
        log::flush();
        std::process::exit(status.code().unwrap_or(1));
    }
    print(&line)
}

/// Lets go of the terminal and the working folder; the log goes to a file from now on, which is given.
fn leave_terminal(device: Device) -> Result<Option<File>, Failure> {
    let path = prepare_runtime_dir()?.join(format!("{}.log", device.name()));
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(&path)
        .map_err(|error| Failure::new(format!("cannot open {}: {error}", path.display())))?;
    log::flush();
    // What fails here leaves the keeper with a terminal, which is no reason to have no keeper.
    _ = setsid();
    _ = std::env::set_current_dir("/");
    _ = File::open("/dev/null").map(dup2_stdin);
    _ = dup2_stderr(&log);
    Ok(Some(log))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_are_what_the_kernel_takes() {
        assert_eq!(block_size("512"), Ok(512));
        assert_eq!(block_size("4096"), Ok(4096));
        for text in ["0", "256", "513", "8192", "4K", ""] {
            assert!(block_size(text).is_err(), "{text}");
        }
    }
}
