//! The replicas' devices by slot, and the way of the core's operations to them.
//!
//! What must hold: a device is closed (detached) only when no operation on it is in flight, so a descriptor in an
//! operation is always this device's.
//!
//! A file that was cut short behind our back is no replica any more: a write behind its new end would make it long
//! again, with a hole that reads as zeroes. So its size is looked at before the first operation on it in each turn of
//! the loop, and once it was too short everything on it fails with ENXIO.
//!
//! The kernel does no write to tmpfs without blocking, so io_uring hands each to a worker thread: a wake-up and a
//! context switch for a copy of 4 KiB. On a file in memory small transfers and flushes are therefore done at once,
//! by plain system calls: they never wait for a device.

use nix::errno::Errno;

use super::data_plane::DataPlane;
use super::device::{DeviceKind, ReplicaDevice};
use super::device_io::{DeviceIo, Step, Target};
use super::operation::Operation;
use super::survey::{Question, Surveyor};
use crate::extent::Extent;
use crate::mirror::event::{DeviceOp, DeviceOutput, OpId};
use crate::units::{REPLICAS_MAX, ReplicaOffset, ReplicaSlot};

/// Largest transfer that is done at once on a file in memory, bytes.
const AT_ONCE_BYTES_MAX: u64 = 64 << 10;

/// A device in use.
pub(super) struct Attached {
    pub device: ReplicaDevice,
    surveyor: Surveyor,
    in_flight: u32,
    /// The turn of the loop in which its size was looked at last.
    looked_at: u64,
    /// It was seen shorter than when it was opened.
    cut_short: bool,
    /// A durable write failed in a way that may have lost other writes: every later flush fails. A new life of the
    /// replica, with a copy of what it missed, or a restart is the cure.
    lost_writes: bool,
}

impl Attached {
    fn new(device: ReplicaDevice) -> Self {
        Self {
            device,
            surveyor: Surveyor::default(),
            in_flight: 0,
            looked_at: 0,
            cut_short: false,
            lost_writes: false,
        }
    }

    /// Whether the device is as long as it was when it was opened; looks once a turn.
    fn is_whole(&mut self, turn: u64) -> bool {
        if self.looked_at != turn && self.device.kind == DeviceKind::File {
            self.looked_at = turn;
            self.cut_short |= self.device.is_cut_short();
        }
        !self.cut_short
    }
}

/// The devices in use, by slot.
pub(super) struct Devices {
    slots: [Option<Attached>; REPLICAS_MAX],
}

impl Devices {
    /// These devices in their slots.
    pub(super) fn new(devices: [Option<ReplicaDevice>; REPLICAS_MAX]) -> Self {
        Self { slots: devices.map(|device| device.map(Attached::new)) }
    }

    /// Puts a device into a free slot.
    pub(super) fn attach(&mut self, slot: ReplicaSlot, device: ReplicaDevice) {
        let place = &mut self.slots[slot.index()];
        assert!(place.is_none());
        *place = Some(Attached::new(device));
    }

    /// Closes the device in a slot.
    pub(super) fn detach(&mut self, slot: ReplicaSlot) {
        let Some(attached) = self.slots[slot.index()].take() else {
            unreachable!("the core detaches what is attached")
        };
        assert!(attached.in_flight == 0);
    }

    /// The device in a slot.
    pub(super) fn get(&self, slot: ReplicaSlot) -> Option<&ReplicaDevice> {
        self.slots[slot.index()].as_ref().map(|attached| &attached.device)
    }

    /// The devices, with their slots.
    pub(super) fn iter(&self) -> impl Iterator<Item = (ReplicaSlot, &ReplicaDevice)> {
        ReplicaSlot::all().filter_map(|slot| self.get(slot).map(|device| (slot, device)))
    }

    fn attached(&mut self, slot: ReplicaSlot) -> &mut Attached {
        match &mut self.slots[slot.index()] {
            Some(attached) => attached,
            None => unreachable!("the core uses attached devices only"),
        }
    }
}

impl DataPlane {
    /// Begins an operation of the core.
    pub(super) fn begin_device_op(&mut self, op: OpId, slot: ReplicaSlot, request: DeviceOp) {
        let turn = self.turn;
        let attached = self.devices.attached(slot);
        if !attached.is_whole(turn) {
            self.device_done.push_back((op, Err(Errno::ENXIO)));
            return;
        }
        if attached.lost_writes && matches!(request, DeviceOp::Flush) {
            self.device_done.push_back((op, Err(Errno::EIO)));
            return;
        }
        if let DeviceOp::ProbeHole { offset, len } = request {
            // Asks the filesystem's map, which is in memory as a rule.
            let hole = attached.device.kind == DeviceKind::File && attached.device.is_hole(offset, len);
            self.device_done.push_back((op, Ok(DeviceOutput::Hole(hole))));
            return;
        }
        if let DeviceOp::Allocation { offset, len } = request {
            self.survey(op, slot, offset, len);
            return;
        }
        if matches!(request, DeviceOp::Cache { .. }) && (attached.device.direct || attached.device.in_memory)
        {
            // Past the page cache, or in it already: nothing to warm up.
            self.device_done.push_back((op, Ok(DeviceOutput::Done)));
            return;
        }
        attached.in_flight += 1;
        let target = Target {
            fd: attached.device.raw_fd(),
            io_align: attached.device.traits.io_align,
            keeps_dsync: attached.device.keeps_dsync,
            written_back: !attached.device.direct && !attached.device.in_memory,
        };
        let at_once = attached.device.in_memory;
        let io = DeviceIo::new((op, slot), target, request, &self.zeroes);
        if at_once && io.is_small(AT_ONCE_BYTES_MAX) {
            self.run_device_io(io);
        } else {
            self.ring.start(Operation::Device(io));
        }
    }

    /// Asks where the device has holes, see `survey`.
    fn survey(&mut self, op: OpId, slot: ReplicaSlot, offset: ReplicaOffset, len: u64) {
        let attached = self.devices.attached(slot);
        let all_data = vec![Extent { len, flags: 0 }];
        if attached.device.kind == DeviceKind::BlockDevice {
            self.device_done.push_back((op, Ok(DeviceOutput::Allocation(all_data))));
            return;
        }
        attached.in_flight += 1;
        let question = Question { op, slot, file: attached.device.file(), offset: offset.0, len };
        if let Err(error) = attached.surveyor.ask(question, &self.mailbox) {
            tracing::debug!("no thread to look for holes: {error}");
            self.end_device_op(op, slot, Ok(DeviceOutput::Allocation(all_data)));
        }
    }

    /// A question for holes is answered.
    pub(super) fn surveyed(&mut self, op: OpId, slot: ReplicaSlot, extents: Vec<Extent>) {
        self.end_device_op(op, slot, Ok(DeviceOutput::Allocation(extents)));
        self.feed_device_done();
    }

    fn run_device_io(&mut self, mut io: DeviceIo) {
        loop {
            let result = io.run_now();
            let result = self.believed(&io, result);
            match io.advance(result) {
                Step::Again(rest) => io = rest,
                Step::Ended(op, slot, result) => {
                    self.look_at_clock(); // the core measures latencies
                    return self.end_device_op(op, slot, result);
                }
            }
        }
    }

    /// The ring has done a part of an operation.
    pub(super) fn device_completed(&mut self, io: DeviceIo, result: i32) {
        let result = self.believed(&io, result);
        match io.advance(result) {
            Step::Again(io) => {
                self.ring.start(Operation::Device(io));
            }
            Step::Ended(op, slot, result) => {
                self.end_device_op(op, slot, result);
                self.feed_device_done();
            }
        }
    }

    /// The result as the core may believe it: no flush is good after, or beside, a failure that lost other writes.
    fn believed(&mut self, io: &DeviceIo, result: i32) -> i32 {
        let attached = self.devices.attached(io.slot);
        attached.lost_writes |= io.may_lose_others(result);
        if attached.lost_writes && io.is_flush() && result >= 0 { -(Errno::EIO as i32) } else { result }
    }

    fn end_device_op(&mut self, op: OpId, slot: ReplicaSlot, result: Result<DeviceOutput, Errno>) {
        self.devices.attached(slot).in_flight -= 1;
        self.device_done.push_back((op, result));
    }
}
