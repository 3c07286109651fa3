//! QEMU's clients: qemu-img, qemu-io, and two of its servers that stand on top of a volume.
//!
//! What they wrote is read back by another client or from the replicas' files; `docs/clients.md` has the command lines.

use std::ffi::OsStr;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use crate::support::daemon::{Daemon, NAME, Volume, assert_same_bytes};
use crate::support::image::{allocated_bytes, sparse_image};
use crate::support::tools::{Beside, lacks, run, wait_for};

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 64 * MIB;
const START_MAX: Duration = Duration::from_secs(20);

/// Runs qemu-img, which must succeed; what it printed.
fn qemu_img(args: &[&str]) -> String {
    run("qemu-img", args).ok()
}

/// The arguments of qemu-io for these commands on this URI.
fn qemu_io_args(commands: &[&str], uri: &str) -> Vec<String> {
    let mut args = vec!["-f".to_owned(), "raw".to_owned()];
    args.extend(commands.iter().flat_map(|command| ["-c".to_owned(), (*command).to_owned()]));
    args.push(uri.to_owned());
    args
}

/// Asserts that qemu-io carried out all its commands and found its patterns.
fn assert_qemu_io_content(printed: &str) {
    assert!(!printed.contains("Pattern verification failed") && !printed.contains("failed:"), "{printed}");
}

fn qemu_io(commands: &[&str], uri: &str) {
    assert_qemu_io_content(&run("qemu-io", qemu_io_args(commands, uri)).ok());
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn qemu_img_carries_images_in_and_out() {
    if lacks(&["qemu-img", "qemu-io"]) {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let image = sparse_image(volume.path("in.raw"), VOLUME_BYTES, 31);
    let [packed, back, head] = ["in.qcow2", "back.qcow2", "head.raw"].map(|name| volume.path(name));
    let (daemon, raw) = (volume.start(), ["-f", "raw"]);
    let uri = daemon.uri();
    let info: serde_json::Value =
        serde_json::from_str(&qemu_img(&["info", "--output=json", raw[0], raw[1], &uri])).unwrap();
    assert_eq!(info["virtual-size"], VOLUME_BYTES, "{info}");
    // In: a qcow2 image, out of order and with its holes; the volume held something else before.
    qemu_io(&["write -P 0xee 0 64M"], &uri);
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&image), text(&packed)]);
    qemu_img(&["convert", "-n", "-W", "-m", "8", "-f", "qcow2", "-O", "raw", text(&packed), &uri]);
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", text(&packed), &uri]);
    for replica in &volume.replicas {
        assert_same_bytes(&image, replica, VOLUME_BYTES);
    }
    // Out: into a qcow2 image, and in part.
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &uri, text(&back)]);
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", text(&back), text(&image)]);
    let (input, output) = (format!("if={uri}"), format!("of={}", head.display()));
    qemu_img(&["dd", "-f", "raw", "-O", "raw", "bs=1M", "count=7", "skip=2", &input, &output]);
    assert_same_ranges(&image, 2 * MIB, &head, 0, 5 * MIB);
    // bench writes a pattern of its own, 32 requests in flight.
    qemu_img(&["bench", "-f", "raw", "-w", "--pattern=0x5c", "-c", "2048", "-d", "32", "-s", "4k", &uri]);
    qemu_img(&["bench", "-f", "raw", "-c", "2048", "-d", "32", "-s", "4k", &uri]);
    qemu_io(&["read -P 0x5c 0 8M"], &uri);
    assert_eq!(daemon.wait_in_sync().clients.errors, 0);
    daemon.stop();
    volume.assert_identical();
}

/// What `qemu-img map` shows of a metadata context: first byte, length, and whether it calls that data.
fn map(context: &str, daemon: &Daemon) -> Vec<(u64, u64, bool)> {
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export={NAME},x-dirty-bitmap={context}",
        daemon.socket.display()
    );
    let json = qemu_img(&["map", "--output=json", "--image-opts", &image]);
    let extents: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    let of = |extent: &serde_json::Value| {
        (
            extent["start"].as_u64().unwrap(),
            extent["length"].as_u64().unwrap(),
            extent["data"].as_bool().unwrap(),
        )
    };
    extents.iter().map(of).collect()
}

#[test]
fn qemu_img_maps_data_and_what_a_replica_misses() {
    if lacks(&["qemu-img"]) {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let daemon = volume.start();
    daemon.verb("fail", &volume.replicas[1]).ok();
    daemon.client().write(8 * MIB, &vec![7; 4 * MIB as usize]).unwrap();
    let there = |yes: bool| {
        vec![(0, 8 * MIB, !yes), (8 * MIB, 4 * MIB, yes), (12 * MIB, VOLUME_BYTES - 12 * MIB, !yes)]
    };
    assert_eq!(map("base:allocation", &daemon), there(true));
    // QEMU takes the lowest bit as "no data" whatever the context.
    assert_eq!(map("nbdmirror:stale/1", &daemon), there(false));
    daemon.stop();
}

/// Asserts that `len` bytes of `left` from `left_at` are those of `right` from `right_at`.
fn assert_same_ranges(left: &Path, left_at: u64, right: &Path, right_at: u64, len: u64) {
    let [a, b] = [(left, left_at), (right, right_at)].map(|(path, at)| {
        let mut bytes = vec![0; len as usize];
        std::fs::File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
        bytes
    });
    assert!(a == b, "{} and {} differ", left.display(), right.display());
}

#[test]
fn a_qcow2_image_lives_on_the_volume() {
    if lacks(&["qemu-img", "qemu-io"]) {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let daemon = volume.start();
    let uri = daemon.uri();
    // A virtual size beyond the volume's: only what is written takes room.
    qemu_img(&["create", "-q", "-f", "qcow2", &uri, "1G"]);
    let commands = [
        "write -P 7 0 4M",
        "write -P 9 1000M 3M",
        "discard 1M 1M",
        "flush",
        "read -P 7 2M 2M",
        "read -P 0 1M 1M",
    ];
    let mut args = qemu_io_args(&commands, &uri);
    args[1] = "qcow2".to_owned();
    assert_qemu_io_content(&run("qemu-io", args).ok());
    qemu_img(&["check", "-f", "qcow2", &uri]);
    qemu_img(&["resize", "-f", "qcow2", &uri, "2G"]);
    daemon.kill();
    let daemon = volume.start();
    let uri = daemon.uri();
    qemu_img(&["check", "-f", "qcow2", &uri]);
    let mut args = qemu_io_args(&["read -P 9 1000M 3M", "read -P 0 1100M 4M", "read -P 0 2000M 1M"], &uri);
    args[1] = "qcow2".to_owned();
    assert_qemu_io_content(&run("qemu-io", args).ok());
    daemon.wait_in_sync();
    daemon.stop();
    volume.assert_identical();
}

#[test]
fn qemu_io_zeroes_with_and_without_holes() {
    if lacks(&["qemu-io"]) {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let daemon = volume.start();
    let uri = daemon.uri();
    qemu_io(&["write -P 0x21 0 64M", "flush"], &uri);
    let full = occupied(&volume);
    // Without -u the room stays (NO_HOLE); odd edges keep their neighbours.
    qemu_io(&["write -z 0 24M", "write -z 25165825 511", "write -z -f 25M 1M", "read -P 0 0 24M"], &uri);
    qemu_io(&["read -P 0x21 24M 1", "read -P 0 25165825 511", "read -P 0x21 25166336 1048064"], &uri);
    qemu_io(&["read -P 0 25M 1M", "read -P 0x21 26M 38M"], &uri);
    for (before, after) in full.iter().zip(occupied(&volume)) {
        // A filesystem's own blocks for the file may have changed.
        assert!(after + 64 * 1024 >= *before, "zeroes without a hole gave up room: {before}, then {after}");
    }
    // With it the room goes.
    qemu_io(&["write -z -u 0 24M", "discard 40M 16M", "read -P 0 0 24M", "read -P 0x21 26M 14M"], &uri);
    qemu_io(&["read -P 0x21 56M 8M", "read -P 0 25165825 511"], &uri);
    for (before, after) in full.iter().zip(occupied(&volume)) {
        assert!(after + 39 * MIB < *before, "a replica had {before} bytes and has {after}");
    }
    // A hole takes data again.
    qemu_io(&["write -P 0x44 1M 3000", "write -P 0x45 45M 64k", "read -P 0x44 1M 3000"], &uri);
    qemu_io(&["read -P 0 1051576 1000", "read -P 0x45 45M 64k"], &uri);
    assert_eq!(daemon.wait_in_sync().clients.errors, 0);
    daemon.stop();
    volume.assert_identical();
}

/// What each replica occupies.
fn occupied(volume: &Volume) -> Vec<u64> {
    volume.replicas.iter().map(|path| allocated_bytes(path)).collect()
}

/// Starts a server of QEMU's that offers the volume again at the socket `again.sock`; its URI.
fn start_on_top<I: AsRef<OsStr>>(
    volume: &Volume,
    tool: &str,
    args: impl IntoIterator<Item = I>,
) -> (Beside, String) {
    let log = volume.path("on-top.log");
    let server = Beside::start(tool, args, &log);
    let socket = volume.path("again.sock");
    wait_for(tool, START_MAX, || socket.exists());
    (server, format!("nbd+unix:///again?socket={}", socket.display()))
}

fn start_storage_daemon(volume: &Volume, daemon: &Daemon) -> (Beside, String) {
    let node = format!(
        "driver=nbd,node-name=mirror,server.type=unix,server.path={},export={NAME},reconnect-delay=60,discard=unmap",
        daemon.socket.display()
    );
    let server =
        format!("addr.type=unix,addr.path={},max-connections=8", volume.path("again.sock").display());
    let export = "type=nbd,id=again,node-name=mirror,name=again,writable=on";
    start_on_top(
        volume,
        "qemu-storage-daemon",
        ["--blockdev", &node, "--nbd-server", &server, "--export", export],
    )
}

#[test]
fn a_storage_daemon_on_top_rides_out_a_restart() {
    if lacks(&["qemu-storage-daemon", "qemu-io", "nbdcopy"]) {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let image = sparse_image(volume.path("in.raw"), VOLUME_BYTES, 32);
    let daemon = volume.start();
    let (on_top, again) = start_storage_daemon(&volume, &daemon);
    run("nbdcopy", ["--connections=4", "--flush", text(&image), &again]).ok();
    daemon.kill();
    // These wait in the storage daemon until the volume is served again.
    let commands = ["aio_write -P 0x71 1M 2M", "aio_write -P 0x72 9M 1M", "aio_flush", "read -P 0x71 1M 2M"];
    let log = volume.path("io.log");
    let mut waiting = Beside::start("qemu-io", qemu_io_args(&commands, &again), &log);
    std::thread::sleep(Duration::from_millis(300));
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(matches!(waiting.0.try_wait(), Ok(None)), "qemu-io did not wait for the volume: {said}");
    let daemon = volume.start();
    assert!(waiting.wait(Duration::from_secs(60)), "qemu-io is not content: {}", log.display());
    assert_qemu_io_content(&std::fs::read_to_string(&log).unwrap());
    qemu_io(&["read -P 0x71 1M 2M", "read -P 0x72 9M 1M"], &daemon.uri());
    drop(on_top);
    daemon.wait_in_sync();
    daemon.stop();
    // Everything else is as it was copied.
    assert_same_ranges(&image, 3 * MIB, &volume.replicas[0], 3 * MIB, 6 * MIB);
    assert_same_ranges(&image, 10 * MIB, &volume.replicas[0], 10 * MIB, 54 * MIB);
    assert_same_ranges(&image, 0, &volume.replicas[0], 0, MIB);
    volume.assert_identical();
}

#[test]
fn qemu_nbd_on_top_and_its_list() {
    if lacks(&["qemu-nbd", "qemu-img", "nbdcopy"]) {
        return;
    }
    let volume = Volume::new(VOLUME_BYTES, &[]);
    let image = sparse_image(volume.path("in.raw"), VOLUME_BYTES, 33);
    let daemon = volume.start();
    let list = run("qemu-nbd", ["--list", "-k", text(&daemon.socket)]).ok();
    assert!(list.contains(NAME) && list.contains(&VOLUME_BYTES.to_string()), "{list}");
    let socket = volume.path("again.sock");
    let uri = daemon.uri();
    let args = ["-f", "raw", "-t", "-e", "4", "-x", "again", "--discard=unmap", "-k", text(&socket), &uri];
    let (on_top, again) = start_on_top(&volume, "qemu-nbd", args);
    run("nbdcopy", ["--connections=4", "--flush", text(&image), &again]).ok();
    qemu_img(&["compare", "-f", "raw", "-F", "raw", text(&image), &again]);
    drop(on_top);
    assert_eq!(daemon.wait_in_sync().clients.errors, 0);
    daemon.stop();
    for replica in &volume.replicas {
        assert_same_bytes(&image, replica, VOLUME_BYTES);
    }
}
