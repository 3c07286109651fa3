//! Creating replicas in memory, reading them back, and every way in which their metadata can be damaged.

use std::io;

use super::*;
use crate::format::assemble::assemble;
use crate::format::create::{CreateError, Created, NewReplica, NewVolume, new_volume};
use crate::format::read::{READ_BYTES_MAX, ReadError, read_found};
use crate::units::ReplicaOffset;

const DEVICE_BYTES: u64 = (64 << 20) + 40960;

fn params() -> NewVolume {
    let replica = |n: u128| NewReplica {
        uuid: Uuid::from_u128(100 + n),
        path: format!("disk{n}.img"),
        device_bytes: DEVICE_BYTES,
    };
    NewVolume {
        name: "vol".to_owned(),
        regions: REGIONS,
        now_unix_ns: 1_772_323_199_123_456_789,
        volume_uuid: Uuid::from_u128(1),
        generation: Uuid::from_u128(2),
        replicas: vec![replica(0), replica(1)],
        in_sync: true,
    }
}

fn device(created: &Created, index: usize) -> Vec<u8> {
    let mut device = vec![0; created.superblocks[index].device_bytes as usize];
    put(&mut device, created, index);
    device
}

fn put(device: &mut [u8], created: &Created, index: usize) {
    for (offset, bytes) in created.writes(index) {
        device[offset.0 as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
}

fn read(device: &[u8]) -> Result<Option<Found>, ReadError> {
    read_failing(device, &[])
}

/// Reads that touch a byte of `bad` fail.
fn read_failing(device: &[u8], bad: &[u64]) -> Result<Option<Found>, ReadError> {
    read_found("disk", device.len() as u64, &mut |offset: ReplicaOffset, buffer: &mut [u8]| {
        let range = offset.0..offset.0 + buffer.len() as u64;
        assert!(buffer.len() as u64 <= READ_BYTES_MAX);
        if bad.iter().any(|bad| range.contains(bad)) {
            return Err(io::Error::other("bad sector"));
        }
        buffer.copy_from_slice(&device[range.start as usize..range.end as usize]);
        Ok(())
    })
}

fn slot_bytes(device: &mut [u8], slot: usize) -> &mut [u8] {
    let at = device.len() - (2 - slot) * 4096;
    &mut device[at..at + 4096]
}

fn one(start: usize, end: usize) -> std::ops::Range<usize> {
    start..end
}

fn good() -> Vec<u8> {
    device(&new_volume(params()).unwrap(), 0)
}

#[test]
fn a_new_volume_reads_back_and_assembles() {
    let created = new_volume(params()).unwrap();
    let found: Vec<Found> = (0..2).map(|index| read(&device(&created, index)).unwrap().unwrap()).collect();
    for (found, superblock) in found.iter().zip(&created.superblocks) {
        assert_eq!(&found.superblock, superblock);
        assert_eq!((found.damaged_slot, found.damaged_sectors), (None, 0));
    }
    let assembly = assemble(&found, STRICT).unwrap();
    assert_eq!(assembly.in_sync.len(), 2);
    assert!(assembly.warnings.is_empty());
}

#[test]
fn a_new_volume_that_is_not_in_sync_copies_the_first_replica() {
    let created = new_volume(NewVolume { in_sync: false, ..params() }).unwrap();
    let found: Vec<Found> = (0..2).map(|index| read(&device(&created, index)).unwrap().unwrap()).collect();
    let assembly = assemble(&found, STRICT).unwrap();
    assert_eq!(assembly.source, slot(0));
    assert!(assembly.resync.contains(slot(1)) && assembly.maps.stale[1].all());
}

#[test]
fn large_bitmaps_are_written_and_read_in_pieces() {
    // 2^20 regions: 293 pages, more than one piece of 256. Only the metadata's end of the device is kept.
    let regions = Regions { volume_bytes: 64 << 30, region_bytes: 64 << 10 };
    let mut params = NewVolume { regions, in_sync: false, ..params() };
    let device_bytes = Layout::device_bytes_min(regions);
    params.replicas.iter_mut().for_each(|replica| replica.device_bytes = device_bytes);
    let created = new_volume(params).unwrap();
    let start = regions.volume_bytes;
    let mut end = vec![0; (device_bytes - start) as usize];
    let mut pieces = 0;
    for (offset, bytes) in created.writes(1) {
        assert!(bytes.len() <= 1 << 20);
        end[(offset.0 - start) as usize..][..bytes.len()].copy_from_slice(&bytes);
        pieces += 1;
    }
    assert_eq!(pieces, 2 + 2);
    let found = read_found("disk", device_bytes, &mut |offset, buffer| {
        buffer.copy_from_slice(&end[(offset.0 - start) as usize..][..buffer.len()]);
        Ok(())
    });
    assert!(found.unwrap().unwrap().maps == created.maps);
}

#[test]
fn a_volume_that_cannot_be_is_not_created() {
    let with = |change: fn(&mut NewVolume)| {
        let mut params = params();
        change(&mut params);
        new_volume(params).unwrap_err()
    };
    assert!(matches!(with(|p| p.name = String::new()), CreateError::Name(_)));
    assert!(matches!(with(|p| p.name = "a\nb".to_owned()), CreateError::Name(_)));
    assert_eq!(with(|p| p.regions.volume_bytes += 512), CreateError::VolumeBytes(65_536_512));
    assert_eq!(with(|p| p.regions.region_bytes = 4096), CreateError::RegionBytes(4096));
    assert_eq!(with(|p| p.replicas.clear()), CreateError::Replicas(0));
    assert!(matches!(with(|p| p.replicas[1].device_bytes = 4096), CreateError::TooSmall { .. }));
}

#[test]
fn a_device_without_a_volume_is_blank() {
    assert!(read(&vec![0; 1 << 20]).unwrap().is_none());
    assert!(read(&vec![0x5a; 1 << 20]).unwrap().is_none());
    assert!(read(&[]).unwrap().is_none());
    assert!(read(&vec![0; 5000]).unwrap().is_none());
}

#[test]
fn one_damaged_superblock_is_survived_and_told() {
    for slot in 0..2 {
        let mut torn = good();
        slot_bytes(&mut torn, slot)[512..].fill(0);
        let mut blank = good();
        slot_bytes(&mut blank, slot).fill(0);
        let mut swapped = good();
        let other = slot_bytes(&mut swapped, 1 - slot).to_vec();
        slot_bytes(&mut swapped, slot).copy_from_slice(&other);
        let mut magic_rotted = good();
        slot_bytes(&mut magic_rotted, slot)[3] ^= 1;
        let cases = [(torn, true), (blank, false), (swapped, true), (magic_rotted, true)];
        for (device, newer_may_be_lost) in cases {
            let found = read(&device).unwrap().unwrap();
            assert_eq!(found.damaged_slot, Some(slot as u64));
            assert_eq!(found.newer_may_be_lost, newer_may_be_lost);
            assert_eq!(found.superblock.event_count, 1 + slot as u64);
        }
        let device = good();
        let bad = (device.len() - (2 - slot) * 4096) as u64;
        assert_eq!(read_failing(&device, &[bad]).unwrap().unwrap().damaged_slot, Some(slot as u64));
    }
}

#[test]
fn two_damaged_superblocks_are_an_error_and_never_a_blank_device() {
    let mut device = good();
    slot_bytes(&mut device, 0)[100] ^= 1;
    let mut half_blank = device.clone();
    slot_bytes(&mut half_blank, 1).fill(0);
    slot_bytes(&mut device, 1)[4000] ^= 1;
    for device in [device, half_blank] {
        let error = read(&device).unwrap_err();
        assert!(matches!(error, ReadError::Damaged { .. }));
        assert!(error.to_string().contains("both superblocks are damaged"), "{error}");
    }
    let end = good().len() as u64;
    assert!(matches!(read_failing(&good(), &[end - 1, end - 5000]), Err(ReadError::Io { .. })));
    // A blank slot beside one that cannot be read is not a blank device.
    assert!(matches!(read_failing(&vec![0; 1 << 20], &[(1 << 20) - 1]), Err(ReadError::Io { .. })));
}

#[test]
fn a_newer_version_in_either_slot_is_an_error() {
    for slot in 0..2 {
        let mut device = good();
        let bytes = slot_bytes(&mut device, slot);
        bytes[8] = 9;
        bytes[16..20].fill(0);
        let crc = crc32fast::hash(bytes);
        bytes[16..20].copy_from_slice(&crc.to_le_bytes());
        let error = read(&device).unwrap_err();
        assert!(error.to_string().contains("format version 9"), "{error}");
    }
}

#[test]
fn a_device_of_another_size_is_an_error() {
    let device = good();
    let grown = [vec![0; 4096], device].concat();
    let error = read(&grown).unwrap_err();
    assert!(matches!(error, ReadError::SizeChanged { .. }), "{error}");
}

#[test]
fn two_volumes_in_two_slots_are_an_error() {
    let mut device = good();
    let mut other = good();
    put(&mut other, &new_volume(NewVolume { volume_uuid: Uuid::from_u128(9), ..params() }).unwrap(), 0);
    slot_bytes(&mut device, 1).copy_from_slice(slot_bytes(&mut other, 1));
    assert!(matches!(read(&device), Err(ReadError::Mixed { .. })));
}

#[test]
fn the_leftover_of_an_earlier_membership_counts_as_damage() {
    // Removed from slot 0, taken in again as slot 1: a crash after the first of the two slots was written.
    let created = new_volume(params()).unwrap();
    let mut device = device(&created, 0);
    let mut newer = created.superblocks[1].clone();
    newer.event_count = 9;
    slot_bytes(&mut device, 1).copy_from_slice(&newer.encode());
    let found = read(&device).unwrap().unwrap();
    assert_eq!((found.superblock, found.damaged_slot), (newer, Some(0)));
}

#[test]
fn a_damaged_or_unreadable_bitmap_sector_reads_as_all_bits_set() {
    let created = new_volume(params()).unwrap();
    let layout = Layout { regions: REGIONS, device_bytes: DEVICE_BYTES };
    let page = layout.page_offset(0).0;
    let mut device = device(&created, 0);
    device[page as usize + 512 + 100] ^= 4;
    let found = read(&device).unwrap().unwrap();
    assert_eq!(found.maps.intent.count_ones(), 448);
    assert_eq!((found.damaged_sectors, found.damaged_regions), (1, vec![one(448, 896)]));
    // 1000 regions stand on one page: where that cannot be read, nothing can.
    assert!(matches!(read_failing(&device, &[page]), Err(ReadError::Io { what: "bitmaps", .. })));
}

#[test]
fn an_unreadable_page_costs_itself_and_no_other() {
    let regions = Regions { volume_bytes: 10_000 * (64 << 10), region_bytes: 64 << 10 };
    let device_bytes = Layout::device_bytes_min(regions);
    let mut params = NewVolume { regions, ..params() };
    params.replicas.iter_mut().for_each(|replica| replica.device_bytes = device_bytes);
    let created = new_volume(params).unwrap();
    let start = regions.volume_bytes;
    let mut end = vec![0; (device_bytes - start) as usize];
    for (offset, bytes) in created.writes(0) {
        end[(offset.0 - start) as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    let found = read_found("disk", device_bytes, &mut |offset, buffer| {
        let at = (offset.0 - start) as usize;
        if (at..at + buffer.len()).contains(&5000) {
            return Err(io::Error::other("bad sector"));
        }
        buffer.copy_from_slice(&end[at..][..buffer.len()]);
        Ok(())
    });
    let found = found.unwrap().unwrap();
    assert_eq!(found.maps.intent.count_ones(), 3584);
    assert_eq!((found.damaged_sectors, found.damaged_regions), (8, vec![one(3584, 7168)]));
}
