//! The `nbdmirror` command.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    nbdmirror::cli::Cli::parse().run()
}
