//! Shows running volumes: `nbdmirror status`.

use clap::Args;

use super::target::Target;
use super::{Outcome, complain, print, status_view};
use crate::control::client::Client;
use crate::control::failure::Failure;
use crate::control::protocol::{Request, VolumeStatus};
use crate::control::runtime_dir::{control_sockets, runtime_dir};

const AFTER_HELP: &str = "\
Examples:
  nbdmirror status              list the running volumes
  nbdmirror status vol          one volume and its replicas
  nbdmirror status --json       all of them, for programs: an array (schema: docs/status-json.md)
  nbdmirror status vol --json   one of them: an object";

#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Status {
    #[command(flatten)]
    target: Target,
    /// Print everything as JSON.
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(super) fn run(self) -> Outcome {
        if self.target.is_named() {
            let status = ask(&mut self.target.connect()?)?;
            return print(&if self.json { to_json(&status)? } else { status_view::detail(&status) });
        }
        let (running, silent) = running_volumes()?;
        if self.json {
            print(&to_json(&running)?)?;
        } else if running.is_empty() && silent.is_none() {
            let dir = runtime_dir();
            print(&format!("No volume is running (none has its control socket in {}).\n", dir.display()))?;
        } else {
            print(&status_view::list(&running))?;
        }
        silent.map_or(Ok(()), Err)
    }
}

/// Every volume that answers, and the last complaint about one that does not.
fn running_volumes() -> Result<(Vec<VolumeStatus>, Option<Failure>), Failure> {
    let mut running = Vec::new();
    let mut silent = None;
    for socket in control_sockets()? {
        let answer = Client::connect_if_alive(&socket)
            .and_then(|client| client.map(|mut client| ask(&mut client)).transpose());
        match answer {
            Ok(status) => running.extend(status),
            Err(failure) => {
                if let Some(earlier) = silent.replace(failure) {
                    complain(&earlier);
                }
            }
        }
    }
    Ok((running, silent))
}

fn ask(client: &mut Client) -> Result<VolumeStatus, Failure> {
    let answer = client.ask(&Request::Status)?;
    match answer.status {
        Some(status) => Ok(*status),
        None => Err(Failure::new(format!("the daemon at {} gave no status", client.path().display()))),
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<String, Failure> {
    match serde_json::to_string_pretty(value) {
        Ok(text) => Ok(text + "\n"),
        Err(error) => Err(Failure::new(format!("cannot print this as JSON: {error}"))),
    }
}
