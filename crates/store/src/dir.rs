//! The directory store: a volume is a directory of some kernel filesystem.

pub mod namespace;
pub mod object;
