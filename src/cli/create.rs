//! Makes a volume: `nbdmirror create`.

use std::path::PathBuf;

use clap::Args;

use super::creation::{Plan, Wish};
use super::open::{Opened, device_failure, distinct_paths, open};
use super::size::{parse_region_size, parse_size};
use super::target::volume_name;
use super::{Outcome, print};
use crate::engine::device::{Access, DeviceOpenError};
use crate::format::describe::shell_word;

const AFTER_HELP: &str = "\
Examples:
  nbdmirror create --size 10G disk-a.img disk-b.img    two sparse files, made if they do not exist
  nbdmirror create --name data /dev/sdb /dev/sdc       two disks, as large as the smaller one gives

A replica that holds a volume, a filesystem, a partition table or an md or LVM signature is refused without
--force. If a replica has content that nothing recognises, the first replica's content becomes the volume's.";

#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Create {
    /// Size of the volume; may be left out with block devices.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,
    /// Name of the volume, 1 to 64 bytes [default: after the first replica].
    #[arg(long, value_parser = volume_name)]
    name: Option<String>,
    /// Unit of dirty tracking and resync, a power of two from 64K to 64M [default: 1M, more above 2T].
    #[arg(long, value_name = "SIZE", value_parser = parse_region_size)]
    region_size: Option<u64>,
    /// The replicas are byte-identical already: no first copy.
    #[arg(long)]
    assume_clean: bool,
    /// Overwrite whatever the replicas hold.
    #[arg(long)]
    force: bool,
    /// Files or block devices, one to eight.
    #[arg(required = true)]
    replica: Vec<PathBuf>,
}

impl Create {
    pub(super) fn run(self) -> Outcome {
        let replicas = distinct_paths(&self.replica)?
            .iter()
            .map(|path| open(path, Access::ReadWrite))
            .collect::<Result<Vec<Opened>, DeviceOpenError>>()
            .map_err(device_failure)?;
        let wish = Wish {
            size_bytes: self.size,
            region_bytes: self.region_size,
            name: self.name,
            assume_clean: self.assume_clean,
            force: self.force,
        };
        let words: Vec<String> =
            self.replica.iter().map(|path| shell_word(&path.display().to_string())).collect();
        let plan = Plan::new(wish, replicas)?;
        let described = plan.describe();
        plan.carry_out()?;
        print(&format!("{described}Serve it: nbdmirror serve {}\n", words.join(" ")))
    }
}
