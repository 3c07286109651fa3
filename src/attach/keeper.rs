//! The keeper of an attached device: it brings dead connections back, until the device is detached.
//!
//! What must hold: a connection goes to the device only when it leads to the same volume, of the same size, which can do all
//! that the device was promised; what waits for a connection waits no longer than the dead time-out.

use std::fs::File;
use std::time::{Duration, Instant};

use super::device::{Device, System};
use super::links::Links;
use super::netlink::{DeadLinks, Heard, NbdNetlink};
use super::source::{Server, Source};
use super::{Options, StateFile, as_descriptors};
use crate::control::failure::Failure;
use crate::nbd::client::Connected;
use crate::nbd::wire::FLAG_READ_ONLY;

/// How often the keeper looks whether the device is still attached.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long the log file may become, bytes. It stands in memory, and nobody rotates it.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// Keeps one device; see the file's header.
#[derive(Debug)]
pub struct Keeper {
    pub(super) system: System,
    pub(super) netlink: NbdNetlink,
    pub(super) dead_links: DeadLinks,
    pub(super) source: Source,
    pub(super) device: Device,
    /// Whose attachment this is: the kernel's `pid` of it.
    pub(super) pid: String,
    pub(super) identity: String,
    pub(super) export: Connected,
    pub(super) options: Options,
    /// Held while the keeper lives.
    pub(super) _state: StateFile,
}

impl Keeper {
    /// Keeps the device until somebody detaches it. `log`, where given, is the file that the log is appended to; it is
    /// kept short.
    ///
    /// # Errors
    /// The device was given up because requests waited for a connection for too long; or netlink fails.
    pub fn run(mut self, log: Option<&File>) -> Result<(), Failure> {
        let began = Instant::now();
        let node = self.device.path();
        let mut links = Links::new(self.options.connections);
        let mut complaint = None;
        loop {
            let wait = links.wait(began.elapsed()).map_or(LOOK_INTERVAL, |wait| wait.min(LOOK_INTERVAL));
            let heard = self.dead_links.wait(self.device.index, wait);
            let now = began.elapsed();
            match heard.map_err(|error| error.failure("cannot hear of dead connections"))? {
                Heard::Nothing => {}
                Heard::Died(count) => links.died(count, now),
                Heard::Lost => links.unknown(now),
            }
            if self.system.attachment(self.device).is_none_or(|found| found.pid != self.pid) {
                tracing::info!("{}: detached", node.display());
                return Ok(());
            }
            if links.wait(now).is_none_or(|wait| wait > Duration::ZERO) {
                continue;
            }
            shorten(log);
            match self.reconnect(links.dead()) {
                Ok(()) => {
                    tracing::info!("{}: {} connection(s) connected again", node.display(), links.dead());
                    links.reconnected();
                    complaint = None;
                }
                Err(failure) => {
                    // Again and again the same is said once.
                    if complaint.as_ref() != Some(&failure) {
                        tracing::warn!(
                            "{}: {} of {} connections are dead: {failure}",
                            node.display(),
                            links.dead(),
                            self.options.connections
                        );
                        complaint = Some(failure);
                    }
                    links.failed(began.elapsed());
                    self.give_up_in_time(&links, began.elapsed())?;
                }
            }
        }
    }

    /// Offers the device as many new connections as are dead.
    fn reconnect(&mut self, dead: u32) -> Result<(), Failure> {
        let server = self.source.find()?;
        check_identity(&self.identity, &server)?;
        let mut fresh = Vec::new();
        for _ in 0..dead {
            let link = server.connect()?;
            check_export(&self.export, &link.export)?;
            fresh.push(link);
        }
        let offer = as_descriptors(&fresh);
        self.netlink
            .reconnect(self.device.index, &self.identity, &offer)
            .map_err(|error| error.failure("cannot reconnect"))
    }

    /// Detaches the device where requests have waited for the dead time-out. The kernel itself fails only those that
    /// were not yet sent, not those that wait for the answer of a connection that died.
    fn give_up_in_time(&mut self, links: &Links, now: Duration) -> Result<(), Failure> {
        let timeout = Duration::from_secs(self.options.dead_timeout_s);
        if links.down_for(now).is_none_or(|down| down < timeout) || self.system.in_flight(self.device) == 0 {
            return Ok(());
        }
        self.netlink
            .disconnect(self.device.index)
            .map_err(|error| error.failure("cannot detach a device whose server is gone"))?;
        let what = format!(
            "{}: requests waited {} s for a connection; detached, they fail",
            self.device.path().display(),
            self.options.dead_timeout_s
        );
        Err(Failure::new(what).hint("unmount what is on it, start the volume, attach again"))
    }
}

/// Begins a log anew that has become long. Whoever appends to it goes on at its end.
fn shorten(log: Option<&File>) {
    if let Some(log) = log
        && log.metadata().is_ok_and(|metadata| metadata.len() > LOG_BYTES_MAX)
    {
        _ = log.set_len(0);
    }
}

/// Refuses another volume than the one that is attached.
pub(super) fn check_identity(wanted: &str, server: &Server) -> Result<(), Failure> {
    if server.identity == wanted {
        return Ok(());
    }
    Err(Failure::new(format!("another volume answers now: {}, not {wanted}", server.identity))
        .hint("serve the right one under this name, or detach the device"))
}

/// Refuses an export that cannot stand in for the one that is attached.
pub(super) fn check_export(attached: &Connected, found: &Connected) -> Result<(), Failure> {
    if found.size_bytes != attached.size_bytes {
        let (now, before) = (found.size_bytes, attached.size_bytes);
        return Err(Failure::new(format!("the export has {now} bytes, the device {before}"))
            .hint("detach the device and attach it anew"));
    }
    let read_only = (attached.transmission_flags ^ found.transmission_flags) & FLAG_READ_ONLY != 0;
    // More is no harm: a newer server.
    if read_only || attached.transmission_flags & !found.transmission_flags != 0 {
        return Err(Failure::new(format!(
            "the export's flags are {:#x}, the device was attached with {:#x}",
            found.transmission_flags, attached.transmission_flags
        ))
        .hint("serve it as before (read-only or not), or detach the device and attach it anew"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::{FLAG_HAS_FLAGS, FLAG_SEND_FLUSH, FLAG_SEND_TRIM};

    #[test]
    fn only_the_same_export_stands_in() {
        let export = |size_bytes, transmission_flags| Connected { size_bytes, transmission_flags };
        let attached = export(1 << 20, FLAG_HAS_FLAGS | FLAG_SEND_FLUSH);
        assert_eq!(check_export(&attached, &attached), Ok(()));
        let newer = export(1 << 20, FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_TRIM);
        assert_eq!(check_export(&attached, &newer), Ok(()));
        for (other, reason) in [
            (export(1 << 21, attached.transmission_flags), "bytes"),
            (export(1 << 20, FLAG_HAS_FLAGS), "flags"),
            (export(1 << 20, attached.transmission_flags | FLAG_READ_ONLY), "flags"),
        ] {
            let failure = check_export(&attached, &other).unwrap_err();
            assert!(failure.what.contains(reason), "{failure}");
        }
        let read_only = export(1 << 20, attached.transmission_flags | FLAG_READ_ONLY);
        assert!(check_export(&read_only, &attached).is_err());
    }

    #[test]
    fn another_volume_is_refused() {
        let server = "nbd://localhost/a".parse::<Source>().unwrap().find().unwrap();
        assert_eq!(check_identity("nbd://localhost/a", &server), Ok(()));
        let failure = check_identity("nbdmirror:1", &server).unwrap_err();
        assert!(failure.what.contains("nbd://localhost/a, not nbdmirror:1"), "{failure}");
    }
}
