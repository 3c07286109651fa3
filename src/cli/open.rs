//! Opening the replicas that a command line names, and reading what stands on them. Writes nothing.
//!
//! What must hold: no two of the paths lead to one thing, whatever links are between; every replica is locked
//! before it is looked at.

use std::io;
use std::path::{Path, PathBuf};

use super::probe::probe;
use crate::control::failure::Failure;
use crate::engine::device::{Access, DeviceIdentity, DeviceOpenError, ReplicaDevice, identity_of_path};
use crate::format::Found;
use crate::format::read::{ReadError, read_found};
use crate::units::REPLICAS_MAX;

/// A replica as given on the command line, opened if it is there.
pub(super) struct Opened {
    /// Its absolute path. Links stay as they are: `/dev/disk/by-id/...` keeps its meaning.
    pub(super) path: PathBuf,
    /// `None`: there is nothing at the path.
    pub(super) device: Option<ReplicaDevice>,
    /// What stands on it.
    pub(super) content: Result<Option<Found>, ReadError>,
}

impl Opened {
    /// The path as text, for messages and for the member table.
    pub(super) fn path_text(&self) -> String {
        self.path.display().to_string()
    }
}

/// Makes `replicas` absolute and checks their number and that no two are the same.
pub(super) fn distinct_paths(replicas: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    if replicas.len() > REPLICAS_MAX {
        return Err(Failure::new(format!("{} replicas: a volume has one to {REPLICAS_MAX}", replicas.len())));
    }
    let mut paths: Vec<PathBuf> = Vec::new();
    let mut places: Vec<Place> = Vec::new();
    for replica in replicas {
        let path = absolute(replica)?;
        let place = Place::of(&path);
        if let Some(index) = places.iter().position(|other| *other == place) {
            let (one, other) = (paths[index].display(), path.display());
            return Err(Failure::new(format!("{one} and {other} are the same replica"))
                .hint("a mirror needs different files or devices, best on different disks"));
        }
        paths.push(path);
        places.push(place);
    }
    Ok(paths)
}

pub(super) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|error| Failure::new(format!("cannot use `{}`: {error}", path.display())))
}

/// What a path leads to.
#[derive(PartialEq, Eq)]
enum Place {
    Existing(DeviceIdentity),
    /// Nothing there: the folder it would stand in, without links, and its name.
    New(PathBuf),
}

impl Place {
    fn of(path: &Path) -> Self {
        if let Ok(identity) = identity_of_path(path) {
            return Self::Existing(identity);
        }
        let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
        match (folder, path.file_name()) {
            (Some(folder), Some(name)) => Self::New(folder.join(name)),
            _ => Self::New(path.to_owned()),
        }
    }
}

/// Opens what is at `path` and reads its metadata; a path that leads to nothing gives no device.
pub(super) fn open(path: &Path, access: Access) -> Result<Opened, DeviceOpenError> {
    let device = match ReplicaDevice::open(path, access) {
        Ok(device) => device,
        Err(DeviceOpenError::NotFound { .. }) => {
            return Ok(Opened { path: path.to_owned(), device: None, content: Ok(None) });
        }
        Err(error) => return Err(error),
    };
    let content = read_metadata(&device);
    Ok(Opened { path: path.to_owned(), device: Some(device), content })
}

/// Reads what stands on a device.
pub(super) fn read_metadata(device: &ReplicaDevice) -> Result<Option<Found>, ReadError> {
    let path = device.path.display().to_string();
    let mut read_at = |offset, bytes: &mut [u8]| -> io::Result<()> { device.read_at(offset, bytes) };
    read_found(&path, device.traits.device_bytes, &mut read_at)
}

/// Opens the replica that an operator wants to add, and refuses what holds somebody's data unless `force`.
pub(super) fn open_for_add(path: &Path, force: bool) -> Result<(ReplicaDevice, Option<Found>), Failure> {
    let device = ReplicaDevice::open(path, Access::ReadWrite).map_err(device_failure)?;
    let found = match read_metadata(&device) {
        Ok(found) => found,
        Err(error) if force => {
            tracing::warn!("{error}; overwritten, as --force was given");
            None
        }
        Err(error) => return Err(Failure::new(error.to_string())),
    };
    if found.is_none() && !force {
        refuse_foreign_data(path, "`nbdmirror add --force` overwrites it")?;
    }
    Ok((device, found))
}

/// Refuses a path that holds a filesystem, a partition table or another's signature.
pub(super) fn refuse_foreign_data(path: &Path, how_to_insist: &str) -> Result<(), Failure> {
    match probe(path)? {
        None => Ok(()),
        Some(what) => Err(Failure::new(format!("{} holds {what}", path.display()))
            .hint(format!("if nothing on it is needed: {how_to_insist}"))),
    }
}

/// In words; the error's own text has the remedy behind its first sentence.
pub(super) fn device_failure(error: DeviceOpenError) -> Failure {
    let text = error.to_string();
    if matches!(error, DeviceOpenError::Io { .. }) {
        return Failure::new(text);
    }
    match text.rsplit_once(". ") {
        Some((what, hint)) => Failure::new(what).hint(hint),
        None => Failure::new(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_replica_twice_is_found_through_links() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("a"), "").unwrap();
        std::fs::write(at("b"), "").unwrap();
        std::fs::hard_link(at("a"), at("hard")).unwrap();
        std::os::unix::fs::symlink(at("a"), at("soft")).unwrap();
        std::os::unix::fs::symlink(dir.path(), at("folder")).unwrap();
        assert!(distinct_paths(&[at("a"), at("b"), at("new")]).is_ok());
        for (one, other) in [
            ("a", "a"),
            ("a", "hard"),
            ("a", "soft"),
            ("a", "folder/a"),
            ("new", "new"),
            ("new", "folder/new"),
        ] {
            let failure = distinct_paths(&[at(one), at(other)]).unwrap_err();
            assert!(failure.what.contains("same replica"), "{one} {other}");
        }
        assert!(distinct_paths(&vec![at("a"); 9]).unwrap_err().what.contains("one to 8"));
    }
}
