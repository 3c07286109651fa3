//! Makes a running volume forget a replica: `nbdmirror remove`.

use clap::Args;

use super::Outcome;
use super::target::{Target, command, replica_for_daemon};
use crate::control::protocol::Request;

const AFTER_HELP: &str = "\
Examples:
  nbdmirror remove vol /srv/disk-b.img
  nbdmirror remove --control /run/nbdmirror/vol.control 1

Its slot becomes free for a replacement. A replica that is in use has to be failed first.";

#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP, allow_missing_positional = true)]
pub(super) struct Remove {
    #[command(flatten)]
    target: Target,
    /// The replica: its path, its slot number or its identity, as `nbdmirror status` shows them.
    replica: String,
}

impl Remove {
    pub(super) fn run(self) -> Outcome {
        let replica = replica_for_daemon(&self.replica)?;
        command(&self.target, &Request::Remove { replica })
    }
}
