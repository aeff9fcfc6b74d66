//! The program's memory, lent to one transfer.
//!
//! *Owns*: the list of addresses a store is given for a caller's buffers: plain memory as it is, memory of our own mappings
//! by the library's own address, pinned; and the waiting until the transfer has let go of all of it.
//!
//! *Does not own*: pages and their pins ([`MappedMemory::pin`](crate::MappedMemory::pin)); what to do about memory that
//! cannot be lent.
//!
//! *Locking*: pins are leaves. Who lends mapped memory holds whatever the transfer needs already; a debug build panics when
//! a lock of classes 1 to 5 is taken before the pins are back (SEMANTICS.md section E).

use std::any::Any;
use std::sync::Arc;

use pinfold_base::rank;

use crate::copy::Access;
use crate::iov::{Direction, IovCursor};
use crate::mapped::{self, Extent};
use crate::span::Segments;

/// Why memory of a mapping was not pinned for a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinStop {
    /// The page is not there, or not dirty where the transfer writes to it, or busy: bring it in with nothing held.
    Cold,
    /// As much is pinned as one transfer may have; the rest is for the next.
    Full,
    /// The page has as many pins as it may have (`ENOMEM`).
    TooMany,
    /// The bytes are the mapping's own and not the file's: copy them.
    Private,
    /// Nobody may access them: beyond the end of the file, or written to in a mapping for reading.
    Forbidden,
}

/// What a mapping pinned of a range: from its first byte on, as far as it came.
pub struct PinnedPart {
    /// The library's own addresses, and what keeps them mapped; as many bytes as were pinned.
    pub segments: Segments,
    /// Gives the pins back when it is dropped.
    pub pins: Box<dyn Any + Send + Sync>,
    /// Why it ended before the range did.
    pub stop: Option<PinStop>,
}

impl PinnedPart {
    /// Makes the answer that nothing was pinned.
    #[must_use]
    pub fn none(stop: PinStop) -> Self {
        Self {
            segments: Segments::new(Arc::new(())),
            pins: Box::new(()),
            stop: Some(stop),
        }
    }
}

impl std::fmt::Debug for PinnedPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PinnedPart")
            .field("segments", &self.segments)
            .field("stop", &self.stop)
            .finish_non_exhaustive()
    }
}

/// How much one transfer is lent.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of mapped memory at most. Other memory is not counted.
    pub mapped_max: usize,
    /// What is lent of a cursor that cannot be lent as a whole is a multiple of so many bytes. At least 1.
    pub granule: usize,
}

/// What came of lending memory to a transfer.
#[derive(Debug)]
#[must_use = "the caller goes on behind `bytes` even when the lending stopped"]
pub struct Lending<R> {
    /// Bytes the transfer was given, from the cursor's position on.
    pub bytes: usize,
    /// The transfer's outcome; none when there was nothing to give it.
    pub outcome: Option<R>,
    /// Why it was not given all of the cursor.
    pub stop: Option<PinStop>,
}

/// What is lent, taken back on every way out, panics included.
struct Lent(Segments);

impl Drop for Lent {
    fn drop(&mut self) {
        while self.0.is_shared() {
            // A completion has run already; the engine lets go of its copy within microseconds.
            std::thread::yield_now();
        }
    }
}

impl Segments {
    /// Runs `work` with a list of what is ahead of a user cursor, for I/O that goes to the user's memory itself.
    ///
    /// Returns only when every copy of the list is gone, that is, when every transfer over it has ended: the caller's
    /// borrow covers all accesses, and all pins are given back. Plain addresses need not be mapped; the kernel answers
    /// `EFAULT`. Only the kernel may access them. Takes no fault and waits for nobody before `work` runs.
    pub fn lend_user<R>(
        cursor: &IovCursor<'_>,
        limits: &Limits,
        work: impl FnOnce(&Self) -> R,
    ) -> Lending<R> {
        let gathered = Gathered::of(cursor, limits);
        let stop = gathered.stop;
        let _leaf = (!gathered.parts.is_empty()).then(rank::hold_pins);
        let lent = Lent(gathered.lend(limits));
        let bytes = lent.0.bytes();
        Lending {
            bytes,
            outcome: (bytes > 0).then(|| work(&lent.0)),
            stop,
        }
    }
}

enum Piece {
    Plain { addr: usize, len: usize },
    Pinned(usize),
}

struct Gathered {
    pieces: smallvec::SmallVec<[Piece; 4]>,
    parts: Vec<PinnedPart>,
    stop: Option<PinStop>,
}

impl Gathered {
    fn of(cursor: &IovCursor<'_>, limits: &Limits) -> Self {
        let mut gathered = Self {
            pieces: smallvec::SmallVec::new(),
            parts: Vec::new(),
            stop: None,
        };
        let access = match cursor.direction() {
            Direction::Source => Access::Read,
            Direction::Target => Access::Write,
        };
        let mut left = limits.mapped_max;
        'all: for span in cursor.spans_ahead() {
            let mut at = 0;
            while at < span.len {
                let addr = span.addr.wrapping_add(at);
                match mapped::extent(addr, span.len - at) {
                    Extent::Plain(len) => {
                        gathered.pieces.push(Piece::Plain { addr, len });
                        at += len;
                    }
                    Extent::Mapped(_) if left == 0 => {
                        gathered.stop = Some(PinStop::Full);
                        break 'all;
                    }
                    Extent::Mapped(len) => {
                        let want = len.min(left);
                        let got = gathered.pin(addr, want, access);
                        at += got;
                        left -= got;
                        if gathered.stop.is_some() {
                            break 'all;
                        }
                    }
                }
            }
        }
        gathered
    }

    /// Pins memory of one mapping; returns how many bytes, all of them unless `stop` is set.
    fn pin(&mut self, addr: usize, len: usize, access: Access) -> usize {
        let Some(part) = mapped::find(addr, |memory, _| memory.pin(addr, len, access)) else {
            // Unmapped since it was looked up: bringing it in will tell what is there now.
            self.stop = Some(PinStop::Cold);
            return 0;
        };
        let got = part.segments.bytes();
        self.stop = part.stop.or((got < len).then_some(PinStop::Cold));
        if got > 0 {
            self.pieces.push(Piece::Pinned(self.parts.len()));
            self.parts.push(part);
        }
        got
    }

    fn lend(self, limits: &Limits) -> Segments {
        let parts = Arc::new(self.parts);
        let mut all = Segments::new(Arc::clone(&parts) as Arc<dyn Any + Send + Sync>);
        for piece in &self.pieces {
            match *piece {
                Piece::Plain { addr, len } => {
                    let addr = std::ptr::with_exposed_provenance_mut(addr);
                    // SAFETY: the cursor's borrow outlives the list, whose lender waits for every copy of it; the memory
                    // is accessed by the kernel alone, which copes with bad addresses.
                    unsafe { all.push_raw(addr, len) };
                }
                Piece::Pinned(part) => {
                    for span in parts[part].segments.spans() {
                        // SAFETY: `parts`, which the list keeps, has the list that keeps this span mapped.
                        unsafe { all.push_raw(span.as_ptr(), span.len()) };
                    }
                }
            }
        }
        drop(parts);
        let odd = all.bytes() % limits.granule;
        if self.stop.is_some() && odd > 0 {
            return all.slice(0, all.bytes() - odd);
        }
        all
    }
}
