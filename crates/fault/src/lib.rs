//! Mappings served by userfaultfd (DESIGN.md section 5).
//!
//! *Owns*: the program's mappings ([`UserMapping`]) and the list of each file's ([`FileMappings`]); the userfaultfds, the
//! threads that read their events and the pool that serves what has to wait ([`Faults`]); what a thread gets whose fault
//! cannot be served. The trait [`FaultTarget`] that a fault calls.
//!
//! *Does not own*: glocks, file sizes, pages, the address ranges themselves ([`pinfold_mem::UserMap`]).
//!
//! *Locking*: a fault arrives with nothing held (INV9). The locks here are leaves that are held for a system call at
//! most, of kinds that allocate nothing; background threads keep all signals away, so no handler of the program runs
//! under one.
//!
//! ```text
//!  a thread touches U
//!    |- handler: sleeps in the kernel -> event -> reader: at once; or passes its turn on: page in, install, wake;
//!    |                                                     or -> slot -> pool: the same, when no reader is left
//!    '- inline:  SIGBUS -> find(addr) -> at once, or reads the page itself: install -> repeat
//!                                     or -> slot -> pool: page in, install -> futex wake -> repeat
//! ```
//! A program whose signals must not fail has its answer too: beyond the end of the file and after errors of the store it
//! gets SIGBUS, never a hang, and also when the pool is gone.

mod channel;
mod faults;
mod file_mappings;
mod mapping;
mod refusal;
mod slots;

use std::ops::Range;
use std::sync::Arc;

use pinfold_base::counter_set;
use pinfold_cache::map::{MapOutcome, MapTarget};
use pinfold_cache::{CacheError, FilePages, ReadAhead, Want};
use pinfold_mem::Access;

pub use channel::Channel;
pub use faults::{Faults, MapRequest, Placed, SetupError};
pub use file_mappings::FileMappings;
pub use mapping::{Advice, UserMapping};

counter_set! {
    /// What happened to the faults of a volume.
    FaultCounters, FaultSnapshot {
        /// Faults on mapped memory, by loads and stores of the program and its system calls.
        faults,
        /// Faults whose page was cached.
        faults_minor,
        /// Faults whose page had to be read.
        faults_major,
        /// Faults by stores.
        faults_write,
        /// Faults that were handed to the pool because they had to wait.
        faults_handed_over,
        /// Faults that ended in SIGBUS: beyond the end of a file, or an error of the store.
        faults_refused,
        /// Faults whose serving panicked; they ended in SIGBUS.
        faults_panicked,
        /// Pages entered into page tables of mappings.
        pages_installed,
    }
}

/// A fault on a file's page.
#[derive(Clone)]
pub struct Fault<'a> {
    /// The page.
    pub page: u64,
    /// What for.
    pub access: Access,
    /// Pages that may be installed with it if they are cached.
    pub around: Range<u64>,
    /// Of these, how many may move where nobody is waited for ([`Here::moves`](pinfold_cache::Here::moves)).
    pub moves: usize,
    /// The reading pattern to learn from; none: nothing is read ahead.
    pub ahead: Option<&'a ReadAhead>,
    /// Where to install it.
    pub to: &'a dyn MapTarget,
}

impl std::fmt::Debug for Fault<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fault({:?} of page {})", self.access, self.page)
    }
}

/// Serves faults on a file's pages; implemented by the room that knows files and sizes.
pub trait FaultTarget: Send + Sync {
    /// Returns the file's pages.
    fn pages(&self) -> &Arc<FilePages>;

    /// Brings a page in and installs it, with nothing held. For a store: reserves space, moves the times, throttles.
    ///
    /// # Errors
    /// The store's; no frame.
    fn fault(&self, fault: &Fault<'_>) -> Result<MapOutcome, CacheError>;

    /// The same as far as it needs no allocation, and waits for nobody, but for the store where it `may_read`; may run in a
    /// signal handler.
    fn try_fault(&self, fault: &Fault<'_>, may_read: bool) -> Option<MapOutcome>;

    /// Brings a page in, for loads, without installing it anywhere. Nothing is held.
    ///
    /// # Errors
    /// As [`FaultTarget::fault`].
    fn make_readable(&self, page: u64, want: &Want<'_>) -> Result<MapOutcome, CacheError>;

    /// Tells whether the size that the pages know is, at this moment, the file's; otherwise other nodes may have changed it, and
    /// a fault finds out. Takes no lock.
    fn knows_end(&self) -> bool {
        true
    }

    /// Does to a page what a first store does, without installing it anywhere. Nothing is held.
    ///
    /// # Errors
    /// As [`FaultTarget::fault`].
    fn make_writable(&self, page: u64) -> Result<MapOutcome, CacheError>;
}
