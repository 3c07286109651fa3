//! What people type: sizes, addresses, names; and what is printed for them to type again.
//!
//! What must hold:
//! - A size that is taken is what was typed, exactly; one that is refused names one that is taken.
//! - Printed addresses, sizes and quoted paths are read back as what they were.
//! - A volume's name that is made up is a valid one.

use std::path::Path;

use nbdmirror::cli::size::{SizeError, exact, parse_region_size, parse_size, pretty};
use nbdmirror::control::listen::ListenAddress;
use nbdmirror::control::runtime_dir::{check_volume_name, default_volume_name};
use nbdmirror::format::describe::{format_utc, printable, shell_word};
use nbdmirror::units::{REGION_BYTES_MAX, REGION_BYTES_MIN, VOLUME_BYTES_MAX};

use super::input::Input;

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.u8() % 5;
    let text = String::from_utf8_lossy(input.rest()).into_owned();
    match kind {
        0 => size(&text),
        1 => listen(&text),
        2 => quoting(&text),
        3 => name(&text),
        _ => printing(Input::new(data).u64()),
    }
}

fn size(text: &str) {
    match parse_size(text) {
        Ok(bytes) => {
            assert!((4096..=VOLUME_BYTES_MAX).contains(&bytes) && bytes % 4096 == 0);
            assert_eq!(parse_size(&exact(bytes)), Ok(bytes));
            assert!(is_exactly(text, bytes), "{text:?} was taken for {bytes}");
        }
        Err(SizeError::Unaligned { nearest, nearest_bytes, .. }) => {
            assert_eq!(parse_size(&nearest), Ok(nearest_bytes));
        }
        Err(error) => assert!(error.to_string().contains(text)),
    }
    match parse_region_size(text) {
        Ok(bytes) => {
            assert!(bytes.is_power_of_two() && (REGION_BYTES_MIN..=REGION_BYTES_MAX).contains(&bytes));
        }
        Err(SizeError::Region { nearest, .. }) => assert!(parse_region_size(&nearest).is_ok()),
        Err(error) => assert_eq!(parse_size(text), Err(error)),
    }
}

/// The same size by another way: digits shifted to whole numbers, the suffix's power by its letter.
fn is_exactly(text: &str, bytes: u64) -> bool {
    let text = text.trim().to_ascii_lowercase();
    let number: String = text.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    let power = match text[number.len()..].chars().next() {
        Some('k') => 10,
        Some('m') => 20,
        Some('g') => 30,
        Some('t') => 40,
        _ => 0,
    };
    let fraction_digits = number.split_once('.').map_or(0, |(_, fraction)| fraction.len()) as u32;
    let digits: String = number.chars().filter(char::is_ascii_digit).collect();
    let typed: u128 = digits.trim_start_matches('0').parse().unwrap_or(0);
    Some(u128::from(bytes) * 10u128.pow(fraction_digits)) == typed.checked_mul(1 << power)
}

fn listen(text: &str) {
    match text.parse::<ListenAddress>() {
        Ok(address) => {
            let printed = address.to_string();
            assert_eq!(printed.parse(), Ok(address), "{printed}");
        }
        Err(why) => assert!(!why.is_empty()),
    }
}

fn quoting(text: &str) {
    let plain = printable(text);
    assert!(!plain.chars().any(char::is_control));
    assert_eq!(plain.chars().count(), text.chars().count());
    let word = shell_word(text);
    let read = unquoted(&word);
    let expected = if text.starts_with('-') { format!("./{plain}") } else { plain };
    assert_eq!(read.as_deref(), Some(&*expected), "a shell reads {word} so");
}

/// The one word that a shell makes of this; `None` where it would make something else of it.
fn unquoted(word: &str) -> Option<String> {
    let mut read = String::new();
    let mut chars = word.chars();
    while let Some(c) = chars.next() {
        match c {
            '\'' => loop {
                match chars.next()? {
                    '\'' => break,
                    c => read.push(c),
                }
            },
            '\\' => read.push(chars.next()?),
            c if c.is_ascii_alphanumeric() || "_-./:=@%+,".contains(c) => read.push(c),
            _ => return None,
        }
    }
    (!word.is_empty()).then_some(read)
}

fn name(text: &str) {
    let made_up = default_volume_name(Path::new(text));
    assert_eq!(check_volume_name(&made_up), Ok(()), "{made_up:?}");
    if check_volume_name(text).is_ok() {
        assert!(!text.is_empty() && text.len() <= 64 && !text.contains('/') && printable(text) == text);
    }
}

fn printing(number: u64) {
    assert!(!pretty(number).is_empty());
    let time = format_utc(number);
    assert!(time.len() == 23 && time.ends_with(" UTC"), "{time}");
}
