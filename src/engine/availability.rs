//! Is there an io_uring that the data plane can use, and if not, what is to be changed.
//!
//! What must hold: every refusal names its cause as the system shows it (not just an errno) and the remedy.

use std::fs::read_to_string;
use std::io;

use io_uring::{IoUring, Probe, opcode};
use nix::sys::resource::{Resource, getrlimit};

const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";
const SYSCTL_GROUP: &str = "/proc/sys/kernel/io_uring_group";

/// Why io_uring cannot be used. The text says what to do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UringUnavailable {
    /// ENOSYS: built without it, or older than 5.1.
    #[error(
        "this kernel has no io_uring. Use Linux 5.11 or newer, built with CONFIG_IO_URING (6.1 or newer is faster)"
    )]
    NoKernelSupport,
    /// It lacks something that is needed.
    #[error(
        "this kernel's io_uring is too old: it lacks {0}. Use Linux 5.11 or newer (6.1 or newer is faster)"
    )]
    TooOld(String),
    /// `kernel.io_uring_disabled` is 2.
    #[error(
        "io_uring is switched off for everybody. Allow it with `sysctl kernel.io_uring_disabled=0` (as root)"
    )]
    SwitchedOff,
    /// `kernel.io_uring_disabled` is 1 and the process has neither the group nor CAP_SYS_ADMIN.
    #[error(
        "io_uring is allowed for group {group} and for root only. Add this user to that group, set another with `sysctl kernel.io_uring_group=GID`, or allow it for everybody with `sysctl kernel.io_uring_disabled=0`"
    )]
    WrongGroup {
        /// The group id; -1 is none.
        group: String,
    },
    /// A seccomp filter.
    #[error(
        "io_uring is forbidden by a seccomp filter, as container runtimes set one. Allow the io_uring_setup, io_uring_enter and io_uring_register system calls in the container's seccomp profile (with Docker or Podman: --security-opt seccomp=PROFILE.json, or seccomp=unconfined)"
    )]
    Seccomp,
    /// EPERM or EACCES for another reason.
    #[error(
        "io_uring is forbidden for this process. Look for a security module's denial (SELinux, AppArmor) in the kernel's log (`dmesg`, `ausearch -m avc`) and allow it"
    )]
    Forbidden,
    /// ENOMEM: before 5.12 rings count against the memory-lock limit.
    #[error(
        "there is no memory for an io_uring: the limit on locked memory is {limit}. Raise it (`ulimit -l 65536`, or LimitMEMLOCK=64M in the systemd unit), or free memory"
    )]
    NoMemory {
        /// RLIMIT_MEMLOCK, bytes.
        limit: String,
    },
    /// EMFILE, ENFILE.
    #[error(
        "no file descriptor is left for an io_uring. Raise the limit (`ulimit -n`, or LimitNOFILE= in the systemd unit)"
    )]
    NoDescriptor,
    /// Anything else.
    #[error("io_uring cannot be set up: {0}. It needs Linux 5.11 or newer with CONFIG_IO_URING")]
    Other(String),
}

/// Checks that io_uring is there and has what the data plane needs.
///
/// # Errors
/// Why not, and what to do.
pub fn check_io_uring() -> Result<(), UringUnavailable> {
    let uring = IoUring::new(8).map_err(|error| explain(&error))?;
    if !uring.params().is_feature_ext_arg() {
        return Err(UringUnavailable::TooOld("waiting with a time-out (EXT_ARG)".to_owned()));
    }
    if !uring.params().is_feature_nodrop() {
        return Err(UringUnavailable::TooOld("lossless completion (NODROP)".to_owned()));
    }
    let mut probe = Probe::new();
    uring.submitter().register_probe(&mut probe).map_err(|error| explain(&error))?;
    let needed = [
        ("READ", opcode::Read::CODE),
        ("WRITE", opcode::Write::CODE),
        ("FSYNC", opcode::Fsync::CODE),
        ("FALLOCATE", opcode::Fallocate::CODE),
        ("RECV", opcode::Recv::CODE),
        ("SEND", opcode::Send::CODE),
        ("SENDMSG", opcode::SendMsg::CODE),
        ("ASYNC_CANCEL", opcode::AsyncCancel::CODE),
    ];
    let missing: Vec<_> =
        needed.iter().filter(|(_, code)| !probe.is_supported(*code)).map(|(name, _)| *name).collect();
    if missing.is_empty() { Ok(()) } else { Err(UringUnavailable::TooOld(missing.join(", "))) }
}

/// What an error of setting up a ring means here.
pub(super) fn explain(error: &io::Error) -> UringUnavailable {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => UringUnavailable::NoKernelSupport,
        Some(libc::EPERM | libc::EACCES) => explain_permission(
            read_to_string(SYSCTL).ok().as_deref(),
            read_to_string(SYSCTL_GROUP).ok().as_deref(),
            read_to_string("/proc/self/status").ok().as_deref(),
        ),
        Some(libc::ENOMEM) => UringUnavailable::NoMemory { limit: memory_lock_limit() },
        Some(libc::EMFILE | libc::ENFILE) => UringUnavailable::NoDescriptor,
        _ => UringUnavailable::Other(error.to_string()),
    }
}

/// Which of the things that forbid io_uring did, from what `/proc` says.
fn explain_permission(
    disabled: Option<&str>,
    group: Option<&str>,
    process_status: Option<&str>,
) -> UringUnavailable {
    let seccomp = process_status
        .and_then(|status| status.lines().find_map(|line| line.strip_prefix("Seccomp:")))
        .is_some_and(|mode| mode.trim() != "0");
    match disabled.map(str::trim) {
        Some("2") => UringUnavailable::SwitchedOff,
        // A process in the group may still be under a filter, but this comes first.
        Some("1") => {
            let group = group.map_or("-1", str::trim).to_owned();
            UringUnavailable::WrongGroup { group }
        }
        _ if seccomp => UringUnavailable::Seccomp,
        _ => UringUnavailable::Forbidden,
    }
}

fn memory_lock_limit() -> String {
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, _)) if soft == libc::RLIM_INFINITY => "none".to_owned(),
        Ok((soft, _)) => format!("{} KiB", soft / 1024),
        Err(_) => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_uring_is_there_where_the_tests_run() {
        assert_eq!(check_io_uring(), Ok(()));
    }

    #[test]
    fn each_cause_is_told_apart() {
        let filtered = Some("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n");
        let free = Some("Seccomp:\t0\n");
        assert_eq!(explain_permission(Some("2\n"), None, filtered), UringUnavailable::SwitchedOff);
        let group = UringUnavailable::WrongGroup { group: "999".to_owned() };
        assert_eq!(explain_permission(Some("1\n"), Some("999\n"), free), group);
        assert_eq!(explain_permission(Some("0\n"), Some("-1\n"), filtered), UringUnavailable::Seccomp);
        assert_eq!(explain_permission(None, None, filtered), UringUnavailable::Seccomp);
        assert_eq!(explain_permission(None, None, free), UringUnavailable::Forbidden);
        let explained = |errno| explain(&io::Error::from_raw_os_error(errno));
        assert_eq!(explained(libc::ENOSYS), UringUnavailable::NoKernelSupport);
        assert!(matches!(explained(libc::ENOMEM), UringUnavailable::NoMemory { .. }));
        assert!(explained(libc::EINVAL).to_string().contains("Linux 5.11"));
    }
}
