//! The real binary: its verbs, and what it says to wrong input. Wrong input leaves every replica untouched.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod cli_support;
mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use cli_support::{BINARY, Bench, is_root};
use support::skip;

const VOLUME_BYTES: u64 = 4 << 20;

#[test]
fn one_command_in_an_empty_folder_serves_a_mirror() {
    let bench = Bench::new();
    let daemon = bench.serve(&["--create", "4M", "disk-a.img", "disk-b.img"]);
    for word in ["Serving volume disk-a", "in-sync", "nbd-client", "qemu-system", "fio", "disk-a.control"] {
        assert!(daemon.banner.contains(word), "{word} in {}", daemon.banner);
    }
    bench.run(&["status"]).succeeds().says("disk-a").says("healthy").says("2/2");
    bench.run(&["status", "disk-a"]).succeeds().says("disk-b.img");
    let status = bench.status_json("disk-a");
    assert_eq!(status["volume"]["size_bytes"], VOLUME_BYTES);
    assert_eq!(status["volume"]["health"], "healthy");
    assert_eq!(status["schema"], 1);
    bench.run(&["examine", "disk-a.img"]).succeeds().says("in use by a daemon");
    bench.run(&["stop"]).succeeds().says("stopped, clean");
    daemon.ended_with(0);
    bench.run(&["examine", "disk-a.img", "disk-b.img"]).succeeds().says("clean;").does_not_say("in use");
    // The same command again serves what is there.
    let daemon = bench.serve(&["--create", "4M", "disk-a.img", "disk-b.img"]);
    assert!(!daemon.banner.contains("Made volume"), "{}", daemon.banner);
    bench.run(&["stop", "disk-a"]).succeeds();
    daemon.ended_with(0);
    assert_eq!(std::fs::read_dir(bench.runtime_dir()).unwrap().count(), 0, "sockets are left behind");
}

#[test]
fn signals_stop_it_cleanly() {
    for signal in ["TERM", "INT"] {
        let bench = Bench::new();
        let daemon = bench.serve(&["--create", "4M", "a", "b"]);
        daemon.signal(signal);
        daemon.ended_with(0);
        bench.run(&["examine", "a"]).succeeds().says("clean;");
    }
}

#[test]
fn a_replica_fails_and_comes_back() {
    let bench = Bench::new();
    let _daemon = bench.serve(&["--create", "4M", "--name", "vol", "a", "b"]);
    bench.run(&["fail", "vol", "b"]).succeeds();
    let status = bench.status_json("vol");
    assert_eq!(status["volume"]["replicas"][1]["state"], "faulty");
    assert_eq!(status["volume"]["health"], "degraded");
    bench.run(&["fail", "vol", "a"]).fails();
    bench.run(&["fail", "vol", "nope"]).fails().says("no replica of volume").says("hint:");
    let control = bench.runtime_dir().join("vol.control");
    bench.run(&["add", "--control", control.to_str().unwrap(), "b"]).succeeds();
    bench.wait_until("in sync again", || bench.status_json("vol")["volume"]["health"] == "healthy");
    bench.run(&["add", "vol", "b"]).fails();
    bench.run(&["add", "vol", "new"]).fails().says("truncate -s");
    bench.run(&["fail", "1"]).succeeds();
    bench.run(&["remove", "vol", "1"]).succeeds();
    assert_eq!(bench.status_json("vol")["volume"]["replicas"].as_array().unwrap().len(), 1);
}

#[test]
fn a_filesystem_is_not_added_without_force() {
    let bench = Bench::new();
    let _daemon = bench.serve(&["--create", "4M", "--name", "vol", "a"]);
    bench.file("fs", 8 << 20);
    bench.make_partition_table("fs");
    bench.untouched(&["fs"], || {
        bench.run(&["add", "vol", "fs"]).fails().says("partition table").says("--force");
    });
    bench.run(&["add", "--force", "vol", "fs"]).succeeds();
}

#[test]
fn a_missing_replica_is_refused_unless_degraded() {
    let bench = Bench::with_volume();
    std::fs::rename(bench.path("b"), bench.path("away")).unwrap();
    bench.untouched(&["a"], || {
        bench.run(&["serve", "a", "b"]).fails().says("no such file").says("nbdmirror serve --degraded");
        bench.run(&["serve", "a"]).fails().says("--degraded");
    });
    let daemon = bench.serve(&["--degraded", "a", "b"]);
    assert!(daemon.banner.contains("missing"), "{}", daemon.banner);
    assert_eq!(bench.status_json("a")["volume"]["health"], "degraded");
}

#[test]
fn diverged_replicas_are_refused_with_both_described() {
    let bench = Bench::with_volume();
    for one in ["a", "b"] {
        let daemon = bench.serve(&["--degraded", one]);
        bench.run(&["stop"]).succeeds();
        daemon.ended_with(0);
    }
    bench.untouched(&["a", "b"], || {
        let refused = bench.run(&["serve", "a", "b"]).fails();
        refused.says("generation").says("event count").says("last written").says("--degraded");
    });
}

#[test]
fn wrong_paths_are_refused() {
    let bench = Bench::with_volume();
    bench.file("c", 8 << 20);
    std::fs::create_dir(bench.path("folder")).unwrap();
    std::os::unix::fs::symlink(bench.path("a"), bench.path("soft")).unwrap();
    std::fs::hard_link(bench.path("a"), bench.path("hard")).unwrap();
    std::os::unix::fs::symlink(bench.path("nothing"), bench.path("dangling")).unwrap();
    bench.untouched(&["a", "b", "c"], || {
        for verb in [&["serve"][..], &["create", "--size", "4M"], &["serve", "--create", "4M"]] {
            let with = |args: &[&'static str]| [verb, args].concat();
            bench.run(&with(&["a", "folder"])).fails().says("a directory").says("hint:");
            bench.run(&with(&["a", "a"])).fails().says("same replica");
            bench.run(&with(&["a", "soft"])).fails().says("same replica");
            bench.run(&with(&["a", "hard"])).fails().says("same replica");
            bench.run(&with(&["folder/../a", "a"])).fails().says("same replica");
            bench.run(&with(&["/dev/null", "a"])).fails().says("character device");
            bench.run(&with(&["1", "2", "3", "4", "5", "6", "7", "8", "9"])).fails().says("one to 8");
        }
        bench.run(&["serve", "nope", "nope2"]).fails().says("no such file");
        bench.run(&["serve", "c"]).fails().says("holds no nbdmirror volume").says("--create");
        bench.run(&["serve", "a", "c"]).fails().says("holds no nbdmirror volume").says("add");
        bench.run(&["serve", "--create", "4M", "a", "c"]).fails().says("holds a volume");
        bench.run(&["create", "--size", "4M", "no/x", "y"]).fails().says("mkdir -p");
        bench.run(&["create", "--size", "4M", "dangling"]).fails().says("leads to nothing");
        bench.run(&["examine", "nope"]).fails().says("No such file");
        bench.run(&["examine", "folder"]).fails().says("neither");
        bench.run(&["examine", "c"]).fails().says("holds no nbdmirror volume");
    });
    for name in ["nope", "x", "y", "1"] {
        assert!(!bench.path(name).exists(), "{name} was made");
    }
}

#[test]
fn wrong_values_are_refused_as_usage() {
    let bench = Bench::with_volume();
    bench.untouched(&["a", "b"], || {
        for (args, word) in [
            (&["create", "--size", "1000", "x"][..], "the nearest that is: 4K"),
            (&["create", "--size", "1.3G", "x"], "1363148K"),
            (&["create", "--size", "many", "x"], "not a size"),
            (&["create", "--size", "65T", "x"], "too large"),
            (&["create", "--size", "4M", "--region-size", "4K", "x"], "power of two"),
            (&["create", "--size", "4M", "--name", "a/b", "x"], "no `/`"),
            (&["create", "--size", "4M"], "REPLICA"),
            (&["serve", "--listen", "10809", "a", "b"], "no port"),
            (&["serve", "--listen", "::1:10809", "a", "b"], "brackets"),
            (&["serve", "--listen", "unix:", "a", "b"], "needs a path"),
            (&["serve", "--memory", "1M", "a", "b"], "too little"),
            (&["status", "vol", "--control", "x"], "cannot be used with"),
            (&["frobnicate"], "frobnicate"),
            (&[], "Usage"),
        ] {
            bench.run(args).exits_with(2).says(word);
        }
    });
}

#[test]
fn wrong_listen_addresses_leave_the_replicas_untouched() {
    let bench = Bench::with_volume();
    std::fs::write(bench.path("precious"), "data").unwrap();
    let live = UnixListener::bind(bench.path("live.sock")).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_address = taken.local_addr().unwrap().to_string();
    bench.untouched(&["a", "b", "precious"], || {
        let listen = |address: &str| bench.run(&["serve", "--listen", address, "a", "b"]).fails();
        listen("192.0.2.1:1").says("no such address");
        listen("no-such-host.invalid:1").says("cannot listen");
        listen(&taken_address).says("another program has this port");
        listen("unix:live.sock").says("in use by a live daemon");
        listen("unix:precious").says("not a socket");
        listen("unix:no/x.sock").says("does not exist");
        listen(&format!("unix:/{}", "x".repeat(120))).exits_with(2).says("shorter");
        bench.run(&["serve", "--control", "live.sock", "a", "b"]).fails().says("in use by a live daemon");
        bench.run(&["serve", "--create", "4M", "--listen", &taken_address, "new-a", "new-b"]).fails();
        bench.run(&["serve", "--write-mostly", "precious", "a", "b"]).fails().says("none of the replicas");
    });
    assert!(!bench.path("new-a").exists());
    drop(live);
    // Its file is still there, and nobody is behind it.
    let daemon = bench.serve(&["--listen", "unix:live.sock", "--listen", "127.0.0.1:0", "a", "b"]);
    assert!(daemon.banner.contains("nbd://127.0.0.1:"), "{}", daemon.banner);
    bench.run(&["status"]).succeeds().says("healthy");
}

#[test]
fn a_second_daemon_finds_replicas_and_sockets_taken() {
    let bench = Bench::with_volume();
    let _daemon = bench.serve(&["--name", "vol", "a", "b"]);
    bench.run(&["serve", "a", "b"]).fails().says("in use").says("stop");
    bench.run(&["create", "--force", "--size", "4M", "a", "b"]).fails().says("in use");
    bench
        .run(&["serve", "--create", "4M", "--name", "vol", "c", "d"])
        .fails()
        .says("live daemon")
        .says("--name");
    assert!(!bench.path("c").exists());
    // A second volume beside it is fine; then one has to be named.
    let second = bench.serve(&["--create", "4M", "--name", "other", "c", "d"]);
    bench.run(&["stop"]).fails().says("2 volumes are running");
    bench.run(&["status"]).succeeds().says("vol").says("other");
    bench.run(&["stop", "other"]).succeeds();
    second.ended_with(0);
}

#[test]
fn replicas_of_another_volume_or_size_are_refused() {
    let bench = Bench::with_volume();
    bench.run(&["create", "--size", "4M", "c", "d"]).succeeds();
    bench.untouched(&["a", "c"], || {
        bench.run(&["serve", "a", "c"]).fails().says("volume");
        bench
            .run(&["create", "--size", "4M", "a", "new"])
            .fails()
            .says("holds a replica of volume `a`")
            .says("--force");
    });
    let file = bench.open("b");
    file.set_len(VOLUME_BYTES).unwrap();
    bench.untouched(&["a", "b"], || {
        bench.run(&["serve", "a", "b"]).fails();
    });
    file.set_len(64 << 20).unwrap();
    bench.untouched(&["a", "b"], || {
        bench.run(&["serve", "a", "b"]).fails();
        bench.run(&["examine", "b"]).fails();
    });
    file.set_len(100).unwrap();
    bench.run(&["serve", "a", "b"]).fails().says("holds no nbdmirror volume");
}

#[test]
fn damaged_superblocks() {
    let bench = Bench::with_volume();
    let superblock = |name: &str, slot: u64| bench.file_len(name) - (2 - slot) * 4096;
    bench.overwrite("b", superblock("b", 0) + 100, b"rotten bits");
    bench.run(&["examine", "b"]).succeeds().says("DAMAGED").says("slot 0");
    let daemon = bench.serve(&["a", "b"]);
    bench.run(&["stop"]).succeeds();
    assert!(daemon.ended_with(0).contains("damaged"), "one damaged slot is told");
    bench.overwrite("b", superblock("b", 0) + 100, b"rotten bits");
    bench.overwrite("b", superblock("b", 1) + 100, b"rotten bits");
    bench.untouched(&["a", "b"], || {
        bench.run(&["serve", "a", "b"]).fails().says("both superblocks are damaged");
        bench.run(&["examine", "b"]).fails().says("damaged");
        bench.run(&["create", "--size", "4M", "b"]).fails().says("--force");
    });
}

#[test]
fn a_newer_format_version_is_refused() {
    let bench = Bench::with_volume();
    for slot in [0, 1] {
        let at = bench.file_len("b") - (2 - slot) * 4096;
        let mut superblock = [0; 4096];
        bench.open("b").read_exact_at(&mut superblock, at).unwrap();
        // Behind the magic: version, header length, CRC (counted as zeroes).
        superblock[8..12].copy_from_slice(&99_u32.to_le_bytes());
        superblock[16..20].fill(0);
        let crc = crc32fast::hash(&superblock);
        superblock[16..20].copy_from_slice(&crc.to_le_bytes());
        bench.overwrite("b", at, &superblock);
    }
    bench.untouched(&["a", "b"], || {
        bench.run(&["serve", "a", "b"]).fails().says("version 99");
        bench.run(&["serve", "--degraded", "a", "b"]).fails().says("version 99");
        bench.run(&["create", "--size", "4M", "b"]).fails().says("--force");
    });
}

#[test]
fn foreign_data_is_not_overwritten_without_force() {
    let bench = Bench::new();
    bench.file("disk", 8 << 20);
    bench.make_partition_table("disk");
    bench.untouched(&["disk"], || {
        bench
            .run(&["create", "--size", "4M", "new", "disk"])
            .fails()
            .says("partition table (dos)")
            .says("--force");
        bench.run(&["serve", "--create", "4M", "new", "disk"]).fails().says("partition table");
        let blind =
            bench.command(&["create", "--size", "4M", "new", "disk"]).env("PATH", "/nowhere").output();
        assert!(!blind.unwrap().status.success());
    });
    assert!(!bench.path("new").exists());
    bench
        .run(&["create", "--size", "4M", "--force", "disk", "new"])
        .succeeds()
        .says("its content is the volume's");
    bench.run(&["examine", "new"]).succeeds().says("stale");
}

#[test]
fn sizes_and_names_at_creation() {
    let bench = Bench::new();
    bench.run(&["create", "x", "y"]).fails().says("size of the volume is not known");
    bench
        .run(&["create", "--size", "1G", "--name", "my volume", "--region-size", "64K", "x", "y"])
        .succeeds();
    assert!(bench.file_len("x") > 1 << 30);
    assert!(bench.allocated("x") < 1 << 20, "a new replica is sparse");
    let examined: serde_json::Value =
        serde_json::from_str(&bench.run(&["examine", "--json", "x"]).succeeds().stdout).unwrap();
    assert_eq!(examined[0]["replica"]["name"], "my volume");
    assert_eq!(examined[0]["replica"]["region_bytes"], 65536);
    // A small file that is there is extended; one without data needs no first copy.
    bench.file("blank", 4096);
    bench.run(&["create", "--size", "4M", "z", "blank"]).succeeds().does_not_say("full copy");
    assert!(bench.file_len("blank") > VOLUME_BYTES);
}

#[test]
fn a_full_filesystem_leaves_nothing_behind() {
    let bench = Bench::new();
    let script = format!(
        "mount -t tmpfs -o size=12k,mode=777 tmpfs {dir} && cd {dir} || exit 99; \
         {BINARY} create --size 4M x y; code=$?; ls; \
         truncate -s 8M old; {BINARY} create --size 4M old y && exit 98; \
         cmp -n 8388608 old /dev/zero || exit 97; rm old; ls; exit $code",
        dir = bench.path("").display()
    );
    let unshare = |script: &str| Command::new("unshare").args(["--mount", "sh", "-c", script]).output();
    // Asked apart: a failure of what is tested is no reason to skip it.
    let private = unshare(&format!("mount -t tmpfs tmpfs {}", bench.path("").display()));
    if !private.is_ok_and(|output| output.status.success()) {
        return skip("no mount of its own to be had");
    }
    let output = unshare(&script).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("filesystem is full"), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "files are left behind");
}

#[test]
fn without_permission_nothing_happens() {
    let bench = Bench::with_volume();
    for name in ["a", "b"] {
        std::fs::set_permissions(bench.path(name), std::fs::Permissions::from_mode(0o400)).unwrap();
    }
    std::fs::set_permissions(bench.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = if is_root() {
        // The build's folder may be closed to others.
        std::fs::copy(BINARY, bench.path("nbdmirror")).unwrap();
        let mut command = bench.command_of(&bench.path("nbdmirror"), &["serve", "a", "b"]);
        command.uid(65534).gid(65534);
        command
    } else {
        bench.command(&["serve", "a", "b"])
    };
    bench.untouched(&["a", "b"], || {
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("permission denied"), "{said}");
    });
}

#[test]
fn a_read_only_volume_writes_nothing() {
    let bench = Bench::with_volume();
    bench.untouched(&["a", "b"], || {
        let daemon = bench.serve(&["--read-only", "a", "b"]);
        assert!(daemon.banner.contains("read-only"), "{}", daemon.banner);
        bench.run(&["stop"]).succeeds();
        daemon.ended_with(0);
    });
    bench.run(&["serve", "--read-only", "--create", "4M", "x"]).fails().says("exclude each other");
}

#[test]
fn operators_who_send_rubbish_cost_only_their_own_connection() {
    let bench = Bench::new();
    let _daemon = bench.serve(&["--create", "4M", "--name", "vol", "a", "b"]);
    let control = bench.runtime_dir().join("vol.control");
    let ask = |request: &[u8]| {
        let mut stream = UnixStream::connect(&control).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // A daemon that has had enough closes before it has taken all.
        let _ = stream.write_all(request);
        let mut answer = String::new();
        let _ = BufReader::new(stream).read_line(&mut answer);
        answer
    };
    for rubbish in [&b"\n"[..], b"{}\n", b"GET / HTTP/1.0\n", b"\xff\xfe\0\n", b"{\"command\":\"erase\"}\n"] {
        let answer = ask(rubbish);
        assert!(answer.starts_with("{\"ok\":false,\"error\":"), "{answer}");
    }
    let endless = vec![b'x'; 1 << 20];
    let answer = ask(&endless);
    assert!(answer.is_empty() || answer.contains("a line of more than"), "{answer}");
    // Silent ones, more than are let in.
    let silent: Vec<_> = (0..50).map(|_| UnixStream::connect(&control)).collect();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(ask(b"{\"command\":\"status\"}\n"), "", "the one too many is turned away");
    drop(silent);
    bench.wait_until("operators are let in again", || {
        ask(b"{\"command\":\"status\"}\n").contains("\"ok\":true")
    });
    // Two requests in one piece, and one in many.
    let mut stream = UnixStream::connect(&control).unwrap();
    stream.write_all(b"{\"command\":\"status\"}\n{\"command\":\"sta").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    stream.write_all(b"tus\"}\n").unwrap();
    let answers: Vec<String> = BufReader::new(stream).lines().take(2).map(Result::unwrap).collect();
    assert!(answers.iter().all(|answer| answer.contains("\"health\":\"healthy\"")), "{answers:?}");
}

#[test]
fn clients_that_stall_in_their_handshake_do_not_keep_others_out() {
    let bench = Bench::new();
    let daemon = bench.serve(&["--create", "4M", "--name", "vol", "a", "b"]);
    let socket = bench.runtime_dir().join("vol.sock");
    let greeted = || {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).map(|()| assert_eq!(&greeting[..8], b"NBDMAGIC")).map(|()| stream)
    };
    // More than are let into the handshake at once: the oldest go.
    let mut stalled: Vec<_> = (0..300).map(|_| greeted().unwrap()).collect();
    let handshakes = bench.status_json("vol")["daemon"]["handshakes"].as_u64().unwrap();
    assert!((200..=256).contains(&handshakes), "{handshakes}");
    assert_eq!(stalled[0].read(&mut [0]).unwrap_or(0), 0, "the oldest was dropped");
    // Rubbish, hang-ups and half an option, all at once.
    for rubbish in [&b"GET / HTTP/1.0\r\n\r\n"[..], &[0xff; 5000], b"\0\0\0\x01IHAVEOPT\0\0"] {
        greeted().unwrap().write_all(rubbish).unwrap();
    }
    // A good client: fixed newstyle, then LIST.
    let mut good = greeted().unwrap();
    good.write_all(b"\0\0\0\x01IHAVEOPT\0\0\0\x03\0\0\0\0").unwrap();
    let mut reply = [0; 27];
    good.read_exact(&mut reply).unwrap();
    assert_eq!(&reply[24..], b"vol");
    // None of them holds up a stop.
    bench.run(&["stop"]).succeeds();
    daemon.ended_with(0);
}

#[test]
fn a_name_given_to_serve_stays_with_the_volume() {
    let bench = Bench::with_volume();
    let daemon = bench.serve(&["--name", "first", "a", "b"]);
    bench.run(&["stop", "first"]).succeeds();
    daemon.ended_with(0);
    bench.run(&["examine", "a"]).succeeds().says("volume first");
}

#[test]
fn help_has_examples_and_pages_can_be_made() {
    let bench = Bench::new();
    for verb in ["create", "serve", "status", "examine", "fail", "add", "remove", "stop"] {
        bench.run(&[verb, "--help"]).succeeds().says("Examples:").says("Usage:");
        bench.run(&["man", verb]).succeeds().says(".TH");
    }
    bench.run(&["completions", "bash"]).succeeds().says("nbdmirror");
    bench.run(&["status", "--json"]).succeeds().is("[]\n");
    bench.run(&["status"]).succeeds().says("No volume is running");
    for args in [
        &["stop"][..],
        &["stop", "vol"],
        &["status", "vol"],
        &["fail", "vol", "x"],
        &["add", "--control", "nope", "x"],
    ] {
        bench.run(args).fails().says("running").says("hint:");
    }
}
