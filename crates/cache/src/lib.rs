//! The page cache: page states, fills, read-ahead, reclaim, dirty pages, write-back.
//!
//! *Owns*: which page of which file is in which frame; whether it is valid, dirty, used; when it goes; the errors of
//! storing it.
//!
//! A page lives in one of two homes: an arena frame, or, once it is mapped, the window of its file ([`map`]).
//!
//! *Does not own*: why data may be cached (glocks), user mappings (they implement [`MapTarget`] and [`ReverseMap`]), what
//! a file is called, how bytes are stored.
//!
//! *Locking*: [`Gate`] (class 4), folio locks in the state word (class 5, one file's in ascending order); queues, the
//! index and the dirty set are leaves (class 6). Completions take leaves only. Nothing is held while user memory may
//! fault: copies under a folio lock report faults instead of taking them (INV9).
//!
//! What keeps two operations on one page apart ([`separation`] is this table as code; a test races every pair):
//!
//! | | fill | read copy | write | write-back | evict | truncate | map |
//! |---|---|---|---|---|---|---|---|
//! | **fill** | index shard | not UPTODATE | folio lock | not DIRTY | LOCKED | gate, folio lock | not UPTODATE |
//! | **read copy** | | – | – (as in the kernel) | – | reference | reference | reference: keeps a snapshot |
//! | **write** | | | folio lock | folio lock, then DIRTY again | LOCKED, DIRTY | inode lock (above), folio lock | folio lock |
//! | **write-back** | | | | WRITEBACK | WRITEBACK | WRITEBACK | folio lock, protected before clean |
//! | **evict** | | | | | LOCKED | LOCKED | LOCKED, clean is protected |
//! | **truncate** | | | | | | inode lock (above), folio lock | gate (stores), folio lock, then the size again |
//! | **map** | | | | | | | folio lock |

pub mod cache;
pub mod dirty;
pub mod errseq;
pub mod fdm;
pub mod file;
pub mod folio;
pub mod gate;
mod home;
pub mod index;
pub mod lease;
pub mod map;
pub mod pin;
pub mod policy;
pub mod readahead;
mod room;
pub mod schemes;
pub mod separation;
mod slots;
pub mod state;
pub mod stores;
mod strides;
pub mod wait;
pub mod writeback;

use std::fmt;

use pinfold_base::Errno;
use pinfold_mem::window::WindowError;
use pinfold_store::StoreError;

pub use cache::{Cache, CacheConfig, CacheSnapshot, Census, MEMORY_MIN};
pub use errseq::{ErrSeq, Sample};
pub use fdm::Brought;
pub use file::{FilePages, Owner, Want};
pub use folio::Folio;
pub use gate::{BlockGuard, Gate};
pub use lease::{Lease, PageRef};
pub use map::{AROUND_MAX, Here, MapOutcome, MapTarget, ReverseMap, SIGNAL_MOVES_MAX};
pub use pin::{Kept, PagePin, PinRefusal, PinSite, PinnedRun};
pub use readahead::{ReadAhead, Walks};
pub use state::PinKind;
pub use stores::Harvest;
pub use writeback::{Mode, Pace};

/// Why the cache could not do what it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheError {
    /// The store refused.
    Store(StoreError),
    /// No frame could be had: everything is dirty, pinned or in use, and stays so.
    NoFrames,
    /// It would have to wait, and the caller asked not to.
    WouldBlock,
    /// The caller's cancellation came first.
    Interrupted,
    /// The system refused a mapped page its memory.
    Window(Errno),
    /// The system refused a mapped file what it needs: a descriptor, addresses.
    Unmappable(WindowError),
    /// So many transfers use the page that no more can be counted.
    TooManyPins,
    /// Whoever decides whether the file may be cached refused.
    Refused(Errno),
}

impl CacheError {
    /// Returns the error number.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Store(error) => error.errno,
            Self::NoFrames => Errno::ENOMEM,
            Self::WouldBlock => Errno::EAGAIN,
            Self::Interrupted => Errno::EINTR,
            Self::Window(errno) => *errno,
            Self::Unmappable(error) => error.errno(),
            Self::TooManyPins => Errno::ENOMEM,
            Self::Refused(errno) => *errno,
        }
    }
}

impl fmt::Display for CacheError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(error) => error.fmt(f),
            Self::NoFrames => {
                f.write_str("no page frame could be freed: all are dirty, pinned or in use")
            }
            Self::WouldBlock => f.write_str("the operation would have to wait"),
            Self::Interrupted => f.write_str("the operation was cancelled"),
            Self::Window(errno) => write!(f, "the system refused memory for a mapping: {errno}"),
            Self::Unmappable(error) => error.fmt(f),
            Self::TooManyPins => f.write_str("too many transfers use one page"),
            Self::Refused(errno) => write!(f, "the file may not be used: {errno}"),
        }
    }
}

impl std::error::Error for CacheError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Store(error) => Some(error),
            Self::NoFrames
            | Self::WouldBlock
            | Self::Interrupted
            | Self::Window(_)
            | Self::Unmappable(_)
            | Self::TooManyPins
            | Self::Refused(_) => None,
        }
    }
}

impl From<StoreError> for CacheError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}
