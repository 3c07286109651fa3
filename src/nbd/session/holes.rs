//! Where a READ's bytes are zeroes, so that they need not be sent.
//!
//! What must hold: only bytes that were read and are zero count, whatever the backing says of holes
//! (`docs/decisions/0009-holes-in-replies.md`); a reply falls into few pieces whatever its bytes are.

use std::ops::Range;

use crate::units::BLOCK_BYTES;

/// Shortest run of zeroes that becomes a hole, bytes, unless all that was asked for is zero. Below it, sending the
/// zeroes costs less than two more pieces.
pub const HOLE_BYTES_MIN: usize = 16 << 10;
/// Compared at a time, bytes: a cache line.
const LINE_BYTES: usize = 64;

/// Calls `piece` with the ranges of `data` in order, none empty, and whether they are holes. They begin and end at
/// multiples of 4096 bytes of the volume, where `data` stands at `offset`, or with `data`.
pub(super) fn pieces(offset: u64, data: &[u8], mut piece: impl FnMut(Range<usize>, bool)) {
    let mut sent = 0;
    let mut zero_from = 0;
    let mut at = 0;
    while at < data.len() {
        let to_boundary = BLOCK_BYTES - (offset + at as u64) % BLOCK_BYTES;
        let end = data.len().min(at + to_boundary as usize);
        if !is_zero(&data[at..end]) {
            if at - zero_from >= HOLE_BYTES_MIN {
                flush(&mut sent, zero_from, at, &mut piece);
            }
            zero_from = end;
        }
        at = end;
    }
    let rest = data.len() - zero_from;
    if rest >= HOLE_BYTES_MIN || rest == data.len() && rest > 0 {
        flush(&mut sent, zero_from, data.len(), &mut piece);
    }
    if sent < data.len() {
        piece(sent..data.len(), false);
    }
}

/// A hole, and before it the data that was not handed on yet.
fn flush(sent: &mut usize, hole: usize, end: usize, piece: &mut impl FnMut(Range<usize>, bool)) {
    if *sent < hole {
        piece(*sent..hole, false);
    }
    piece(hole..end, true);
    *sent = end;
}

/// Whether all bytes are zero. Looks no further than the first line that has another.
fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<LINE_BYTES>();
    let line_is_zero = |line: &[u8; LINE_BYTES]| line.iter().fold(0, |all, byte| all | byte) == 0;
    lines.iter().all(line_is_zero) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(offset: u64, data: &[u8]) -> Vec<(Range<usize>, bool)> {
        let mut found = Vec::new();
        pieces(offset, data, |range, hole| found.push((range, hole)));
        found
    }

    #[test]
    fn holes_are_long_runs_of_whole_blocks_or_everything() {
        const K: usize = 1 << 10;
        let mut data = vec![0; 64 * K];
        assert_eq!(all(0, &data), [(0..64 * K, true)]);
        assert_eq!(all(512, &data[..512]), [(0..512, true)]);
        assert_eq!(all(0, &[]), []);
        data[20 * K] = 1;
        assert_eq!(all(0, &data), [(0..20 * K, true), (20 * K..24 * K, false), (24 * K..64 * K, true)]);
        assert_eq!(all(0, &data[..32 * K]), [(0..20 * K, true), (20 * K..32 * K, false)]);
        assert_eq!(all(8 << 10, &data[8 * K..24 * K]), [(0..16 * K, false)]);
        // Not aligned: the block with the 1 begins and ends elsewhere in the data.
        assert_eq!(
            all(4095, &data),
            [(0..16 * K + 1, true), (16 * K + 1..20 * K + 1, false), (20 * K + 1..64 * K, true)]
        );
        data.fill(7);
        assert_eq!(all(0, &data), [(0..64 * K, false)]);
    }

    #[test]
    fn one_byte_is_enough_to_be_no_hole() {
        for len in [1, 63, 64, 65, 511, 4096, 4097] {
            for at in 0..len {
                let mut data = vec![0; len];
                data[at] = 0x80;
                assert_eq!(all(100, &data), [(0..len, false)], "{at} of {len}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn sr_01_11_pieces_cover_everything_once_and_holes_are_zero(
            offset in 0_u64..20_000,
            runs in prop::collection::vec((1_usize..40_000, any::<bool>()), 0..8),
        ) {
            let mut data = Vec::new();
            for (len, zero) in runs {
                data.resize(data.len() + len, u8::from(!zero));
            }
            let mut at = 0;
            let mut holes = 0;
            for (range, hole) in all(offset, &data) {
                prop_assert!(range.start == at && range.end > at);
                at = range.end;
                if hole {
                    prop_assert!(data[range.clone()].iter().all(|byte| *byte == 0));
                    prop_assert!(range.len() >= HOLE_BYTES_MIN || range.len() == data.len());
                    holes += 1;
                }
                for edge in [range.start, range.end] {
                    let inner = edge != 0 && edge != data.len();
                    prop_assert!(!inner || (offset + edge as u64).is_multiple_of(BLOCK_BYTES));
                }
            }
            prop_assert_eq!(at, data.len());
            prop_assert!(holes <= 1 + data.len() / HOLE_BYTES_MIN);
        }
    }
}
