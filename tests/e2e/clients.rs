//! Other people's clients and real data: an ext4 image through qemu-img and nbdcopy, qemu-io's patterns, what nbdinfo
//! sees; and clients of bad manners, who cost their own connection and nothing else.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::daemon::{self, Volume, assert_same_bytes};
use crate::support::nbd::{Client, Command};
use crate::support::rng::Rng;
use crate::support::tools::{lacks, run};

const IMAGE_BYTES: u64 = 192 << 20;
/// Folders of which the first that is there fills the ext4 image; each holds thousands of small files and links.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/share/perl", "/usr/share/zoneinfo", "/usr/share/doc"];

/// An ext4 image of `IMAGE_BYTES` with a system folder in it.
fn ext4_image(dir: &Path) -> PathBuf {
    let image = dir.join("ext4.img");
    File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
    let folder =
        SYSTEM_FOLDERS.into_iter().find(|folder| Path::new(folder).is_dir()).expect("a system folder");
    let args = ["-q", "-t", "ext4", "-F", "-d", folder].map(std::ffi::OsStr::new);
    run("mke2fs", args.into_iter().chain([image.as_os_str()])).ok();
    image
}

fn assert_fsck_clean(image: &Path) {
    let said = run("e2fsck", ["-f".as_ref(), "-n".as_ref(), image.as_os_str()]);
    assert!(said.status.success(), "{}: e2fsck {}:\n{}{}", image.display(), said.status, said.out, said.err);
}

#[test]
fn an_ext4_image_comes_back_identical() {
    if lacks(&["mke2fs", "e2fsck", "qemu-img", "nbdcopy"]) {
        return;
    }
    let volume = Volume::new(IMAGE_BYTES, &[]);
    let image = ext4_image(volume.dir.path());
    let daemon = volume.start();
    let uri = daemon.uri();
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8"].map(std::ffi::OsStr::new);
    run("qemu-img", convert.into_iter().chain([image.as_os_str(), uri.as_ref()])).ok();
    let back = volume.path("back.img");
    run("nbdcopy", ["--connections=4".as_ref(), uri.as_ref(), back.as_os_str()]).ok();
    assert_same_bytes(&image, &back, IMAGE_BYTES);
    run(
        "qemu-img",
        [
            "compare".as_ref(),
            "-f".as_ref(),
            "raw".as_ref(),
            "-F".as_ref(),
            "raw".as_ref(),
            image.as_os_str(),
            uri.as_ref(),
        ],
    )
    .ok();
    daemon.stop();
    for replica in &volume.replicas {
        assert_same_bytes(&image, replica, IMAGE_BYTES);
        assert_fsck_clean(replica);
    }
    volume.assert_identical();
}

#[test]
fn nbdinfo_sees_the_size_and_what_is_offered() {
    if lacks(&["nbdinfo"]) {
        return;
    }
    let volume = Volume::new(64 << 20, &[]);
    let daemon = volume.start();
    let text = run("nbdinfo", ["--json", "--no-content", &daemon.uri()]).ok();
    let info: serde_json::Value = serde_json::from_str(&text).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 64 << 20, "{text}");
    for offered in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"] {
        assert_eq!(export[offered], true, "{offered}: {text}");
    }
    assert_eq!(export["is_read_only"], false, "{text}");
    let list = run(
        "nbdinfo",
        ["--list", "--no-content", &format!("nbd+unix:///?socket={}", daemon.socket.display())],
    )
    .ok();
    assert!(list.contains(daemon::NAME), "{list}");
    let unknown = format!("nbd+unix:///other?socket={}", daemon.socket.display());
    assert!(!run("nbdinfo", [&unknown]).status.success(), "a volume of another name is served");
}

#[test]
fn qemu_io_reads_its_patterns_back() {
    if lacks(&["qemu-io"]) {
        return;
    }
    let volume = Volume::new(64 << 20, &[]);
    let daemon = volume.start();
    let commands = [
        "write -P 0x11 0 1M",
        "write -P 0x22 4097 511",
        "write -P 0x33 1M 32M",
        "write -z 2M 1M",
        "write -z 3M 513",
        "discard 4M 64k",
        "aio_write -P 0x44 40M 4k",
        "aio_write -P 0x55 41M 64k",
        "aio_flush",
        "flush",
        "write -f -P 0x66 67108352 512",
        "read -P 0x11 0 4097",
        "read -P 0x22 4097 511",
        "read -P 0x11 4608 1000",
        "read -P 0 2M 1M",
        "read -P 0 3M 513",
        "read -P 0x33 3146241 1k",
        "read -P 0x33 5M 28M",
        "read -P 0x44 40M 4k",
        "read -P 0x55 41M 64k",
        "read -P 0x66 67108352 512",
        "read -P 0 34M 6M",
    ];
    let mut args = vec!["-f".to_owned(), "raw".to_owned()];
    args.extend(commands.iter().flat_map(|command| ["-c".to_owned(), (*command).to_owned()]));
    args.push(daemon.uri());
    let out = run("qemu-io", args).ok();
    assert!(!out.contains("Pattern verification failed") && !out.contains("failed:"), "{out}");
    assert_eq!(daemon.wait_in_sync().clients.errors, 0);
    daemon.stop();
    volume.assert_identical();
}

#[test]
fn rubbish_costs_its_own_connection_only() {
    let volume = Volume::new(16 << 20, &[]);
    let daemon = volume.start();
    let mut good = daemon.client();
    good.write(0, &[1; 4096]).unwrap();
    let mut rng = Rng::new(5);
    let mut held = Vec::new();
    for round in 0..64 {
        let mut stream = UnixStream::connect(&daemon.socket).unwrap();
        let noise: Vec<u8> = (0..rng.below(8192)).map(|_| rng.next() as u8).collect();
        // The server may hang up in the middle of it.
        let _ = match round % 4 {
            0 => stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            1 => stream.write_all(&noise),
            2 => stream.write_all(&[0, 0, 0, 3]).and_then(|()| stream.write_all(&noise)),
            _ => Ok(()),
        };
        if round % 3 == 0 {
            held.push(stream);
        }
    }
    assert_eq!(good.read(0, 4096).unwrap(), [1; 4096]);
    let mut late = daemon.client();
    late.write(4096, &[2; 512]).unwrap();
    assert_eq!(late.read(4096, 512).unwrap(), [2; 512]);
    drop(held);
    daemon.stop();
    volume.assert_identical();
}

#[test]
fn a_client_that_vanishes_in_mid_write_costs_nothing() {
    const LEN: usize = 128 << 10;
    let volume = Volume::new(64 << 20, &[]);
    let daemon = volume.start();
    for round in 0..8_u8 {
        let mut client = daemon.client();
        for slot in 0..64 {
            client.send(Command::Write, 0, slot * LEN as u64, LEN as u32, &[round + 1; LEN]).unwrap();
        }
        // The last write stays without half of its payload.
        client.send(Command::Write, 0, 32 << 20, 4096, &[9; 2048]).unwrap();
        drop(client);
    }
    let mut client = daemon.client();
    for slot in 0..64 {
        let bytes = client.read(slot * LEN as u64, LEN).unwrap();
        for sector in bytes.chunks(512) {
            assert!(sector[0] <= 8 && sector.iter().all(|byte| *byte == sector[0]), "torn sector");
        }
        assert_eq!(client.read(slot * LEN as u64, LEN).unwrap(), bytes, "a block changed its mind");
    }
    assert_eq!(client.read(32 << 20, 4096).unwrap(), [0; 4096], "half a request was carried out");
    daemon.stop();
    volume.assert_identical();
}

#[test]
fn a_client_that_never_reads_does_not_stop_others() {
    let volume = Volume::new(64 << 20, &[]);
    let daemon = volume.start();
    let mut deaf = daemon.client();
    let socket = daemon.socket.clone();
    let flood = std::thread::spawn(move || {
        // Far more replies than the socket holds; the server may stop taking requests, or hang up.
        for slot in 0..256 {
            if deaf.send(Command::Read, 0, slot * (128 << 10), 128 << 10, &[]).is_err() {
                break;
            }
        }
        std::thread::sleep(Duration::from_secs(1));
    });
    for round in 0..50_u8 {
        let mut client = Client::connect(&socket, "").unwrap();
        client.write(u64::from(round) * 512, &[round; 512]).unwrap();
        assert_eq!(client.read(u64::from(round) * 512, 512).unwrap(), [round; 512]);
    }
    flood.join().unwrap();
    daemon.stop();
}
