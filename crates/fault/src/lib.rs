//! Mappings served by userfaultfd (DESIGN.md section 5).
//!
//! *Owns*: the trait [`FaultTarget`] that a fault calls. The table of user mappings and the two deliveries are
//! still to come.
//!
//! *Does not own*: glocks, file sizes, pages.
//!
//! *Locking*: none; a fault arrives with nothing held (INV9).

use pinfold_base::PageIndex;
use pinfold_mem::Access;

/// How a fault was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The page is mapped; repeat the instruction.
    Mapped,
    /// Beyond the end of the file, or the store failed: SIGBUS.
    Bus,
    /// The page went away while the fault waited; repeat the instruction.
    Retry,
}

/// Serves a fault on a file's page; implemented by the room that knows files and sizes.
pub trait FaultTarget: Send + Sync {
    /// Brings `page` in for `access`. Called with no lock held.
    fn fault(&self, page: PageIndex, access: Access) -> Answer;
}
