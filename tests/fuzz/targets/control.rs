//! The control protocol: lines of JSON.
//!
//! What must hold:
//! - A request that is understood is printed as one line, and that line means the same request.
//! - Any request that a client can make is understood, whatever its text.
//! - An answer that a client takes prints to the same answer again; an error about any line is one line.

use nbdmirror::control::failure::Failure;
use nbdmirror::control::protocol::{Answer, Request, VolumeStatus};

use super::input::Input;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 4 {
        0 => request_line(input.rest()),
        1 => answer_line(input.rest()),
        2 => status_line(input.rest()),
        _ => any_request(&mut input),
    }
}

fn request_line(line: &[u8]) {
    match serde_json::from_slice::<Request>(line) {
        Ok(request) => round_trip(&request),
        Err(error) => {
            let answer = Answer::from(Failure::new(format!("not understood: {error}")).hint("a hint"));
            assert!(!answer.ok && answer.error.is_some());
            answer_line(&one_line(&answer));
        }
    }
}

fn one_line<T: serde::Serialize>(value: &T) -> Vec<u8> {
    let line = serde_json::to_vec(value).expect("it can be printed");
    assert!(!line.contains(&b'\n'), "an end of line within the line");
    line
}

fn round_trip(request: &Request) {
    let line = one_line(request);
    let again: Request = serde_json::from_slice(&line).expect("what was printed is understood");
    assert_eq!(&again, request);
}

fn answer_line(line: &[u8]) {
    if let Ok(answer) = serde_json::from_slice::<Answer>(line) {
        let line = one_line(&answer);
        let again: Answer = serde_json::from_slice(&line).expect("what was printed is understood");
        assert_eq!(one_line(&again), line);
    }
}

fn status_line(line: &[u8]) {
    if let Ok(status) = serde_json::from_slice::<VolumeStatus>(line) {
        let again: VolumeStatus = serde_json::from_slice(&one_line(&status)).expect("it is understood");
        assert_eq!(again, status);
        for slot in 0..10 {
            let _ = status.access_in_words(slot);
        }
    }
}

fn any_request(input: &mut Input<'_>) {
    while !input.is_empty() {
        round_trip(&match input.u8() % 5 {
            0 => Request::Status,
            1 => Request::Stop,
            2 => Request::Fail { replica: input.text() },
            3 => Request::Remove { replica: input.text() },
            _ => Request::Add { force: input.one_in(2), path: input.text() },
        });
    }
}
