//! What a file or device holds already, as libblkid knows it.
//!
//! Asked through `blkid`, libblkid's own tool from util-linux: it knows every filesystem, partition table,
//! RAID and LVM signature that the system's own tools know, and is kept up to date with them.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::control::failure::Failure;

/// `blkid` exit codes (blkid(8)).
const FOUND: i32 = 0;
const NOTHING_FOUND: i32 = 2;
const AMBIVALENT: i32 = 8;
/// System folders are seldom in an ordinary user's `PATH`.
const PLACES: [&str; 3] = ["blkid", "/usr/sbin/blkid", "/sbin/blkid"];

/// Describes what `path` holds, such as `an ext4 filesystem`; `None` where libblkid knows nothing of it.
///
/// # Errors
/// `blkid` is not installed or does not work; then nothing is known.
pub(super) fn probe(path: &Path) -> Result<Option<String>, Failure> {
    let output = run_blkid(path)?;
    let said = String::from_utf8_lossy(&output.stdout);
    match output.status.code() {
        Some(NOTHING_FOUND) => Ok(None),
        Some(FOUND) => Ok(Some(describe(&said))),
        Some(AMBIVALENT) => Ok(Some("signatures of more than one kind".to_owned())),
        _ => {
            let error = String::from_utf8_lossy(&output.stderr);
            Err(cannot_check(path, &format!("blkid ended with {}: {}", output.status, error.trim())))
        }
    }
}

fn run_blkid(path: &Path) -> Result<Output, Failure> {
    for place in PLACES {
        let mut command = Command::new(place);
        command.args(["--probe", "--output", "export"]).arg(path).env("LC_ALL", "C").stdin(Stdio::null());
        match command.output() {
            Ok(output) => return Ok(output),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(cannot_check(path, &format!("blkid does not start: {error}"))),
        }
    }
    Err(cannot_check(path, "blkid is not installed"))
}

fn cannot_check(path: &Path, why: &str) -> Failure {
    Failure::new(format!("cannot check whether {} holds data: {why}", path.display()))
        .hint("install util-linux, which has blkid, or give --force if nothing on it is needed")
}

/// Puts blkid's `KEY=value` lines into words.
fn describe(said: &str) -> String {
    let values: BTreeMap<&str, &str> = said.lines().filter_map(|line| line.split_once('=')).collect();
    let label = values.get("LABEL").map(|label| format!(" labelled `{label}`")).unwrap_or_default();
    match (values.get("USAGE").copied(), values.get("TYPE"), values.get("PTTYPE")) {
        (Some("filesystem"), Some(kind), _) => format!("a filesystem ({kind}){label}"),
        (Some("raid"), Some(kind), _) => format!("a RAID or LVM signature ({kind}){label}"),
        (Some("crypto"), Some(kind), _) => format!("an encrypted container ({kind}){label}"),
        (_, Some(kind), _) => format!("a signature ({kind}){label}"),
        (_, None, Some(table)) => format!("a partition table ({table})"),
        _ => "something that blkid knows".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_in_words() {
        for (said, words) in [
            ("DEVNAME=x\nTYPE=ext4\nUSAGE=filesystem\n", "a filesystem (ext4)"),
            ("TYPE=xfs\nUSAGE=filesystem\nLABEL=home\n", "a filesystem (xfs) labelled `home`"),
            ("TYPE=linux_raid_member\nUSAGE=raid\n", "a RAID or LVM signature (linux_raid_member)"),
            ("TYPE=LVM2_member\nUSAGE=raid\n", "a RAID or LVM signature (LVM2_member)"),
            ("PTUUID=1\nPTTYPE=gpt\n", "a partition table (gpt)"),
            ("", "something that blkid knows"),
        ] {
            assert_eq!(describe(said), words);
        }
    }

    #[test]
    fn an_empty_file_holds_nothing_and_a_partition_table_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16 << 20).unwrap();
        assert_eq!(probe(file.path()).unwrap(), None);
        // A DOS partition table: one Linux partition from sector 2048 on, and the signature.
        let mut sector = [0_u8; 512];
        sector[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x40, 0, 0]);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &sector, 0).unwrap();
        assert_eq!(probe(file.path()).unwrap().unwrap(), "a partition table (dos)");
    }
}
