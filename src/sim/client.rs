//! Clients: they send requests that overlap on purpose, and the answers are judged here.

use crate::buffer::Payload;
use crate::mirror::event::{Event, Request, RequestError, RequestId};
use crate::units::ByteRange;

use super::disk::FlushMark;
use super::oracle::{Outcome, Value};
use super::plan::Plan;
use super::rng::Rng;
use super::world::{Checked, Wake, World, violated};

/// A client: where it likes to go, and how busy it is.
#[derive(Clone)]
pub struct Client {
    hot_spots: Vec<u64>,
    in_flight: usize,
}

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A read.
    Read,
    /// A write.
    Write,
    /// Zeroes.
    Zero,
    /// A trim.
    Trim,
    /// A flush.
    Flush,
}

/// A request that is not answered yet.
pub struct Pending {
    /// Who sent it.
    pub client: usize,
    /// What.
    pub asked: Asked,
    /// Which bytes.
    pub range: ByteRange,
    /// What it writes.
    pub value: Value,
    /// Durable before the answer.
    pub fua: bool,
    /// The oracle's time.
    pub begin: u64,
    /// For a flush: what it covers on each disk.
    pub marks: Vec<FlushMark>,
}

impl Client {
    /// A client of `plan`'s world.
    pub fn new(plan: &Plan, rng: &mut Rng) -> Self {
        // All clients share spots: they are meant to get into each other's way.
        let mut shared = Rng::new(plan.seed);
        let _ = rng;
        let hot_spots = (0..plan.mix.hot_spots).map(|_| shared.below(plan.volume_bytes)).collect();
        Self { hot_spots, in_flight: 0 }
    }

    /// The daemon died.
    pub fn forget(&mut self) {
        self.in_flight = 0;
    }
}

impl World {
    /// A client may send.
    pub(super) fn client_wakes(&mut self, client: usize) -> Checked {
        let ready = self.daemon.as_ref().is_some_and(|daemon| !daemon.stopping);
        if !ready || self.requests_left == 0 || self.clients[client].in_flight >= self.plan.depth {
            return Ok(());
        }
        self.requests_left -= 1;
        let asked = self.choose();
        let range = self.choose_range(client, asked);
        let fua = matches!(asked, Asked::Write | Asked::Zero | Asked::Trim)
            && self.rng.per_mille(self.plan.mix.fua);
        self.send(client, asked, range, fua)
    }

    fn choose(&mut self) -> Asked {
        let weights = self.plan.mix.weights;
        let mut at = self.rng.below(weights.iter().sum());
        for (asked, weight) in
            [Asked::Read, Asked::Write, Asked::Zero, Asked::Trim, Asked::Flush].into_iter().zip(weights)
        {
            if at < weight {
                return asked;
            }
            at -= weight;
        }
        Asked::Read
    }

    fn choose_range(&mut self, client: usize, asked: Asked) -> ByteRange {
        let volume = self.plan.volume_bytes;
        let (unit, len_max, whole) = (self.plan.mix.unit, self.plan.mix.len_max, self.plan.mix.whole);
        let rng = &mut self.rng;
        if matches!(asked, Asked::Zero | Asked::Trim) && rng.per_mille(whole) {
            return ByteRange::new(0, volume);
        }
        if rng.per_mille(5) {
            return ByteRange::new(rng.below(volume + 1), 0);
        }
        let spots = &self.clients[client].hot_spots;
        let middle = if spots.is_empty() || rng.per_mille(100) {
            rng.below(volume)
        } else {
            let spot = spots[rng.below(spots.len() as u64) as usize];
            (spot + rng.below(2 * len_max)).min(volume - 1)
        };
        let offset = middle / unit * unit;
        let len_max = if rng.coin() { len_max } else { unit.max(len_max / 16) };
        let len = (rng.between(1, len_max.max(unit)) / unit * unit).max(unit);
        ByteRange::new(offset, len.min(volume - offset))
    }

    /// A client sends a request.
    pub(super) fn send(&mut self, client: usize, asked: Asked, range: ByteRange, fua: bool) -> Checked {
        let id = self.fresh_id();
        let value = Value { id: id as u32, zero: asked != Asked::Write };
        self.trace(|| {
            let fua = if fua { " FUA" } else { "" };
            format!("client {client}: request {id}: {asked:?}{fua} {}+{}", range.offset, range.len)
        });
        let Some(daemon) = &self.daemon else { return Ok(()) };
        let request = match asked {
            Asked::Read => Request::Read { range },
            Asked::Write => {
                let mut data = daemon.pool.payload_for(range);
                value.fill(range.offset, data.bytes_mut());
                Request::Write { offset: range.offset, data, fua }
            }
            Asked::Zero => Request::WriteZeroes { range, may_unmap: self.rng.coin(), fua },
            Asked::Trim => Request::Trim { range, fua },
            Asked::Flush => Request::Flush,
        };
        let begin = match asked {
            Asked::Read => self.oracle.read_begin(),
            Asked::Flush => self.oracle.flush_begin(),
            Asked::Write | Asked::Zero | Asked::Trim => self.oracle.write_begin(value, range),
        };
        let marks = match asked {
            Asked::Flush => self.disks.iter().map(|disk| disk.disk.flush_mark()).collect(),
            _ => vec![],
        };
        if let Some(daemon) = &mut self.daemon {
            let pending = Pending { client, asked, range, value, fua, begin, marks };
            daemon.requests.insert(id, pending);
        }
        self.clients[client].in_flight += 1;
        self.deliver(Event::Request { id: RequestId(id), request })
    }

    /// The core answers a request.
    pub(super) fn client_reply(
        &mut self,
        id: RequestId,
        result: Result<Option<Payload>, RequestError>,
    ) -> Checked {
        let Some(daemon) = &mut self.daemon else { return Ok(()) };
        let Some(pending) = daemon.requests.remove(&id.0) else {
            return violated("protocol", format!("request {} is answered twice, or was never sent", id.0));
        };
        self.counts.replies += 1;
        self.counts.errors += u64::from(result.is_err());
        self.trace(|| format!("request {}: answered {:?}", id.0, result.as_ref().map(|_| "well")));
        let client = &mut self.clients[pending.client];
        client.in_flight -= 1;
        let think = self.rng.between(1, 2 * self.plan.think_ns);
        self.wake_in(think, Wake::Client(pending.client));
        match result {
            Ok(data) => self.judge_success(id.0, &pending, data),
            Err(error) => self.judge_failure(id.0, &pending, error),
        }
    }

    fn judge_success(&mut self, id: u64, pending: &Pending, data: Option<Payload>) -> Checked {
        match pending.asked {
            Asked::Read => {
                if pending.range.is_empty() && data.is_none() {
                    self.oracle.read_failed(pending.begin);
                    return Ok(());
                }
                let Some(data) = data else {
                    return violated("protocol", format!("read {id} is answered without data"));
                };
                if data.len as u64 != pending.range.len {
                    return violated("protocol", format!("read {id} is answered with {} bytes", data.len));
                }
                self.promise_5_one_answer(id, pending, &data)
            }
            Asked::Flush => {
                self.oracle.flush_end(pending.begin, true);
                self.promise_9_a_flush_is_a_flush(id, pending)
            }
            Asked::Write | Asked::Zero | Asked::Trim => {
                let outcome = if pending.asked == Asked::Trim {
                    Outcome::Maybe
                } else {
                    Outcome::Done { fua: pending.fua }
                };
                self.oracle.write_end(pending.value, pending.begin, outcome);
                self.promise_2_failure_before_ack(id, pending)?;
                self.promise_9_fua_is_durable(id, pending)
            }
        }
    }

    fn judge_failure(&mut self, id: u64, pending: &Pending, error: RequestError) -> Checked {
        match pending.asked {
            Asked::Read => self.oracle.read_failed(pending.begin),
            Asked::Flush => self.oracle.flush_end(pending.begin, false),
            Asked::Write | Asked::Zero | Asked::Trim => {
                self.oracle.write_end(pending.value, pending.begin, Outcome::Maybe);
            }
        }
        let stopping = self.daemon.as_ref().is_some_and(|daemon| daemon.stopping);
        if self.plan.within_model && !self.excused && !(stopping && error == RequestError::Stopping) {
            let asked = pending.asked;
            return violated(
                "promise_6_never_the_last",
                format!("request {id} ({asked:?}) failed ({error}) while a replica was well"),
            );
        }
        Ok(())
    }
}
