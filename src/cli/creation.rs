//! Making a volume: a plan that has been checked, then its execution.
//!
//! What must hold: planning writes nothing, and all refusals come from it. Where a filesystem is full, that is found
//! before a byte of any replica is changed, and the files that were made are removed again.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::open::{Opened, device_failure, refuse_foreign_data};
use super::size::{exact, pretty};
use crate::control::failure::Failure;
use crate::control::runtime_dir::default_volume_name;
use crate::engine::device::{Access, DeviceKind, ReplicaDevice};
use crate::format::create::{Created, NewReplica, NewVolume, new_volume};
use crate::format::layout::{Layout, superblock_offset};
use crate::units::{BLOCK_BYTES, REGION_BYTES_MIN, Regions, ReplicaOffset};

/// Most regions of a new volume: their maps take under 40 MiB then. 2^30 of them would take gigabytes, and a start many seconds.
const REGIONS_MAX: u64 = 1 << 24;

/// What the operator wants.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    /// Size of the volume; `None`: what the block devices give.
    pub(super) size_bytes: Option<u64>,
    /// Size of a region; `None`: by the volume's size.
    pub(super) region_bytes: Option<u64>,
    /// The volume's name; `None`: after the first replica.
    pub(super) name: Option<String>,
    /// The replicas are the same already.
    pub(super) assume_clean: bool,
    /// Whatever they hold.
    pub(super) force: bool,
}

/// A volume that can be made.
pub(super) struct Plan {
    /// Its name.
    pub(super) name: String,
    /// Its size and its regions'.
    pub(super) regions: Regions,
    /// Whether all replicas are taken to be in sync; otherwise the first one is copied to the others.
    pub(super) in_sync: bool,
    targets: Vec<Target>,
}

/// A replica to be made.
struct Target {
    path: PathBuf,
    /// What is there already, locked.
    existing: Option<ReplicaDevice>,
    /// Its size in the end.
    device_bytes: u64,
}

impl Plan {
    /// Checks everything that can be checked without writing.
    pub(super) fn new(wish: Wish, replicas: Vec<Opened>) -> Result<Self, Failure> {
        for replica in &replicas {
            check_content(replica, wish.force)?;
        }
        let regions = choose_regions(&wish, &replicas)?;
        check_region_count(regions)?;
        let needed_bytes = Layout::device_bytes_min(regions);
        let name = match wish.name {
            Some(name) => name,
            None => default_volume_name(&replicas[0].path),
        };
        let in_sync = wish.assume_clean || replicas.len() == 1 || replicas.iter().all(is_blank);
        let mut targets = Vec::new();
        for replica in replicas {
            let device_bytes = device_bytes(&replica, needed_bytes)?;
            targets.push(Target { path: replica.path, existing: replica.device, device_bytes });
        }
        Ok(Self { name, regions, in_sync, targets })
    }

    /// Makes it. All locks are released in the end.
    pub(super) fn carry_out(mut self) -> Result<(), Failure> {
        let mut made = MadeFiles::default();
        for target in &mut self.targets {
            target.prepare(&mut made)?;
        }
        let created = self.metadata()?;
        // All space first: a full filesystem is to be found before anything is overwritten.
        for (index, target) in self.targets.iter().enumerate() {
            target.reserve(&created, index)?;
        }
        for (index, target) in self.targets.iter().enumerate() {
            target.write(&created, index)?;
        }
        made.keep();
        Ok(())
    }

    fn metadata(&self) -> Result<Created, Failure> {
        let replica_of = |target: &Target| NewReplica {
            uuid: Uuid::new_v4(),
            path: target.path.display().to_string(),
            device_bytes: target.device_bytes,
        };
        // A clock before 1970 is wrong, but no reason not to make a volume.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        new_volume(NewVolume {
            name: self.name.clone(),
            regions: self.regions,
            now_unix_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            volume_uuid: Uuid::new_v4(),
            generation: Uuid::new_v4(),
            replicas: self.targets.iter().map(replica_of).collect(),
            in_sync: self.in_sync,
        })
        .map_err(|error| Failure::new(error.to_string()))
    }

    /// What was or will be made, in words.
    pub(super) fn describe(&self) -> String {
        let mut text = format!(
            "Made volume {}: {} in regions of {}, {} replica{}\n",
            self.name,
            pretty(self.regions.volume_bytes),
            pretty(self.regions.region_bytes),
            self.targets.len(),
            if self.targets.len() == 1 { "" } else { "s" }
        );
        for (index, target) in self.targets.iter().enumerate() {
            let role = match (self.in_sync, index) {
                (true, _) => "in sync",
                (false, 0) => "in sync: its content is the volume's",
                (false, _) => "gets a full copy when the volume is served",
            };
            text.push_str(&format!("  {}  ({role})\n", target.path.display()));
        }
        text
    }
}

/// Refuses a replica that is somebody's already, and a path that nothing can be made at.
fn check_content(replica: &Opened, force: bool) -> Result<(), Failure> {
    if replica.device.is_none() {
        return check_can_be_made(&replica.path);
    }
    if force {
        return Ok(());
    }
    let path = replica.path.display();
    match &replica.content {
        Ok(None) => refuse_foreign_data(&replica.path, "--force overwrites it"),
        Ok(Some(found)) => Err(Failure::new(format!(
            "{path} holds a replica of volume `{}` already",
            found.superblock.name
        ))
        .hint(
            "`nbdmirror serve` serves it, `nbdmirror examine` shows it; --force makes a new volume over it",
        )),
        Err(error) => Err(Failure::new(format!("{path} seems to hold a volume: {error}"))
            .hint("--force makes a new volume over it, if nothing on it is needed")),
    }
}

fn check_can_be_made(path: &Path) -> Result<(), Failure> {
    if path.symlink_metadata().is_ok() {
        return Err(Failure::new(format!("{} is a link that leads to nothing", path.display()))
            .hint("remove the link, or make what it should lead to"));
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    match std::fs::metadata(folder) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(Failure::new(format!(
            "{} is not a folder, so {} cannot be made in it",
            folder.display(),
            path.display()
        ))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Failure::new(format!("the folder {} does not exist", folder.display())).hint(format!(
                "make it first: mkdir -p {}",
                crate::format::describe::shell_word(&folder.display().to_string())
            )))
        }
        Err(error) => Err(Failure::new(format!("cannot look at the folder {}: {error}", folder.display()))),
    }
}

/// The volume's size and its regions'.
fn choose_regions(wish: &Wish, replicas: &[Opened]) -> Result<Regions, Failure> {
    if let Some(volume_bytes) = wish.size_bytes {
        let region_bytes = wish.region_bytes.unwrap_or_else(|| Layout::default_region_bytes(volume_bytes));
        return Ok(Regions { volume_bytes, region_bytes });
    }
    let block_devices = replicas
        .iter()
        .filter_map(|replica| replica.device.as_ref())
        .filter(|device| device.kind == DeviceKind::BlockDevice);
    let Some(smallest) = block_devices.map(|device| device.traits.device_bytes).min() else {
        return Err(Failure::new("the size of the volume is not known")
            .hint("give it, such as --size 10G; only block devices give theirs"));
    };
    let region_bytes = wish.region_bytes.unwrap_or_else(|| Layout::default_region_bytes(smallest));
    let volume_bytes = Layout::volume_bytes_max(smallest, region_bytes);
    if volume_bytes == 0 {
        let needed =
            Layout::device_bytes_min(Regions { volume_bytes: BLOCK_BYTES, region_bytes: REGION_BYTES_MIN });
        return Err(Failure::new(format!(
            "the smallest replica has {smallest} bytes, too few for any volume"
        ))
        .hint(format!("a replica has at least {needed} bytes")));
    }
    Ok(Regions { volume_bytes, region_bytes })
}

/// Each region takes memory for as long as the volume is served, and time at each start.
fn check_region_count(regions: Regions) -> Result<(), Failure> {
    if regions.count() <= REGIONS_MAX {
        return Ok(());
    }
    let enough = regions.volume_bytes.div_ceil(REGIONS_MAX).next_power_of_two();
    Err(Failure::new(format!(
        "a volume of {} in regions of {} would have {} regions; there may be {REGIONS_MAX}",
        exact(regions.volume_bytes),
        exact(regions.region_bytes),
        regions.count()
    ))
    .hint(format!("give --region-size {} or more, or leave it out", exact(enough))))
}

/// The size that a replica will have; files grow where needed, devices must be large enough.
fn device_bytes(replica: &Opened, needed_bytes: u64) -> Result<u64, Failure> {
    match &replica.device {
        None => Ok(needed_bytes),
        Some(device) if device.traits.device_bytes >= needed_bytes => Ok(device.traits.device_bytes),
        Some(device) if device.kind == DeviceKind::File => Ok(needed_bytes),
        Some(device) => Err(Failure::new(format!(
            "{} is too small: it has {} bytes, this volume needs {needed_bytes} on each replica",
            replica.path.display(),
            device.traits.device_bytes
        ))
        .hint("leave --size out to use what the smallest device gives, or give a smaller one")),
    }
}

/// Whether it reads as zeroes for sure: it does not exist, or is a file without data.
fn is_blank(replica: &Opened) -> bool {
    match &replica.device {
        None => true,
        Some(device) => {
            let bytes = device.traits.device_bytes;
            device.kind == DeviceKind::File && (bytes == 0 || device.is_hole(ReplicaOffset(0), bytes))
        }
    }
}

impl Target {
    /// Brings the file into being and to its size.
    fn prepare(&mut self, made: &mut MadeFiles) -> Result<(), Failure> {
        let shown = self.path.display();
        let failed = |doing: &str, error: io::Error| cannot(&self.path, doing, &error);
        if let Some(device) = &self.existing {
            if device.traits.device_bytes < self.device_bytes {
                let file = OpenOptions::new().write(true).open(&self.path).map_err(|e| failed("open", e))?;
                let bytes_before = file.metadata().map_err(|e| failed("look at", e))?.len();
                made.grown.push((self.path.clone(), bytes_before));
                file.set_len(self.device_bytes).map_err(|e| failed("extend", e))?;
                tracing::debug!("{shown}: extended to {}", exact(self.device_bytes));
            }
            return Ok(());
        }
        // A replica holds everything that is on the volume: its owner's alone.
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.path)
            .map_err(|error| failed("make", error))?;
        made.paths.push(self.path.clone());
        file.set_len(self.device_bytes).map_err(|error| failed("size", error))?;
        drop(file);
        self.existing = Some(ReplicaDevice::open(&self.path, Access::ReadWrite).map_err(device_failure)?);
        Ok(())
    }

    /// Makes sure that its filesystem has the space for its metadata.
    fn reserve(&self, created: &Created, index: usize) -> Result<(), Failure> {
        let device = self.device();
        for (offset, bytes) in created.writes(index) {
            device
                .reserve(offset, bytes.len() as u64)
                .map_err(|error| cannot(&self.path, "write metadata to", &error))?;
        }
        Ok(())
    }

    fn device(&self) -> &ReplicaDevice {
        let Some(device) = &self.existing else { unreachable!("every target has been prepared") };
        device
    }

    /// Writes its metadata and makes sure that it stays.
    fn write(&self, created: &Created, index: usize) -> Result<(), Failure> {
        let device = self.device();
        let failed = |error: io::Error| cannot(&self.path, "write metadata to", &error);
        let first_superblock = superblock_offset(self.device_bytes, 0);
        let mut pages_are_durable = false;
        for (offset, bytes) in created.writes(index) {
            if offset >= first_superblock && !pages_are_durable {
                device.sync().map_err(failed)?;
                pages_are_durable = true;
            }
            device.write_at(offset, &bytes).map_err(failed)?;
        }
        device.sync().map_err(failed)?;
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        // Some filesystems cannot sync a folder; the replica itself is safe by now.
        if let Err(error) = File::open(folder).and_then(|folder| folder.sync_all()) {
            tracing::debug!("cannot sync {}: {error}", folder.display());
        }
        Ok(())
    }
}

fn cannot(path: &Path, doing: &str, error: &io::Error) -> Failure {
    let failure = Failure::new(format!("cannot {doing} {}: {error}", path.display()));
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            failure.hint("its filesystem is full; make room or choose another place")
        }
        io::ErrorKind::FileTooLarge => failure.hint(
            "its filesystem (or `ulimit -f`) does not take files of this size; choose a smaller --size",
        ),
        io::ErrorKind::PermissionDenied => failure.hint("choose a folder that you may write in"),
        io::ErrorKind::AlreadyExists => failure.hint("somebody made it just now; try again"),
        _ => failure,
    }
}

/// The files made or extended so far; removed and cut again unless they are kept.
#[derive(Default)]
struct MadeFiles {
    paths: Vec<PathBuf>,
    /// With their size before, bytes.
    grown: Vec<(PathBuf, u64)>,
}

impl MadeFiles {
    fn keep(mut self) {
        self.paths.clear();
        self.grown.clear();
    }
}

impl Drop for MadeFiles {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!("cannot remove {} again: {error}", path.display());
            }
        }
        for (path, bytes) in &self.grown {
            let cut = OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(*bytes));
            if let Err(error) = cut {
                tracing::warn!("cannot cut {} to {bytes} bytes again: {error}", path.display());
            }
        }
    }
}
