//! The runtime directory, where the sockets of running volumes stand, and the names that volumes may have.
//!
//! What must hold: nobody but root and the user may put a socket where we look for one, so a directory in
//! `/tmp` is used only when it belongs to us and is closed to others.

use std::fs::{DirBuilder, Metadata};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use super::failure::Failure;
use crate::format::superblock::NAME_BYTES_MAX;

/// Overrides the runtime directory: for tests, and for containers.
pub const RUNTIME_DIR_VARIABLE: &str = "NBDMIRROR_RUNTIME_DIR";
/// How a control socket's file name ends.
pub const CONTROL_SUFFIX: &str = ".control";
/// How an NBD socket's file name ends.
pub const NBD_SUFFIX: &str = ".sock";

/// Where the sockets of this user's volumes stand: `$NBDMIRROR_RUNTIME_DIR`, `/run/nbdmirror` as root,
/// `$XDG_RUNTIME_DIR/nbdmirror`, or `/tmp/nbdmirror-UID`, the first that applies. May not exist yet.
#[must_use]
pub fn runtime_dir() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(dir) = variable(RUNTIME_DIR_VARIABLE) {
        return dir;
    }
    if geteuid().is_root() {
        return PathBuf::from("/run/nbdmirror");
    }
    match variable("XDG_RUNTIME_DIR").filter(|dir| dir.is_absolute()) {
        Some(dir) => dir.join("nbdmirror"),
        None => PathBuf::from(format!("/tmp/nbdmirror-{}", geteuid())),
    }
}

/// The runtime directory, made if it does not exist.
///
/// # Errors
/// It cannot be made, or it is not a directory, or others than root and this user may write in it.
pub fn prepare_runtime_dir() -> Result<PathBuf, Failure> {
    let dir = runtime_dir();
    let mode = if geteuid().is_root() { 0o755 } else { 0o700 };
    let made = DirBuilder::new().mode(mode).recursive(true).create(&dir);
    // Not followed: a symbolic link in /tmp may be anybody's.
    let metadata = made.and_then(|()| std::fs::symlink_metadata(&dir)).map_err(|error| {
        Failure::new(format!("cannot make the runtime directory {}: {error}", dir.display())).hint(format!(
            "give --listen and --control, or name another directory in ${RUNTIME_DIR_VARIABLE}"
        ))
    })?;
    check_owner(&dir, &metadata)?;
    Ok(dir)
}

fn check_owner(dir: &Path, metadata: &Metadata) -> Result<(), Failure> {
    let ours = metadata.uid() == geteuid().as_raw() || metadata.uid() == 0;
    if metadata.is_dir() && ours && metadata.mode() & 0o022 == 0 {
        return Ok(());
    }
    let what = format!("the runtime directory {} may be written by others", dir.display());
    Err(Failure::new(what)
        .hint(format!("remove it, or name a directory of your own in ${RUNTIME_DIR_VARIABLE}")))
}

/// The runtime directory, to look for running volumes in; `None` where it does not exist.
///
/// # Errors
/// It is not a directory, or others than root and this user may write in it: what stands there may be a trap.
pub fn trusted_runtime_dir() -> Result<Option<PathBuf>, Failure> {
    let dir = runtime_dir();
    match std::fs::symlink_metadata(&dir) {
        Ok(metadata) => check_owner(&dir, &metadata).map(|()| Some(dir)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(cannot_read(&dir, &error)),
    }
}

fn cannot_read(dir: &Path, error: &std::io::Error) -> Failure {
    Failure::new(format!("cannot read {}: {error}", dir.display()))
}

/// The control sockets in the runtime directory, in order of name; none where it does not exist.
///
/// # Errors
/// The directory is there and cannot be read, or not trusted.
pub fn control_sockets() -> Result<Vec<PathBuf>, Failure> {
    let Some(dir) = trusted_runtime_dir()? else { return Ok(Vec::new()) };
    let entries = std::fs::read_dir(&dir).map_err(|error| cannot_read(&dir, &error))?;
    let mut sockets: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.to_str().is_some_and(|path| path.ends_with(CONTROL_SUFFIX)))
        .collect();
    sockets.sort();
    Ok(sockets)
}

/// Checks a volume's name: 1 to 64 bytes of printable UTF-8 without `/`.
///
/// # Errors
/// Says which rule it breaks.
pub fn check_volume_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(format!("a volume's name has 1 to {NAME_BYTES_MAX} bytes; this has {}", name.len()));
    }
    if name.contains('/') || name.chars().any(char::is_control) {
        return Err("a volume's name has printable characters and no `/`".to_owned());
    }
    Ok(())
}

/// The name of a volume that is given none: after its first replica's file, without folder and ending.
#[must_use]
pub fn default_volume_name(replica: &Path) -> String {
    let stem = replica.file_stem().unwrap_or_default().to_string_lossy();
    let mut name: String = stem.chars().map(|c| if c.is_control() { '-' } else { c }).collect();
    while name.len() > NAME_BYTES_MAX {
        name.pop();
    }
    if name.is_empty() { "volume".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_printable_and_short() {
        for name in ["a", "disk-a", "Bücher 2", &"x".repeat(64)] {
            assert_eq!(check_volume_name(name), Ok(()), "{name}");
        }
        for name in ["", "a/b", "a\nb", "a\0", &"x".repeat(65)] {
            assert!(check_volume_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn volumes_without_a_name_are_called_after_their_first_replica() {
        for (path, name) in [
            ("disk-a.img", "disk-a"),
            ("/dev/sdb", "sdb"),
            ("/srv/x.y.img", "x.y"),
            ("/", "volume"),
            ("a\nb", "a-b"),
        ] {
            assert_eq!(default_volume_name(Path::new(path)), name);
        }
        let long = default_volume_name(Path::new(&"ü".repeat(100)));
        assert_eq!(check_volume_name(&long), Ok(()));
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let check = |mode| {
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            check_owner(dir.path(), &std::fs::symlink_metadata(dir.path()).unwrap())
        };
        assert!(check(0o700).is_ok() && check(0o755).is_ok());
        assert!(check(0o770).is_err() && check(0o777).is_err());
    }
}
