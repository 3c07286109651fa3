//! Stops a running volume: `nbdmirror stop`.

use std::time::{Duration, Instant};

use clap::Args;

use super::target::Target;
use super::{Outcome, print};
use crate::control::failure::Failure;
use crate::control::protocol::Request;

/// How long a daemon that has stopped its volume may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(10);
const END_POLL: Duration = Duration::from_millis(10);

const AFTER_HELP: &str = "\
Examples:
  nbdmirror stop                                        the only volume that runs
  nbdmirror stop vol
  nbdmirror stop --control /run/nbdmirror/vol.control

Waits until requests in flight are finished, the replicas are flushed and marked clean, and the daemon has
ended. Exits with 1 if the volume could not be marked clean.";

#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Stop {
    #[command(flatten)]
    target: Target,
}

impl Stop {
    pub(super) fn run(self) -> Outcome {
        let mut client = self.target.connect()?;
        let answer = client.ask(&Request::Stop)?;
        let waited = Instant::now();
        while client.path().exists() {
            if waited.elapsed() > END_TIMEOUT {
                return Err(Failure::new(format!(
                    "the volume stopped, but its daemon at {} goes on",
                    client.path().display()
                ))
                .hint("look at its log; `kill` ends it without harm to the volume"));
            }
            std::thread::sleep(END_POLL);
        }
        if answer.clean != Some(true) {
            return Err(Failure::new("stopped, but the volume could not be marked clean")
                .hint("the daemon's log says why; the next start resyncs the regions concerned"));
        }
        print("stopped, clean\n")
    }
}
