//! Clients whose every request and answer is in the log.
//!
//! What must hold: all connections write everywhere, so requests in flight overlap; each write's bytes are its own (they
//! follow from the index of its event), so a byte names its writer.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::Path;

use super::checker::unique_bytes;
use super::nbd::{Client, Command, FUA, NO_HOLE};
use super::recorder::{Event, Recorder, Request};
use super::rng::{Rng, mix};

/// Most requests that one connection keeps in flight.
const DEPTH_MAX: u64 = 8;

/// What is asked.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    /// Number of connections.
    pub(crate) connections: u64,
    /// Requests on each; fewer where the daemon goes away.
    pub(crate) requests: usize,
    /// The part of the volume that is written.
    pub(crate) window: Range<u64>,
    /// What the choices follow from.
    pub(crate) seed: u64,
}

/// Asks all of `load`; returns when everything is answered or the daemon has gone.
pub(crate) fn ask(recorder: &Recorder, socket: &Path, load: &Load) {
    std::thread::scope(|scope| {
        for connection in 0..load.connections {
            scope.spawn(move || {
                let Ok(client) = Client::connect(socket, "") else { return };
                let rng = Rng::new(load.seed ^ mix(connection + 1));
                let mut asker = Asker { recorder, client, rng, in_flight: HashMap::new() };
                // The daemon's end is a part of some scenarios; an error as an answer stands in the log.
                let _ = asker.run(load);
            });
        }
    });
}

/// Reads `len` bytes at `offset`, noted in the log; the events of the request and its answer enclose it.
pub(crate) fn read(recorder: &Recorder, client: &mut Client, offset: u64, len: u64) -> (usize, Vec<u8>) {
    let asked = recorder.log().push(Event::Asked(Request::Read { offset, len }));
    let bytes = client.read(offset, len as usize).unwrap();
    let mut log = recorder.log();
    let data = Some(log.keep(&bytes));
    log.push(Event::Answered { asked, error: 0, data });
    (asked, bytes)
}

struct Asker<'a> {
    recorder: &'a Recorder,
    client: Client,
    rng: Rng,
    /// By cookie, the index of the event.
    in_flight: HashMap<u64, usize>,
}

impl Asker<'_> {
    fn run(&mut self, load: &Load) -> io::Result<()> {
        let depth = 1 + self.rng.below(DEPTH_MAX) as usize;
        for _ in 0..load.requests {
            while self.in_flight.len() >= depth {
                self.receive()?;
            }
            let request = choose(&mut self.rng, &load.window);
            self.send(request)?;
        }
        while !self.in_flight.is_empty() {
            self.receive()?;
        }
        Ok(())
    }

    fn send(&mut self, request: Request) -> io::Result<()> {
        // In the log before the first byte is sent: a send cut short may have arrived whole.
        let asked = self.recorder.log().push(Event::Asked(request));
        let fua_flag = |fua: bool| if fua { FUA } else { 0 };
        let cookie = match request {
            Request::Write { offset, len, fua } => {
                let bytes = unique_bytes(asked as u64, offset, len);
                self.client.send(Command::Write, fua_flag(fua), offset, len as u32, &bytes)
            }
            Request::Zeroes { offset, len, fua } => {
                let flags = fua_flag(fua) | self.rng.pick(&[0, NO_HOLE]);
                self.client.send(Command::WriteZeroes, flags, offset, len as u32, &[])
            }
            Request::Trim { offset, len } => self.client.send(Command::Trim, 0, offset, len as u32, &[]),
            Request::Flush => self.client.send(Command::Flush, 0, 0, 0, &[]),
            Request::Read { offset, len } => self.client.send(Command::Read, 0, offset, len as u32, &[]),
        }?;
        self.in_flight.insert(cookie, asked);
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        let reply = self.client.receive()?;
        let asked = self.in_flight.remove(&reply.cookie).expect("the client matches replies");
        self.recorder.log().push(Event::Answered { asked, error: reply.error, data: None });
        Ok(())
    }
}

/// The next request: mostly writes, mostly short, half of them in the same few places.
fn choose(rng: &mut Rng, window: &Range<u64>) -> Request {
    let kind = rng.below(100);
    if kind < 10 {
        return Request::Flush;
    }
    let align = rng.pick(&[4096, 4096, 512, 1]);
    let size = window.end - window.start;
    let room = if rng.chance(50) { size } else { size.min(128 << 10) };
    let longest = if rng.chance(10) { 192 << 10 } else { 12 << 10 };
    let offset = rng.below(room / align) * align;
    let len = ((1 + rng.below(longest / align)) * align).min(size - offset);
    let (offset, fua) = (window.start + offset, rng.chance(12));
    match kind {
        10..18 => Request::Zeroes { offset, len, fua },
        18..22 => Request::Trim { offset, len },
        22..26 => Request::Read { offset, len },
        _ => Request::Write { offset, len, fua },
    }
}
