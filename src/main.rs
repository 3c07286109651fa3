//! The `nbdmirror` command.

fn main() {}
