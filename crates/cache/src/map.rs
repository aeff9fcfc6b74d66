//! Pages in user mappings: how a fault gets its page, and how access is taken away again (SEMANTICS.md section F).
//!
//! *Owns*: the order of steps that keeps stores from being lost: valid before mapped (INV1), dirty before writable
//! (INV2), protected before clean.
//!
//! *Does not own*: mappings, their descriptors, who waits for a fault ([`MapTarget`] and [`ReverseMap`], which
//! `pinfold-fault` implements); the move between a page's two homes (`home.rs`).
//!
//! *Locking*: entered with nothing held, or from a signal handler with nothing held (`FilePages::try_map`, which waits
//! for nobody and allocates nothing). Page tables are changed under the folio's lock; ioctls are leaves.

use std::ops::Range;

use pinfold_mem::RawSpan;
use pinfold_mem::uffd::Installed;

/// One user mapping, while the cache serves a fault in it; implemented by `pinfold-fault`.
///
/// Called with folios locked: must take no lock but leaves and touch no user mapping. A mapping that is gone meanwhile
/// answers [`InstallStop::Gone`](pinfold_mem::uffd::InstallStop::Gone). Whoever waits for the fault is woken by the
/// caller of `FilePages::map`, once it has returned: an installation that met a mapped page wakes
/// nobody.
pub trait MapTarget {
    /// Returns the pages of the file that the mapping shows.
    fn covers(&self) -> Range<u64>;

    /// Tells whether stores go to the file; in a private mapping they stay with it.
    fn shared(&self) -> bool;

    /// Tells whether the fault is a store to a page that is mapped for reading. A hint that saves a system call.
    fn protected(&self) -> bool {
        false
    }

    /// Allocates the window's pages from `page` on, fills them from `from`, and maps them; for reading only when
    /// `protect`. Called on shared mappings alone.
    fn copy(&self, page: u64, from: RawSpan, protect: bool) -> Installed;

    /// Maps pages that the window has; for reading only when `protect`.
    fn resume(&self, pages: Range<u64>, protect: bool) -> Installed;

    /// Lets mapped pages be stored to.
    fn unprotect(&self, pages: Range<u64>);
}

/// All user mappings of a file; implemented by `pinfold-fault`.
///
/// Called with folios locked, under the same rule as [`MapTarget`].
pub trait ReverseMap: Send + Sync {
    /// Takes all access away from the shared mappings of these pages. Private copies stay.
    fn unmap(&self, pages: Range<u64>);

    /// Makes these pages fault at the next store through any mapping; returns when no processor can store to them.
    fn protect(&self, pages: Range<u64>);
}

/// How a fault was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "an access beyond the end is SIGBUS"]
pub enum MapOutcome {
    /// The page is mapped, or was and is gone again: repeat the access.
    Mapped,
    /// The page lies beyond the end of the file.
    BeyondEnd,
}
