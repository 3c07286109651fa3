//! Why replicas are not started together, in words that an operator can act on.
//!
//! What must hold: each text names the replicas by path and says the command, or the deed, that goes on.

use uuid::Uuid;

use super::assemble::{AssembleOptions, Found};
use super::describe::{format_utc, printable, shell_word, state_word};
use super::superblock::{MemberState, Superblock};
use super::verdict::{Verdict, verdict};
use crate::units::ReplicaSet;

/// Why the replicas given cannot be started as a volume. The text says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    /// No replica was given, or none holds a volume.
    #[error(
        "none of the replicas given holds a volume; make one with `nbdmirror create` or `serve --create SIZE`"
    )]
    Empty,
    /// The replicas belong to more than one volume.
    #[error("the replicas belong to different volumes; give those of one volume only:{0}")]
    Foreign(String),
    /// Two of them are one replica and a copy of it.
    #[error("{path} is a copy of {original} (one replica's identity twice); give only one of the two")]
    Copy {
        /// The later one given.
        path: String,
        /// The earlier one given.
        original: String,
    },
    /// A replica uses features that only a newer program may write.
    #[error(
        "{path}: only a newer nbdmirror may write to it (features {features:#x}); use that, or serve with --read-only"
    )]
    ReadOnlyFeatures {
        /// Which replica.
        path: String,
        /// The unknown bits of the read-only compatible group.
        features: u64,
    },
    /// Replicas were written without each other.
    #[error("{0}")]
    Diverged(String),
    /// A replica is no member (any more).
    #[error(
        "{path} was removed from volume {volume}; leave it out, and to have it back: nbdmirror add {volume_word} \
         {path_word} (a full copy)"
    )]
    NotMember {
        /// Which replica.
        path: String,
        /// The path as a shell takes it.
        path_word: String,
        /// The volume's name.
        volume: String,
        /// The name as a shell takes it.
        volume_word: String,
    },
    /// Members are missing and `--degraded` was not given.
    #[error("{0}")]
    Missing(String),
    /// No replica found is in sync and `--force` was not given.
    #[error("{0}")]
    NoneInSync(String),
}

pub(super) fn check_one_volume(found: &[Found]) -> Result<(), AssembleError> {
    if found.is_empty() {
        return Err(AssembleError::Empty);
    }
    let mut volumes: Vec<Uuid> = Vec::new();
    for found in found {
        if !volumes.contains(&found.superblock.volume_uuid) {
            volumes.push(found.superblock.volume_uuid);
        }
    }
    if volumes.len() == 1 {
        return Ok(());
    }
    let mut text = String::new();
    for volume in volumes {
        let of_volume: Vec<&Found> = found.iter().filter(|f| f.superblock.volume_uuid == volume).collect();
        let paths: Vec<String> = of_volume.iter().map(|found| printable(&found.path)).collect();
        let name = printable(&of_volume[0].superblock.name);
        text += &format!("\n  volume {name} ({volume}): {}", paths.join(", "));
    }
    Err(AssembleError::Foreign(text))
}

pub(super) fn check_copies(found: &[Found]) -> Result<(), AssembleError> {
    let identity = |found: &Found| found.superblock.own_entry().map(|own| own.uuid);
    for (index, later) in found.iter().enumerate() {
        if let Some(earlier) = found[..index].iter().find(|earlier| identity(earlier) == identity(later)) {
            let (path, original) = (printable(&later.path), printable(&earlier.path));
            return Err(AssembleError::Copy { path, original });
        }
    }
    Ok(())
}

pub(super) fn check_features(found: &[Found], options: AssembleOptions) -> Result<(), AssembleError> {
    match found.iter().find(|found| found.read_only_features != 0) {
        Some(found) if !options.read_only => Err(AssembleError::ReadOnlyFeatures {
            path: printable(&found.path),
            features: found.read_only_features,
        }),
        _ => Ok(()),
    }
}

pub(super) fn check_members(
    found: &[Found],
    head: &Superblock,
    verdicts: &[Verdict],
) -> Result<(), AssembleError> {
    match found.iter().zip(verdicts).find(|(_, verdict)| **verdict == Verdict::NotMember) {
        Some((found, _)) => Err(AssembleError::NotMember {
            path: printable(&found.path),
            path_word: shell_word(&found.path),
            volume: printable(&head.name),
            volume_word: shell_word(&head.name),
        }),
        None => Ok(()),
    }
}

/// Describes every replica found, and the commands that keep each side.
pub(super) fn diverged(found: &[Found]) -> AssembleError {
    let sides = sides(found);
    let mut why: Vec<String> = Vec::new();
    for head in sides.iter().filter_map(|side| side.first()) {
        for other in found {
            if let Verdict::Diverged(reason) = verdict(&head.superblock, &other.superblock) {
                let line = format!("{}: seen from {}, {reason}", other.path, head.path);
                why.push(printable(&line));
            }
        }
    }
    let intro = "the replicas have diverged: each may hold writes that the other lacks. Nothing was changed.";
    AssembleError::Diverged(format!("{intro}\n  {}{}", why.join("\n  "), two_sides(found, &sides)))
}

/// In sync by the table, and each other's stale maps say otherwise.
pub(super) fn accuse_each_other(found: &[Found]) -> AssembleError {
    let sides: Vec<Vec<&Found>> = found.iter().map(|found| vec![found]).collect();
    let intro = "the replicas have diverged: each one's bitmaps say that the other missed writes. Nothing was changed.";
    AssembleError::Diverged(format!("{intro}{}", two_sides(found, &sides)))
}

/// Splits the replicas into sides that agree, each with its own newest replica first.
fn sides(found: &[Found]) -> Vec<Vec<&Found>> {
    let mut sides = Vec::new();
    let mut rest: Vec<&Found> = found.iter().collect();
    // Newest first by event count; what does not agree with that one makes the next side.
    rest.sort_by_key(|found| std::cmp::Reverse(found.superblock.event_count));
    while let Some(head) = rest.first().copied() {
        let agrees = |other: &&Found| {
            std::ptr::eq(*other, head)
                || !matches!(verdict(&head.superblock, &other.superblock), Verdict::Diverged(_))
        };
        let (side, others): (Vec<&Found>, Vec<&Found>) = rest.iter().copied().partition(agrees);
        sides.push(side);
        rest = others;
    }
    sides
}

fn two_sides(found: &[Found], sides: &[Vec<&Found>]) -> String {
    let mut text = String::new();
    for found in found {
        text += &format!("\n  {}: {}", printable(&found.path), found.describe());
    }
    text += "\nKeep one side; the other is then overwritten with it (copy first what you need from it):";
    for side in sides {
        text += &format!("\n  to keep {}:", paths(side, printable, ", "));
        text += &format!("\n    nbdmirror serve --degraded {}", paths(side, shell_word, " "));
        for other in found.iter().filter(|other| !side.iter().any(|kept| std::ptr::eq(*kept, *other))) {
            let name = shell_word(&other.superblock.name);
            text += &format!("\n    nbdmirror add --force {name} {}", shell_word(&other.path));
        }
    }
    text
}

fn paths(found: &[&Found], word: fn(&str) -> String, separator: &str) -> String {
    found.iter().map(|found| word(&found.path)).collect::<Vec<_>>().join(separator)
}

fn all_words(found: &[Found]) -> String {
    paths(&found.iter().collect::<Vec<_>>(), shell_word, " ")
}

/// Each missing member on a line of its own: slot, state, last path.
fn missing_lines(head: &Superblock, missing: ReplicaSet) -> String {
    head.members()
        .filter(|(slot, _)| missing.contains(*slot))
        .map(|(slot, member)| {
            let path = printable(&member.path);
            format!("\n  replica {slot}: last seen at {path}, recorded as {}", state_word(member.state))
        })
        .collect()
}

pub(super) fn missing(
    found: &[Found],
    head: &Superblock,
    missing: ReplicaSet,
    forced: bool,
) -> AssembleError {
    let force = if forced { "--force " } else { "" };
    AssembleError::Missing(format!(
        "volume {} is not complete; missing:{}\nName these replicas too, or start without them:\n  nbdmirror serve \
         --degraded {force}{}",
        printable(&head.name),
        missing_lines(head, missing),
        all_words(found),
    ))
}

pub(super) fn none_in_sync(found: &[Found], head: &Superblock, missing: ReplicaSet) -> AssembleError {
    let mut text = format!("no replica given has all of volume {}'s data:", printable(&head.name));
    for found in found {
        text += &format!(
            "\n  {}: missed writes after {}",
            printable(&found.path),
            format_utc(found.superblock.written_unix_ns)
        );
    }
    let newer: Vec<String> = head
        .members()
        .filter(|(slot, member)| missing.contains(*slot) && member.state == MemberState::InSync)
        .map(|(slot, member)| format!("replica {slot}, last seen at {}", printable(&member.path)))
        .collect();
    text += &match newer.as_slice() {
        [] => "\nNo other replica is known to have it.".to_owned(),
        newer => format!("\nThe newer data is on {}: name that replica too.", newer.join(", or on ")),
    };
    let degraded = if missing.is_empty() { "" } else { "--degraded " };
    text += &format!(
        "\nTo give up the newer data for good and go on from the best of these:\n  nbdmirror serve {degraded}--force {}",
        all_words(found)
    );
    AssembleError::NoneInSync(text)
}
