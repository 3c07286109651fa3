//! Takes a replica into a running volume: `nbdmirror add`.

use clap::Args;

use super::Outcome;
use super::target::{Target, command, replica_for_daemon};
use crate::control::protocol::Request;

const AFTER_HELP: &str = "\
Examples:
  nbdmirror add vol /srv/disk-b.img           one that was away: copies what it missed
  nbdmirror add vol /dev/sdc                  a blank replacement: copies everything

A file that does not exist is not made: make one of the right size with `truncate`, the error says which.
What holds another volume, a filesystem or a diverged copy is refused unless --force is given.";

#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP, allow_missing_positional = true)]
pub(super) struct Add {
    #[command(flatten)]
    target: Target,
    /// The replica: a file or a block device.
    replica: String,
    /// Overwrite it whatever it holds: another volume, a filesystem, a diverged copy.
    #[arg(long)]
    force: bool,
}

impl Add {
    pub(super) fn run(self) -> Outcome {
        let path = replica_for_daemon(&self.replica)?;
        command(&self.target, &Request::Add { path, force: self.force })
    }
}
