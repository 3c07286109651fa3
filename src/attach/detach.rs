//! Detaching a device: nobody may use it, what it holds back is written, then the kernel lets go.
//!
//! ```text
//!   users? ──yes──► refused        (--force: on)
//!     │ no
//!   flush, in a process of its own ──late──► refused        (--force: on, after a shorter wait)
//!     │ done
//!   DISCONNECT ──► wait until it is free ──late──► say who has it open
//! ```
//!
//! What must hold: whatever the server does, this ends in bounded time. A flush of a device whose server is gone hangs,
//! uninterruptible, until the dead time-out; so it happens in another process, which is left behind then.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use super::POLL_INTERVAL;
use super::device::{Device, System};
use super::netlink::NbdNetlink;
use crate::control::failure::Failure;

const FLUSH_TIMEOUT: Duration = Duration::from_secs(60);
const FORCED_FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
const FREE_TIMEOUT: Duration = Duration::from_secs(10);
/// The block layer's own.
const REQUEST_CHECK_MS_DEFAULT: u32 = 30_000;
/// What the flushing process may say, bytes.
const REPORT_BYTES_MAX: u64 = 4096;

/// Flushes a device that nobody else has claimed; what the flushing process does.
///
/// # Errors
/// `ResourceBusy` where a filesystem or another device stands on it; whatever opening and flushing give.
pub fn flush(device: Device) -> io::Result<()> {
    // Exclusive: refused where anything in the kernel holds the device, in whatever namespace.
    let file: File = OpenOptions::new().read(true).custom_flags(nix::libc::O_EXCL).open(device.path())?;
    file.sync_all()
}

/// Detaches `device`. `start_flush` starts a process that runs [`flush`] and writes what went wrong to its standard output,
/// which is a pipe. Gives what there is to say besides.
///
/// # Errors
/// It is not attached; it is in use or cannot be flushed, and `force` is not set; the kernel refuses.
pub fn detach(
    device: Device,
    force: bool,
    start_flush: impl FnOnce() -> io::Result<Child>,
) -> Result<Option<String>, Failure> {
    let node = device.path();
    let mut netlink =
        NbdNetlink::open().map_err(|error| error.failure(&format!("cannot detach {}", node.display())))?;
    let system = System::default();
    if system.attachment(device).is_none() {
        return Err(Failure::new(format!("{} is not attached", node.display())));
    }
    let users = system.users(device)?;
    if !users.is_empty() && !force {
        return Err(Failure::new(format!("cannot detach a device in use: {}", users.join(", "))).hint(
            "end that first (umount, swapoff, dmsetup remove...); --force detaches all the same, with loss",
        ));
    }
    let flushed = flush_in_time(start_flush, if force { FORCED_FLUSH_TIMEOUT } else { FLUSH_TIMEOUT });
    match flushed {
        Err(what) if !force => {
            return Err(Failure::new(format!("cannot detach {}: {what}", node.display()))
                .hint("is its volume running? --force detaches all the same, with loss"));
        }
        _ => {}
    }
    // As the kernel has it by default: the next client of the device may know nothing of our setting.
    _ = system.set_request_check_ms(device, REQUEST_CHECK_MS_DEFAULT);
    netlink
        .disconnect(device.index)
        .map_err(|error| error.failure(&format!("cannot detach {}", node.display())))?;
    let lost = flushed.err().map(|what| format!("writes may be lost: {what}"));
    if !users.is_empty() {
        // It stays occupied as long as they use it, and gives them errors.
        let lost = lost.unwrap_or_default();
        return Ok(Some(format!("still in use, by what gets errors now: {}; {lost}", users.join(", "))));
    }
    wait_until_free(&system, device)?;
    Ok(lost)
}

fn wait_until_free(system: &System, device: Device) -> Result<(), Failure> {
    let began = Instant::now();
    while system.attachment(device).is_some() {
        if began.elapsed() > FREE_TIMEOUT {
            let openers = system.openers(device);
            let who = if openers.is_empty() {
                "some process or kernel device has it open".to_owned()
            } else {
                format!("process {} has it open", openers.join(", "))
            };
            return Err(Failure::new(format!(
                "{} is disconnected, but not free: {who}",
                device.path().display()
            ))
            .hint("it becomes free when that ends"));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

/// Runs the flushing process; what went wrong, in words.
fn flush_in_time(start: impl FnOnce() -> io::Result<Child>, timeout: Duration) -> Result<(), String> {
    let mut child = start().map_err(|error| format!("cannot start a process to flush it: {error}"))?;
    let began = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if began.elapsed() < timeout => std::thread::sleep(POLL_INTERVAL),
            Ok(None) => {
                // Takes effect when the kernel lets go of it; nobody waits for that.
                _ = child.kill();
                return Err(format!(
                    "its server did not take what is to be written in {} s",
                    timeout.as_secs()
                ));
            }
            Err(error) => return Err(format!("cannot wait for the process that flushes it: {error}")),
        }
    };
    report(&mut child, status)
}

fn report(child: &mut Child, status: ExitStatus) -> Result<(), String> {
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    if let Some(stdout) = child.stdout.take() {
        _ = stdout.take(REPORT_BYTES_MAX).read_to_string(&mut text);
    }
    let text = text.trim();
    Err(if text.is_empty() { format!("the process that flushes it: {status}") } else { text.to_owned() })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn shell(script: &str) -> impl FnOnce() -> io::Result<Child> {
        move || Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn()
    }

    #[test]
    fn the_flushing_process_is_not_waited_for_for_ever() {
        assert_eq!(flush_in_time(shell("exit 0"), Duration::from_secs(60)), Ok(()));
        let failed = flush_in_time(shell("echo it is mounted; exit 1"), Duration::from_secs(60));
        assert_eq!(failed, Err("it is mounted".to_owned()));
        let silent = flush_in_time(shell("exit 3"), Duration::from_secs(60));
        assert!(silent.unwrap_err().contains("exit status: 3"));
        let late = flush_in_time(shell("exec sleep 60"), Duration::ZERO);
        assert!(late.unwrap_err().contains("0 s"));
    }
}
