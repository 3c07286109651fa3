//! The NBD protocol, pure: takes bytes in any split, gives bytes. Knows nothing of the mirror.
//!
//! ```text
//!              bytes in                          28-byte request headers
//!                 │                                        │
//!  greeting ─► Handshake ── Step::Transmission(Session) ─► Session::parse ─► Command | Refuse | Disconnect
//!                 │                                        │
//!                 └─► Step::Close          engine's result ─► Session::encode_reply ─► bytes out
//! ```
//!
//! What must hold, whatever a client sends: nothing panics, memory stays bounded, the stream stays in step
//! or is closed, and every byte sent is well formed (promise 11).
//!
//! What a client negotiates lives in [`Session`](session::Session) and nowhere else: a reply style is chosen
//! in `Session::encode_reply`, a header size and its extra flags in `Session::parse`, an option in one arm of
//! `Handshake::answer`. That is where structured replies, extended headers, metadata contexts and STARTTLS go.
//! Today they are unknown options and are refused as such.

pub mod client;
pub mod export;
pub mod handshake;
pub mod session;
pub mod wire;
