//! SIZE on the command line, and sizes in print.
//!
//! What must hold: a size is bytes or a decimal number with a binary suffix; no rounding ever happens
//! silently, a size that is not a multiple of 4 KiB is refused and the nearest that is gets named.

use crate::units::{BLOCK_BYTES, REGION_BYTES_MAX, REGION_BYTES_MIN, VOLUME_BYTES_MAX};

/// Suffixes and the power of two that each stands for.
const SUFFIXES: [(char, u32); 4] = [('k', 10), ('m', 20), ('g', 30), ('t', 40)];
/// More fraction digits than this cannot matter below 64 TiB, and the arithmetic stays within 128 bits.
const FRACTION_DIGITS_MAX: usize = 18;

/// Why a SIZE was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number with a known suffix.
    #[error("`{0}` is not a size; give bytes or a binary suffix, such as 1073741824, 64K, 1.5G or 1T")]
    Malformed(String),
    /// Not whole blocks.
    #[error("{given} is not a multiple of 4 KiB; the nearest that is: {nearest} ({nearest_bytes} bytes)")]
    Unaligned {
        /// As typed.
        given: String,
        /// The nearest multiple, with a suffix.
        nearest: String,
        /// The nearest multiple, bytes.
        nearest_bytes: u64,
    },
    /// Nothing can be that large.
    #[error("{0} is too large; the largest volume is 64T")]
    TooLarge(String),
    /// Not a region size.
    #[error("{given} is not a region size: a power of two from 64K to 64M; try {nearest}")]
    Region {
        /// As typed.
        given: String,
        /// The nearest region size.
        nearest: String,
    },
}

/// Parses a SIZE into bytes: a positive multiple of 4 KiB, at most 64 TiB.
///
/// # Errors
/// [`SizeError`] says what is wrong and which size is near.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let malformed = || SizeError::Malformed(text.to_owned());
    let (number, shift) = split_suffix(text.trim()).ok_or_else(malformed)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !digits(whole) || !digits(fraction) {
        return Err(malformed());
    }
    if number.ends_with('.') || fraction.len() > FRACTION_DIGITS_MAX {
        return Err(malformed());
    }
    let too_large = || SizeError::TooLarge(text.to_owned());
    // The size is `numerator / denominator` bytes, exactly.
    let denominator = 10_u128.pow(fraction.len() as u32);
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| too_large())? };
    if whole > VOLUME_BYTES_MAX {
        return Err(too_large());
    }
    let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| malformed())? };
    let numerator = (u128::from(whole) * denominator + fraction) << shift;
    let block = u128::from(BLOCK_BYTES) * denominator;
    let nearest = ((numerator + block / 2) / block).max(1) * u128::from(BLOCK_BYTES);
    let nearest_bytes = u64::try_from(nearest).map_err(|_| too_large())?;
    if nearest_bytes > VOLUME_BYTES_MAX {
        return Err(too_large());
    }
    if u128::from(nearest_bytes) * denominator != numerator {
        let nearest = exact(nearest_bytes);
        return Err(SizeError::Unaligned { given: text.to_owned(), nearest, nearest_bytes });
    }
    Ok(nearest_bytes)
}

/// Parses a region size into bytes: a power of two from 64 KiB to 64 MiB.
///
/// # Errors
/// As for [`parse_size`], and for sizes that no region has.
pub fn parse_region_size(text: &str) -> Result<u64, SizeError> {
    let region_bytes = parse_size(text)?;
    if region_bytes.is_power_of_two() && (REGION_BYTES_MIN..=REGION_BYTES_MAX).contains(&region_bytes) {
        return Ok(region_bytes);
    }
    let nearest = region_bytes.clamp(REGION_BYTES_MIN, REGION_BYTES_MAX).next_power_of_two();
    Err(SizeError::Region { given: text.to_owned(), nearest: exact(nearest) })
}

/// Splits `1.5GiB` into `1.5` and 30; `None` for a suffix that we do not know.
fn split_suffix(text: &str) -> Option<(&str, u32)> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let suffix = suffix.to_ascii_lowercase();
    if suffix.is_empty() || suffix == "b" {
        return Some((number, 0));
    }
    let (_, shift) = SUFFIXES.into_iter().find(|(letter, _)| suffix.starts_with(*letter))?;
    matches!(&suffix[1..], "" | "b" | "ib").then_some((number, shift))
}

/// The size as [`parse_size`] takes it, exact: the largest suffix that divides it, else bytes.
#[must_use]
pub fn exact(bytes: u64) -> String {
    for (letter, shift) in SUFFIXES.into_iter().rev() {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{}", bytes >> shift, letter.to_ascii_uppercase());
        }
    }
    bytes.to_string()
}

/// The size for people: three digits or so and a unit, such as `1.5 GiB` or `64 KiB`.
#[must_use]
pub fn pretty(bytes: u64) -> String {
    let Some((letter, shift)) = SUFFIXES.into_iter().rev().find(|(_, shift)| bytes >> shift != 0) else {
        return format!("{bytes} B");
    };
    let unit = letter.to_ascii_uppercase();
    let whole = bytes >> shift;
    // Tenths, cut and not rounded: a resync that is not done never reads as done.
    let tenths = ((u128::from(bytes) * 10) >> shift) % 10;
    if tenths == 0 || whole >= 100 {
        format!("{whole} {unit}iB")
    } else {
        format!("{whole}.{tenths} {unit}iB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bytes_or_binary_suffixes() {
        for (text, bytes) in [
            ("4096", 4096),
            ("4096B", 4096),
            ("64K", 64 << 10),
            ("64k", 64 << 10),
            ("64KiB", 64 << 10),
            ("1.5G", 3 << 29),
            ("0.5MiB", 1 << 19),
            (".5M", 1 << 19),
            ("1T", 1 << 40),
            ("64T", 64 << 40),
            ("1.000G", 1 << 30),
            (" 8K ", 8192),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        let twenty_digits = format!("0.{}", "1".repeat(20));
        for text in
            ["", "G", "-1", "1X", "1GG", "1.5.5G", "1,5G", "0x1000", "1 G", "1.", ".", "1KBi", &twenty_digits]
        {
            assert!(matches!(parse_size(text), Err(SizeError::Malformed(_))), "{text}");
        }
        for text in ["65T", "99999999999999999999999", "18446744073709551615T", "64.0001T"] {
            assert!(matches!(parse_size(text), Err(SizeError::TooLarge(_))), "{text}");
        }
    }

    #[test]
    fn the_nearest_whole_block_is_named() {
        for (text, nearest) in [
            ("1000", 4096),
            ("0", 4096),
            ("6143", 4096),
            ("6144", 8192),
            ("1.3G", 1_395_863_552),
            ("1025K", 1 << 20),
        ] {
            let Err(SizeError::Unaligned { nearest_bytes, .. }) = parse_size(text) else { panic!("{text}") };
            assert_eq!(nearest_bytes, nearest, "{text}");
            assert_eq!(parse_size(&exact(nearest_bytes)), Ok(nearest_bytes));
        }
        assert_eq!(
            parse_size("1000").unwrap_err().to_string(),
            "1000 is not a multiple of 4 KiB; the nearest that is: 4K (4096 bytes)"
        );
    }

    #[test]
    fn region_sizes_are_powers_of_two() {
        assert_eq!(parse_region_size("64K"), Ok(64 << 10));
        assert_eq!(parse_region_size("64M"), Ok(64 << 20));
        for (text, near) in [("4K", "64K"), ("96K", "128K"), ("128M", "64M"), ("1G", "64M")] {
            let Err(SizeError::Region { nearest, .. }) = parse_region_size(text) else { panic!("{text}") };
            assert_eq!(nearest, near);
        }
    }

    #[test]
    fn sizes_in_print() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (4096, "4 KiB"),
            (3 << 29, "1.5 GiB"),
            ((1 << 30) - 1, "1023 MiB"),
            (1 << 40, "1 TiB"),
        ] {
            assert_eq!(pretty(bytes), text);
        }
        assert_eq!((exact(3 << 29).as_str(), exact(5).as_str(), exact(0).as_str()), ("1536M", "5", "0"));
    }

    proptest::proptest! {
        #[test]
        fn what_is_printed_exactly_is_read_back(blocks in 1_u64..=(VOLUME_BYTES_MAX / BLOCK_BYTES)) {
            let bytes = blocks * BLOCK_BYTES;
            proptest::prop_assert_eq!(parse_size(&exact(bytes)), Ok(bytes));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,24}") {
            let _ = parse_size(&text);
            let _ = parse_region_size(&text);
        }
    }
}
