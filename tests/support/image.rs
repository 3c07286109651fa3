//! Disk images for other people's clients: data that names its place, runs of one byte, and holes.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::rng::Rng;

const MIB: u64 = 1 << 20;
/// One byte repeated, as a formatted disk has it.
const RUN: u8 = 0xa5;

/// What a MiB of an image holds, in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Random bytes.
    Random,
    /// Nothing: a hole.
    Hole,
    /// [`RUN`] throughout.
    Run,
    /// Random bytes in the upper half, a hole before them.
    Half,
}

/// What the MiB of this index holds.
pub(crate) fn kind(mib: u64) -> Kind {
    match mib % 4 {
        0 => Kind::Random,
        1 => Kind::Hole,
        2 => Kind::Run,
        _ => Kind::Half,
    }
}

/// Makes a sparse image of `size_bytes` (whole MiB) at `path`; equal seeds give equal images.
pub(crate) fn sparse_image(path: PathBuf, size_bytes: u64, seed: u64) -> PathBuf {
    assert!(size_bytes.is_multiple_of(MIB));
    let file = File::create(&path).unwrap();
    file.set_len(size_bytes).unwrap();
    let mut rng = Rng::new(seed);
    let mut random = |len: u64| -> Vec<u8> { (0..len / 8).flat_map(|_| rng.next().to_le_bytes()).collect() };
    for mib in 0..size_bytes / MIB {
        let at = mib * MIB;
        match kind(mib) {
            Kind::Random => file.write_all_at(&random(MIB), at).unwrap(),
            Kind::Hole => {}
            Kind::Run => file.write_all_at(&[RUN; MIB as usize], at).unwrap(),
            Kind::Half => file.write_all_at(&random(MIB / 2), at + MIB / 2).unwrap(),
        }
    }
    path
}

/// What a file occupies on its filesystem, bytes.
pub(crate) fn allocated_bytes(path: &Path) -> u64 {
    // A filesystem may allocate only when it writes back.
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}
