//! Messages from other threads: connections, operators' commands, status, and the way to the end.
//!
//! ```text
//! running ──stop──► Draining ──all answered, replies sent (or given up)──► Core ──AdminDone──► Ended
//! ```

use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::oneshot;

use super::client::Client;
use super::data_plane::DataPlane;
use super::device::ReplicaDevice;
use super::handle::{
    AdminAnswer, AdminRequest, Connection, Counted, DeviceStatus, EngineStatus, Message, StopReport,
};
use crate::mirror::event::{AdminCommand, AdminError, AdminId, Candidate, Event};
use crate::units::{Nanos, REPLICAS_MAX, ReplicaSlot, SECOND_NS};

/// How long a stop waits for clients to take their last replies, nanoseconds.
pub(super) const SEND_NS_MAX: u64 = 5 * SECOND_NS;

/// Clients at once, at most; each may hold a little memory beside the budget (see `memory`).
const CONNECTIONS_MAX: usize = 4096;

/// Who waits for the answer to an admin command.
pub(super) struct AdminWaiter {
    answer: oneshot::Sender<AdminAnswer>,
    /// The device offered, until the core takes it.
    candidate: Option<ReplicaDevice>,
}

/// The way to the end.
pub(super) struct Stop {
    waiters: Vec<oneshot::Sender<StopReport>>,
    stage: StopStage,
}

enum StopStage {
    /// Requests are answered and replies sent; the time by which they must be gone, once only replies are left.
    Draining(Option<Nanos>),
    /// The core has been told.
    Core(AdminId),
    Ended(StopReport),
}

impl Stop {
    /// When it has to be looked at again.
    pub(super) fn deadline(&self) -> Option<Nanos> {
        match self.stage {
            StopStage::Draining(deadline) => deadline,
            StopStage::Core(_) | StopStage::Ended(_) => None,
        }
    }

    /// Tells everybody who asked for it.
    pub(super) fn announce(self, report: &StopReport) {
        for waiter in self.waiters {
            let _ = waiter.send(report.clone());
        }
    }
}

impl DataPlane {
    /// Deals with everything in the mailbox.
    pub(super) fn read_mailbox(&mut self) {
        for message in self.mailbox.take() {
            match message {
                Message::Connect(connection, counted) => self.connect(connection, counted),
                Message::Admin(request, answer) => self.admin_request(*request, answer),
                Message::Status(answer) => {
                    let _ = answer.send(self.status());
                }
                Message::Stop(answer) => self.begin_stop(answer),
                Message::Allocation { op, slot, extents } => self.surveyed(op, slot, extents),
            }
        }
    }

    fn connect(&mut self, connection: Connection, counted: Counted) {
        let Connection { fd, session, leftover, peer } = connection;
        if self.clients.len() >= CONNECTIONS_MAX {
            tracing::warn!("{peer}: refused, all {CONNECTIONS_MAX} places for clients are taken");
            return;
        }
        // Replies are sent when they are there (HS-12). Fails on Unix sockets, which do that anyway.
        match setsockopt(&fd, sockopt::TcpNoDelay, &true) {
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOPROTOOPT) => {}
            Err(errno) => tracing::debug!("{peer}: no TCP_NODELAY: {}", errno.desc()),
        }
        let mut client = Client::new(fd, session, peer, counted, self.now);
        client.stopping = self.stop.is_some();
        client.preload(&self.pool, &leftover);
        let key = self.clients.insert(client);
        if let Some(ns_max) = self.client_idle_ns_max {
            self.sweep_within(ns_max);
        }
        self.parse(key, false);
    }

    fn status(&self) -> EngineStatus {
        let mut replicas = [None; REPLICAS_MAX];
        for (slot, device) in self.devices.iter() {
            replicas[slot.index()] = Some(DeviceStatus { direct: device.direct, kind: device.kind });
        }
        EngineStatus {
            open: self.mirror.is_open(),
            volume: self.mirror.status(self.now),
            connections: self.clients.len(),
            memory_bytes: (self.pool.used_bytes() + self.pool.kept_bytes()) as u64,
            replicas,
        }
    }

    fn next_admin_id(&mut self) -> AdminId {
        self.admin_count += 1;
        AdminId(self.admin_count)
    }

    fn admin_request(&mut self, request: AdminRequest, answer: oneshot::Sender<AdminAnswer>) {
        let prepared = match request {
            // Also while it stops: a replica that hangs holds up requests in flight.
            AdminRequest::Fail(slot) => Ok((AdminCommand::Fail(slot), None)),
            _ if self.stop.is_some() => {
                Err(AdminError("the volume is stopping; start it again first".to_owned()))
            }
            AdminRequest::Remove(slot) => Ok((AdminCommand::Remove(slot), None)),
            AdminRequest::Add { device, found, force, fresh_uuid } => {
                self.check_candidate(&device).map(|()| {
                    let path = device.path.display().to_string();
                    let candidate = Candidate { found, traits: device.traits, path, fresh_uuid, force };
                    (AdminCommand::Add(Box::new(candidate)), Some(device))
                })
            }
        };
        match prepared {
            Err(error) => {
                let _ = answer.send(Err(error));
            }
            Ok((command, candidate)) => {
                let id = self.next_admin_id();
                self.admin.insert(id, AdminWaiter { answer, candidate });
                self.feed(Event::Admin { id, command });
            }
        }
    }

    fn check_candidate(&self, candidate: &ReplicaDevice) -> Result<(), AdminError> {
        let same = |(_, device): &(ReplicaSlot, &ReplicaDevice)| device.identity() == candidate.identity();
        match self.devices.iter().find(same) {
            None => Ok(()),
            Some((slot, _)) => {
                let path = candidate.path.display();
                Err(AdminError(format!("{path} is the volume's replica {slot} already; nothing to do")))
            }
        }
    }

    /// The core has taken a candidate in.
    pub(super) fn attach(&mut self, id: AdminId, slot: ReplicaSlot) {
        let Some(device) = self.admin.get_mut(&id).and_then(|waiter| waiter.candidate.take()) else {
            unreachable!("the core attaches a candidate once, before it answers")
        };
        self.devices.attach(slot, device);
    }

    /// The core has answered; a candidate that it did not take is closed.
    pub(super) fn admin_done(&mut self, id: AdminId, result: AdminAnswer) {
        if let Some(stop) = &mut self.stop
            && matches!(stop.stage, StopStage::Core(stop_id) if stop_id == id)
        {
            let clean = result.is_ok();
            let message = result.unwrap_or_else(|error| error.0);
            stop.stage = StopStage::Ended(StopReport { clean, message });
            return;
        }
        let Some(waiter) = self.admin.remove(&id) else { unreachable!("the core answers each command once") };
        // Whoever asked may have left.
        let _ = waiter.answer.send(result);
    }

    fn begin_stop(&mut self, waiter: oneshot::Sender<StopReport>) {
        if let Some(stop) = &mut self.stop {
            stop.waiters.push(waiter);
            return;
        }
        self.stop = Some(Stop { waiters: vec![waiter], stage: StopStage::Draining(None) });
        // What is in flight is answered; what comes now is refused, until the end (NT-03).
        for key in self.clients.keys() {
            if let Some(client) = self.clients.get_mut(key) {
                client.stopping = true;
                client.in_line = false;
            }
            self.touch(key);
        }
    }

    /// Goes on with a stop where it can; the report when it has come to its end.
    pub(super) fn stop_step(&mut self) -> Option<StopReport> {
        // A request that is still coming is not waited for: it would be refused.
        let drained = self.clients.iter().all(|client| client.outgoing.is_empty() && !client.sending);
        let Self { stop, requests, now, .. } = self;
        let stop = stop.as_mut()?;
        if let StopStage::Draining(deadline) = &mut stop.stage
            && requests.len() == 0
        {
            let deadline = *deadline.get_or_insert(now.plus(SEND_NS_MAX));
            if drained || deadline <= *now {
                let id = self.next_admin_id();
                if let Some(stop) = &mut self.stop {
                    stop.stage = StopStage::Core(id);
                }
                self.feed(Event::Admin { id, command: AdminCommand::Stop });
            }
        }
        match &self.stop.as_ref()?.stage {
            StopStage::Ended(report) => Some(report.clone()),
            StopStage::Draining(_) | StopStage::Core(_) => None,
        }
    }
}
