//! Files that programs on the mounts of two nodes map, read and write: what one does the others see, and nobody waits for ever.
//!
//! The nodes are this process's, with a lock service of its own. Where FUSE or Python cannot be had the tests say so and pass.

#![allow(clippy::unwrap_used, reason = "tests")]

mod mapped;
mod rig;
