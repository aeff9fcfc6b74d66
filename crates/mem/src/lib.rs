//! User memory, frames, and the system calls under them; the room where `unsafe` lives.
//!
//! *Owns*: the frame [`arena`], spans of user memory and the cursor over them ([`span`], [`iov`]), copies that
//! survive faults ([`copy`]), fault-in ([`faultin`]), io_uring ([`uring`]), per-thread credentials ([`creds`]); the
//! memory of mapped files ([`window`]), userfaultfd ([`uffd`]), the table of user mappings ([`mapped`]) and a bit for each page
//! of one ([`page_bits`]).
//!
//! *Does not own*: what a frame holds, when memory may be touched, any file.
//!
//! *Locking*: the arena's free list and a ring's submission queue are leaves (class 6). Nothing here blocks
//! on another room.
#![allow(
    unsafe_code,
    reason = "the one room that is allowed to; see docs/decisions/"
)]

pub mod arena;
pub mod bus;
pub mod clock;
pub mod copy;
pub mod creds;
mod descriptor;
mod epochs;
pub mod exit;
pub mod faultin;
pub mod forked;
pub mod futex;
pub mod homes;
pub mod iov;
pub mod lend;
pub mod limits;
pub mod loan;
pub mod mapped;
pub mod page_bits;
pub mod quiet;
pub mod record_lock;
pub mod region;
#[cfg(test)]
mod region_for_tests;
pub mod span;
mod stacks;
pub mod sys;
pub mod uffd;
pub mod uring;
pub mod window;

pub use arena::{Arena, ArenaError, Charge, Frame, FrameRun};
pub use copy::{Access, CopyStop};
pub use forked::forked;
pub use homes::Homes;
pub use iov::{Direction, IovCursor};
pub use lend::{Lending, PinStop, PinnedPart};
pub use loan::Loan;
pub use mapped::{Lent, MappedMemory, SignalVerdict};
pub use page_bits::PageBits;
pub use quiet::{Expecting, Quiet};
pub use span::{AlignedBuf, IoSpan, RawSpan, Segments};
pub use uffd::{Delivery, InstallStop, Installed, Privilege, Uffd};
pub use window::{UserMap, UserMapKind, Window};
