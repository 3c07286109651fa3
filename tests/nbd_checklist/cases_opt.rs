//! OPT: options in general, ABORT, LIST, STARTTLS where there is no TLS, and the two that choose the form of replies.

use super::ground::{EXPORT, Ground};
use super::link::{Link, Mode, cmd};
use super::raw::{FIXED_NEWSTYLE, NO_ZEROES, Raw, be16, be32, be64, info_data, meta_data, opt, option, rep};

cases! {
    opt_01_an_unknown_option_is_unsup,
    opt_02_an_unknown_option_with_data_is_unsup_and_its_data_skipped,
    opt_03_twenty_unknown_options,
    opt_04_withdrawn_options_are_unsup,
    opt_05_abort_is_acknowledged,
    opt_06_abort_with_data_is_acknowledged,
    opt_07_abort_and_gone,
    opt_08_list_is_well_formed,
    opt_09_list_with_data_is_invalid,
    opt_10_what_is_listed_can_be_opened,
    opt_11_starttls_without_tls,
    opt_12_starttls_with_data,
    opt_13_a_server_without_tls_never_asks_for_it,
    opt_30_structured_replies_are_granted,
    opt_31_structured_reply_with_data_is_invalid,
    opt_32_structured_reply_twice,
    opt_46_extended_headers_are_granted,
    opt_46_extended_headers_twice,
    opt_46_export_name_after_extended_headers,
    opt_47_extended_headers_with_data_is_invalid,
    opt_48_structured_reply_after_extended_headers,
    opt_49_a_whole_haggle,
    opt_50_export_name_after_structured_reply,
}

/// Options that no specification has.
const UNKNOWN: [u32; 6] = [12, 99, 4711, 0x7fff_ffff, 0x8000_0000, u32::MAX];

fn opt_01_an_unknown_option_is_unsup(ground: &Ground) {
    let mut raw = ground.haggling();
    for code in UNKNOWN {
        assert_eq!(raw.ask_one(code, &[]), rep::ERR_UNSUP);
        raw.in_step();
    }
}

fn opt_02_an_unknown_option_with_data_is_unsup_and_its_data_skipped(ground: &Ground) {
    let mut raw = ground.haggling();
    for (code, len) in UNKNOWN.into_iter().zip([1, 16, 4095, 4097, 70_000, 1 << 20]) {
        // The data looks like options.
        let data: Vec<u8> = option(opt::LIST, &[]).into_iter().cycle().take(len).collect();
        assert_eq!(raw.ask_one(code, &data), rep::ERR_UNSUP);
        raw.in_step();
    }
}

fn opt_03_twenty_unknown_options(ground: &Ground) {
    let mut raw = ground.haggling();
    for code in 1000..1020 {
        raw.option(code, &[7; 3]);
    }
    for code in 1000..1020 {
        assert_eq!(raw.try_option_reply(code).unwrap().kind, rep::ERR_UNSUP);
    }
    raw.in_step();
}

fn opt_04_withdrawn_options_are_unsup(ground: &Ground) {
    let mut raw = ground.haggling();
    for code in [opt::PEEK_EXPORT, 0] {
        assert_eq!(raw.ask_one(code, &[]), rep::ERR_UNSUP);
        assert_eq!(raw.ask_one(code, EXPORT), rep::ERR_UNSUP);
        raw.in_step();
    }
}

fn opt_05_abort_is_acknowledged(ground: &Ground) {
    assert_eq!(ground.haggling().ask_one(opt::ABORT, &[]), rep::ACK);
}

fn opt_06_abort_with_data_is_acknowledged(ground: &Ground) {
    for len in [1, 100, 5000] {
        assert_eq!(ground.haggling().ask_one(opt::ABORT, &vec![b'!'; len]), rep::ACK);
    }
}

fn opt_07_abort_and_gone(ground: &Ground) {
    for _ in 0..10 {
        ground.haggling().option(opt::ABORT, &[]);
    }
    ground.let_go();
}

fn opt_08_list_is_well_formed(ground: &Ground) {
    // `ask` checks the form.
    let replies = ground.haggling().ask(opt::LIST, &[]);
    assert_eq!(replies.last().unwrap().kind, rep::ACK);
    assert!(replies[..replies.len() - 1].iter().all(|reply| reply.kind == rep::SERVER));
}

fn opt_09_list_with_data_is_invalid(ground: &Ground) {
    let mut raw = ground.haggling();
    for data in [&b"x"[..], EXPORT, &[0; 5000]] {
        assert_eq!(raw.ask_one(opt::LIST, data), rep::ERR_INVALID);
        raw.in_step();
    }
}

/// The names that LIST gives.
fn listed(raw: &mut Raw) -> Vec<Vec<u8>> {
    let replies = raw.ask(opt::LIST, &[]);
    let servers = replies.iter().filter(|reply| reply.kind == rep::SERVER);
    servers.map(|reply| reply.data[4..4 + be32(&reply.data, 0) as usize].to_vec()).collect()
}

fn opt_10_what_is_listed_can_be_opened(ground: &Ground) {
    let names = listed(&mut ground.haggling());
    assert!(names.iter().any(|name| name == EXPORT), "the volume is not in {names:?}");
    for name in names {
        let link = Link::open(ground.haggling(), Mode::Simple, &name, &[]);
        assert!(link.size > 0);
        link.leave();
    }
}

const NO_TLS: [u32; 3] = [rep::ERR_UNSUP, rep::ERR_POLICY, rep::ERR_PLATFORM];

fn opt_11_starttls_without_tls(ground: &Ground) {
    let mut raw = ground.haggling();
    let kind = raw.ask_one(opt::STARTTLS, &[]);
    assert!(NO_TLS.contains(&kind), "{kind:#x}");
    raw.in_step();
}

fn opt_12_starttls_with_data(ground: &Ground) {
    let mut raw = ground.haggling();
    let kind = raw.ask_one(opt::STARTTLS, b"\x16\x03\x01\x02\x00");
    assert!(NO_TLS.contains(&kind) || kind == rep::ERR_INVALID, "{kind:#x}");
    raw.in_step();
}

fn opt_13_a_server_without_tls_never_asks_for_it(ground: &Ground) {
    let data =
        [vec![], vec![0; 4], info_data(EXPORT, &[]), info_data(b"nothing", &[]), meta_data(EXPORT, &[])];
    for code in (0..14).filter(|code| ![opt::EXPORT_NAME, opt::ABORT].contains(code)) {
        for data in &data {
            let replies = ground.haggling().ask(code, data);
            assert!(replies.iter().all(|reply| reply.kind != rep::ERR_TLS_REQD), "option {code}");
        }
    }
}

fn opt_30_structured_replies_are_granted(ground: &Ground) {
    let mut link = ground.link_in(Mode::Structured);
    link.usable();
    link.leave();
}

/// An option refused for its data has not been taken.
fn has_not_been_taken(raw: Raw) {
    let mut link = Link::go(raw, Mode::Simple, EXPORT, Vec::new());
    link.usable();
    assert!(link.call(cmd::READ, 0, 0, 512).chunks.is_empty());
}

fn opt_31_structured_reply_with_data_is_invalid(ground: &Ground) {
    for len in [1, 4, 5000] {
        let mut raw = ground.haggling();
        assert_eq!(raw.ask_one(opt::STRUCTURED_REPLY, &vec![0; len]), rep::ERR_INVALID);
        raw.in_step();
        has_not_been_taken(raw);
    }
}

fn opt_32_structured_reply_twice(ground: &Ground) {
    let mut raw = ground.haggling();
    assert_eq!(raw.ask_one(opt::STRUCTURED_REPLY, &[]), rep::ACK);
    let kind = raw.ask_one(opt::STRUCTURED_REPLY, &[]);
    assert!([rep::ACK, rep::ERR_INVALID].contains(&kind), "{kind:#x}");
    raw.in_step();
    Link::go(raw, Mode::Structured, EXPORT, Vec::new()).usable();
}

fn opt_46_extended_headers_are_granted(ground: &Ground) {
    let mut link = ground.link_in(Mode::Extended);
    link.usable();
    link.leave();
}

fn opt_46_extended_headers_twice(ground: &Ground) {
    let mut raw = ground.haggling();
    assert_eq!(raw.ask_one(opt::EXTENDED_HEADERS, &[]), rep::ACK);
    let kind = raw.ask_one(opt::EXTENDED_HEADERS, &[]);
    assert!([rep::ACK, rep::ERR_INVALID].contains(&kind), "{kind:#x}");
    raw.in_step();
    Link::go(raw, Mode::Extended, EXPORT, Vec::new()).usable();
}

/// The draft forbids it to clients; a server closes, or serves it in the form that was negotiated.
fn opt_46_export_name_after_extended_headers(ground: &Ground) {
    let mut raw = ground.haggling();
    assert_eq!(raw.ask_one(opt::EXTENDED_HEADERS, &[]), rep::ACK);
    raw.option(opt::EXPORT_NAME, EXPORT);
    if let Some(answer) = raw.try_take(10) {
        Link::in_transmission(raw, Mode::Extended, be64(&answer, 0), be16(&answer, 8)).usable();
    }
}

fn opt_47_extended_headers_with_data_is_invalid(ground: &Ground) {
    for len in [1, 4, 5000] {
        let mut raw = ground.haggling();
        assert_eq!(raw.ask_one(opt::EXTENDED_HEADERS, &vec![0; len]), rep::ERR_INVALID);
        raw.in_step();
        has_not_been_taken(raw);
    }
}

fn opt_48_structured_reply_after_extended_headers(ground: &Ground) {
    let mut raw = ground.haggling();
    assert_eq!(raw.ask_one(opt::EXTENDED_HEADERS, &[]), rep::ACK);
    assert_eq!(raw.ask_one(opt::STRUCTURED_REPLY, &[]), rep::ERR_EXT_HEADER_REQD);
    raw.in_step();
    Link::go(raw, Mode::Extended, EXPORT, Vec::new()).usable();
    // The other order is legal: the client found out that more can be had.
    let mut raw = ground.haggling();
    assert_eq!(raw.ask_one(opt::STRUCTURED_REPLY, &[]), rep::ACK);
    assert_eq!(raw.ask_one(opt::EXTENDED_HEADERS, &[]), rep::ACK);
    Link::go(raw, Mode::Extended, EXPORT, Vec::new()).usable();
}

fn opt_49_a_whole_haggle(ground: &Ground) {
    let mut raw = ground.raw_tcp().hello(FIXED_NEWSTYLE | NO_ZEROES);
    raw.in_step();
    assert_eq!(raw.ask(opt::INFO, &info_data(EXPORT, &[1, 2, 3])).pop().unwrap().kind, rep::ACK);
    assert_eq!(raw.ask_one(opt::STRUCTURED_REPLY, &[]), rep::ACK);
    let listed = raw.ask(opt::LIST_META_CONTEXT, &meta_data(EXPORT, &[]));
    assert_eq!(listed.last().unwrap().kind, rep::ACK);
    let contexts = super::link::select(&mut raw, EXPORT, &["base:allocation"]);
    assert_eq!(contexts.len(), 1);
    let mut link = Link::go(raw, Mode::Structured, EXPORT, contexts);
    link.usable();
    assert_eq!(link.call(cmd::BLOCK_STATUS, 0, 0, 4096).error, 0);
    link.leave();
}

fn opt_50_export_name_after_structured_reply(ground: &Ground) {
    let mut raw = ground.haggling();
    assert_eq!(raw.ask_one(opt::STRUCTURED_REPLY, &[]), rep::ACK);
    raw.option(opt::EXPORT_NAME, EXPORT);
    let answer = raw.take(10);
    let mut link = Link::in_transmission(raw, Mode::Structured, be64(&answer, 0), be16(&answer, 8));
    link.usable();
    link.leave();
}
