//! Glocks: one lock per file whose mode is the right to cache it (SEMANTICS.md section H).
//!
//! ```text
//!   Space     one node: its glocks, its threads, its membership     space.rs
//!     Glock   one file: waiting, duties                             glock.rs
//!       Machine   transitions, without threads or clock             machine.rs
//!     Session   who has what between nodes                          service.rs: local, scripted, etcd
//! ```
//!
//! *Owns*: the modes; the queue of holders; when a mode is asked for, kept, and given up; the trait [`Duties`] that a
//! demotion calls; the trait [`LockService`] and its services.
//!
//! *Does not own*: files, pages.
//!
//! *Locking*: class 2. What is held inside is a leaf, and nothing of it is held while a duty is done or a service is asked.
//!
//! A service that is gone is noticed by the node's own clock, before its lease ends: it withdraws, which refuses
//! every request with EIO and gives nothing away.

mod clock;
mod glock;
mod machine;
mod mode;
mod report;
pub mod service;
mod space;

pub use clock::{Clock, HandClock, Time};
pub use glock::{Duties, Glock, Guard, Kept, MayDemote, Queued, lock_all, wait_all};
pub use machine::{QUEUE_MAX, Refusal};
pub use mode::{Flags, Mode, Request};
pub use report::{Counts, DemoteReport, Doing, HolderReport, Report};
pub use service::{FenceCounts, JoinError, LockService, Name, Traffic};
pub use space::{Options, Space, WORKERS_MAX};
