//! Running volumes as text for people, readable in 80 columns.

use std::fmt::Write;

use super::size::pretty;
use crate::control::protocol::VolumeStatus;
use crate::mirror::status::{Health, ReplicaState, ReplicaStatus, ResyncStatus, Status};

/// Characters of a progress bar.
const BAR_WIDTH: u64 = 30;

/// One line a volume.
pub(super) fn list(volumes: &[VolumeStatus]) -> String {
    let name_width = volumes.iter().map(|v| v.volume.name.chars().count()).max().unwrap_or(0).max(6);
    let mut text =
        format!("{:name_width$}  {:>9}  {:9}  {:8}  RESYNC\n", "VOLUME", "SIZE", "HEALTH", "REPLICAS");
    for status in volumes {
        let volume = &status.volume;
        let in_sync = volume.replicas.iter().filter(|replica| replica.state == ReplicaState::InSync).count();
        let replicas = format!("{in_sync}/{}", volume.replicas.len());
        let resync = volume.resync.as_ref().map_or_else(|| "-".to_owned(), progress_in_words);
        let _ = writeln!(
            text,
            "{:name_width$}  {:>9}  {:9}  {replicas:8}  {resync}",
            volume.name,
            pretty(volume.size_bytes),
            health(volume.health),
        );
    }
    text
}

/// One volume and all of its replicas.
pub(super) fn detail(status: &VolumeStatus) -> String {
    let volume = &status.volume;
    let daemon = &status.daemon;
    let mut text = String::new();
    let read_only = if volume.read_only { ", read-only" } else { "" };
    let _ = writeln!(
        text,
        "Volume {}: {}, {}{read_only}",
        volume.name,
        health(volume.health),
        pretty(volume.size_bytes)
    );
    let _ = writeln!(text, "  identity  {}", volume.volume_uuid);
    let _ = writeln!(text, "  daemon    pid {}, up {}", daemon.pid, duration(daemon.uptime_s));
    for (index, uri) in daemon.listen.iter().enumerate() {
        let _ = writeln!(text, "  {:8}  {uri}", if index == 0 { "serves" } else { "" });
    }
    let _ = writeln!(text, "  control   {}", daemon.control);
    clients(&mut text, status);
    dirty(&mut text, volume);
    text.push('\n');
    text.push_str("  SLOT STATE           STALE  READS  LATENCY r/w       ERRORS  REPLICA\n");
    for replica in &volume.replicas {
        replica_lines(&mut text, replica, status);
    }
    if let Some(resync) = &volume.resync {
        let _ = writeln!(text, "\n  resync {} {}", bar(resync), progress_in_words(resync));
    }
    text
}

fn clients(text: &mut String, status: &VolumeStatus) {
    let counters = &status.volume.clients;
    let _ = writeln!(
        text,
        "  clients   {} connected, {} requests in flight\n  requests  {} reads ({}), {} writes ({}), {} flushes",
        status.engine.connections,
        counters.in_flight,
        counters.reads,
        pretty(counters.read_bytes),
        counters.writes,
        pretty(counters.write_bytes),
        counters.flushes,
    );
    if counters.errors > 0 {
        let _ = writeln!(text, "            {} answered with an error", counters.errors);
    }
}

fn dirty(text: &mut String, volume: &Status) {
    let _ = writeln!(
        text,
        "  dirty     {} in regions of {} (a crash now would resync these)",
        pretty(volume.dirty_bytes),
        pretty(volume.region_bytes)
    );
    if volume.unclean_bytes_at_start > 0 {
        let _ = writeln!(
            text,
            "  unclean   {} at this start, {} still to be synced",
            pretty(volume.unclean_bytes_at_start),
            pretty(volume.unsynced_bytes)
        );
    }
}

fn replica_lines(text: &mut String, replica: &ReplicaStatus, status: &VolumeStatus) {
    let stale = if replica.stale_bytes == 0 { "-".to_owned() } else { pretty(replica.stale_bytes) };
    let latency =
        format!("{} / {}", latency(replica.read_latency_ewma_ns), latency(replica.write_latency_ewma_ns));
    let _ = writeln!(
        text,
        "  {:<4} {:10} {stale:>10}  {:>4.0}%  {latency:16}  {:>6}  {}",
        replica.slot,
        state(replica.state),
        replica.read_share * 100.0,
        replica.errors,
        replica.path,
    );
    if let Some(access) = status.access_in_words(replica.slot).filter(|access| *access != "direct I/O") {
        let _ = writeln!(text, "       {access}: what it stands on takes no direct I/O");
    }
    if let Some(reason) = &replica.reason {
        let _ = writeln!(text, "       why: {reason}");
    }
    if replica.write_mostly {
        text.push_str("       write-mostly: read only when nothing else can answer\n");
    }
}

fn health(health: Health) -> &'static str {
    match health {
        Health::Healthy => "healthy",
        Health::Resyncing => "resyncing",
        Health::Degraded => "DEGRADED",
        Health::Failed => "FAILED",
    }
}

/// A replica's state in the words that `--json` uses too.
pub(super) fn state(state: ReplicaState) -> &'static str {
    match state {
        ReplicaState::InSync => "in-sync",
        ReplicaState::Resyncing => "resyncing",
        ReplicaState::Stale => "stale",
        ReplicaState::Faulty => "faulty",
        ReplicaState::Missing => "missing",
    }
}

/// Done hundredths, rounded down: 100 only when nothing is left.
fn percent_done(resync: &ResyncStatus) -> u64 {
    let all = resync.done_bytes.saturating_add(resync.remaining_bytes);
    if all == 0 { 100 } else { (u128::from(resync.done_bytes) * 100 / u128::from(all)) as u64 }
}

fn bar(resync: &ResyncStatus) -> String {
    let full = percent_done(resync) * BAR_WIDTH / 100;
    format!("[{}{}]", "#".repeat(full as usize), "-".repeat((BAR_WIDTH - full) as usize))
}

fn progress_in_words(resync: &ResyncStatus) -> String {
    let left = resync.time_left_s.map(|seconds| format!(", {} left", duration(seconds))).unwrap_or_default();
    format!(
        "{}%, {} to go at {}/s{left}",
        percent_done(resync),
        pretty(resync.remaining_bytes),
        pretty(resync.rate_bytes_per_s)
    )
}

/// A time in nanoseconds as `80 us` or `1.2 ms`; `-` for 0, which is "not known".
fn latency(ns: u64) -> String {
    match ns {
        0 => "-".to_owned(),
        1..1_000_000 => format!("{} us", ns.div_ceil(1000)),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.1} s", ns as f64 / 1e9),
    }
}

/// Seconds as `45 s`, `3 min 20 s`, `2 h 5 min` or `3 d 4 h`.
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match () {
        () if days > 0 => format!("{days} d {} h", hours % 24),
        () if hours > 0 => format!("{hours} h {} min", minutes % 60),
        () if minutes > 0 => format!("{minutes} min {} s", seconds % 60),
        () => format!("{seconds} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_in_words() {
        for (seconds, words) in
            [(0, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (273_600, "3 d 4 h")]
        {
            assert_eq!(duration(seconds), words);
        }
        for (ns, words) in
            [(0, "-"), (1, "1 us"), (80_000, "80 us"), (1_250_000, "1.2 ms"), (2_000_000_000, "2.0 s")]
        {
            assert_eq!(latency(ns), words);
        }
    }

    #[test]
    fn progress_never_claims_more_than_is_done() {
        let resync = |done_bytes, remaining_bytes| ResyncStatus {
            remaining_bytes,
            done_bytes,
            rate_bytes_per_s: 100 << 20,
            time_left_s: Some(61),
        };
        assert_eq!(percent_done(&resync(999, 1)), 99);
        assert_eq!(percent_done(&resync(1000, 0)), 100);
        assert_eq!(percent_done(&resync(0, 0)), 100);
        assert_eq!(
            progress_in_words(&resync(1 << 30, 3 << 30)),
            "25%, 3 GiB to go at 100 MiB/s, 1 min 1 s left"
        );
        assert_eq!(bar(&resync(1, 1)), "[###############---------------]");
        assert_eq!(percent_done(&resync(u64::MAX, u64::MAX)), 100);
    }
}
