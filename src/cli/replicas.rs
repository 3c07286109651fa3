//! Which of the opened replicas a volume is assembled from.
//!
//! What must hold: nothing is left out silently. Without `--degraded` every replica named must be there and
//! readable; with it, each one that is left out is named in the log with the reason.

use super::open::Opened;
use crate::control::failure::Failure;
use crate::engine::device::ReplicaDevice;
use crate::format::Found;
use crate::format::describe::shell_word;
use crate::format::read::ReadError;

/// Replicas with a volume on them. The two lists run in parallel.
pub(super) struct Gathered {
    /// What stands on each.
    pub(super) found: Vec<Found>,
    /// The devices.
    pub(super) devices: Vec<ReplicaDevice>,
}

/// The replicas that hold a volume; all must, unless `degraded`.
pub(super) fn gather(opened: Vec<Opened>, degraded: bool) -> Result<Gathered, Failure> {
    let mut gathered = Gathered { found: Vec::new(), devices: Vec::new() };
    let mut left_out = None;
    let without = command_without_the_absent(&opened);
    for replica in opened {
        let path = replica.path_text();
        let failure = match (replica.device, replica.content) {
            (Some(device), Ok(Some(found))) => {
                gathered.devices.push(device);
                gathered.found.push(found);
                continue;
            }
            (Some(_), Ok(None)) => holds_nothing(&path, degraded),
            (Some(_), Err(error @ ReadError::Newer { .. })) => {
                return Err(Failure::new(error.to_string()));
            }
            (Some(_), Err(error)) => Failure::new(error.to_string()),
            (None, _) => {
                Failure::new(format!("{path}: there is no such file or device")).hint(match &without {
                    Some(command) => format!("check the path; if the replica is gone for now: {command}"),
                    None => "check the path; `serve --create SIZE` makes a volume".to_owned(),
                })
            }
        };
        if !degraded {
            return Err(failure);
        }
        tracing::warn!("left out: {failure}");
        left_out = Some(failure);
    }
    match (gathered.found.is_empty(), left_out) {
        (true, Some(failure)) => Err(failure),
        _ => Ok(gathered),
    }
}

/// The replicas of a volume just made.
pub(super) fn require_all(opened: Vec<Opened>) -> Result<Gathered, Failure> {
    gather(opened, false)
}

/// The command that serves the replicas that are there; `None` if there are none.
fn command_without_the_absent(opened: &[Opened]) -> Option<String> {
    let there = opened.iter().filter(|replica| matches!(replica.content, Ok(Some(_))));
    let words: Vec<String> = there.map(|replica| shell_word(&replica.path_text())).collect();
    (!words.is_empty()).then(|| format!("nbdmirror serve --degraded {}", words.join(" ")))
}

fn holds_nothing(path: &str, degraded: bool) -> Failure {
    let failure = Failure::new(format!("{path} holds no nbdmirror volume"));
    if degraded {
        failure.hint("once the volume runs, take it in with `nbdmirror add`")
    } else {
        failure.hint(
            "`serve --create SIZE` or `nbdmirror create` makes a volume; a blank replacement is taken in by \
             serving the others with --degraded and then `nbdmirror add`",
        )
    }
}
