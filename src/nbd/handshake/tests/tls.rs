//! STARTTLS, and what goes on inside TLS.

use super::*;

fn starttls() -> (u32, Vec<u8>) {
    (wire::OPT_STARTTLS, vec![])
}

fn run_tls(tls: TlsMode, bytes: &[u8]) -> (Handshake, Progress, Vec<u8>) {
    let mut out = Vec::new();
    let mut handshake = Handshake::new(export(), tls);
    let progress = handshake.receive(bytes, &mut out);
    (handshake, progress, out)
}

#[test]
fn opt_11_12_13_starttls_without_tls_is_refused_in_step() {
    let options = [starttls(), (wire::OPT_STARTTLS, vec![1; 9]), list()];
    let expected = [wire::REP_ERR_POLICY, wire::REP_ERR_INVALID, wire::REP_SERVER, wire::REP_ACK];
    assert_eq!(haggle_kinds(&options), expected);
}

#[test]
fn tls_01_02_05_06_10_starttls_begins_anew() {
    for tls in [TlsMode::Allowed, TlsMode::Required] {
        let mut bytes = hello(3, &[starttls()]);
        let taken = bytes.len();
        bytes.extend_from_slice(b"slipped in");
        let (handshake, progress, out) = run_tls(tls, &bytes);
        assert!(matches!(progress.step, Step::StartTls));
        assert_eq!((progress.consumed, kinds(&out)), (taken, vec![wire::REP_ACK]));
        let mut inside = handshake.inside_tls();
        let mut out = Vec::new();
        let options = hello(0, &[starttls(), list(), (wire::OPT_EXPORT_NAME, vec![])]);
        let progress = inside.receive(&options[4..], &mut out); // no flags again
        assert!(matches!(progress.step, Step::Transmission(_)));
        let expected = [wire::REP_ERR_INVALID, wire::REP_SERVER, wire::REP_ACK];
        let (replies, answer) = out.split_at(out.len() - 10); // NO_ZEROES was said before
        assert_eq!((kinds(replies), &answer[..8]), (expected.to_vec(), &(5_u64 << 30).to_be_bytes()[..]));
    }
}

#[test]
fn tls_03_04_12_nothing_goes_without_required_tls() {
    let options = [list(), info(&[]), go(&[]), (99, vec![1]), (wire::OPT_STARTTLS, vec![1])];
    let (_, progress, out) = run_tls(TlsMode::Required, &hello(3, &options));
    assert!(matches!(progress.step, Step::NeedMore));
    let required = wire::REP_ERR_TLS_REQD;
    assert_eq!(kinds(&out), [required, required, required, required, wire::REP_ERR_INVALID]);
    let (_, progress, out) = run_tls(TlsMode::Required, &hello(3, &[(wire::OPT_EXPORT_NAME, vec![])]));
    assert!(matches!(progress.step, Step::Close(_)) && out.is_empty());
    let (_, progress, out) = run_tls(TlsMode::Required, &hello(3, &[(wire::OPT_ABORT, vec![])]));
    assert!(matches!(progress.step, Step::Close(_)) && kinds(&out) == [wire::REP_ACK]);
}

#[test]
fn tls_a_client_without_fixed_newstyle_is_served_without_tls_or_not_at_all() {
    let (_, progress, out) = run_tls(TlsMode::Allowed, &hello(2, &[starttls(), list()]));
    assert!(matches!(progress.step, Step::NeedMore));
    assert_eq!(kinds(&out), [wire::REP_ERR_POLICY, wire::REP_SERVER, wire::REP_ACK]);
    let (_, progress, _) = run_tls(TlsMode::Required, &hello(2, &[]));
    assert!(matches!(progress.step, Step::Close(_)));
}
