//! Assembly from arbitrary replicas: a volume with a history of commits, spoilt, with checksums that are right.
//!
//! What must hold:
//! - A replica that one with the newest commit records as not in sync, or whose misses a trusted replica has in its
//!   stale map, is never a source (but by `--force`, which is said).
//! - Intent and stale bits of trusted replicas are never dropped, and what is dirty is stale on whoever is behind.
//! - The roles are those of the head's members, each once; the source is in sync.
//! - A refusal names a replica by its path. `--degraded` and `--force` change nothing where they are not needed, and
//!   the order in which replicas are named changes nothing.
//! - What was assembled opens: the core's own invariants hold over it.

use nbdmirror::buffer::BufferPool;
use nbdmirror::extent::Extent;
use nbdmirror::format::assemble::{AssembleOptions, Readmit, assemble, readmit};
use nbdmirror::format::bitmap::{Bitmap, RegionMaps};
use nbdmirror::format::create::{Created, NewReplica, NewVolume, new_volume};
use nbdmirror::format::describe::{printable, shell_word};
use nbdmirror::format::layout::Layout;
use nbdmirror::format::superblock::{EVENT_COUNT_MAX, Member, MemberState, PARENTS_MAX, Superblock};
use nbdmirror::format::{Assembly, Found};
use nbdmirror::mirror::event::{Action, DeviceOp, DeviceOutput, DeviceTraits, Event};
use nbdmirror::mirror::{Mirror, MirrorConfig};
use nbdmirror::units::{Nanos, REPLICAS_MAX, Regions, ReplicaSet, ReplicaSlot};
use uuid::Uuid;

use super::input::Input;
use super::volume::{Stand, previous, seal_superblock, set_some, some_state, some_uuid};

/// Device operations that are carried out while an assembly is opened.
const OPENING_OPS_MAX: usize = 100;

pub fn run(data: &[u8]) {
    super::plant_bug();
    let mut input = Input::new(data);
    let options =
        AssembleOptions { degraded: !input.one_in(3), force: input.one_in(3), read_only: input.one_in(4) };
    let found = found(&mut input);
    let result = assemble(&found, options);
    for candidate in &found {
        check_readmit(&found[0], candidate);
    }
    match &result {
        Ok(assembly) => {
            check_roles(assembly, &found);
            check_sources(assembly, &found);
            check_maps(assembly, &found);
            check_options(assembly, &found, options);
            opens(assembly.clone(), &found, options.read_only);
        }
        Err(error) => {
            let text = error.to_string();
            let named = |found: &Found| {
                text.contains(&printable(&found.path)) || text.contains(&shell_word(&found.path))
            };
            assert!(found.is_empty() || found.iter().any(named), "no replica is named: {text}");
        }
    }
    let mut turned = found;
    turned.reverse();
    let other = assemble(&turned, options);
    assert_eq!(result.is_ok(), other.is_ok(), "the order of replicas decides");
    if let (Ok(one), Ok(other)) = (result, other) {
        assert!(one.maps == other.maps && one.unsynced == other.unsynced, "the order of replicas decides");
        assert_eq!(sets(&one), sets(&other), "the order of replicas decides");
    }
}

fn sets(assembly: &Assembly) -> ([ReplicaSet; 4], ReplicaSlot, bool) {
    let sets = [assembly.in_sync, assembly.resync, assembly.missing, assembly.laggards];
    (sets, assembly.source, assembly.forced)
}

/// What stands on one replica while its history is made.
struct Side {
    superblock: Superblock,
    before: Superblock,
    maps: RegionMaps,
}

/// One to four replicas with a history.
fn found(input: &mut Input<'_>) -> Vec<Found> {
    let count = 1 + input.index(4);
    let created = created(count);
    let mut sides: Vec<Side> = created
        .superblocks
        .iter()
        .map(|superblock| Side {
            superblock: superblock.clone(),
            before: previous(superblock),
            maps: created.maps.clone(),
        })
        .collect();
    let spoils = input.one_in(2);
    for _ in 0..input.index(12) {
        if spoils && input.one_in(2) {
            spoil(input, &mut sides);
        } else {
            commit(input, &mut sides);
        }
    }
    let left_out = input.u8();
    let mut found = Vec::new();
    for (index, side) in sides.iter().enumerate() {
        let path = ["/dev/sda", "b disk.img", "--force", "/c\u{7}/x'y"][index % 4];
        let mut stand = Stand::new(path, &side.superblock, &side.before, &side.maps);
        if spoils && input.one_in(4) {
            damage(input, &mut stand);
        }
        let here = left_out & 0x80 == 0 || left_out & (1 << index) == 0;
        found.extend(stand.find().ok().flatten().filter(|_| here));
    }
    found
}

fn created(count: usize) -> Created {
    let regions = Regions { volume_bytes: (12 << 16) + 4096, region_bytes: 64 << 10 };
    let replica = |index| NewReplica {
        uuid: Uuid::from_u128(100 + index as u128),
        path: format!("/old/{index}"),
        device_bytes: Layout::device_bytes_min(regions) + 4096 * index as u64,
    };
    let volume = NewVolume {
        name: "a volume".to_owned(),
        regions,
        now_unix_ns: 1,
        volume_uuid: Uuid::from_u128(1),
        generation: Uuid::from_u128(2),
        replicas: (0..count).map(replica).collect(),
        in_sync: true,
    };
    new_volume(volume).expect("a valid volume")
}

/// One commit as the core makes them: some replicas take part, the others are recorded as not; a crash may fall
/// before the last of them has it.
fn commit(input: &mut Input<'_>, sides: &mut [Side]) {
    let leader = input.index(sides.len());
    let takes_part = input.u8();
    let crash_before = if input.one_in(4) { input.index(sides.len()) } else { usize::MAX };
    let mut head = sides[leader].superblock.clone();
    let mut maps = sides[leader].maps.clone();
    head.event_count = (head.event_count + 1).min(EVENT_COUNT_MAX - 10);
    head.clean = input.one_in(3);
    let mut shrunk = false;
    for slot in 0..sides.len() {
        let part = slot == leader || takes_part & (1 << slot) != 0;
        let Some(member) = &mut head.members[slot] else { continue };
        if part {
            member.event_count = head.event_count;
            if member.state != MemberState::InSync && input.one_in(2) {
                member.state = MemberState::InSync;
                maps.stale[slot].fill(false);
            }
        } else {
            shrunk |= member.state == MemberState::InSync;
            if member.state != MemberState::Faulty {
                member.state = input.pick(&[MemberState::Stale, MemberState::Faulty, MemberState::Resyncing]);
            }
        }
    }
    if shrunk {
        head.parents.insert(0, head.generation);
        head.parents.truncate(PARENTS_MAX);
        head.generation = Uuid::from_u128(input.u128() | 1 << 100);
    }
    for _ in 0..input.index(3) {
        set_some(input, &mut maps);
    }
    for (slot, side) in sides.iter_mut().enumerate() {
        let part = slot == leader || takes_part & (1 << slot) != 0;
        if part && slot < crash_before && head.members[slot].is_some() {
            let own = Superblock {
                slot: side.superblock.slot,
                device_bytes: side.superblock.device_bytes,
                ..head.clone()
            };
            side.before = std::mem::replace(&mut side.superblock, own);
            side.maps = maps.clone();
        }
    }
}

/// One field of one replica's metadata becomes something else that is valid by itself.
fn spoil(input: &mut Input<'_>, sides: &mut [Side]) {
    let other = input.index(sides.len());
    let (generation, parents) = (sides[other].superblock.generation, sides[other].superblock.parents.clone());
    let at = input.index(sides.len());
    let side = &mut sides[at];
    let superblock = &mut side.superblock;
    let slot = input.index(REPLICAS_MAX);
    match input.u8() % 12 {
        0 => {
            let near = superblock.event_count;
            superblock.event_count = input.number(near).min(EVENT_COUNT_MAX - 10);
        }
        1 => superblock.clean = !superblock.clean,
        2 => superblock.generation = some_uuid(input),
        3 => superblock.generation = generation,
        4 => superblock.parents.insert(0, generation),
        5 => superblock.parents = parents,
        6 => superblock.parents = (0..input.index(PARENTS_MAX + 1)).map(|_| some_uuid(input)).collect(),
        7 => {
            let member = Member {
                uuid: Uuid::from_u128(100 + u128::from(input.u8() % 8)),
                state: some_state(input),
                event_count: superblock.event_count,
                path: "/new/path".to_owned(),
            };
            superblock.members[slot] = (!input.one_in(4)).then_some(member);
        }
        8 => superblock.slot = ReplicaSlot::new(slot),
        9 => superblock.volume_uuid = some_uuid(input),
        10 => {
            let near = superblock.event_count;
            if let Some(member) = &mut superblock.members[slot % 4] {
                member.state = some_state(input);
                member.event_count = input.number(near).min(EVENT_COUNT_MAX - 10);
            }
        }
        _ => set_some(input, &mut side.maps),
    }
    // Only what decodes goes on; a slot follows from the count.
    let valid = Superblock::decode(&side.superblock.encode()).is_ok();
    if !valid {
        side.superblock = side.before.clone();
    }
    let counted = |count: u64| count.saturating_sub(1);
    side.before = Superblock { event_count: counted(side.superblock.event_count), ..side.superblock.clone() };
}

fn damage(input: &mut Input<'_>, stand: &mut Stand) {
    match input.u8() % 3 {
        0 => stand.slots[input.index(2)][77] ^= 1,
        1 => stand.pages[input.index(512)] ^= 1,
        _ => {
            // A read-only compatible feature that is not known.
            for slot in &mut stand.slots {
                slot[32] |= 1;
                seal_superblock(slot);
            }
        }
    }
}

fn of_slot<'f>(assembly: &Assembly, found: &'f [Found], slot: ReplicaSlot) -> Option<&'f Found> {
    assembly.found_of_slot[slot.index()].map(|index| &found[index])
}

fn subset(part: &Bitmap, whole: &Bitmap) -> bool {
    part.iter_ones().all(|bit| whole[bit])
}

fn check_roles(assembly: &Assembly, found: &[Found]) {
    for found in found {
        let generation = found.superblock.generation;
        let known = generation == assembly.head.generation || assembly.head.parents.contains(&generation);
        assert!(known, "{} went on by itself and is taken in", found.path);
    }
    let members: ReplicaSet = assembly.head.members().map(|(slot, _)| slot).collect();
    let roles = [assembly.in_sync, assembly.resync, assembly.missing];
    assert_eq!(roles.iter().map(|role| role.len()).sum::<usize>(), members.len(), "a role twice, or none");
    assert_eq!(roles[0].union(roles[1]).union(roles[2]), members);
    assert!(assembly.in_sync.contains(assembly.source), "the source is not in sync");
    for slot in ReplicaSlot::all() {
        let here = of_slot(assembly, found, slot);
        assert_eq!(here.is_some(), assembly.in_sync.union(assembly.resync).contains(slot));
        if let Some(found) = here {
            let own = found.superblock.own_entry().expect("checked when decoded").uuid;
            assert_eq!(found.superblock.slot, slot);
            assert_eq!(assembly.head.members[slot.index()].as_ref().map(|member| member.uuid), Some(own));
            assert_eq!(found.superblock.volume_uuid, assembly.head.volume_uuid, "volumes are mixed");
        }
    }
}

/// Nobody in sync is recorded as behind by anyone found who is not older.
fn check_sources(assembly: &Assembly, found: &[Found]) {
    if assembly.forced {
        assert!(assembly.in_sync.len() == 1 && assembly.laggards.is_empty());
        return;
    }
    for slot in assembly.in_sync.iter() {
        let source = of_slot(assembly, found, slot).expect("it was found");
        let uuid = source.superblock.own_entry().map(|own| own.uuid);
        for other in found {
            // Who has the newest commit: older accounts may come from before the replica joined.
            let newest = other.superblock.event_count == assembly.head.event_count
                && other.superblock.generation == assembly.head.generation;
            let entry =
                other.superblock.members[slot.index()].as_ref().filter(|entry| Some(entry.uuid) == uuid);
            if newest {
                let entry = entry.expect("a source is a member by the newest account");
                assert_eq!(
                    entry.state,
                    MemberState::InSync,
                    "{slot} is behind by the account of {}",
                    other.path
                );
                // A crash may fall between two replicas' writes of one commit, and between no more.
                assert!(source.superblock.event_count + 1 >= entry.event_count, "{slot} is an old copy");
            }
        }
        for witness in assembly.in_sync.iter().filter_map(|slot| of_slot(assembly, found, slot)) {
            let damaged = |bit: &usize| witness.damaged_regions.iter().any(|range| range.contains(bit));
            let accused = witness.maps.stale[slot.index()].iter_ones().find(|bit| !damaged(bit));
            assert_eq!(accused, None, "replica {slot} missed a write by the bitmap of {}", witness.path);
        }
    }
}

fn check_maps(assembly: &Assembly, found: &[Found]) {
    let maps = &assembly.maps;
    assert_eq!(maps.regions() as u64, assembly.head.regions.count());
    for slot in assembly.in_sync.iter() {
        let trusted = of_slot(assembly, found, slot).expect("it was found");
        assert!(subset(&trusted.maps.intent, &maps.intent), "an intent bit of replica {slot} is dropped");
        for behind in assembly.resync.union(assembly.missing).iter() {
            let stale = &maps.stale[behind.index()];
            assert!(
                subset(&trusted.maps.stale[behind.index()], stale),
                "a stale bit for {behind} is dropped"
            );
        }
    }
    for slot in assembly.resync.union(assembly.missing).iter() {
        assert!(subset(&maps.intent, &maps.stale[slot.index()]), "a dirty region is not stale on {slot}");
        if let Some(found) = of_slot(assembly, found, slot) {
            assert!(
                subset(&found.maps.intent, &maps.stale[slot.index()]),
                "what {slot} had in flight is dropped"
            );
        }
    }
    for slot in assembly.in_sync.iter() {
        assert!(maps.stale[slot.index()].not_any());
    }
    let may_differ = assembly.in_sync.len() >= 2 && !assembly.head.clean;
    assert!(if may_differ { assembly.unsynced == maps.intent } else { assembly.unsynced.not_any() });
}

fn check_options(assembly: &Assembly, found: &[Found], options: AssembleOptions) {
    assert!(options.degraded || assembly.missing.is_empty(), "degraded, and not allowed");
    assert!(options.force || !assembly.forced, "forced, and not allowed");
    assert!(options.read_only || found.iter().all(|found| found.read_only_features == 0));
    let narrow = AssembleOptions {
        degraded: !assembly.missing.is_empty(),
        force: assembly.forced,
        read_only: found.iter().any(|found| found.read_only_features != 0),
    };
    let again = assemble(found, narrow).expect("no option that is not needed is needed");
    assert!(sets(&again) == sets(assembly) && again.maps == assembly.maps);
}

fn check_readmit(head: &Found, candidate: &Found) {
    let foreign = candidate.superblock.volume_uuid != head.superblock.volume_uuid;
    match readmit(&head.superblock, candidate) {
        Readmit::Foreign { .. } => assert!(foreign),
        Readmit::Diverged { description } => {
            assert!(!foreign && description.contains(&printable(&candidate.path)), "{description}");
        }
        Readmit::Member { slot, .. } => {
            let uuid =
                |superblock: &Superblock| superblock.members[slot.index()].as_ref().map(|member| member.uuid);
            assert!(!foreign && uuid(&head.superblock) == uuid(&candidate.superblock));
        }
        Readmit::NewMember => assert!(!foreign),
    }
}

/// The core starts from it, over devices that do all they are asked to.
fn opens(assembly: Assembly, found: &[Found], read_only: bool) {
    let mut traits = [None; REPLICAS_MAX];
    for (traits, found_at) in traits.iter_mut().zip(assembly.found_of_slot) {
        let device_bytes = found_at.map(|index| found[index].device_bytes);
        *traits = device_bytes.map(|device_bytes| DeviceTraits {
            device_bytes,
            io_align: 512,
            cheap_zero: true,
            cheap_allocated_zero: false,
        });
    }
    let config = MirrorConfig {
        read_only,
        write_mostly: ReplicaSet::EMPTY,
        traits,
        entropy: 5,
        wall_clock_origin_ns: 0,
        intent_idle_ns: 1_000_000_000,
        resync_jobs_max: 1,
        resync_burst_ns: 16_000_000,
        without_intent: false,
    };
    let mut mirror = Mirror::new(config, assembly, BufferPool::new(1 << 20));
    let mut actions = Vec::new();
    mirror.handle(Nanos(1), Event::Tick, &mut actions);
    mirror.check_invariants();
    for done in 0..OPENING_OPS_MAX {
        if mirror.is_open() {
            return;
        }
        let Some(at) = actions.iter().position(|action| matches!(action, Action::Device { .. })) else {
            break;
        };
        let Action::Device { op, request, .. } = actions.swap_remove(at) else { break };
        let output = match request {
            DeviceOp::Read { mut buffer, len, .. } => {
                buffer[..len as usize].fill(0);
                DeviceOutput::Read(buffer)
            }
            DeviceOp::ProbeHole { .. } => DeviceOutput::Hole(false),
            DeviceOp::Allocation { len, .. } => DeviceOutput::Allocation(vec![Extent { len, flags: 0 }]),
            DeviceOp::Write { .. } | DeviceOp::Zero { .. } | DeviceOp::Flush | DeviceOp::Cache { .. } => {
                DeviceOutput::Done
            }
        };
        mirror.handle(Nanos(2 + done as u64), Event::DeviceDone { op, result: Ok(output) }, &mut actions);
        mirror.check_invariants();
    }
    assert!(mirror.is_open(), "it does not open");
}
