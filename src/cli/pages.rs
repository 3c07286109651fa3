//! The manual pages and completion scripts, made from the command line's own definition.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Outcome};
use crate::control::failure::Failure;

const MAN_AFTER_HELP: &str = "\
Example:
  nbdmirror man > nbdmirror.1; nbdmirror man serve > nbdmirror-serve.1";

#[derive(Args, Debug)]
#[command(after_help = MAN_AFTER_HELP)]
pub(super) struct Man {
    /// The verb; nbdmirror itself if it is left out.
    verb: Option<String>,
}

impl Man {
    pub(super) fn run(self) -> Outcome {
        let mut command = Cli::command();
        command.build();
        let command = match self.verb {
            None => command,
            Some(verb) => command.find_subcommand(&verb).cloned().ok_or_else(|| {
                Failure::new(format!("there is no verb `{verb}`")).hint("see `nbdmirror --help`")
            })?,
        };
        let mut page = Vec::new();
        clap_mangen::Man::new(command)
            .render(&mut page)
            .map_err(|error| Failure::new(format!("cannot render the page: {error}")))?;
        super::print(&String::from_utf8_lossy(&page))
    }
}

const COMPLETIONS_AFTER_HELP: &str = "\
Example:
  nbdmirror completions bash > ~/.local/share/bash-completion/completions/nbdmirror";

#[derive(Args, Debug)]
#[command(after_help = COMPLETIONS_AFTER_HELP)]
pub(super) struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> Outcome {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "nbdmirror", &mut script);
        super::print(&String::from_utf8_lossy(&script))
    }
}
