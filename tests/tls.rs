//! The real binary over TLS: what is promised in docs/tls.md, with a raw client; and real clients.
//!
//! Test names carry the requirement of the protocol checklist that they hold (TLS-01 and so on).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "what the other tests of the command line share")]

mod cli_support;
mod tls_support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::process::{Command, Stdio};

use cli_support::{Bench, Daemon};
use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};
use tls_support::*;

const FILES: [&str; 4] = ["--tls-cert", "server.pem", "--tls-key", "server-key.pem"];
const LISTEN: [&str; 6] = ["--listen", "127.0.0.1:0", "--listen", "unix:nbd.sock", "--name", "vol"];

/// A bench with a volume, an authority and the server's certificate.
fn bench() -> Bench {
    let bench = Bench::with_volume();
    let dir = bench.path("");
    authority(&dir, "our");
    certificate(&dir, "our", "server", 30);
    bench
}

fn serve(bench: &Bench, args: &[&str]) -> (Daemon, SocketAddr) {
    let daemon = bench.serve(&[&LISTEN[..], &FILES, args, &["a", "b"]].concat());
    let address = address(&daemon.banner);
    (daemon, address)
}

fn trust(bench: &Bench, identity: Option<&str>) -> Trust {
    Trust::new(&bench.path(""), "our", identity, &TLS13)
}

fn connections(bench: &Bench) -> u64 {
    bench.status_json("vol")["engine"]["connections"].as_u64().unwrap()
}

fn log(bench: &Bench) -> String {
    std::fs::read_to_string(bench.path("log")).unwrap()
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|index| (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7] ^ seed).collect()
}

#[test]
fn tls_01_and_09_data_goes_both_ways_and_a_disconnect_is_said() {
    let bench = bench();
    let (_daemon, address) = serve(&bench, &["--tls", "require"]);
    let versions: [&'static SupportedProtocolVersion; 2] = [&TLS12, &TLS13];
    for (seed, version) in versions.into_iter().enumerate() {
        let trust = Trust::new(&bench.path(""), "our", None, version);
        let mut client = TlsClient::new(address, &trust);
        for len in [1, 512, 4096, 16 << 10, 1 << 20, 3 << 20] {
            let data = pattern(len, seed as u8);
            client.write(4096, &data);
            assert!(client.read(4096, len) == data, "{len} bytes");
        }
        // Many at once, both ways.
        for index in 0..32 {
            client.send(1, index, index << 16, 1 << 16, &pattern(1 << 16, index as u8));
        }
        let mut written: Vec<u64> = (0..32).map(|_| client.reply()).collect();
        written.sort_unstable();
        assert!(written.into_iter().eq(0..32));
        for index in 0..32 {
            assert!(client.read(index << 16, 1 << 16) == pattern(1 << 16, index as u8));
        }
        client.send(2, 0, 0, 0, &[]);
        client.expect_close_notify();
    }
    bench.wait_until("all gone", || connections(&bench) == 0);
}

#[test]
fn tls_02_03_and_10_what_is_answered_without_tls_and_inside() {
    let bench = bench();
    let (_daemon, address) = serve(&bench, &["--tls", "require"]);
    let mut stream = connect(address);
    greet(&mut stream).unwrap();
    for (code, data) in [(LIST, &[][..]), (GO, &[0; 6]), (6, &[0; 6]), (8, &[]), (99, &[])] {
        assert_eq!(option(&mut stream, code, data).unwrap(), ERR_TLS_REQD, "option {code}");
    }
    let mut stream = begin_tls(stream, &trust(&bench, None)).unwrap();
    assert_eq!(option(&mut stream, STARTTLS, &[]).unwrap(), ERR_INVALID);
    assert_eq!(option(&mut stream, LIST, &[]).unwrap(), ACK);
    assert_eq!(option(&mut stream, GO, &[0; 6]).unwrap(), ACK);
}

#[test]
fn tls_04_export_name_without_tls_ends_the_session() {
    let bench = bench();
    let (_daemon, address) = serve(&bench, &["--tls", "require"]);
    let mut stream = connect(address);
    greet(&mut stream).unwrap();
    stream.write_all(&option_bytes(EXPORT_NAME, b"vol")).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn tls_06_what_was_negotiated_in_clear_is_forgotten() {
    const STRUCTURED_REPLY: u32 = 8;
    const SET_META_CONTEXT: u32 = 10;
    // The empty export name, one query.
    let query = [&[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 15][..], b"base:allocation"].concat();
    let bench = bench();
    let (_daemon, address) = serve(&bench, &["--tls", "allow"]);
    let mut stream = connect(address);
    greet(&mut stream).unwrap();
    assert_eq!(option(&mut stream, STRUCTURED_REPLY, &[]).unwrap(), ACK);
    let mut stream = begin_tls(stream, &trust(&bench, None)).unwrap();
    assert_eq!(option(&mut stream, SET_META_CONTEXT, &query).unwrap(), ERR_INVALID);
    assert_eq!(option(&mut stream, STRUCTURED_REPLY, &[]).unwrap(), ACK);
    assert_eq!(option(&mut stream, SET_META_CONTEXT, &query).unwrap(), ACK);
}

#[test]
fn where_tls_is_allowed_both_are_served_and_off_is_off() {
    let bench = bench();
    let (daemon, address) = serve(&bench, &["--tls", "allow"]);
    let mut stream = connect(address);
    greet(&mut stream).unwrap();
    assert_eq!(option(&mut stream, GO, &[0; 6]).unwrap(), ACK);
    TlsClient::new(address, &trust(&bench, None)).write(0, b"data");
    daemon.signal("TERM");
    daemon.ended_with(0);
    let daemon = bench.serve(&[&LISTEN[..], &["a", "b"]].concat());
    let mut stream = connect(tls_support::address(&daemon.banner));
    greet(&mut stream).unwrap();
    assert_ne!(option(&mut stream, STARTTLS, &[]).unwrap(), ACK);
    assert_eq!(option(&mut stream, GO, &[0; 6]).unwrap(), ACK);
}

#[test]
fn tls_05_bytes_in_clear_behind_starttls_end_the_connection() {
    let bench = bench();
    let (_daemon, address) = serve(&bench, &["--tls", "allow"]);
    for injected in [option_bytes(LIST, &[]), option_bytes(GO, &[0; 6]), vec![0x49]] {
        let mut stream = connect(address);
        greet(&mut stream).unwrap();
        let mut bytes = option_bytes(STARTTLS, &[]);
        bytes.extend_from_slice(&injected);
        stream.write_all(&bytes).unwrap();
        let mut ack = [0; 20];
        stream.read_exact(&mut ack).unwrap();
        // As far as it is closed by then.
        let _ = inside_tls(stream, &trust(&bench, None)).map(|_| panic!("went on with TLS"));
    }
}

#[test]
fn tls_07_and_08_what_is_no_tls_or_too_old_is_closed() {
    let bench = bench();
    let (_daemon, address) = serve(&bench, &["--tls", "require"]);
    // A ClientHello that knows no more than its version, with the suites of its time.
    let hello = |minor: u8| {
        let mut body = vec![3, minor];
        body.extend_from_slice(&[7; 32]);
        body.extend_from_slice(&[0, 0, 6, 0xc0, 0x13, 0xc0, 0x09, 0, 0x2f, 1, 0, 0, 0]);
        let mut record = vec![22, 3, 1, 0, body.len() as u8 + 4, 1, 0, 0, body.len() as u8];
        record.extend_from_slice(&body);
        record
    };
    let garbage = [vec![0xff; 64], b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![0; 5], hello(1), hello(2)];
    for bytes in garbage {
        let mut stream = connect(address);
        greet(&mut stream).unwrap();
        assert_eq!(option(&mut stream, STARTTLS, &[]).unwrap(), ACK);
        stream.write_all(&bytes).unwrap();
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        // Nothing, or an alert that ends it.
        assert!(said.is_empty() || said[0] == 21, "{said:?}");
        assert!(said.len() < 16);
    }
    TlsClient::new(address, &trust(&bench, None)).write(0, b"data");
    assert!(log(&bench).contains("no TLS"), "{}", log(&bench));
}

#[test]
fn tls_11_twenty_stuck_handshakes_keep_nobody_out() {
    let bench = bench();
    let (_daemon, address) = serve(&bench, &["--tls", "require", "--max-connections", "2"]);
    let stuck: Vec<_> = (0..20)
        .map(|index| {
            let mut stream = connect(address);
            greet(&mut stream).unwrap();
            assert_eq!(option(&mut stream, STARTTLS, &[]).unwrap(), ACK);
            // Half of them begin a record.
            stream.write_all(&[22, 3, 1, 2, 0, 1, 0][..if index % 2 == 0 { 7 } else { 0 }]).unwrap();
            stream
        })
        .collect();
    let mut client = TlsClient::new(address, &trust(&bench, None));
    client.write(0, b"data");
    assert_eq!(client.read(0, 4), b"data");
    // Their time runs out.
    for mut stream in stuck {
        expect_end(&mut stream);
    }
    bench.wait_until("the handshakes are gone", || {
        bench.status_json("vol")["daemon"]["handshakes"].as_u64().unwrap() == 0
    });
    assert_eq!(client.read(0, 4), b"data");
}

#[test]
fn clients_need_a_certificate_of_the_authority_that_is_good_today() {
    let bench = bench();
    let dir = bench.path("");
    authority(&dir, "other");
    certificate(&dir, "our", "friend", 30);
    certificate(&dir, "our", "expired", -1);
    certificate(&dir, "other", "stranger", 30);
    let (_daemon, address) = serve(&bench, &["--tls", "allow", "--tls-client-ca", "our-ca.pem"]);
    for version in [&TLS12, &TLS13] {
        let connect = |identity| TlsClient::try_new(address, &Trust::new(&dir, "our", identity, version));
        connect(Some("friend")).unwrap().write(0, b"data");
        for identity in [None, Some("expired"), Some("stranger")] {
            assert!(connect(identity).is_err(), "{identity:?} with {version:?}");
        }
    }
    // The server's certificate is not the one of the authority that the client trusts.
    let wrong = Trust::new(&dir, "other", Some("friend"), &TLS13);
    assert!(TlsClient::try_new(address, &wrong).is_err());
    TlsClient::new(address, &trust(&bench, Some("friend"))).write(0, b"data");
}

#[test]
fn sighup_reads_the_files_again_for_new_connections() {
    let bench = bench();
    let dir = bench.path("");
    let (daemon, address) = serve(&bench, &["--tls", "require"]);
    let shown = |client: &TlsClient| client.stream.conn.peer_certificates().unwrap()[0].to_vec();
    let mut old = TlsClient::new(address, &trust(&bench, None));
    let old_certificate = shown(&old);
    certificate(&dir, "our", "server", 30);
    assert_eq!(shown(&TlsClient::new(address, &trust(&bench, None))), old_certificate, "nobody has said so");
    daemon.signal("HUP");
    bench.wait_until("reloaded", || log(&bench).contains("read again"));
    let new_certificate = shown(&TlsClient::new(address, &trust(&bench, None)));
    assert_ne!(new_certificate, old_certificate);
    old.write(0, b"goes on");
    // Files that do not fit: the last good ones stay.
    std::fs::write(bench.path("server-key.pem"), "nonsense").unwrap();
    daemon.signal("HUP");
    bench.wait_until("refused", || log(&bench).contains("stay as they were"));
    assert!(log(&bench).contains("holds no private key"), "{}", log(&bench));
    assert_eq!(shown(&TlsClient::new(address, &trust(&bench, None))), new_certificate);
    assert_eq!(old.read(0, 7), b"goes on");
    daemon.signal("TERM");
    daemon.ended_with(0);
}

#[test]
fn a_slow_reload_takes_nothing_back_from_a_later_one() {
    let bench = bench();
    let dir = bench.path("");
    authority(&dir, "other");
    certificate(&dir, "our", "dismissed", 30);
    certificate(&dir, "other", "friend", 30);
    std::fs::copy(bench.path("our-ca.pem"), bench.path("clients.pem")).unwrap();
    let (daemon, address) = serve(&bench, &["--tls", "require", "--tls-client-ca", "clients.pem"]);
    let connect = |identity| TlsClient::try_new(address, &trust(&bench, Some(identity)));
    connect("dismissed").unwrap().write(0, b"data");
    // The first reload finds a file that is long in coming.
    nix::unistd::mkfifo(&bench.path("slow"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::fs::rename(bench.path("slow"), bench.path("clients.pem")).unwrap();
    daemon.signal("HUP");
    let mut slow = std::fs::File::options().write(true).open(bench.path("clients.pem")).unwrap();
    std::fs::copy(bench.path("other-ca.pem"), bench.path("new")).unwrap();
    std::fs::rename(bench.path("new"), bench.path("clients.pem")).unwrap();
    daemon.signal("HUP");
    bench.wait_until("reloaded", || log(&bench).contains("read again"));
    assert!(connect("dismissed").is_err());
    slow.write_all(&std::fs::read(bench.path("our-ca.pem")).unwrap()).unwrap();
    drop(slow);
    bench.wait_until("both ended", || log(&bench).matches("SIGHUP:").count() == 2);
    assert!(connect("dismissed").is_err(), "{}", log(&bench));
    assert_eq!(connect("friend").unwrap().read(0, 4), b"data");
}

#[test]
fn a_half_closed_client_gets_what_it_asked_for() {
    let bench = bench();
    let (_daemon, address) = serve(&bench, &["--tls", "require"]);
    let mut client = TlsClient::new(address, &trust(&bench, None));
    let data = pattern(1 << 20, 3);
    client.write(0, &data);
    for cookie in 0..8 {
        client.send(0, cookie, 0, 1 << 20, &[]);
    }
    client.stream.conn.send_close_notify();
    client.stream.flush().unwrap();
    client.stream.sock.shutdown(Shutdown::Write).unwrap();
    for _ in 0..8 {
        assert!(client.reply() < 8);
        let mut read = vec![0; 1 << 20];
        client.stream.read_exact(&mut read).unwrap();
        assert!(read == data);
    }
    client.expect_close_notify();
}

#[test]
fn a_client_that_is_cut_off_ends_its_connection_only() {
    let bench = bench();
    let (_daemon, address) = serve(&bench, &["--tls", "require"]);
    let mut other = TlsClient::new(address, &trust(&bench, None));
    let cut = TlsClient::new(address, &trust(&bench, None));
    bench.wait_until("both are there", || connections(&bench) == 2);
    cut.stream.sock.shutdown(Shutdown::Write).unwrap();
    bench.wait_until("one is gone", || connections(&bench) == 1);
    // A record that has been tampered with.
    let mut tampered = TlsClient::new(address, &trust(&bench, None));
    tampered.stream.sock.write_all(&[23, 3, 3, 0, 32]).unwrap();
    tampered.stream.sock.write_all(&[9; 32]).unwrap();
    expect_end(&mut tampered.stream.sock);
    bench.wait_until("it is gone, too", || connections(&bench) == 1);
    other.write(0, b"data");
}

#[test]
fn a_client_that_does_not_read_waits_by_itself_and_gets_everything() {
    let bench = bench();
    let (_daemon, address) = serve(&bench, &["--tls", "require"]);
    let mut lazy = TlsClient::new(address, &trust(&bench, None));
    let data = pattern(1 << 20, 9);
    lazy.write(0, &data);
    for cookie in 0..64 {
        lazy.send(0, cookie, 0, 1 << 20, &[]);
    }
    let mut other = TlsClient::new(address, &trust(&bench, None));
    for _ in 0..100 {
        assert!(other.read(0, 4096) == data[..4096]);
    }
    for _ in 0..64 {
        lazy.reply();
        let mut read = vec![0; 1 << 20];
        lazy.stream.read_exact(&mut read).unwrap();
        assert!(read == data);
    }
}

#[test]
fn a_stop_ends_tls_connections_in_order() {
    let bench = bench();
    let (daemon, address) = serve(&bench, &["--tls", "require"]);
    let mut client = TlsClient::new(address, &trust(&bench, None));
    client.write(0, b"data");
    daemon.signal("TERM");
    client.expect_close_notify();
    drop(client);
    daemon.ended_with(0);
}

#[test]
fn files_that_do_not_fit_are_named() {
    let bench = bench();
    let dir = bench.path("");
    certificate(&dir, "our", "second", 30);
    openssl(&dir, &["pkey", "-in", "server-key.pem", "-aes256", "-passout", "pass:x", "-out", "locked.pem"]);
    let whole = std::fs::read_to_string(bench.path("server.pem")).unwrap();
    std::fs::write(bench.path("half.pem"), &whole[..whole.len() / 2]).unwrap();
    std::fs::write(bench.path("empty"), "").unwrap();
    let (cert, key) = ("server.pem", "server-key.pem");
    for (cert, key, says) in [
        ("missing.pem", key, "cannot read missing.pem"),
        (cert, "missing.pem", "cannot read missing.pem"),
        ("empty", key, "empty holds no certificate"),
        (key, key, "server-key.pem holds no certificate"),
        ("half.pem", key, "half.pem is not PEM"),
        (cert, "empty", "empty holds no private key"),
        (cert, "locked.pem", "locked.pem is encrypted"),
        (cert, "second-key.pem", "second-key.pem is not the one of the certificate server.pem"),
        ("a", key, "a is too long"),
    ] {
        let args = ["serve", "--tls", "require", "--tls-cert", cert, "--tls-key", key, "a", "b"];
        bench.untouched(&["a", "b"], || _ = bench.run(&args).fails().says(says));
    }
    let with_ca =
        [&["serve", "--tls", "require"], &FILES[..], &["--tls-client-ca", "empty", "a", "b"]].concat();
    bench.run(&with_ca).fails().says("empty holds no certificate");
    bench.run(&["serve", "--tls", "require", "a", "b"]).fails().says("--tls-cert FILE and --tls-key FILE");
    bench.run(&["serve", "--tls-cert", cert, "--tls-key", key, "a", "b"]).fails().says("TLS is off");
    openssl(&dir, &["x509", "-in", cert, "-out", "copy.pem"]);
    std::fs::copy(bench.path(key), bench.path("open.pem")).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(bench.path("open.pem"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let open = ["--tls", "require", "--tls-cert", cert, "--tls-key", "open.pem", "--name", "vol", "a", "b"];
    let daemon = bench.serve(&open);
    assert!(daemon.banner.contains("can be read by everybody"), "{}", daemon.banner);
}

#[test]
fn keys_of_every_kind_work() {
    let bench = bench();
    let dir = bench.path("");
    openssl(&dir, &["ec", "-in", "server-key.pem", "-out", "sec1.pem"]);
    for (kind, name) in [("rsa:2048", "rsa"), ("ed25519", "ed")] {
        let (key, cert) = (format!("{name}-key.pem"), format!("{name}.pem"));
        let mut args = vec!["req", "-x509", "-newkey", kind, "-nodes", "-days", "30", "-subj", "/CN=x"];
        args.extend(["-keyout", &key, "-out", &cert]);
        openssl(&dir, &args);
    }
    openssl(&dir, &["rsa", "-traditional", "-in", "rsa-key.pem", "-out", "pkcs1.pem"]);
    for (cert, key) in [
        ("server.pem", "sec1.pem"),
        ("rsa.pem", "rsa-key.pem"),
        ("rsa.pem", "pkcs1.pem"),
        ("ed.pem", "ed-key.pem"),
    ] {
        let args = ["--tls", "require", "--tls-cert", cert, "--tls-key", key, "--name", "vol", "a", "b"];
        let daemon = bench.serve(&args);
        daemon.signal("TERM");
        daemon.ended_with(0);
    }
}

#[test]
fn libnbd_and_qemu_speak_tls_with_us() {
    let bench = bench();
    let dir = bench.path("");
    certificate(&dir, "our", "client", 30);
    let (_daemon, address) = serve(&bench, &["--tls", "require", "--tls-client-ca", "our-ca.pem"]);
    std::fs::create_dir(bench.path("creds")).unwrap();
    for (from, to) in [
        ("our-ca.pem", "ca-cert.pem"),
        ("client.pem", "client-cert.pem"),
        ("client-key.pem", "client-key.pem"),
    ] {
        std::fs::copy(bench.path(from), bench.path("creds").join(to)).unwrap();
    }
    let creds = bench.path("creds").display().to_string();
    let port = address.port();
    std::fs::write(bench.path("in.img"), pattern(4 << 20, 5)).unwrap();
    let tcp = format!("nbds://localhost:{port}/vol?tls-certificates={creds}");
    let socket = bench.path("nbd.sock").display().to_string();
    let unix = format!("nbds+unix:///vol?socket={socket}&tls-certificates={creds}&tls-hostname=localhost");
    run(&bench, &["nbdinfo", &unix]);
    run(&bench, &["nbdcopy", "in.img", &tcp]);
    run(&bench, &["nbdcopy", &unix, "out.img"]);
    assert!(std::fs::read(bench.path("out.img")).unwrap() == pattern(4 << 20, 5));
    let object = format!("tls-creds-x509,id=t,dir={creds},endpoint=client");
    let image = format!("driver=nbd,host=localhost,port={port},export=vol,tls-creds=t");
    run(&bench, &["qemu-img", "info", "--object", &object, "--image-opts", &image]);
}

/// Runs a client of others, if it is installed.
fn run(bench: &Bench, args: &[&str]) {
    let mut command = Command::new("timeout");
    let output =
        command.arg("60").args(args).current_dir(bench.path("")).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}
