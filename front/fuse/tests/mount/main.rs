//! What a mounted volume promises to programs, through the kernel.
//!
//! The tests mount in this process. Where that is not possible they say so and pass: FUSE needs `/dev/fuse`, and root
//! or `fusermount3`.

#![allow(clippy::unwrap_used, reason = "tests")]

mod coherence;
mod locks;
mod names;
mod nodes;
mod oracle;
mod others;
mod support;
