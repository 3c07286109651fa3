//! Words for operators: what a superblock says, times, and paths as a shell takes them.

use super::superblock::{MemberState, Superblock};
use crate::units::SECOND_NS;

const DAY_S: u64 = 86_400;

/// One line: generation, event count, time of writing, and who is in sync by this superblock's account.
#[must_use]
pub fn describe(superblock: &Superblock) -> String {
    let in_sync: Vec<String> = superblock
        .members()
        .filter(|(_, member)| member.state == MemberState::InSync)
        .map(|(slot, member)| format!("{slot} ({})", printable(&member.path)))
        .collect();
    format!(
        "generation {}, event count {}, last written {}; in sync by its account: {}",
        superblock.generation,
        superblock.event_count,
        format_utc(superblock.written_unix_ns),
        if in_sync.is_empty() { "none".to_owned() } else { format!("replica {}", in_sync.join(", ")) },
    )
}

/// A member's state in a word, as `status` has it.
#[must_use]
pub fn state_word(state: MemberState) -> &'static str {
    match state {
        MemberState::InSync => "in-sync",
        MemberState::Resyncing => "resyncing",
        MemberState::Stale => "stale",
        MemberState::Faulty => "faulty",
    }
}

/// A time, given in nanoseconds since 1970, as `2026-02-28 23:59:59 UTC`.
#[must_use]
pub fn format_utc(unix_ns: u64) -> String {
    let unix_s = unix_ns / SECOND_NS;
    let (year, month, day) = civil_from_days(unix_s / DAY_S);
    let second = unix_s % DAY_S;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// `word` as one word of a shell command, quoted where it must be.
#[must_use]
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=@%+,".contains(c);
    if !word.is_empty() && !word.starts_with('-') && word.chars().all(plain) {
        word.to_owned()
    } else {
        let dash = if word.starts_with('-') { "./" } else { "" };
        format!("'{dash}{}'", printable(word).replace('\'', "'\\''"))
    }
}

/// `text` without anything that a terminal would obey.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Year, month (1 to 12) and day (1 to 31) of the Gregorian calendar, `days` after 1970-01-01. Counted in years
/// that begin on 1 March, so that a leap day is the last day of its year, from 0000-03-01.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    const DAYS_BEFORE_1970: u64 = 719_468;
    const DAYS_PER_400_YEARS: u64 = 146_097;
    let days = days + DAYS_BEFORE_1970;
    let (era, day_of_era) = (days / DAYS_PER_400_YEARS, days % DAYS_PER_400_YEARS);
    // Leap days so far in this era: one each 4 years, none each 100 years, one on its very last day.
    let leap_days = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
    let year_of_era = (day_of_era - leap_days) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // From March on, month lengths repeat 31 30 31 30 31: 153 days in 5 months.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_count_on_through_every_month_and_leap_day() {
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..200_000 {
            assert_eq!(civil_from_days(days), (year, month, day));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let last = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            day += 1;
            if day > last[month as usize - 1] {
                (month, day) = (month + 1, 1);
            }
            if month > 12 {
                (year, month) = (year + 1, 1);
            }
        }
    }

    #[test]
    fn times_read_as_utc() {
        assert_eq!(format_utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(format_utc(951_782_399 * SECOND_NS), "2000-02-28 23:59:59 UTC");
        assert_eq!(format_utc(1_772_323_199_999_999_999), "2026-02-28 23:59:59 UTC");
        assert_eq!(format_utc(u64::MAX), "2554-07-21 23:34:33 UTC");
    }

    #[test]
    fn paths_are_quoted_where_a_shell_needs_it() {
        assert_eq!(shell_word("/dev/sdb1"), "/dev/sdb1");
        assert_eq!(shell_word("my disk's.img"), "'my disk'\\''s.img'");
        assert_eq!(shell_word("--force"), "'./--force'");
        assert_eq!(shell_word("a\x1b[2J"), "'a\u{fffd}[2J'");
    }
}
