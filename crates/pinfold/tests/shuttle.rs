//! Whole paths under a scheduler that decides at every lock and every atomic step who goes on (shuttle): buffered and direct
//! reads and writes, write-back, sync, eviction, truncation, pins, the background thread, and the store itself, which answers
//! late, in pieces and in any order.
//!
//! Run with
//! `RUSTFLAGS="--cfg shuttle -Cdebug-assertions" cargo test -p pinfold --release --test shuttle --target-dir target/shuttle`.
//! `PINFOLD_SHUTTLE_SCHEDULES=N` runs N schedules a test and scheduler, `PINFOLD_SHUTTLE_SEED=N` others than the usual ones. A schedule
//! that fails is kept in a file, whose name is printed; `PINFOLD_SHUTTLE_REPLAY=FILE` with the name of the test runs it again.
//!
//! Not here: faults (userfaultfd) and rings, which are the kernel's to schedule. What they call in the cache is. Weak orderings
//! are loom's (`crates/cache/tests/loom.rs`): here every atomic step is seen at once.
#![cfg(shuttle)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

#[path = "shuttle/files.rs"]
mod files;
#[path = "shuttle/pages.rs"]
mod pages;
#[path = "shuttle/rig.rs"]
mod rig;
#[path = "shuttle/store.rs"]
mod store;
