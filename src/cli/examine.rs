//! Shows what stands on replicas: `nbdmirror examine`. Reads only, takes no lock, so it works beside a daemon.

use std::fmt::Write;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use clap::Args;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use uuid::Uuid;

use super::size::pretty;
use super::{Outcome, complain, print};
use crate::control::failure::Failure;
use crate::format::Found;
use crate::format::bitmap::Bitmap;
use crate::format::describe::{format_utc, printable, state_word};
use crate::format::read::read_found;
use crate::units::{RegionIndex, Regions, ReplicaOffset};

const AFTER_HELP: &str = "\
Examples:
  nbdmirror examine disk-a.img disk-b.img
  nbdmirror examine --json /dev/sdb

Exits with 1 if a replica cannot be read or holds no volume that can be understood.";

#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Examine {
    /// Files or block devices.
    #[arg(required = true)]
    replica: Vec<PathBuf>,
    /// Print everything as JSON: an array.
    #[arg(long)]
    json: bool,
}

/// What was found at one path. The schema stands in `docs/status-json.md`.
#[derive(Debug, Serialize)]
struct Examined {
    path: String,
    /// Why there is nothing more to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replica: Option<ReplicaFacts>,
}

#[derive(Debug, Serialize)]
struct ReplicaFacts {
    in_use: bool,
    device_bytes: u64,
    volume_uuid: Uuid,
    name: String,
    volume_bytes: u64,
    region_bytes: u64,
    created_unix_s: u64,
    slot: usize,
    event_count: u64,
    generation: Uuid,
    parents: Vec<Uuid>,
    clean: bool,
    written_unix_ns: u64,
    damaged_slot: Option<u64>,
    damaged_sectors: u64,
    /// Bytes in regions whose intent bit is set.
    dirty_bytes: u64,
    members: Vec<MemberFacts>,
}

#[derive(Debug, Serialize)]
struct MemberFacts {
    slot: usize,
    uuid: Uuid,
    state: &'static str,
    event_count: u64,
    path: String,
    /// Bytes in regions that it missed writes in, by this replica's account.
    stale_bytes: u64,
}

impl Examine {
    pub(super) fn run(self) -> Outcome {
        let examined: Vec<Examined> = self.replica.iter().map(|path| examine(path)).collect();
        if self.json {
            let text = serde_json::to_string_pretty(&examined)
                .map_err(|error| Failure::new(format!("cannot print this as JSON: {error}")))?;
            print(&(text + "\n"))?;
        } else {
            let texts: Vec<String> = examined
                .iter()
                .filter_map(|examined| Some(describe(&examined.path, examined.replica.as_ref()?)))
                .collect();
            print(&texts.join("\n"))?;
        }
        let mut failures = examined.into_iter().filter_map(|examined| examined.error).peekable();
        while let Some(error) = failures.next() {
            if failures.peek().is_none() {
                return Err(Failure::new(error));
            }
            complain(&error);
        }
        Ok(())
    }
}

fn examine(path: &Path) -> Examined {
    let shown = path.display().to_string();
    match look(path, &shown) {
        Ok(Some((found, in_use))) => {
            Examined { path: shown, error: None, replica: Some(facts(&found, in_use)) }
        }
        Ok(None) => {
            let error = Some(format!("{shown} holds no nbdmirror volume"));
            Examined { path: shown, error, replica: None }
        }
        Err(error) => Examined { path: shown, error: Some(error), replica: None },
    }
}

/// What stands at `path`, and whether a daemon has it open.
fn look(path: &Path, shown: &str) -> Result<Option<(Found, bool)>, String> {
    let failed = |doing: &str, error: io::Error| format!("{shown}: cannot {doing}: {error}");
    // To open a FIFO or a tape may wait or act.
    let kind = std::fs::metadata(path).map_err(|error| failed("look at it", error))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(format!("{shown} is neither a regular file nor a block device"));
    }
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| failed("open it", error))?;
    let device_bytes = file.seek(SeekFrom::End(0)).map_err(|error| failed("find its size", error))?;
    let mut read_at = |offset: ReplicaOffset, bytes: &mut [u8]| file.read_exact_at(bytes, offset.0);
    let found = read_found(shown, device_bytes, &mut read_at).map_err(|error| error.to_string())?;
    Ok(found.map(|found| (found, is_in_use(file))))
}

/// Whether a daemon holds the lock that all of them take.
fn is_in_use(file: File) -> bool {
    matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, Errno::EWOULDBLOCK)))
}

fn facts(found: &Found, in_use: bool) -> ReplicaFacts {
    let superblock = &found.superblock;
    let members = superblock
        .members()
        .map(|(slot, member)| MemberFacts {
            slot: slot.index(),
            uuid: member.uuid,
            state: state_word(member.state),
            event_count: member.event_count,
            path: member.path.clone(),
            stale_bytes: bytes_in(superblock.regions, &found.maps.stale[slot.index()]),
        })
        .collect();
    ReplicaFacts {
        in_use,
        device_bytes: found.device_bytes,
        volume_uuid: superblock.volume_uuid,
        name: superblock.name.clone(),
        volume_bytes: superblock.regions.volume_bytes,
        region_bytes: superblock.regions.region_bytes,
        created_unix_s: superblock.created_unix_s,
        slot: superblock.slot.index(),
        event_count: superblock.event_count,
        generation: superblock.generation,
        parents: superblock.parents.clone(),
        clean: superblock.clean,
        written_unix_ns: superblock.written_unix_ns,
        damaged_slot: found.damaged_slot,
        damaged_sectors: found.damaged_sectors,
        dirty_bytes: bytes_in(superblock.regions, &found.maps.intent),
        members,
    }
}

fn bytes_in(regions: Regions, bitmap: &Bitmap) -> u64 {
    bitmap.iter_ones().map(|index| regions.range(RegionIndex(index as u64)).len).sum()
}

fn describe(path: &str, facts: &ReplicaFacts) -> String {
    let mut text = String::new();
    let in_use = if facts.in_use { " (in use by a daemon)" } else { "" };
    let _ = writeln!(text, "{path}: replica {} of volume {}{in_use}", facts.slot, printable(&facts.name));
    let _ = writeln!(
        text,
        "  volume      {}, {} in regions of {}",
        facts.volume_uuid,
        pretty(facts.volume_bytes),
        pretty(facts.region_bytes)
    );
    let _ =
        writeln!(text, "  created     {}", format_utc(facts.created_unix_s.saturating_mul(1_000_000_000)));
    let _ = writeln!(text, "  written     {}", format_utc(facts.written_unix_ns));
    let state = if facts.clean { "clean" } else { "not stopped cleanly, or running" };
    let _ = writeln!(text, "  state       {state}; {} dirty", pretty(facts.dirty_bytes));
    let _ = writeln!(text, "  event count {}", facts.event_count);
    let _ = writeln!(text, "  generation  {}", facts.generation);
    for parent in &facts.parents {
        let _ = writeln!(text, "    before it {parent}");
    }
    if let Some(slot) = facts.damaged_slot {
        let _ =
            writeln!(text, "  DAMAGED     superblock slot {slot}; the other one is used, serving mends it");
    }
    if facts.damaged_sectors > 0 {
        let sectors = facts.damaged_sectors;
        let _ = writeln!(text, "  DAMAGED     {sectors} bitmap sectors; their regions are taken to be dirty");
    }
    text.push_str("  members by its account:\n");
    for member in &facts.members {
        let stale = if member.stale_bytes == 0 {
            String::new()
        } else {
            format!(", {} stale", pretty(member.stale_bytes))
        };
        let _ = writeln!(
            text,
            "    {}  {:9}  event {}{stale}  {}",
            member.slot,
            member.state,
            member.event_count,
            printable(&member.path)
        );
    }
    text
}
