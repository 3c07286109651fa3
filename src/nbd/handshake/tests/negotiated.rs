//! Structured replies, extended headers and metadata contexts.

use super::*;
use crate::extent::StatusContext;

fn structured() -> (u32, Vec<u8>) {
    (wire::OPT_STRUCTURED_REPLY, vec![])
}

fn extended() -> (u32, Vec<u8>) {
    (wire::OPT_EXTENDED_HEADERS, vec![])
}

fn context_query(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend_from_slice(&(query.len() as u32).to_be_bytes());
        data.extend_from_slice(query.as_bytes());
    }
    data
}

fn set(queries: &[&str]) -> (u32, Vec<u8>) {
    (wire::OPT_SET_META_CONTEXT, context_query(NAME.as_bytes(), queries))
}

fn list_contexts(queries: &[&str]) -> (u32, Vec<u8>) {
    (wire::OPT_LIST_META_CONTEXT, context_query(NAME.as_bytes(), queries))
}

/// The contexts that the last option is answered with: numbers and names. Its answer ends with an acknowledgement.
fn contexts(options: &[(u32, Vec<u8>)]) -> Vec<(u32, String)> {
    let replies = haggle(options);
    let last = options.last().unwrap().0;
    let replies: Vec<_> = replies.into_iter().skip_while(|reply| reply.option != last).collect();
    let (ack, contexts) = replies.split_last().unwrap();
    assert_eq!((ack.kind, ack.data.len()), (wire::REP_ACK, 0), "{ack:?}");
    let context = |reply: &Reply| {
        assert_eq!(reply.kind, wire::REP_META_CONTEXT);
        let mut reader = Reader::new(&reply.data);
        (reader.u32().unwrap(), String::from_utf8(reader.rest().to_vec()).unwrap())
    };
    contexts.iter().map(context).collect()
}

/// What is negotiated at the end of these options and a GO.
fn negotiated(options: &[(u32, Vec<u8>)]) -> Negotiated {
    let options = [options, &[go(&[])]].concat();
    let (progress, out) = run(&hello(3, &options));
    let Step::Transmission(session) = progress.step else { panic!("{:?}", progress.step) };
    // What is said of the export is what holds.
    let flags = export().transmission_flags(session.negotiated());
    let info = parse_replies(&out).into_iter().rfind(|reply| reply.kind == wire::REP_INFO).unwrap();
    assert_eq!(info.data[10..], flags.to_be_bytes());
    session.negotiated()
}

const ALL: [&str; 4] = ["base:allocation", "nbdmirror:state", "nbdmirror:stale/0", "nbdmirror:stale/2"];

#[test]
fn opt_30_31_32_structured_replies() {
    let with_data = (wire::OPT_STRUCTURED_REPLY, vec![0; 5]);
    let expected = [wire::REP_ERR_INVALID, wire::REP_ACK, wire::REP_ACK, wire::REP_SERVER, wire::REP_ACK];
    assert_eq!(haggle_kinds(&[with_data.clone(), structured(), structured(), list()]), expected);
    assert_eq!(negotiated(&[]).mode, ReplyMode::Simple);
    assert_eq!(negotiated(&[with_data]).mode, ReplyMode::Simple);
    assert_eq!(negotiated(&[structured()]).mode, ReplyMode::Structured);
}

#[test]
fn opt_46_47_48_extended_headers() {
    let with_data = (wire::OPT_EXTENDED_HEADERS, vec![0; 5]);
    let options = [with_data, extended(), extended(), structured(), list()];
    let expected = [
        wire::REP_ERR_INVALID,
        wire::REP_ACK,
        wire::REP_ACK,
        wire::REP_ERR_EXT_HEADER_REQD,
        wire::REP_SERVER,
        wire::REP_ACK,
    ];
    assert_eq!(haggle_kinds(&options), expected);
    for options in [&[extended()][..], &[structured(), extended()], &[extended(), structured()]] {
        assert_eq!(negotiated(options).mode, ReplyMode::Extended);
    }
    // So the extension says.
    assert_closes(&hello(3, &[extended(), (wire::OPT_EXPORT_NAME, vec![])]));
}

#[test]
fn opt_50_tf_05_export_name_keeps_what_was_negotiated() {
    let options = [structured(), set(&ALL), (wire::OPT_EXPORT_NAME, NAME.into())];
    let (progress, out) = run(&hello(3, &options));
    let Step::Transmission(session) = progress.step else { panic!("{:?}", progress.step) };
    assert_eq!(session.negotiated().mode, ReplyMode::Structured);
    assert_eq!(session.negotiated(), negotiated(&options[..2]));
    assert!(out.ends_with(&export().transmission_flags(session.negotiated()).to_be_bytes()));
}

#[test]
fn opt_33_34_list_meta_context() {
    let names = |queries: &[&str]| -> Vec<String> {
        let found = contexts(&[structured(), list_contexts(queries)]);
        assert!(found.iter().all(|(id, _)| *id == 0));
        found.into_iter().map(|(_, name)| name).collect()
    };
    assert_eq!(names(&[]), ALL);
    assert_eq!(names(&["base:"]), ALL[..1]);
    assert_eq!(names(&["nbdmirror:"]), ALL[1..]);
    assert_eq!(names(&["nbdmirror:stale/", "nbdmirror:stale/2"]), ALL[2..]);
    assert_eq!(names(&["qemu:", "base:", "x-y:z", "base:allocation"]), ALL[..1]);
    for unknown in ["qemu:", "base:other", "nbdmirror:stale/1", "nothing", ""] {
        assert!(names(&[unknown]).is_empty());
    }
    // It changes nothing.
    assert_eq!(negotiated(&[structured(), set(&ALL[..1]), list_contexts(&[])]).contexts.iter().count(), 1);
}

#[test]
fn opt_35_36_37_40_set_meta_context() {
    let set_after = |queries: &[&str]| contexts(&[structured(), set(queries)]);
    assert_eq!(set_after(&["base:allocation"]), [(0, ALL[0].to_owned())]);
    let all: Vec<_> = set_after(&ALL);
    assert_eq!(all.iter().map(|(_, name)| &name[..]).collect::<Vec<_>>(), ALL);
    assert_eq!(all.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [0, 1, 2, 4]);
    for queries in [&[][..], &["base:"], &["base:other"], &["qemu:allocation-depth"], &["nbdmirror:stale/"]] {
        assert!(set_after(queries).is_empty());
    }
    let chosen = |options: &[(u32, Vec<u8>)]| negotiated(options).contexts.iter().collect::<Vec<_>>();
    assert_eq!(chosen(&[structured(), set(&["base:allocation"])]), [StatusContext::Allocation]);
    let later = [structured(), set(&["base:allocation"]), set(&["nbdmirror:state"])];
    assert_eq!(chosen(&later), [StatusContext::State]);
    let nothing = (wire::OPT_SET_META_CONTEXT, vec![0; 3]);
    assert!(chosen(&[structured(), set(&ALL), nothing]).is_empty(), "also where it fails");
    assert!(chosen(&[structured(), set(&ALL), set(&[])]).is_empty());
}

#[test]
fn opt_38_contexts_need_structured_replies() {
    for option in [set(&ALL), list_contexts(&[])] {
        let kinds = haggle_kinds(&[option.clone(), list()]);
        assert_eq!(kinds, [wire::REP_ERR_INVALID, wire::REP_SERVER, wire::REP_ACK]);
        assert!(contexts(&[extended(), option]).len() > 1);
    }
}

#[test]
fn opt_39_malformed_context_queries_are_invalid_and_in_step() {
    let good = context_query(NAME.as_bytes(), &["base:allocation"]);
    let mut count_high = good.clone();
    count_high[4 + NAME.len() + 3] = 2;
    let mut count_low = good.clone();
    count_low[4 + NAME.len() + 3] = 0;
    let mut endless = good.clone();
    endless[4 + NAME.len()..8 + NAME.len()].fill(0xff);
    let mut long_query = good.clone();
    long_query[8 + NAME.len()] = 0xff;
    let over = context_query(NAME.as_bytes(), &[&"x".repeat(wire::STRING_BYTES_MAX + 1)]);
    let more = [&good[..], &[0]].concat();
    let short = (0..good.len()).map(|end| good[..end].to_vec());
    for data in [count_high, count_low, endless, long_query, over, more].into_iter().chain(short) {
        for code in [wire::OPT_SET_META_CONTEXT, wire::OPT_LIST_META_CONTEXT] {
            let kinds = haggle_kinds(&[structured(), (code, data.clone()), list()]);
            assert_eq!(kinds[1..], [wire::REP_ERR_INVALID, wire::REP_SERVER, wire::REP_ACK], "{data:?}");
        }
    }
}

#[test]
fn opt_41_nt_14_contexts_belong_to_an_export_by_its_name() {
    for name in [&b"other"[..], b"vol\0", b"\xff"] {
        for code in [wire::OPT_SET_META_CONTEXT, wire::OPT_LIST_META_CONTEXT] {
            let kinds = haggle_kinds(&[structured(), (code, context_query(name, &ALL)), list()]);
            assert_eq!(kinds[1..], [wire::REP_ERR_UNKNOWN, wire::REP_SERVER, wire::REP_ACK]);
        }
    }
    let by_empty_name = (wire::OPT_SET_META_CONTEXT, context_query(b"", &ALL));
    assert!(negotiated(&[structured(), by_empty_name.clone()]).contexts.is_empty(), "GO uses another name");
    let enter = (wire::OPT_GO, encode_info_query(b"", &[]));
    let (progress, _) = run(&hello(3, &[structured(), by_empty_name, enter]));
    let Step::Transmission(session) = progress.step else { panic!("{:?}", progress.step) };
    assert_eq!(session.negotiated().contexts.iter().count(), ALL.len());
}

#[test]
fn opt_42_5000_queries() {
    let many: Vec<String> = (0..5000).map(|index| format!("x-test:query-{index}")).collect();
    let mut queries: Vec<&str> = many.iter().map(String::as_str).collect();
    queries.push("base:allocation");
    assert_eq!(contexts(&[structured(), set(&queries)]).len(), 1);
    let same = vec!["nbdmirror:state"; 5000];
    assert_eq!(contexts(&[structured(), set(&same)]).len(), 1);
    let too_many = vec!["nbdmirror:state"; 50_000];
    for option in [set(&too_many), list_contexts(&too_many)] {
        let kinds = haggle_kinds(&[structured(), option, list()]);
        assert_eq!(kinds, [wire::REP_ACK, wire::REP_ERR_TOO_BIG, wire::REP_SERVER, wire::REP_ACK]);
    }
}

#[test]
fn opt_49_full_haggle() {
    let options = [list(), info(&[]), structured(), list_contexts(&[]), set(&ALL), info(&[]), go(&[])];
    let (progress, out) = run(&hello(3, &options));
    let Step::Transmission(session) = progress.step else { panic!("{:?}", progress.step) };
    assert_eq!(session.negotiated().contexts.iter().count(), ALL.len());
    let replies = parse_replies(&out);
    assert_eq!(replies.last().unwrap().kind, wire::REP_ACK);
    // GO says what INFO said just before, with what had been negotiated by then (OPT-17).
    let [.., info, info_ack, go, _] = &replies[..] else { panic!("{replies:?}") };
    assert_eq!((info_ack.kind, info.kind, go.kind), (wire::REP_ACK, wire::REP_INFO, wire::REP_INFO));
    assert_eq!(info.data, go.data);
}

#[test]
fn tls_06_nothing_negotiated_gets_into_tls() {
    let mut handshake = Handshake::new(export(), TlsMode::Allowed);
    let mut out = Vec::new();
    let options = [extended(), set(&ALL), (wire::OPT_STARTTLS, vec![])];
    assert!(matches!(handshake.receive(&hello(3, &options), &mut out).step, Step::StartTls));
    let bytes = hello(0, &[go(&[])]);
    let progress = handshake.inside_tls().receive(&bytes[4..], &mut out);
    let Step::Transmission(session) = progress.step else { panic!("{:?}", progress.step) };
    assert_eq!(session.negotiated(), Negotiated::default());
}
