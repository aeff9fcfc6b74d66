//! What every room shares: units, progress, error numbers, ranked locks, counters.
//!
//! *Owns*: [`ByteOffset`], [`PageIndex`], [`PageCount`], [`Progress`], [`Errno`], the lock ranks of
//! SEMANTICS.md section I and their run-time check, event counters, and the shim that lets one source
//! run on the standard library's atomics or under loom.
//!
//! *Does not own*: any system call, any memory of the user's, any policy.
//!
//! *Locking*: it provides locks and takes none.

pub mod counters;
pub mod errno;
pub mod progress;
pub mod rank;
pub mod roomy;
pub mod sync;
pub mod units;

pub use errno::Errno;
pub use progress::Progress;
pub use units::{ByteOffset, PAGE_SIZE, PageCount, PageIndex, page_span};
