//! The on-disk format: a pure codec (bytes in, values out) and the rules of assembly.
//!
//! `docs/on-disk-format.md` has the byte map. Data first, metadata behind it, found from the end:
//!
//! ```text
//! 0 ............ volume_bytes   the volume's bytes (promise 10)
//!                               [gap: replicas may be larger than needed]
//! bitmap_offset .. +pages*4096  bitmap pages: intent bits and stale maps (see `bitmap`)
//! device_end - 8192             superblock slot 0
//! device_end - 4096             superblock slot 1
//! ```

//! - `superblock`, `bitmap`: bytes to values and back. `cursor` is their only way to bytes.
//! - `layout`: where things stand. `read`: a whole replica's metadata. `create`: a new volume's bytes.
//! - `assemble`: who is trusted at start, by the rules in `verdict`. `describe`: words for operators.

pub mod assemble;
pub mod bitmap;
pub mod create;
mod cursor;
pub mod describe;
pub mod layout;
pub mod read;
mod refuse;
pub mod superblock;
mod verdict;

#[cfg(test)]
mod tests;

pub use assemble::{Assembly, Found};
