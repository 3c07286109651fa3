//! libnbd's clients (nbdinfo, nbdcopy, nbdsh, nbdfuse) and nbdkit's nbd plugin, which is one too.
//!
//! What they wrote is read back by another client or from the replicas' files; `docs/clients.md` has the command lines.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::daemon::{NAME, Volume, assert_same_bytes};
use crate::support::image::{allocated_bytes, sparse_image};
use crate::support::skip;
use crate::support::tools::{Beside, is_root, lacks, run, wait_for};

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 32 * MIB;
const START_MAX: Duration = Duration::from_secs(20);
/// A folder with thousands of small files of which copies are made.
const FOLDERS: [&str; 3] = ["/usr/share/zoneinfo", "/usr/share/perl", "/usr/share/doc"];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn assert_holds(volume: &Volume, image: &Path) {
    for replica in &volume.replicas {
        assert_same_bytes(image, replica, VOLUME_BYTES);
    }
}

#[test]
fn nbdinfo_answers_scripts_by_its_exit_code() {
    if lacks(&["nbdinfo"]) {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let daemon = volume.start();
    let uri = daemon.uri();
    assert_eq!(run("nbdinfo", ["--size", &uri]).ok().trim(), VOLUME_BYTES.to_string());
    for can in
        ["connect", "read", "write", "flush", "fua", "trim", "zero", "fast-zero", "multi-conn", "cache", "df"]
    {
        run("nbdinfo", ["--can", can, &uri]).ok();
    }
    for is in ["read-only", "rotational", "tls"] {
        // 2 is nbdinfo's "no".
        assert_eq!(run("nbdinfo", ["--is", is, &uri]).status.code(), Some(2), "{is}");
    }
    let all = format!("nbd+unix:///?socket={}", daemon.socket.display());
    let list: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", ["--list", "--json", &all]).ok()).unwrap();
    let exports = list["exports"].as_array().unwrap();
    assert!(exports.len() == 1 && exports[0]["export-name"] == NAME, "{list}");
    assert_eq!(exports[0]["export-size"], VOLUME_BYTES, "{list}");
}

/// What `nbdinfo --map` shows of a metadata context: first byte, length and type; neighbours of a type as one.
fn map(context: &str, uri: &str) -> Vec<(u64, u64, u64)> {
    let json = run("nbdinfo", ["--json", &format!("--map={context}"), uri]).ok();
    let extents: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    let mut merged: Vec<(u64, u64, u64)> = Vec::new();
    for extent in extents {
        let [offset, length, kind] = ["offset", "length", "type"].map(|name| extent[name].as_u64().unwrap());
        assert_eq!(offset, merged.last().map_or(0, |last| last.0 + last.1), "a gap: {json}");
        match merged.last_mut() {
            Some(last) if last.2 == kind => last.1 += length,
            _ => merged.push((offset, length, kind)),
        }
    }
    merged
}

#[test]
fn nbdinfo_draws_the_mirror() {
    const HOLE_AND_ZERO: u64 = 3;
    const DIRTY: u64 = 1;
    const OUT_OF_SYNC: u64 = 2;
    if lacks(&["nbdinfo"]) {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let daemon = volume.start();
    let uri = daemon.uri();
    assert_eq!(map("base:allocation", &uri), [(0, VOLUME_BYTES, HOLE_AND_ZERO)]);
    for context in ["nbdmirror:state", "nbdmirror:stale/0", "nbdmirror:stale/1"] {
        assert_eq!(map(context, &uri), [(0, VOLUME_BYTES, 0)], "{context}");
    }
    daemon.verb("fail", &volume.replicas[1]).ok();
    let mut client = daemon.client();
    client.write(20 * MIB, &vec![7; 2 * MIB as usize]).unwrap();
    // Regions are of 1 MiB.
    let missed =
        |kind| vec![(0, 20 * MIB, 0), (20 * MIB, 2 * MIB, kind), (22 * MIB, VOLUME_BYTES - 22 * MIB, 0)];
    assert_eq!(map("nbdmirror:state", &uri), missed(DIRTY | OUT_OF_SYNC));
    assert_eq!(map("nbdmirror:stale/1", &uri), missed(1));
    assert_eq!(map("nbdmirror:stale/0", &uri), [(0, VOLUME_BYTES, 0)]);
    let allocated: Vec<_> =
        map("base:allocation", &uri).iter().map(|(at, len, kind)| (*at, *len, 3 - kind)).collect();
    assert_eq!(allocated, missed(HOLE_AND_ZERO));
    daemon.verb("add", &volume.replicas[1]).ok();
    daemon.wait_in_sync();
    assert_eq!(map("nbdmirror:stale/1", &uri), [(0, VOLUME_BYTES, 0)]);
    assert!(map("nbdmirror:state", &uri).iter().all(|extent| extent.2 & OUT_OF_SYNC == 0));
    let unknown = run("nbdinfo", ["--map=nbdmirror:stale/7", &uri]);
    assert!(!unknown.status.success() && unknown.err.contains("does not support"), "{unknown:?}");
    daemon.stop();
    volume.assert_identical();
}

#[test]
fn nbdcopy_goes_both_ways() {
    if lacks(&["nbdcopy"]) {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let daemon = volume.start();
    let uri = daemon.uri();
    let back = volume.path("back.raw");
    let ways: [&[&str]; 4] = [
        &["--connections=4", "--requests=64"],
        &["--connections=1", "--requests=1"],
        &["--synchronous"],
        &["--connections=2", "--request-size=32768", "--allocated", "--flush"],
    ];
    for (seed, way) in (40..).zip(ways) {
        // Each image has its holes where the one before may have had data, which must be gone.
        let image = sparse_image(volume.path("in.raw"), VOLUME_BYTES, seed);
        run("nbdcopy", [way, &[text(&image), &uri]].concat()).ok();
        assert_holds(&volume, &image);
        run("nbdcopy", [way, &[&uri, text(&back)]].concat()).ok();
        assert_same_bytes(&image, &back, VOLUME_BYTES);
    }
    assert_eq!(daemon.wait_in_sync().clients.errors, 0);
    daemon.stop();
    volume.assert_identical();
}

#[test]
fn nbdcopy_keeps_holes() {
    if lacks(&["nbdcopy"]) {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let image = sparse_image(volume.path("in.raw"), VOLUME_BYTES, 45);
    let occupied = allocated_bytes(&image);
    assert!(occupied < VOLUME_BYTES * 3 / 4, "no room for holes here: {occupied}");
    let fresh = allocated_bytes(&volume.replicas[0]);
    let daemon = volume.start();
    // --sparse=0: nbdcopy does not look for zeroes itself; holes are what the file and the server say they are.
    let ask = ["--connections=4", "--sparse=0"];
    run("nbdcopy", [&ask[..], &["--flush", text(&image), &daemon.uri()]].concat()).ok();
    let back = volume.path("back.raw");
    run("nbdcopy", [&ask[..], &[&daemon.uri(), text(&back)]].concat()).ok();
    daemon.stop();
    assert_holds(&volume, &image);
    assert_same_bytes(&image, &back, VOLUME_BYTES);
    for (copy, more) in [(&volume.replicas[0], fresh), (&volume.replicas[1], fresh), (&back, 0)] {
        let is = allocated_bytes(copy);
        assert!(is <= occupied + more + MIB, "{}: {is} bytes of an image of {occupied}", copy.display());
    }
}

/// Runs nbdsh; its own Python, whatever else of that name is on the `PATH`.
fn nbdsh(args: &[&str]) -> String {
    run("env", [&["PATH=/usr/bin:/bin", "nbdsh"], args].concat()).ok()
}

#[test]
fn nbdsh_sends_odd_requests() {
    if lacks(&["nbdsh"]) {
        return;
    }
    let volume = Volume::new(64 * MIB, &[]);
    let daemon = volume.start();
    let script = include_str!("odd_requests.py");
    for structured in ["True", "False"] {
        let connect = format!(
            "h.set_request_structured_replies({structured})\nh.connect_uri({:?})\n{script}",
            daemon.uri()
        );
        assert_eq!(nbdsh(&["-c", &connect]).trim(), "fine", "structured replies: {structured}");
    }
    daemon.wait_in_sync();
    daemon.stop();
    volume.assert_identical();
}

/// A filesystem mounted through a loop device; unmounted when dropped.
struct LoopMount(PathBuf);

impl LoopMount {
    fn new(image: &Path, folder: PathBuf) -> Self {
        fs::create_dir(&folder).unwrap();
        run("mount", ["-o", "loop", text(image), text(&folder)]).ok();
        Self(folder)
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        let said = run("umount", [text(&self.0)]);
        if !said.status.success() && !std::thread::panicking() {
            panic!("umount: {}", said.err);
        }
    }
}

/// Why no loop device can be had here; a machine without any is still tested, in containers they are rare.
fn no_loop_device() -> Option<String> {
    if !is_root() {
        return Some("not root".to_owned());
    }
    let said = run("losetup", ["--find"]);
    (!said.status.success()).then(|| said.err.trim().to_owned())
}

/// Copies a folder into the filesystem in `image`, by way of a loop device, and compares it after a second mount.
fn fill_by_loop_device(volume: &Volume, image: &Path) {
    let folder = FOLDERS.into_iter().find(|folder| Path::new(folder).is_dir()).expect("a system folder");
    let mount = LoopMount::new(image, volume.path("first"));
    run("cp", ["-a", folder, text(&mount.0.join("copy"))]).ok();
    drop(mount);
    let mount = LoopMount::new(image, volume.path("second"));
    run("diff", ["-r", "--no-dereference", folder, text(&mount.0.join("copy"))]).ok();
    run("fstrim", [text(&mount.0)]).ok();
}

#[test]
fn a_filesystem_through_nbdfuse_and_a_loop_device() {
    if lacks(&["nbdfuse", "fusermount3", "mke2fs", "e2fsck"]) {
        return;
    }
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        return skip(&format!("/dev/fuse: {error}"));
    }
    let volume = Volume::new(64 * MIB, &[]);
    let daemon = volume.start();
    let file = volume.path("volume");
    fs::write(&file, b"").unwrap();
    let fuse = Beside::start("nbdfuse", [text(&file), &daemon.uri()], &volume.path("nbdfuse.log"));
    wait_for("nbdfuse", START_MAX, || fs::metadata(&file).is_ok_and(|file| file.len() == volume.size_bytes));
    // What the file takes is what the volume holds, and the other way round.
    let image = sparse_image(volume.path("in.raw"), volume.size_bytes, 50);
    run(
        "dd",
        [
            &format!("if={}", image.display()),
            &format!("of={}", file.display()),
            "bs=1M",
            "conv=notrunc,fsync",
        ],
    )
    .ok();
    run("cmp", [text(&image), text(&file)]).ok();
    for replica in &volume.replicas {
        assert_same_bytes(&image, replica, volume.size_bytes);
    }
    run("mke2fs", ["-q", "-t", "ext4", "-F", text(&file)]).ok();
    match no_loop_device() {
        None => fill_by_loop_device(&volume, &file),
        // Not a failure under CI: what nbdmirror serves was tried, a loop device is the kernel's.
        Some(reason) if std::env::var("CI").as_deref() == Ok("true") => eprintln!("no loop device: {reason}"),
        Some(reason) => skip(&format!("no loop device: {reason}")),
    }
    drop(fuse);
    assert_eq!(daemon.wait_in_sync().clients.errors, 0);
    daemon.stop();
    volume.assert_identical();
    for replica in &volume.replicas {
        let said = run("e2fsck", ["-f", "-n", text(replica)]);
        assert!(said.status.success(), "e2fsck {}:\n{}{}", said.status, said.out, said.err);
    }
}

#[test]
fn nbdkit_passes_it_on() {
    if lacks(&["nbdkit", "nbdcopy", "nbdinfo"]) {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let image = sparse_image(volume.path("in.raw"), VOLUME_BYTES, 51);
    let daemon = volume.start();
    let [socket, back] = ["again.sock", "back.raw"].map(|name| volume.path(name));
    let to = [format!("socket={}", daemon.socket.display()), format!("export={NAME}")];
    let args = ["-f", "-U", text(&socket), "nbd", &to[0], &to[1]];
    let proxy = Beside::start("nbdkit", args, &volume.path("nbdkit.log"));
    wait_for("nbdkit", START_MAX, || socket.exists());
    let again = format!("nbd+unix:///?socket={}", socket.display());
    assert_eq!(run("nbdinfo", ["--size", &again]).ok().trim(), VOLUME_BYTES.to_string());
    run("nbdcopy", ["--connections=4", "--flush", text(&image), &again]).ok();
    run("nbdcopy", ["--connections=4", &again, text(&back)]).ok();
    drop(proxy);
    assert_same_bytes(&image, &back, VOLUME_BYTES);
    assert_eq!(daemon.wait_in_sync().clients.errors, 0);
    daemon.stop();
    assert_holds(&volume, &image);
}
