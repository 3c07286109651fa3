//! Stops using a replica of a running volume: `nbdmirror fail`.

use clap::Args;

use super::Outcome;
use super::target::{Target, command, replica_for_daemon};
use crate::control::protocol::Request;

const AFTER_HELP: &str = "\
Examples:
  nbdmirror fail vol /srv/disk-b.img
  nbdmirror fail --control /run/nbdmirror/vol.control 1

The replica is recorded as faulty and what it misses is kept, so that `nbdmirror add` copies just that.
The last replica in sync is never failed.";

#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP, allow_missing_positional = true)]
pub(super) struct Fail {
    #[command(flatten)]
    target: Target,
    /// The replica: its path, its slot number or its identity, as `nbdmirror status` shows them.
    replica: String,
}

impl Fail {
    pub(super) fn run(self) -> Outcome {
        let replica = replica_for_daemon(&self.replica)?;
        command(&self.target, &Request::Fail { replica })
    }
}
