//! The NBD protocol, pure: takes bytes in any split, gives bytes. Knows nothing of the mirror.
//!
//! ```text
//!              bytes in                                 request headers
//!                 │                                        │
//!  greeting ─► Handshake ── Step::Transmission(Session) ─► Session::parse ─► Command | Refuse | Disconnect
//!                 │                                        │
//!                 ├─► Step::Close        engine's result ─► Session::encode_* ─► bytes out, payloads between
//!                 └─► Step::StartTls ─► Handshake::inside_tls
//! ```
//!
//! What must hold, whatever a client sends: nothing panics, memory stays bounded, the stream stays in step
//! or is closed, and every byte sent is well formed (promise 11).
//!
//! What a client has negotiated lives in [`Session`](session::Session) and nowhere else: how requests and replies
//! look, and which metadata contexts BLOCK_STATUS speaks of.

pub mod client;
pub mod context;
pub mod export;
pub mod handshake;
pub mod session;
pub mod wire;
