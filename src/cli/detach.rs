//! Takes a block device away again: `nbdmirror detach`.

use std::io;
use std::process::{Child, Command, Stdio};

use clap::Args;

use super::{Outcome, print};
use crate::attach::detach::{detach, flush};
use crate::attach::device::Device;
use crate::control::failure::Failure;

const AFTER_HELP: &str = "\
Examples:
  nbdmirror detach /dev/nbd0
  nbdmirror detach nbd0 --force

What was written is flushed first. Refused while the device or a partition of it is mounted, used as swap, or held by
another device. The volume goes on.";

#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Detach {
    /// /dev/nbdN.
    device: Device,
    /// Detach although it is in use or cannot be flushed: its users get errors, what was not flushed is lost.
    #[arg(long)]
    force: bool,
    /// What the command starts to flush the device.
    #[arg(long, hide = true)]
    only_flush: bool,
}

impl Detach {
    pub(super) fn run(self) -> Outcome {
        if self.only_flush {
            return flush(self.device).map_err(|error| {
                let what = match error.kind() {
                    io::ErrorKind::ResourceBusy => {
                        "it is in use, perhaps mounted by another mount namespace (a container)".to_owned()
                    }
                    _ => format!("cannot flush it: {error}"),
                };
                _ = print(&what);
                Failure::new(what)
            });
        }
        let device = self.device;
        let remark = detach(device, self.force, || start_flush(device))?;
        let remark =
            remark.map_or_else(String::new, |remark| format!(" ({})", remark.trim_end_matches("; ")));
        print(&format!("{} is detached{remark}\n", device.path().display()))
    }
}

fn start_flush(device: Device) -> io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .args(["detach", "--only-flush", &device.name()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
}
