//! The C API from outside: its header, programs compiled against it, and the same programs compiled against libc.
#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, in its functions too"
)]

mod built;
mod header;
mod programs;
