//! The scenario suite: what must never happen between a file system, its callers' memory and its errors.
//!
//! Runs on any directory of any file system, and on this library. Says what deadlocks, spins, goes stale or leaves
//! debris, by the numbers of SEMANTICS.md section J.
//!
//! *Owns*: the [back ends](fs), the [scenarios](suite), the [runner] with its watchdog, the [report].
//!
//! *Does not own*: the file systems; how a person starts it (`pinfold torture`).
//!
//! *Locking*: leaves only; a scenario that hangs takes nothing of the runner's with it, being a process of its own.
//!
//! ```text
//! runner ── starts ──> child ── runs ──> scenario ── calls ──> Fs / Handle ── kernel | pinfold | mutant
//!    ^                   |
//!    └── beats, outcome ─┘      silence for 10 s: stacks are taken, the child is killed, outcome "hung"
//! ```

pub mod child;
pub mod fs;
pub mod image;
pub mod report;
pub mod runner;
pub mod scenario;
pub mod stacks;
pub mod suite;
pub mod target;

/// The kernel's own mappings, and memory that is touched without a reference into it.
pub use pinfold_mem::region;
pub use report::{Record, Tally};
pub use runner::{ChildCommand, Event, Plan};
pub use scenario::{Outcome, Scenario};
pub use target::{Backend, Faults, Target};
