//! Clients: they send requests that overlap on purpose, and the answers are judged here.

use std::sync::Arc;

use crate::buffer::Payload;
use crate::extent::{ContextSet, StatusContext};
use crate::mirror::event::{Answer, Event, Request, RequestError, RequestId};
use crate::nbd::export::{Export, Negotiated};
use crate::nbd::session::{Command, Parsed, Session};
use crate::nbd::wire::{PAYLOAD_BYTES_MAX, REQUEST_BYTES, REQUEST_MAGIC};
use crate::units::{BLOCK_BYTES, ByteRange, Nanos, ReplicaSet};

use super::counts::{FaultKind, RequestKind};
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
    /// What is known of a range.
    Status,
    /// A prefetch.
    Cache,
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
    /// When it was sent.
    pub sent_at: Nanos,
    /// For a flush: what it covers on each disk.
    pub marks: Vec<FlushMark>,
    /// For a status: which contexts, and whether just one extent.
    pub question: (ContextSet, bool),
    /// For zeroes that are to be fast or not at all: whether the space may be given back.
    pub fast: Option<bool>,
    /// It was sent to a volume that was open.
    pub was_open: bool,
    /// For these: some replica has no such way, as it stands now.
    pub must_refuse: bool,
}

impl Asked {
    /// Whether it changes the volume.
    #[must_use]
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Zero | Self::Trim)
    }
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
        if self.rng.per_mille(self.plan.mix.hostile) {
            self.wake_in(1 + self.plan.think_ns, Wake::Client(client));
            return self.promise_11_hostile_request();
        }
        // Where copies may differ there is more to be got wrong.
        let status = self.plan.mix.status;
        let status = if status > 0 && self.is_unsynced() { 300 } else { status };
        let asked = if self.rng.per_mille(status) {
            Asked::Status
        } else if self.rng.per_mille(self.plan.mix.cache) {
            Asked::Cache
        } else {
            self.choose()
        };
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
        let whole = if asked == Asked::Status { 300 } else { whole };
        if matches!(asked, Asked::Zero | Asked::Trim | Asked::Status) && rng.per_mille(whole) {
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

    /// Counts a request by its kinds.
    fn count_request(&mut self, asked: Asked, range: ByteRange, fua: bool) {
        let writes = matches!(asked, Asked::Write | Asked::Zero | Asked::Trim);
        let of_bytes = asked != Asked::Flush;
        let overlapping = self.daemon.as_ref().is_some_and(|daemon| {
            daemon.requests.values().any(|other| {
                other.asked != Asked::Flush && other.range.overlaps(range) && (writes || other.asked.writes())
            })
        });
        let kind = match asked {
            Asked::Read => RequestKind::Read,
            Asked::Write => RequestKind::Write,
            Asked::Zero => RequestKind::Zeroes,
            Asked::Trim => RequestKind::Trim,
            Asked::Flush => RequestKind::Flush,
            Asked::Status => RequestKind::Status,
            Asked::Cache => RequestKind::Cache,
        };
        let kinds = [
            (true, kind),
            (fua, RequestKind::Fua),
            (of_bytes && !range.is_aligned(BLOCK_BYTES), RequestKind::Unaligned),
            (of_bytes && overlapping, RequestKind::Overlapping),
            (of_bytes && self.regions().touched(range).nth(1).is_some(), RequestKind::ManyRegions),
            (of_bytes && range.len == self.plan.volume_bytes, RequestKind::Whole),
            (of_bytes && range.is_empty(), RequestKind::Empty),
            (writes && self.read_only, RequestKind::WriteReadOnly),
        ];
        kinds.into_iter().filter(|(so, _)| *so).for_each(|(_, kind)| self.counts.request(kind));
    }

    /// What else there is to be chosen: contexts and whether just one extent; may unmap; fast.
    fn details(&mut self, asked: Asked) -> ((ContextSet, bool), bool, bool) {
        let rng = &mut self.rng;
        match asked {
            Asked::Zero => {
                let (may_unmap, fast) = (rng.coin(), rng.per_mille(self.plan.mix.fast));
                fast.then(|| self.counts.request(RequestKind::FastZeroes));
                ((ContextSet::EMPTY, false), may_unmap, fast)
            }
            Asked::Status => {
                let most = rng.coin();
                let mut contexts: ContextSet =
                    StatusContext::all().filter(|_| most || rng.per_mille(300)).collect();
                contexts.insert(rng.pick(&[StatusContext::Allocation, StatusContext::State]));
                let one = rng.per_mille(200);
                one.then(|| self.counts.request(RequestKind::StatusOne));
                ((contexts, one), false, false)
            }
            _ => ((ContextSet::EMPTY, false), false, false),
        }
    }

    /// A client sends a request.
    pub(super) fn send(&mut self, client: usize, asked: Asked, range: ByteRange, fua: bool) -> Checked {
        let id = self.fresh_id();
        let value = Value { id: id as u32, zero: asked != Asked::Write };
        self.count_request(asked, range, fua);
        self.trace(|| {
            let fua = if fua { " FUA" } else { "" };
            format!("client {client}: request {id}: {asked:?}{fua} {}+{}", range.offset, range.len)
        });
        let (question, may_unmap, fast) = self.details(asked);
        let Some(daemon) = &self.daemon else { return Ok(()) };
        let fast_how = fast.then_some(may_unmap);
        let was_open = daemon.mirror.is_open();
        let must_refuse =
            was_open && !self.read_only && fast_how.is_some_and(|may_unmap| self.zeroes_slowly(may_unmap));
        let request = match asked {
            Asked::Read => Request::Read { range },
            Asked::Write => {
                let mut data = daemon.pool.payload_for(range);
                value.fill(range.offset, data.bytes_mut());
                Request::Write { offset: range.offset, data, fua }
            }
            Asked::Zero => Request::WriteZeroes { range, may_unmap, fast, fua },
            Asked::Trim => Request::Trim { range, fua },
            Asked::Flush => Request::Flush,
            Asked::Status => Request::BlockStatus { range, contexts: question.0, one: question.1 },
            Asked::Cache => Request::Cache { range },
        };
        let begin = match asked {
            Asked::Read | Asked::Status => self.oracle.read_begin(),
            Asked::Cache => 0,
            Asked::Flush => self.oracle.flush_begin(),
            // A write to a volume served read-only never happens: the oracle does not hear of it.
            Asked::Write | Asked::Zero | Asked::Trim if self.read_only => 0,
            Asked::Write | Asked::Zero | Asked::Trim => self.oracle.write_begin(value, range),
        };
        let marks = match asked {
            Asked::Flush => self.disks.iter().map(|disk| disk.disk.flush_mark()).collect(),
            _ => vec![],
        };
        if let Some(daemon) = &mut self.daemon {
            let pending = Pending {
                client,
                asked,
                range,
                value,
                fua,
                begin,
                sent_at: self.now,
                marks,
                question,
                fast: fast_how,
                was_open,
                must_refuse,
            };
            daemon.requests.insert(id, pending);
        }
        self.clients[client].in_flight += 1;
        self.deliver(Event::Request { id: RequestId(id), request })
    }

    /// Promise 11: wrong requests are refused by the protocol layer, right ones let through as they are. This one is
    /// at or over some edge; where it is let through though it leaves the volume, the promise is broken.
    fn promise_11_hostile_request(&mut self) -> Checked {
        self.counts.request(RequestKind::Hostile);
        let volume = self.plan.volume_bytes;
        let export = Export {
            name: "sim".to_owned(),
            description: String::new(),
            size_bytes: volume,
            read_only: self.read_only,
            replicas: ReplicaSet::EMPTY,
        };
        let rng = &mut self.rng;
        let near = |rng: &mut Rng, at: u64| at.wrapping_add(rng.between(0, 8192)).wrapping_sub(4096);
        let offset = match rng.below(4) {
            0 => near(rng, volume),
            1 => near(rng, u64::MAX),
            2 => rng.next_u64(),
            _ => rng.below(volume),
        };
        let len = match rng.below(4) {
            0 => rng.between(0, 8192),
            1 => near(rng, PAYLOAD_BYTES_MAX.into()),
            2 => u64::from(u32::MAX) - rng.below(8192),
            _ => near(rng, volume - offset.min(volume)),
        } as u32;
        let (flags, kind) = (rng.pick(&[0, 0, 1, 2, 0x8000]), rng.below(9) as u16);
        let mut header = [0; REQUEST_BYTES];
        header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        header[4..6].copy_from_slice(&(flags as u16).to_be_bytes());
        header[6..8].copy_from_slice(&kind.to_be_bytes());
        header[16..24].copy_from_slice(&offset.to_be_bytes());
        header[24..].copy_from_slice(&len.to_be_bytes());
        let end = u128::from(offset) + u128::from(len);
        let parsed = Session::new(Arc::new(export), Negotiated::default()).parse(&header);
        match parsed.map(|(parsed, _)| parsed) {
            Some(Parsed::Command { command: Command::Flush, .. }) => Ok(()),
            Some(Parsed::Command { command, .. }) if end > u128::from(volume) => {
                violated("promise_11_bad_input", format!("{command:?} leaves the volume and is let through"))
            }
            Some(Parsed::Command { command, .. }) if self.read_only && command.writes() => {
                violated("promise_11_bad_input", format!("{command:?} is let through to a read-only volume"))
            }
            _ => Ok(()),
        }
    }

    /// The core answers a request.
    pub(super) fn client_reply(&mut self, id: RequestId, result: Result<Answer, RequestError>) -> Checked {
        let Some(daemon) = &mut self.daemon else { return Ok(()) };
        let Some(pending) = daemon.requests.remove(&id.0) else {
            return violated("protocol", format!("request {} is answered twice, or was never sent", id.0));
        };
        daemon.replies += 1;
        self.counts.replies += 1;
        self.counts.errors += u64::from(result.is_err());
        self.trace(|| format!("request {}: answered {:?}", id.0, result.as_ref().map(|_| "well")));
        let client = &mut self.clients[pending.client];
        client.in_flight -= 1;
        let think = self.rng.between(1, 2 * self.plan.think_ns);
        self.wake_in(think, Wake::Client(pending.client));
        match result {
            Ok(Answer::Status(answer)) => self.judge_status(id.0, &pending, &answer),
            Ok(answer) => self.judge_success(id.0, &pending, answer.data()),
            Err(RequestError::NotSupported) => self.judge_refusal(id.0, &pending),
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
            Asked::Cache => Ok(()),
            Asked::Status if pending.range.is_empty() => {
                self.oracle.read_failed(pending.begin);
                Ok(())
            }
            Asked::Status => violated("protocol", format!("status {id} is answered without extents")),
            Asked::Flush if self.read_only => Ok(()), // it flushes nothing: nothing was written
            Asked::Flush => {
                self.oracle.flush_end(pending.begin, true);
                self.promise_9_a_flush_is_a_flush(id, pending)
            }
            _ if self.read_only => {
                violated("promise_11_bad_input", format!("write {id} to a read-only volume"))
            }
            _ if pending.must_refuse => {
                violated("protocol", format!("zeroing {id} is fast though a replica has no such way"))
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
        if matches!(pending.asked, Asked::Status | Asked::Cache) && error != RequestError::Stopping {
            return violated("protocol", format!("request {id} ({:?}) failed: {error}", pending.asked));
        }
        match pending.asked {
            Asked::Cache => {}
            Asked::Read | Asked::Status => self.oracle.read_failed(pending.begin),
            Asked::Flush => self.oracle.flush_end(pending.begin, false),
            Asked::Write | Asked::Zero | Asked::Trim => {
                self.oracle.write_end(pending.value, pending.begin, Outcome::Maybe);
            }
        }
        if self.read_only {
            let right = match pending.asked {
                // Its one source may give an error: no other may answer where the copies differ.
                Asked::Read => {
                    error == RequestError::Io && self.plan.faults.has(FaultKind::ReadError)
                        || self.is_unsynced()
                }
                Asked::Flush => false,
                _ => error == RequestError::ReadOnly,
            };
            if !right {
                let asked = pending.asked;
                return violated("read_only", format!("request {id} ({asked:?}) is answered with: {error}"));
            }
            return Ok(());
        }
        let stopping = self.daemon.as_ref().is_some_and(|daemon| daemon.stopping);
        // Where all disks may be full at once, what writes may find no room; it finds some afterwards.
        let no_room = self.plan.faults.has(FaultKind::FullEverywhere)
            && pending.asked.writes()
            && pending.sent_at <= self.last_full;
        let excused = self.excused || no_room || stopping && error == RequestError::Stopping;
        if self.plan.within_model && !excused {
            let asked = pending.asked;
            return violated(
                "promise_6_never_the_last",
                format!("request {id} ({asked:?}) failed ({error}) while a replica was well"),
            );
        }
        Ok(())
    }

    /// Whether copies may differ somewhere, by the core's word.
    pub(super) fn is_unsynced(&self) -> bool {
        self.daemon.as_ref().is_some_and(|daemon| daemon.mirror.status(self.now).unsynced_bytes > 0)
    }
}
