//! The codec: what is encoded is decoded, damage is noticed, no bytes make it panic.
