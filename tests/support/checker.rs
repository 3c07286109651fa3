//! The checker: writes through several connections while the daemon may be killed, remembers what was acknowledged and
//! what was made durable, and says afterwards what of it is not there.
//!
//! ```text
//! send ──► in flight ──reply──► acknowledged ──flush reply, or FUA──► durable
//!             └──connection lost──► in doubt ──first read after──► settled (old or new, per sector, for good)
//! ```
//!
//! What must hold: no two writes in flight share a byte (each connection owns its stripes and waits where its own
//! writes would overlap), so each byte has one legal value, or two while in doubt. Stripe ends fall in the middle
//! of sectors on purpose: neighbours write the two halves of one sector at the same time.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use nbdmirror::units::REGION_BYTES_MIN;

use super::nbd::{Client, Command, FUA, NO_HOLE, Reply};
use super::rng::{Rng, mix};

const SECTOR: u64 = 512;
/// NBD's error of a server that is stopping.
const ESHUTDOWN: u32 = 108;
/// Most requests that one connection keeps in flight.
const DEPTH_MAX: usize = 16;
/// Violations described in full; the rest are counted.
const VIOLATIONS_SHOWN: usize = 8;

/// Why a byte must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
enum Promise {
    /// Never written, or settled after a kill.
    None = 0,
    /// A write was acknowledged.
    Acknowledged = 1,
    /// And flushed, or acknowledged with FUA.
    Durable = 2,
}

/// A write whose reply never came: old or new, per sector.
#[derive(Clone, Debug)]
struct Doubt {
    offset: u64,
    new: Vec<u8>,
}

/// What the volume must hold.
#[derive(Debug)]
struct Model {
    image: Vec<u8>,
    /// For each sector, the strongest promise on any of its bytes.
    promises: Vec<Promise>,
    /// Acknowledged ranges that no flush has covered yet, in order of acknowledgement.
    unflushed: VecDeque<(u64, Range<u64>)>,
    next_acknowledgement: u64,
    in_doubt: Vec<Doubt>,
    /// Start offsets of sectors that a durable write covered whole, newest last.
    durable: Vec<u64>,
    /// Indexes of the smallest regions written since the last [`Checker::forget_touched`], answered or not.
    touched: BTreeSet<u64>,
    /// Requests that a live daemon answered with an error, which must not be.
    refused: Vec<String>,
    counts: Counts,
}

/// What a round of writing did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// Writes and writes of zeroes acknowledged.
    pub(crate) acknowledged: u64,
    /// Of those, with FUA.
    pub(crate) fua: u64,
    /// Flushes answered.
    pub(crate) flushes: u64,
    /// Writes in flight when the connection was lost.
    pub(crate) in_doubt: u64,
}

/// How a round writes.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The part of the volume that is written.
    pub(crate) window: Range<u64>,
    /// Number of connections.
    pub(crate) connections: u64,
    /// Size of each connection's stripes, bytes; the larger, the larger the writes.
    pub(crate) stripe_bytes: u64,
    /// What the round's choices follow from.
    pub(crate) seed: u64,
}

/// The checker of one volume.
#[derive(Debug)]
pub(crate) struct Checker {
    size_bytes: u64,
    model: Mutex<Model>,
}

impl Checker {
    /// A checker of a volume of `size_bytes` that reads as zeroes.
    pub(crate) fn new(size_bytes: u64) -> Self {
        let model = Model {
            image: vec![0; size_bytes as usize],
            promises: vec![Promise::None; size_bytes.div_ceil(SECTOR) as usize],
            unflushed: VecDeque::new(),
            next_acknowledgement: 0,
            in_doubt: Vec::new(),
            durable: Vec::new(),
            touched: BTreeSet::new(),
            refused: Vec::new(),
            counts: Counts::default(),
        };
        Self { size_bytes, model: Mutex::new(model) }
    }

    /// What has happened since the count was begun anew, also while writes go on.
    pub(crate) fn counts(&self) -> Counts {
        self.model.lock().unwrap().counts
    }

    /// Begins the count anew, as `write` does.
    pub(crate) fn count_anew(&self) {
        self.model.lock().unwrap().counts = Counts::default();
    }

    /// Writes until the connections are lost or `stop` is set, in which case what is in flight is finished.
    pub(crate) fn write(&self, socket: &Path, plan: &Plan, stop: &AtomicBool) -> Counts {
        self.count_anew();
        std::thread::scope(|scope| {
            for connection in 0..plan.connections {
                scope.spawn(move || Writer::new(self, plan, connection).run(socket, stop));
            }
        });
        self.counts()
    }

    /// Reads the whole volume and says what is wrong, one line each; writes in doubt are settled by what is read.
    pub(crate) fn verify(&self, socket: &Path) -> Result<(), Vec<String>> {
        let mut violations = std::mem::take(&mut self.model.lock().unwrap().refused);
        let mut clients = [0; 2].map(|_| Client::connect(socket, "").expect("connect to verify"));
        self.settle(&mut clients, &mut violations);
        self.compare(&mut clients[0], &mut violations);
        // What was settled is final: the next round's writes are durable or not on their own.
        self.model.lock().unwrap().unflushed.clear();
        let hidden = violations.len().saturating_sub(VIOLATIONS_SHOWN);
        violations.truncate(VIOLATIONS_SHOWN);
        if hidden > 0 {
            violations.push(format!("and {hidden} more"));
        }
        if violations.is_empty() { Ok(()) } else { Err(violations) }
    }

    /// Decides writes in doubt by reading them, twice, on two connections that must agree.
    fn settle(&self, clients: &mut [Client; 2], violations: &mut Vec<String>) {
        let mut model = self.model.lock().unwrap();
        for doubt in std::mem::take(&mut model.in_doubt) {
            let reads = clients.each_mut().map(|client| client.read(doubt.offset, doubt.new.len()));
            let [Ok(first), Ok(second)] = reads else {
                violations.push(format!("byte {}: read of a write in doubt failed", doubt.offset));
                continue;
            };
            if first != second {
                violations.push(format!("byte {}: two reads of a write in doubt disagree", doubt.offset));
            }
            for part in sectors(doubt.offset, doubt.new.len() as u64) {
                let here = (part.start - doubt.offset) as usize..(part.end - doubt.offset) as usize;
                let at = part.start as usize..part.end as usize;
                if first[here.clone()] == doubt.new[here.clone()] {
                    model.image[at].copy_from_slice(&doubt.new[here]);
                } else if first[here] != model.image[at] {
                    violations.push(format!("byte {}: neither old nor new", part.start));
                }
                // Whichever it is, it stays so from here on.
                let sector = (part.start / SECTOR) as usize;
                model.promises[sector] = model.promises[sector].max(Promise::Acknowledged);
            }
        }
    }

    /// Compares every byte of the volume with what it must be.
    fn compare(&self, client: &mut Client, violations: &mut Vec<String>) {
        const CHUNK: u64 = 1 << 20;
        let model = self.model.lock().unwrap();
        let mut offset = 0;
        while offset < self.size_bytes {
            let len = CHUNK.min(self.size_bytes - offset);
            let expected = &model.image[offset as usize..(offset + len) as usize];
            match client.read(offset, len as usize) {
                Err(error) => violations.push(format!("byte {offset}: read of {len} bytes failed: {error}")),
                Ok(found) if found != expected => {
                    for part in sectors(offset, len) {
                        let here = (part.start - offset) as usize..(part.end - offset) as usize;
                        if found[here.clone()] != expected[here.clone()] {
                            let promise = model.promises[(part.start / SECTOR) as usize];
                            let (found, expected) = (tag(&found[here.clone()]), tag(&expected[here]));
                            violations.push(format!(
                                "byte {}: lost, promise {promise:?}: has {found:016x}, must have {expected:016x}",
                                part.start
                            ));
                        }
                    }
                }
                Ok(_) => {}
            }
            offset += len;
        }
    }

    /// The volume's bytes as they must be.
    pub(crate) fn image(&self) -> Vec<u8> {
        self.model.lock().unwrap().image.clone()
    }

    /// A sector (its first byte) that the newest durable write covers whole and no write in doubt touches.
    pub(crate) fn newest_durable_sector(&self) -> Option<u64> {
        let model = self.model.lock().unwrap();
        let doubtful = |sector: u64| {
            model
                .in_doubt
                .iter()
                .any(|doubt| doubt.offset < sector + SECTOR && sector < doubt.offset + doubt.new.len() as u64)
        };
        model.durable.iter().rev().copied().find(|sector| !doubtful(*sector))
    }

    /// Number of regions of `region_bytes` that were written since [`Checker::forget_touched`].
    pub(crate) fn touched_regions(&self, region_bytes: u64) -> u64 {
        let model = self.model.lock().unwrap();
        let regions: BTreeSet<u64> =
            model.touched.iter().map(|smallest| smallest * REGION_BYTES_MIN / region_bytes).collect();
        regions.len() as u64
    }

    /// Starts counting touched regions anew.
    pub(crate) fn forget_touched(&self) {
        self.model.lock().unwrap().touched.clear();
    }
}

/// The parts of `offset..offset + len` that fall into one sector each.
fn sectors(offset: u64, len: u64) -> impl Iterator<Item = Range<u64>> {
    let end = offset + len;
    (offset / SECTOR..end.div_ceil(SECTOR))
        .map(move |sector| (sector * SECTOR).max(offset)..((sector + 1) * SECTOR).min(end))
}

/// The first eight bytes, to recognise a block by.
fn tag(bytes: &[u8]) -> u64 {
    let mut tag = [0; 8];
    let n = bytes.len().min(8);
    tag[..n].copy_from_slice(&bytes[..n]);
    u64::from_be_bytes(tag)
}

/// Bytes that no other write and no other place has.
pub(crate) fn unique_bytes(key: u64, offset: u64, len: u64) -> Vec<u8> {
    let word = |index: u64| mix(key ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_be_bytes();
    let words = offset / 8..(offset + len).div_ceil(8);
    words.flat_map(word).skip((offset % 8) as usize).take(len as usize).collect()
}

/// What a request in flight will mean when it is answered.
#[derive(Debug)]
enum Pending {
    /// These bytes stand at `offset`.
    Write { offset: u64, new: Vec<u8>, fua: bool },
    /// Writes acknowledged before this number are durable.
    Flush { acknowledged_before: u64 },
}

/// One connection's writing.
struct Writer<'a> {
    checker: &'a Checker,
    plan: &'a Plan,
    connection: u64,
    rng: Rng,
    in_flight: HashMap<u64, Pending>,
    depth: usize,
}

impl<'a> Writer<'a> {
    fn new(checker: &'a Checker, plan: &'a Plan, connection: u64) -> Self {
        let mut rng = Rng::new(plan.seed ^ mix(connection + 1));
        let depth = 1 + rng.below(DEPTH_MAX as u64) as usize;
        Self { checker, plan, connection, rng, in_flight: HashMap::new(), depth }
    }

    fn run(mut self, socket: &Path, stop: &AtomicBool) {
        let Ok(mut client) = Client::connect(socket, "") else { return };
        let lost = self.converse(&mut client, stop).is_err();
        let mut model = self.checker.model.lock().unwrap();
        assert!(lost || self.in_flight.is_empty());
        for pending in self.in_flight.into_values() {
            if let Pending::Write { offset, new, .. } = pending {
                model.in_doubt.push(Doubt { offset, new });
                model.counts.in_doubt += 1;
            }
        }
    }

    fn converse(&mut self, client: &mut Client, stop: &AtomicBool) -> io::Result<()> {
        while !stop.load(Ordering::Relaxed) {
            while self.in_flight.len() < self.depth {
                self.send_one(client)?;
            }
            let reply = client.receive()?;
            self.answered(reply);
        }
        while !self.in_flight.is_empty() {
            let reply = client.receive()?;
            self.answered(reply);
        }
        Ok(())
    }

    /// Sends a write, a write of zeroes or a flush; nothing where the place chosen is being written.
    fn send_one(&mut self, client: &mut Client) -> io::Result<()> {
        if self.rng.chance(4) {
            let acknowledged_before = self.checker.model.lock().unwrap().next_acknowledgement;
            let cookie = client.send(Command::Flush, 0, 0, 0, &[])?;
            self.in_flight.insert(cookie, Pending::Flush { acknowledged_before });
            return Ok(());
        }
        let range = self.choose_range();
        let overlaps = |pending: &Pending| {
            matches!(pending, Pending::Write { offset, new, .. }
                if *offset < range.end && range.start < *offset + new.len() as u64)
        };
        if self.in_flight.values().any(overlaps) {
            return Ok(());
        }
        let (offset, len) = (range.start, range.end - range.start);
        let fua = self.rng.chance(10);
        let flags = if fua { FUA } else { 0 };
        let zeroes = self.rng.chance(8);
        let new = if zeroes { vec![0; len as usize] } else { unique_bytes(self.rng.next(), offset, len) };
        let touched = offset / REGION_BYTES_MIN..range.end.div_ceil(REGION_BYTES_MIN);
        self.checker.model.lock().unwrap().touched.extend(touched);
        // Known as in flight before the first byte is sent: a send cut short may have arrived whole.
        let (command, flags, payload) = match zeroes {
            true => (Command::WriteZeroes, flags | self.rng.pick(&[0, NO_HOLE]), [].as_slice()),
            false => (Command::Write, flags, new.as_slice()),
        };
        match client.send(command, flags, offset, len as u32, payload) {
            Ok(cookie) => {
                self.in_flight.insert(cookie, Pending::Write { offset, new, fua });
                Ok(())
            }
            Err(error) => {
                self.in_flight.insert(u64::MAX, Pending::Write { offset, new, fua });
                Err(error)
            }
        }
    }

    /// A range in one of this connection's stripes: whole blocks, whole sectors or any bytes.
    fn choose_range(&mut self) -> Range<u64> {
        let plan = self.plan;
        let stripes = (plan.window.end - plan.window.start) / plan.stripe_bytes / plan.connections;
        let stripe = self.rng.below(stripes) * plan.connections + self.connection;
        let start = plan.window.start + stripe * plan.stripe_bytes;
        let end = start + plan.stripe_bytes;
        let align = self.rng.pick(&[4096, 4096, 512, 1]);
        let (first, last) = (start.next_multiple_of(align), end / align * align);
        if first >= last {
            return start..end;
        }
        let units = (last - first) / align;
        let offset = self.rng.below(units);
        // Mostly short, sometimes as long as the stripe allows.
        let longest = if self.rng.chance(15) { units } else { units.min((16384 / align).max(1)) };
        let len = 1 + self.rng.below((units - offset).min(longest));
        first + offset * align..first + (offset + len) * align
    }

    fn answered(&mut self, reply: Reply) {
        let pending = self.in_flight.remove(&reply.cookie).expect("the client matches replies");
        let mut model = self.checker.model.lock().unwrap();
        let error = reply.error;
        match pending {
            // Came while the daemon stops: not carried out, so the bytes stay what they were.
            _ if error == ESHUTDOWN => {}
            _ if error != 0 => {
                let what = match pending {
                    Pending::Write { offset, new, .. } => format!("write of {} bytes at {offset}", new.len()),
                    Pending::Flush { .. } => "flush".to_owned(),
                };
                model.refused.push(format!("{what}: answered with error {error}"));
            }
            Pending::Write { offset, new, fua } => model.acknowledged(offset, &new, fua),
            Pending::Flush { acknowledged_before } => model.flushed(acknowledged_before),
        }
    }
}

impl Model {
    fn acknowledged(&mut self, offset: u64, new: &[u8], fua: bool) {
        let range = offset..offset + new.len() as u64;
        self.image[offset as usize..range.end as usize].copy_from_slice(new);
        self.counts.acknowledged += 1;
        if fua {
            self.counts.fua += 1;
            self.promise(&range, Promise::Durable);
        } else {
            self.promise(&range, Promise::Acknowledged);
            self.unflushed.push_back((self.next_acknowledgement, range));
        }
        self.next_acknowledgement += 1;
    }

    fn flushed(&mut self, acknowledged_before: u64) {
        self.counts.flushes += 1;
        while self.unflushed.front().is_some_and(|(number, _)| *number < acknowledged_before) {
            let (_, range) = self.unflushed.pop_front().expect("not empty");
            self.promise(&range, Promise::Durable);
        }
    }

    fn promise(&mut self, range: &Range<u64>, promise: Promise) {
        for part in sectors(range.start, range.end - range.start) {
            self.promises[(part.start / SECTOR) as usize] = promise;
            let whole = part.end - part.start == SECTOR;
            let distinct = self.image[part.start as usize] != 0;
            if promise == Promise::Durable && whole && distinct {
                self.durable.push(part.start);
            }
        }
    }
}
