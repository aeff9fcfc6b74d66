//! Promises of volumes that share a directory under glocks: what several nodes do looks as if one did it.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(
    unsafe_code,
    reason = "loads and stores of mapped memory, as a program makes them"
)]

mod shared {
    mod coherence;
    mod crosswise;
    mod late;
    mod mapped;
    pub mod rig;
    mod storm;
    mod withdrawal;
}
