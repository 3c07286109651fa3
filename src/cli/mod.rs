//! The command line, one file a verb.
//!
//! What must hold: a verb does its checks first and touches replicas after; whatever goes wrong is said as
//! `nbdmirror: <what>` with `  hint: <what to do>` on standard error. Exit codes: 0 done, 1 it failed,
//! 2 the command line was wrong, 130 a second interrupt cut a stop short.

pub mod size;

mod add;
mod attach;
mod banner;
mod create;
mod creation;
mod detach;
mod examine;
mod fail;
mod open;
mod pages;
mod probe;
mod remove;
mod replicas;
mod serve;
mod status;
mod status_view;
mod stop;
mod target;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::control::failure::Failure;
use crate::control::log;

const AFTER_HELP: &str = "\
Examples:
  nbdmirror serve --create 1G disk-a.img disk-b.img   make a mirror of two files and serve it
  nbdmirror status                                    list the running volumes
  nbdmirror fail VOLUME disk-b.img                    stop using a replica
  nbdmirror add VOLUME disk-b.img                     take it in again and resync it
  nbdmirror attach VOLUME /dev/nbd0                   make it a block device of this machine
  nbdmirror stop                                      stop the running volume, cleanly

SIZE is bytes or a binary suffix (64K, 1.5G, 1T), a multiple of 4 KiB.
Exit codes: 0 done, 1 failed, 2 wrong command line.";

/// RAID-1 in userspace: mirrors one volume over two to eight replicas and serves it over NBD.
#[derive(Debug, Parser)]
#[command(name = "nbdmirror", version, after_help = AFTER_HELP, max_term_width = 100, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a volume on files or block devices.
    Create(create::Create),
    /// Serve a volume over NBD.
    Serve(Box<serve::Serve>),
    /// Show running volumes.
    Status(status::Status),
    /// Show what stands on replicas, whether or not they are in use.
    Examine(examine::Examine),
    /// Stop using a replica of a running volume.
    Fail(fail::Fail),
    /// Take a replica into a running volume and bring it up to date.
    Add(add::Add),
    /// Make a running volume forget a replica.
    Remove(remove::Remove),
    /// Stop a running volume cleanly.
    Stop(stop::Stop),
    /// Make a volume a block device of this machine, /dev/nbdN.
    Attach(attach::Attach),
    /// Take such a block device away again.
    Detach(detach::Detach),
    /// Print the manual page (roff) of nbdmirror or of a verb.
    #[command(hide = true)]
    Man(pages::Man),
    /// Print a completion script.
    #[command(hide = true)]
    Completions(pages::Completions),
}

impl Cli {
    /// Does what the command line says, prints what went wrong, and gives the process's exit code.
    #[must_use]
    pub fn run(self) -> ExitCode {
        let result = match self.verb {
            Verb::Create(verb) => verb.run(),
            Verb::Serve(verb) => verb.run(),
            Verb::Status(verb) => verb.run(),
            Verb::Examine(verb) => verb.run(),
            Verb::Fail(verb) => verb.run(),
            Verb::Add(verb) => verb.run(),
            Verb::Remove(verb) => verb.run(),
            Verb::Stop(verb) => verb.run(),
            Verb::Attach(verb) => verb.run(),
            Verb::Detach(verb) => verb.run(),
            Verb::Man(verb) => verb.run(),
            Verb::Completions(verb) => verb.run(),
        };
        log::flush();
        match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => {
                complain(&failure);
                ExitCode::FAILURE
            }
        }
    }
}

/// What every verb gives.
type Outcome = Result<(), Failure>;

/// Says on standard error what went wrong. That it cannot be said is no reason to panic, as `eprintln` does.
fn complain(what: &dyn std::fmt::Display) {
    use std::io::Write;
    _ = writeln!(std::io::stderr(), "nbdmirror: {what}");
}

/// Prints to standard output; a reader that went away (such as `head`) is not an error worth a message.
fn print(text: &str) -> Outcome {
    use std::io::Write;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
