//! Bytes for good: where pages come from and go to.
//!
//! *Owns*: the traits [`Object`] (one file's bytes: ranges, many in flight, completion-based), the
//! [directory store](dir) with its name space, the [limit](timed) on how long a store may take, and the test stores.
//!
//! *Does not own*: what is cached, the logical size and times of a file that has dirty pages.
//!
//! *Locking*: leaves only. A completion runs on whatever thread reaps it and may take class 6 alone.

pub mod dir;
pub mod object;
pub mod testing;
pub mod timed;

pub use dir::object::{DirObject, Reopen};
pub use object::{
    Completion, Geometry, Object, Operation, Rearrange, Seek, StoreError, StoreResult, SyncScope,
    Transfer,
};
pub use timed::{TimeLimit, TimeLimitSnapshot, TimedObject};
