//! The NBD protocol, pure: takes bytes in any split, gives bytes. Knows nothing of the mirror.
