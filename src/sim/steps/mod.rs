//! Crash at every step: named scenarios, each crashed after every event, and its recoveries crashed again.
//!
//! - `fork`: a crash here and now, and the worlds that it may leave.

pub mod fork;
