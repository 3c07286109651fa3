//! What `serve` says when it has started: what it serves, where, from which replicas, and how to attach.

use std::fmt::Write;
use std::path::Path;

use super::size::pretty;
use super::status_view;
use crate::control::listen::Place;
use crate::engine::EngineStatus;
use crate::format::describe::shell_word;
use crate::mirror::status::ReplicaState;

/// The NBD URI of a volume at a place; `secure`: with TLS, which is required there.
pub(super) fn uri(place: &Place, name: &str, secure: bool) -> String {
    let scheme = if secure { "nbds" } else { "nbd" };
    let name = percent_encode(name, "");
    match place {
        Place::Unix(path) => {
            format!("{scheme}+unix:///{name}?socket={}", percent_encode(&path.display().to_string(), "/"))
        }
        Place::Tcp(address) => format!("{scheme}://{address}/{name}"),
    }
}

/// Everything that is not unreserved in a URI (RFC 3986), nor in `also`, as `%XX`.
fn percent_encode(text: &str, also: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || "-._~".contains(c) || also.contains(c) {
            encoded.push(c);
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// The whole text.
pub(super) fn banner(status: &EngineStatus, places: &[Place], control: &Path, secure: bool) -> String {
    let volume = &status.volume;
    let access = if volume.read_only { "read-only" } else { "read-write" };
    let mut text = format!("Serving volume {}: {}, {access}\n", volume.name, pretty(volume.size_bytes));
    for replica in &volume.replicas {
        let _ = write!(
            text,
            "  replica {}  {:9}  {}",
            replica.slot,
            status_view::state(replica.state),
            replica.path
        );
        if replica.stale_bytes > 0 {
            let _ = write!(text, " ({} stale)", pretty(replica.stale_bytes));
        }
        if let Some(reason) = replica.reason.as_ref().filter(|_| replica.state != ReplicaState::InSync) {
            let _ = write!(text, " ({reason})");
        }
        text.push('\n');
    }
    if volume.unclean_bytes_at_start > 0 {
        let bytes = pretty(volume.unclean_bytes_at_start);
        let _ = writeln!(text, "  it was not stopped cleanly: {bytes} are synced in the background");
    }
    for (index, place) in places.iter().enumerate() {
        let _ = writeln!(
            text,
            "{:8} {}",
            if index == 0 { "serves" } else { "" },
            uri(place, &volume.name, secure)
        );
    }
    let _ = writeln!(text, "control  {}", control.display());
    if let Some(place) = places.first() {
        attach_commands(&mut text, place, &volume.name, secure);
    }
    let name = shell_word(&volume.name);
    let _ =
        writeln!(text, "Look with `nbdmirror status {name}`, stop with Ctrl-C or `nbdmirror stop {name}`.");
    text
}

fn attach_commands(text: &mut String, place: &Place, name: &str, secure: bool) {
    if secure {
        text.push_str("clients must use TLS: docs/tls.md has each client's command line\n");
        return;
    }
    let uri = shell_word(&uri(place, name, secure));
    let nbd_client = match place {
        Place::Unix(path) => format!("-unix {}", shell_word(&path.display().to_string())),
        Place::Tcp(address) => format!("{} {}", address.ip(), address.port()),
    };
    text.push_str("attach with one of\n");
    let _ = writeln!(text, "  nbdmirror attach {}", shell_word(name));
    let _ = writeln!(text, "  nbd-client {nbd_client} /dev/nbd0 -name {}", shell_word(name));
    let _ = writeln!(text, "  qemu-system-x86_64 -drive format=raw,if=virtio,file={uri}");
    let _ = writeln!(text, "  fio --name=test --ioengine=nbd --uri={uri} --rw=randread --bs=4k --iodepth=32");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_encoded() {
        for (place, name, expected) in [
            (Place::Unix("/run/a b.sock".into()), "disk-a", "nbd+unix:///disk-a?socket=/run/a%20b.sock"),
            (Place::Tcp("127.0.0.1:10809".parse().unwrap()), "ü/", "nbd://127.0.0.1:10809/%C3%BC%2F"),
            (Place::Tcp("[::1]:1".parse().unwrap()), "v", "nbd://[::1]:1/v"),
        ] {
            assert_eq!(uri(&place, name, false), expected);
            assert_eq!(uri(&place, name, true), expected.replacen("nbd", "nbds", 1));
        }
    }
}
