//! An NBD device of this kernel, as sysfs and procfs show it: whether it is attached, to what, and who uses it.
//!
//! What must hold: nothing here opens the device, since an open of one whose server is gone waits for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::control::failure::Failure;

/// Highest device number that the kernel takes with 16 partitions each (20 bits of minor numbers).
const INDEX_MAX: u32 = (1 << 15) - 1;
const SECTOR_BYTES: u64 = 512;

/// `/dev/nbdN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// N.
    pub index: u32,
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("/dev/").unwrap_or(text).strip_prefix("nbd").unwrap_or_default();
        let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        let canonical = plain && (number == "0" || !number.starts_with('0'));
        match number.parse() {
            Ok(index) if canonical && index <= INDEX_MAX => Ok(Self { index }),
            _ => Err(format!("`{text}` is not a whole NBD device; give /dev/nbd0, nbd0 or another number")),
        }
    }
}

/// How a device is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The process that attached it, as the kernel names it: another attachment has another.
    pub pid: String,
    /// What it is attached to, if the kernel knows (Linux 5.14) and it was told.
    pub backend: Option<String>,
    /// Size, bytes.
    pub size_bytes: u64,
    /// Whether it takes no writes.
    pub read_only: bool,
}

/// Where sysfs, procfs and device nodes are.
#[derive(Clone, Debug)]
pub struct System {
    root: PathBuf,
}

impl Default for System {
    fn default() -> Self {
        Self { root: PathBuf::from("/") }
    }
}

impl Device {
    /// The kernel's name of it.
    #[must_use]
    pub fn name(self) -> String {
        format!("nbd{}", self.index)
    }

    /// Its node.
    #[must_use]
    pub fn path(self) -> PathBuf {
        PathBuf::from(format!("/dev/nbd{}", self.index))
    }
}

impl System {
    fn block(&self, device: Device) -> PathBuf {
        self.root.join("sys/block").join(device.name())
    }

    fn read(&self, device: Device, file: &str) -> Option<String> {
        Some(fs::read_to_string(self.block(device).join(file)).ok()?.trim_end().to_owned())
    }

    /// How the device is attached; `None` where it is not.
    #[must_use]
    pub fn attachment(&self, device: Device) -> Option<Attachment> {
        // The file is there while the device is attached, and only then.
        let pid = self.read(device, "pid")?;
        let sectors: u64 = self.read(device, "size")?.parse().ok()?;
        Some(Attachment {
            pid,
            backend: self.read(device, "backend").filter(|backend| !backend.is_empty()),
            size_bytes: sectors.saturating_mul(SECTOR_BYTES),
            read_only: self.read(device, "ro")? == "1",
        })
    }

    /// Requests that are with the server, or wait for a connection.
    #[must_use]
    pub fn in_flight(&self, device: Device) -> u64 {
        let text = self.read(device, "inflight").unwrap_or_default();
        text.split_whitespace().filter_map(|number| number.parse::<u64>().ok()).sum()
    }

    /// Sets after how many milliseconds the kernel looks at a request that has no answer.
    ///
    /// # Errors
    /// The kernel has no such setting (before Linux 5.0), or we may not write it.
    pub fn set_request_check_ms(&self, device: Device, ms: u32) -> std::io::Result<()> {
        fs::write(self.block(device).join("queue/io_timeout"), ms.to_string())
    }

    /// The whole device and its partitions: name and `major:minor`.
    fn parts(&self, device: Device) -> Vec<(String, String)> {
        let folder = self.block(device);
        let mut names = vec![device.name()];
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        let partition = format!("{}p", device.name());
        names.extend(
            entries
                .filter_map(|entry| entry.file_name().into_string().ok())
                .filter(|name| name.starts_with(&partition)),
        );
        names.sort();
        let number = |name: &str| {
            let folder = if *name == device.name() { folder.clone() } else { folder.join(name) };
            fs::read_to_string(folder.join("dev")).unwrap_or_default().trim_end().to_owned()
        };
        names.into_iter().map(|name| (number(&name), name)).map(|(number, name)| (name, number)).collect()
    }

    /// Who uses the device or a partition of it, in words: mounts, swap, devices on top.
    ///
    /// # Errors
    /// procfs cannot be read.
    pub fn users(&self, device: Device) -> Result<Vec<String>, Failure> {
        let read = |path: &str| {
            fs::read_to_string(self.root.join(path))
                .map_err(|error| Failure::new(format!("cannot read /{path}: {error}")))
        };
        let (mounts, swaps) = (read("proc/self/mountinfo")?, read("proc/swaps")?);
        let mut users = Vec::new();
        for (name, number) in self.parts(device) {
            let node = format!("/dev/{name}");
            users.extend(
                mount_points(&mounts, &number, &node)
                    .into_iter()
                    .map(|point| format!("{node} is mounted at {point}")),
            );
            if swaps.lines().any(|line| line.split_whitespace().next() == Some(&node)) {
                users.push(format!("{node} is used as swap"));
            }
            let folder = self.block(device);
            let folder = if name == device.name() { folder } else { folder.join(&name) };
            let holders = fs::read_dir(folder.join("holders")).into_iter().flatten().flatten();
            users.extend(
                holders.map(|holder| format!("{node} is held by /dev/{}", holder.file_name().display())),
            );
        }
        Ok(users)
    }

    /// Processes that have the device or a partition of it open, as `PID (NAME)`; those that we may see.
    #[must_use]
    pub fn openers(&self, device: Device) -> Vec<String> {
        let nodes: Vec<PathBuf> =
            self.parts(device).iter().map(|(name, _)| Path::new("/dev").join(name)).collect();
        let mut openers = Vec::new();
        for process in fs::read_dir(self.root.join("proc")).into_iter().flatten().flatten() {
            let pid = process.file_name().to_string_lossy().into_owned();
            if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
                continue;
            }
            let descriptors = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
            let opens = descriptors
                .filter_map(|entry| fs::read_link(entry.path()).ok())
                .any(|target| nodes.contains(&target));
            if opens {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                openers.push(format!("{pid} ({})", name.trim_end()));
            }
        }
        openers.sort();
        openers
    }
}

/// Where a device is mounted: lines `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS... - TYPE SOURCE OPTIONS`. A filesystem
/// that spans devices has a number of its own and names one of them as its source.
fn mount_points(mountinfo: &str, number: &str, node: &str) -> Vec<String> {
    let mut points = Vec::new();
    for line in mountinfo.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let dash = words.iter().position(|word| *word == "-");
        let source = dash.and_then(|dash| words.get(dash + 2));
        let (Some(found), Some(point)) = (words.get(2), words.get(4)) else { continue };
        if (!number.is_empty() && *found == number) || source == Some(&node) {
            // Blanks are escaped in octal.
            points.push(point.replace("\\040", " "));
        }
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    const NBD3: Device = Device { index: 3 };

    fn system(files: &[(&str, &str)]) -> (tempfile::TempDir, System) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let system = System { root: dir.path().to_owned() };
        (dir, system)
    }

    #[test]
    fn devices_are_named_whole() {
        for (text, index) in [("/dev/nbd0", 0), ("nbd0", 0), ("nbd15", 15), ("/dev/nbd32767", 32767)] {
            let device: Device = text.parse().unwrap();
            assert_eq!(device.index, index);
            assert_eq!(device.path().to_str().unwrap(), format!("/dev/nbd{index}"));
        }
        for text in
            ["", "/dev/nbd", "nbd0p1", "/dev/sda", "nbd-1", "nbd+1", "nbd01", "0", "nbd32768", "/dev/nbd/0"]
        {
            assert!(text.parse::<Device>().unwrap_err().contains("/dev/nbd0"), "{text}");
        }
    }

    #[test]
    fn an_attachment_is_what_sysfs_says() {
        let (_dir, system) = system(&[
            ("sys/block/nbd3/pid", "812\n"),
            ("sys/block/nbd3/size", "8192\n"),
            ("sys/block/nbd3/ro", "1\n"),
            ("sys/block/nbd3/backend", "nbdmirror:x\n"),
            ("sys/block/nbd3/inflight", "       2        7\n"),
            ("sys/block/nbd4/size", "0\n"),
            ("sys/block/nbd5/pid", "9\n"),
            ("sys/block/nbd5/size", "8\n"),
            ("sys/block/nbd5/ro", "0\n"),
        ]);
        let wanted = Attachment {
            pid: "812".to_owned(),
            backend: Some("nbdmirror:x".to_owned()),
            size_bytes: 4 << 20,
            read_only: true,
        };
        assert_eq!(system.attachment(NBD3), Some(wanted));
        assert_eq!(system.in_flight(NBD3), 9);
        assert_eq!(system.attachment(Device { index: 4 }), None);
        assert_eq!(system.attachment(Device { index: 5 }).unwrap().backend, None);
    }

    #[test]
    fn users_are_named() {
        let (_dir, system) = system(&[
            ("sys/block/nbd3/dev", "43:48\n"),
            ("sys/block/nbd3/nbd3p1/dev", "43:49\n"),
            ("sys/block/nbd3/nbd3p1/holders/dm-4", ""),
            (
                "proc/self/mountinfo",
                "22 1 43:4 / / rw - ext4 /dev/nbd0p4 rw\n\
                 36 22 43:48 / /srv/my\\040data rw,noatime shared:1 - ext4 /dev/disk/by-label/x rw\n\
                 37 22 0:31 / /pool rw - btrfs /dev/nbd3p1 rw\n\
                 38 22 0:32 / /other rw - btrfs /dev/nbd31 rw\n",
            ),
            (
                "proc/swaps",
                "Filename Type Size Used Priority\n/dev/nbd3 partition 8 0 -2\n/dev/nbd33 partition 8 0 -2\n",
            ),
        ]);
        assert_eq!(
            system.users(NBD3).unwrap(),
            [
                "/dev/nbd3 is mounted at /srv/my data",
                "/dev/nbd3 is used as swap",
                "/dev/nbd3p1 is mounted at /pool",
                "/dev/nbd3p1 is held by /dev/dm-4",
            ]
        );
        assert_eq!(system.users(Device { index: 7 }).unwrap(), [""; 0]);
    }

    #[test]
    fn openers_are_named() {
        let (dir, system) = system(&[("proc/77/comm", "fio\n"), ("proc/78/comm", "sh\n")]);
        for (process, target) in [("77", "/dev/nbd3"), ("78", "/dev/nbd31")] {
            let folder = dir.path().join("proc").join(process).join("fd");
            fs::create_dir_all(&folder).unwrap();
            std::os::unix::fs::symlink(target, folder.join("4")).unwrap();
        }
        assert_eq!(system.openers(NBD3), ["77 (fio)"]);
    }
}
