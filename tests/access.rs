//! The real binary against those who may not connect, who connect too often, and who connect and do nothing; and how
//! it is started and stopped by a service manager.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "what other tests share")]

mod cli_support;
mod tls_support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cli_support::{BINARY, Bench, Daemon, is_root};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect as connect_to, socket};
use tls_support::{ACK, GO, LIST, address, connect, expect_end, greet, option, option_bytes};

const ERR_SHUTDOWN: u32 = 0x8000_0007;
const SILENCE_MAX: Duration = Duration::from_secs(30);

fn serve(bench: &Bench, args: &[&str]) -> (Daemon, SocketAddr) {
    let listen = ["--listen", "127.0.0.1:0", "--listen", "unix:nbd.sock", "--name", "vol"];
    let daemon = bench.serve(&[&listen[..], args, &["a", "b"]].concat());
    let address = address(&daemon.banner);
    (daemon, address)
}

fn figure(bench: &Bench, part: &str, name: &str) -> u64 {
    bench.status_json("vol")[part][name].as_u64().unwrap()
}

fn log(bench: &Bench) -> String {
    std::fs::read_to_string(bench.path("log")).unwrap()
}

/// Files that the daemon has open.
fn descriptors(bench: &Bench) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", figure(bench, "daemon", "pid"))).unwrap().count()
}

fn unix(bench: &Bench) -> UnixStream {
    let stream = UnixStream::connect(bench.path("nbd.sock")).unwrap();
    stream.set_read_timeout(Some(SILENCE_MAX)).unwrap();
    stream
}

/// Goes through the handshake.
fn attach<S: Read + Write>(mut stream: S) -> S {
    greet(&mut stream).unwrap();
    assert_eq!(option(&mut stream, GO, &[0; 6]).unwrap(), ACK);
    stream
}

fn request(kind: u16, offset: u64, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&[7; 8]);
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Writes and reads a little.
fn use_it(stream: &mut (impl Read + Write)) {
    let data = [0x5a; 4096];
    let mut reply = [0; 16];
    stream.write_all(&request(1, 8192, 4096, &data)).unwrap();
    stream.read_exact(&mut reply).unwrap();
    stream.write_all(&request(0, 8192, 4096, &[])).unwrap();
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
    let mut read = [0; 4096];
    stream.read_exact(&mut read).unwrap();
    assert!(read == data);
}

/// Connects from another address of this machine.
fn connect_from(from: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let SocketAddr::V4(to) = to else { panic!("{to}") };
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(fd.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(from, 0))).unwrap();
    connect_to(fd.as_raw_fd(), &SockaddrIn::from(to)).unwrap();
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(SILENCE_MAX)).unwrap();
    stream
}

/// Closed without a byte.
fn expect_refusal(stream: &mut impl Read) {
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes);
    assert!(bytes.is_empty(), "{read:?}: {bytes:?}");
}

#[test]
fn only_addresses_that_are_named_may_connect_over_tcp() {
    let bench = Bench::with_volume();
    let (_daemon, address) = serve(&bench, &["--allow", "127.0.0.1", "--allow", "::1"]);
    use_it(&mut attach(connect(address)));
    for _ in 0..50 {
        expect_refusal(&mut connect_from(Ipv4Addr::new(127, 0, 0, 2), address));
    }
    // Unix sockets have their own ways.
    use_it(&mut attach(unix(&bench)));
    let lines = log(&bench).lines().filter(|line| line.contains("--allow does not name it")).count();
    assert!((1..=2).contains(&lines), "a flood of refusals is to be a line or two:\n{}", log(&bench));
    bench.run(&["serve", "--allow", "10.0.0", "a", "b"]).exits_with(2).says("192.0.2.0/24");
}

#[test]
fn addresses_named_for_unix_sockets_only_are_said_to_do_nothing() {
    let bench = Bench::with_volume();
    let listen = ["--listen", "unix:nbd.sock", "--name", "vol", "--allow", "127.0.0.1", "a", "b"];
    let _daemon = bench.serve(&listen);
    assert!(log(&bench).contains("it has no effect"), "{}", log(&bench));
}

#[test]
fn a_client_too_many_is_turned_away_and_operators_never() {
    let bench = Bench::with_volume();
    let (_daemon, address) = serve(&bench, &["--max-connections", "3"]);
    // In the middle of their handshake: they take no place.
    let silent: Vec<_> = (0..10).map(|_| connect(address)).collect();
    let mut first = attach(connect(address));
    let others = [attach(connect(address)), attach(connect(address))];
    bench.wait_until("three are there", || figure(&bench, "engine", "connections") == 3);
    for _ in 0..20 {
        expect_refusal(&mut connect(address));
        expect_refusal(&mut unix(&bench));
    }
    // Those that were let in before there were three find the places taken.
    for mut stream in silent {
        greet(&mut stream).unwrap();
        let _ = option(&mut stream, GO, &[0; 6]);
        expect_end(&mut stream);
    }
    use_it(&mut first);
    assert_eq!(figure(&bench, "engine", "connections"), 3);
    drop(others);
    bench.wait_until("two have left", || figure(&bench, "engine", "connections") == 1);
    use_it(&mut attach(unix(&bench)));
    assert!(log(&bench).contains("all 3 places for clients are taken"), "{}", log(&bench));
    bench.run(&["serve", "--max-connections", "0", "a", "b"]).exits_with(2).says("1 to 4096");
}

#[test]
fn ab_01_and_02_clients_that_come_and_do_nothing_cost_others_nothing() {
    let bench = Bench::with_volume();
    let (_daemon, address) = serve(&bench, &[]);
    let mut client = attach(connect(address));
    use_it(&mut client);
    let before = descriptors(&bench);
    for _ in 0..200 {
        drop(connect(address));
    }
    let silent: Vec<_> = (0..200).map(|_| connect(address)).collect();
    use_it(&mut client);
    use_it(&mut attach(connect(address)));
    use_it(&mut attach(unix(&bench)));
    drop(silent);
    // Negotiated, and gone without a word.
    for _ in 0..100 {
        drop(attach(connect(address)));
    }
    bench.wait_until("all are gone", || {
        figure(&bench, "daemon", "handshakes") == 0 && figure(&bench, "engine", "connections") == 1
    });
    bench.wait_until("their descriptors are closed", || descriptors(&bench) <= before + 2);
    use_it(&mut client);
}

#[test]
fn ab_08_nobody_holds_a_place_in_the_handshake_for_long() {
    let bench = Bench::with_volume();
    let (_daemon, address) = serve(&bench, &[]);
    let began = Instant::now();
    let silent = connect(address);
    let mut unread = connect(address);
    greet(&mut unread).unwrap();
    // Asks until nothing more fits anywhere, and reads no answer.
    unread.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let asks = option_bytes(LIST, &[]).repeat(100);
    while unread.write(&asks).is_ok() {}
    let mut slow = connect(address);
    slow.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut bytes = option_bytes(GO, &[0; 6]);
    bytes.splice(0..0, 3_u32.to_be_bytes());
    // A byte in a while: the whole would take a minute.
    let mut sent = 0;
    for byte in &bytes {
        if slow.write_all(&[*byte]).is_err() {
            break;
        }
        sent += 1;
        std::thread::sleep(Duration::from_secs(1));
    }
    assert!(sent < bytes.len(), "the slow one was waited for");
    for mut stream in [silent, unread] {
        stream.set_read_timeout(Some(SILENCE_MAX)).unwrap();
        expect_end(&mut stream);
    }
    assert!(began.elapsed() >= Duration::from_secs(9), "not at once, either");
    assert_eq!(figure(&bench, "daemon", "handshakes"), 0);
    use_it(&mut attach(connect(address)));
}

#[test]
fn ab_15_a_client_that_never_reads_waits_by_itself() {
    let bench = Bench::with_volume();
    let (_daemon, address) = serve(&bench, &[]);
    let mut lazy = attach(connect(address));
    for _ in 0..256 {
        lazy.write_all(&request(0, 0, 128 << 10, &[])).unwrap();
    }
    let mut other = attach(connect(address));
    for _ in 0..100 {
        use_it(&mut other);
    }
    let mut all = vec![0; 256 * (16 + (128 << 10))];
    lazy.read_exact(&mut all).unwrap();
    use_it(&mut lazy);
}

#[test]
fn idle_clients_are_disconnected_where_that_is_asked_for() {
    let bench = Bench::with_volume();
    let (_daemon, address) = serve(&bench, &["--idle-timeout", "2"]);
    let idle = attach(connect(address));
    let mut half = attach(connect(address));
    half.write_all(&request(1, 0, 4096, &[1; 100])).unwrap();
    let mut busy = attach(connect(address));
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(4) {
        use_it(&mut busy);
        std::thread::sleep(Duration::from_millis(100));
    }
    for mut stream in [idle, half] {
        expect_end(&mut stream);
    }
    use_it(&mut busy);
    assert!(log(&bench).contains("idle for 2 s"), "{}", log(&bench));
}

#[test]
fn unix_sockets_have_the_mode_and_the_owner_that_are_asked_for() {
    let bench = Bench::with_volume();
    let seen = |args: &[&str]| {
        let (daemon, _) = serve(&bench, args);
        let file = std::fs::metadata(bench.path("nbd.sock")).unwrap();
        use_it(&mut attach(unix(&bench)));
        daemon.signal("TERM");
        daemon.ended_with(0);
        (file.permissions().mode() & 0o7777, file.uid(), file.gid())
    };
    let me = std::fs::metadata(bench.path("a")).unwrap();
    assert_eq!(seen(&[]), (0o600, me.uid(), me.gid()));
    assert_eq!(seen(&["--socket-mode", "666"]), (0o666, me.uid(), me.gid()));
    if is_root() {
        assert_eq!(seen(&["--socket-mode", "660", "--socket-owner", "65534:12345"]), (0o660, 65534, 12345));
        assert_eq!(seen(&["--socket-owner", ":54321"]), (0o600, me.uid(), 54321));
    } else {
        bench.run(&["serve", "--socket-owner", "0", "a", "b"]).fails().says("only root");
    }
    bench.untouched(&["a", "b"], || {
        bench
            .run(&["serve", "--socket-owner", "no-such-user", "a", "b"])
            .fails()
            .says("no user `no-such-user`");
        bench.run(&["serve", "--socket-mode", "rw", "a", "b"]).exits_with(2).says("octal");
    });
}

#[test]
fn nt_03_a_stop_refuses_options_and_ends_handshakes() {
    let bench = Bench::with_volume();
    let (daemon, address) = serve(&bench, &[]);
    let mut client = connect(address);
    greet(&mut client).unwrap();
    let mut silent = connect(address);
    assert_eq!(option(&mut client, LIST, &[]).unwrap(), ACK);
    daemon.signal("TERM");
    let mut refused = 0;
    while let Ok(kind) = option(&mut client, LIST, &[]) {
        assert!(kind == ERR_SHUTDOWN || (kind == ACK && refused == 0), "{kind:#x}");
        refused += u32::from(kind == ERR_SHUTDOWN);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(refused > 0, "closed without a word");
    expect_end(&mut silent);
    assert!(TcpStream::connect(address).is_err());
    daemon.ended_with(0);
}

/// `serve`, as a service manager starts it: with `listener` as descriptor 3.
fn serve_activated(bench: &Bench, listener: impl Into<std::os::fd::OwnedFd>, args: &[&str]) -> Command {
    let mut command = bench.command_of("sh".as_ref(), &[]);
    command.args([
        "-c",
        "exec 3<&0 0</dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"",
        "sh",
        BINARY,
        "serve",
    ]);
    command.args(["--name", "vol"]).args(args).args(["a", "b"]).stdin(Stdio::from(listener.into()));
    command.stdout(Stdio::null()).stderr(std::fs::File::create(bench.path("log")).unwrap());
    command
}

#[test]
fn listeners_are_taken_over_and_the_manager_is_told() {
    let bench = Bench::with_volume();
    let notified = UnixDatagram::bind(bench.path("notify")).unwrap();
    notified.set_read_timeout(Some(SILENCE_MAX)).unwrap();
    let hears = |state: &str| {
        let mut bytes = [0; 64];
        let count = notified.recv(&mut bytes).unwrap();
        assert_eq!(std::str::from_utf8(&bytes[..count]).unwrap(), state);
    };
    let socket = bench.path("nbd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut command = serve_activated(&bench, listener.try_clone().unwrap(), &[]);
    let mut daemon = command.env("NOTIFY_SOCKET", bench.path("notify")).spawn().unwrap();
    hears("READY=1");
    use_it(&mut attach(unix(&bench)));
    let listen = bench.status_json("vol")["daemon"]["listen"].clone();
    assert_eq!(listen.as_array().unwrap().len(), 1, "{listen}");
    bench.run(&["stop", "vol"]).succeeds();
    hears("STOPPING=1");
    assert!(daemon.wait().unwrap().success());
    assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket(), "the manager's socket is not ours");

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut daemon = serve_activated(&bench, listener, &[]).spawn().unwrap();
    // It waits in the listener's line until it is served.
    use_it(&mut attach(connect(address)));
    bench.run(&["stop", "vol"]).succeeds();
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn what_is_no_listener_is_not_taken_over() {
    let bench = Bench::with_volume();
    let refused = |listener: std::os::fd::OwnedFd, args: &[&str], says: &str| {
        bench.untouched(&["a", "b"], || {
            let mut daemon = serve_activated(&bench, listener, args).spawn().unwrap();
            assert_eq!(daemon.wait().unwrap().code(), Some(1), "{}", log(&bench));
            assert!(log(&bench).contains(says), "{}", log(&bench));
        });
    };
    refused(UnixDatagram::bind(bench.path("dgram")).unwrap().into(), &[], "neither a Unix nor a TCP stream");
    refused(UnixStream::pair().unwrap().0.into(), &[], "does not listen");
    refused(std::fs::File::open(bench.path("a")).unwrap().into(), &[], "neither a Unix nor a TCP stream");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    refused(listener.into(), &["--listen", "unix:other.sock"], "one or the other");
    // Variables meant for another process are nothing to us.
    let mut command = bench.command(&["serve", "--degraded", "a", "a"]);
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    let output = command.output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("LISTEN_FDS"));
}

#[test]
fn ab_18_a_half_closed_handshake_ends() {
    let bench = Bench::with_volume();
    let (_daemon, address) = serve(&bench, &[]);
    let mut stream = connect(address);
    greet(&mut stream).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    expect_end(&mut stream);
    use_it(&mut attach(connect(address)));
}
