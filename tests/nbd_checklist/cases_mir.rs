//! MIR: overlapping requests on two replicas. Which of them wins is open; that all readers see the same is not. Reads
//! are repeated, so that both replicas are asked, and the replicas are compared when the section is over.

use super::ground::{Ground, pattern};
use super::link::{Link, Mode, cmd, flag};
use crate::support::rng::Rng;

cases! {
    mir_01_overlapping_writes_on_one_connection,
    mir_02_overlapping_writes_on_four_connections,
    mir_03_overlapping_writes_zeroes_and_trims,
    mir_04_reads_that_race_a_write,
}

const AREA: u64 = 65_536;
const SECTOR: usize = 512;

/// Reads the area several times on several connections; what all agree on.
fn agreed(ground: &Ground, links: &mut [Link], offset: u64) -> Vec<u8> {
    let first = links[0].read(offset, AREA);
    for round in 0..6 {
        for link in &mut *links {
            assert!(link.read(offset, AREA) == first, "reads do not agree (round {round})");
        }
    }
    assert!(ground.link().read(offset, AREA) == first, "reads do not agree");
    first
}

/// A round of overlapping WRITEs, spread over the connections; each sector is that of one write.
fn writes(ground: &Ground, links: &mut [Link], rng: &mut Rng) {
    let offset = ground.written(1, AREA);
    let mut sent = Vec::new();
    for index in 0..24 {
        let from = rng.below(64) * SECTOR as u64;
        let len = (1 + rng.below(64)) * SECTOR as u64;
        let fill = 2 * index as u8 + 2;
        let link = &mut links[index % links.len()];
        link.send_write(0, offset + from, &vec![fill; len as usize]);
        sent.push((from as usize, (from + len) as usize, fill));
    }
    for link in &mut *links {
        assert!(link.receive_all().values().all(|reply| reply.error == 0));
    }
    let base = pattern(1, offset, AREA);
    let data = agreed(ground, links, offset);
    for at in (0..AREA as usize).step_by(SECTOR) {
        let sector = &data[at..at + SECTOR];
        let mut over = sent.iter().filter(|(from, to, _)| (*from..*to).contains(&at)).peekable();
        let untouched = over.peek().is_none();
        let is_one = over.any(|(_, _, fill)| sector.iter().all(|byte| byte == fill));
        assert!(is_one || (untouched && sector == &base[at..at + SECTOR]), "the sector at {at} is mixed");
    }
}

fn mir_01_overlapping_writes_on_one_connection(ground: &Ground) {
    let mut rng = Rng::new(1);
    let mut links = [ground.link()];
    for _ in 0..12 {
        writes(ground, &mut links, &mut rng);
    }
}

fn mir_02_overlapping_writes_on_four_connections(ground: &Ground) {
    let mut rng = Rng::new(2);
    let mut links = [0; 4].map(|_| ground.link());
    for _ in 0..12 {
        writes(ground, &mut links, &mut rng);
    }
}

fn mir_03_overlapping_writes_zeroes_and_trims(ground: &Ground) {
    let mut rng = Rng::new(3);
    let mut links = [0; 4].map(|_| ground.link());
    for _ in 0..12 {
        let offset = ground.written(3, AREA);
        for index in 0..24 {
            let from = offset + rng.below(AREA / 2);
            let len = 1 + rng.below(AREA / 2);
            let link = &mut links[index % 4];
            match rng.below(4) {
                0 => link.send(cmd::TRIM, 0, from, len),
                1 => link.send(cmd::WRITE_ZEROES, 0, from, len),
                2 => link.send(cmd::WRITE_ZEROES, flag::NO_HOLE, from, len),
                _ => link.send_write(0, from, &vec![index as u8; len as usize]),
            };
        }
        for link in &mut links {
            assert!(link.receive_all().values().all(|reply| reply.error == 0));
        }
        agreed(ground, &mut links, offset);
    }
}

fn mir_04_reads_that_race_a_write(ground: &Ground) {
    let offset = ground.written(40, 4096);
    let mut writer = ground.link();
    let mut readers = Mode::ALL.map(|mode| ground.link_in(mode));
    let mut old = pattern(40, offset, 4096);
    for round in 0..100 {
        let new = pattern(41 + round, offset, 4096);
        // Some reads may be overtaken by the write, some not.
        let before = (0..6).map(|index| readers[index % 2].send(cmd::READ, 0, offset, 4096)).count();
        writer.send_write(0, offset, &new);
        for index in before..12 {
            readers[index % 3].send(cmd::READ, 0, offset, 4096);
        }
        writer.receive().ok();
        for reader in &mut readers {
            for reply in reader.receive_all().into_values() {
                let data = reply.ok();
                for at in (0..4096).step_by(SECTOR) {
                    let sector = &data[at..at + SECTOR];
                    let is_old = sector == &old[at..at + SECTOR];
                    assert!(is_old || sector == &new[at..at + SECTOR], "neither old nor new");
                }
            }
            for _ in 0..2 {
                assert!(reader.read(offset, 4096) == new, "old data after the reply (round {round})");
            }
        }
        old = new;
    }
}
