//! Which running volume a command is for, and which replica of it.

use std::path::{Path, PathBuf};

use clap::Args;

use super::Outcome;
use crate::control::client::Client;
use crate::control::failure::Failure;
use crate::control::protocol::Request;
use crate::control::runtime_dir::{check_volume_name, control_sockets, runtime_dir};

/// The running volume that a command is for.
#[derive(Args, Debug)]
pub(super) struct Target {
    /// Name of a running volume; may be left out if just one is running.
    #[arg(value_parser = volume_name, conflicts_with = "control")]
    volume: Option<String>,
    /// The volume's control socket, in place of VOLUME.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
}

/// Checks a volume's name as a value on the command line.
pub(super) fn volume_name(text: &str) -> Result<String, String> {
    check_volume_name(text).map(|()| text.to_owned())
}

impl Target {
    /// Whether the command line names a volume.
    pub(super) fn is_named(&self) -> bool {
        self.volume.is_some() || self.control.is_some()
    }

    /// Connects to the volume's daemon: the one named, or the only one that runs.
    ///
    /// # Errors
    /// It does not run, or none is named and there is not exactly one.
    pub(super) fn connect(&self) -> Result<Client, Failure> {
        if let Some(path) = &self.control {
            return Client::connect(path);
        }
        if let Some(name) = &self.volume {
            return Client::connect_to_volume(name);
        }
        only_running(control_sockets()?)
    }
}

fn only_running(sockets: Vec<PathBuf>) -> Result<Client, Failure> {
    let mut running: Vec<Client> = sockets
        .iter()
        .filter_map(|path| Client::connect_if_alive(path).transpose())
        .collect::<Result<_, _>>()?;
    match running.pop() {
        Some(client) if running.is_empty() => Ok(client),
        Some(client) => {
            running.push(client);
            let mut names: Vec<String> =
                running.iter().map(|client| client.path().display().to_string()).collect();
            names.sort();
            Err(Failure::new(format!("{} volumes are running", names.len()))
                .hint(format!("say which one: VOLUME, or --control and one of {}", names.join(", "))))
        }
        None => Err(Failure::new("no volume is running").hint(format!(
            "volumes are looked for in {}; --control PATH names a socket elsewhere",
            runtime_dir().display()
        ))),
    }
}

/// A replica as the daemon is to see it: a slot number or an identity as it stands, a path made absolute
/// (the daemon's working folder is another one).
pub(super) fn replica_for_daemon(replica: &str) -> Result<String, Failure> {
    if replica.parse::<u8>().is_ok() || uuid::Uuid::parse_str(replica).is_ok() {
        return Ok(replica.to_owned());
    }
    let path = std::path::absolute(Path::new(replica))
        .map_err(|error| Failure::new(format!("cannot use `{replica}` as a path: {error}")))?;
    path.into_os_string().into_string().map_err(|_| Failure::new("a replica's path must be UTF-8"))
}

/// Sends one command and prints the daemon's answer.
pub(super) fn command(target: &Target, request: &Request) -> Outcome {
    let answer = target.connect()?.ask(request)?;
    super::print(&format!("{}\n", answer.message.unwrap_or_default()))
}
