//! One file's bytes behind a seam that completes asynchronously.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use pinfold_base::sync::{Condvar, Mutex};
use pinfold_base::{Errno, Progress};
use pinfold_mem::Segments;
use pinfold_mem::uring::Attended;

/// What a store was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reading a range.
    Read,
    /// Writing a range.
    Write,
    /// Changing the size.
    SetLen,
    /// Reserving space.
    Allocate,
    /// Punching or zeroing a range.
    Punch,
    /// Making bytes durable.
    Sync,
    /// Looking for data or a hole.
    Seek,
    /// Reading or changing attributes.
    Attributes,
    /// Taking up a fencing token.
    TakeUp,
}

/// A store's refusal: the operation, the range it concerned, and the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreError {
    /// What was tried.
    pub operation: Operation,
    /// First byte concerned.
    pub offset: u64,
    /// Bytes concerned; 0 when the operation has no range.
    pub len: u64,
    /// The error number.
    pub errno: Errno,
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "store: {:?} of {} bytes at {}: {}",
            self.operation, self.len, self.offset, self.errno
        )
    }
}

impl std::error::Error for StoreError {}

/// Result of a store's blocking operation.
pub type StoreResult<T> = Result<T, StoreError>;

/// Called exactly once when a transfer ends, on the thread that learns of it (perhaps the submitting one, before
/// `submit` returns). It takes no lock above class 6 and does not block.
pub type Completion = Box<dyn FnOnce(Progress<StoreError>) + Send>;

/// One range on its way: `segments.bytes()` bytes at `offset`.
pub struct Transfer {
    /// Position in the file, in bytes.
    pub offset: u64,
    /// Where the bytes come from (write) or go to (read), in file order.
    pub segments: Segments,
    /// Told the outcome.
    pub done: Completion,
}

impl fmt::Debug for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Transfer({} + {})", self.offset, self.segments.bytes())
    }
}

/// What a store likes: alignments and sizes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Offsets and lengths that are multiples of this avoid the slow path for tails. A power of two, at most 4096.
    pub block: u32,
    /// Memory alignment that direct transfers need. A power of two, at most 4096.
    pub memory: u32,
    /// The size above which a larger transfer is no faster.
    pub transfer_best: u32,
    /// Whether transfers by-pass the kernel's page cache.
    pub direct: bool,
}

/// How much a sync makes durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncScope {
    /// Data and what is needed to read it back (fdatasync).
    Data,
    /// All of it, times included (fsync).
    All,
}

/// What [`Object::seek`] looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is data (SEEK_DATA).
    Data,
    /// The next byte that is in a hole (SEEK_HOLE); the end of the file counts as one.
    Hole,
}

/// How [`Object::rearrange`] changes a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rearrange {
    /// The range reads as zeros and stays reserved; the size stays.
    Zero,
    /// The range is taken out and what follows moves down; the file gets shorter.
    Collapse,
    /// A hole of the range's length is put in and what follows moves up; the file gets longer.
    Insert,
}

/// One file's bytes.
///
/// Reads and writes are given as ranges, many may be in flight, in any order and on any thread; overlapping
/// writes in flight have no defined order. A read that meets the end of the file completes short
/// (`Progress { done: less, stop: None }`). A write never makes the file longer than its last byte.
/// Everything but `read`, `write` may block.
#[expect(
    clippy::len_without_is_empty,
    reason = "the stored size may fail to be known; nobody asks whether it is zero"
)]
pub trait Object: Send + Sync + fmt::Debug {
    /// Returns what this store likes.
    fn geometry(&self) -> Geometry;

    /// Tells whether reads are possible; a file opened for writing alone by a caller without read permission is
    /// served without read-modify-write.
    fn readable(&self) -> bool {
        true
    }

    /// Tells whether this process itself copies from and to the memory of transfers, which then has to be accessible;
    /// otherwise only the kernel touches it, and copes with memory that is not.
    fn copies(&self) -> bool {
        false
    }

    /// Takes up a fencing token: the right that this node has to the file from now on, asked for before anything is read or
    /// written under it. Tokens of one file grow with each grant that could conflict with an earlier one, on whichever node.
    ///
    /// A store that compares them refuses from now on whatever this or another node's object sends that took up a smaller one,
    /// and that was not done yet, with `ESTALE`: a write that comes late, of a node that stood still and does not know that it
    /// lost its right, changes nothing. An object store does so by a condition on each put.
    ///
    /// What is not overridden compares nothing, as directories of a kernel filesystem: who shares them relies on the
    /// node's own clock, and on whoever fences it.
    ///
    /// # Errors
    /// `ESTALE` if a larger token was taken up; whatever the store says.
    fn take_up(&self, token: u64) -> StoreResult<()> {
        let _ = token;
        Ok(())
    }

    /// Starts reads. Does not wait for them.
    fn read(&self, batch: Vec<Transfer>);

    /// Starts writes. Does not wait for them.
    fn write(&self, batch: Vec<Transfer>);

    /// Starts a read whose completion may run in the thread that waits for it; does not wait. Returns the queue that has to be
    /// [attended](Attended) to for that; `None` where the store sees to the completion by itself.
    ///
    /// In such a queue nothing is tried again: less than all, and an error number that another try would not meet, are as
    /// good as nothing.
    fn read_attended(&self, transfer: Transfer) -> Option<Arc<Attended>> {
        self.read(vec![transfer]);
        None
    }

    /// Reads one range and waits, in the calling thread if that is cheaper than a completion.
    fn read_wait(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        wait_for(|done| {
            self.read(vec![Transfer {
                offset,
                segments: segments.clone(),
                done,
            }]);
        })
    }

    /// Reads one range in the calling thread, which may be in a signal handler: allocates nothing, takes no lock that one
    /// may wait for with memory being allocated. `None`, with nothing done, where that cannot be.
    fn read_here(&self, offset: u64, segments: &Segments) -> Option<Progress<StoreError>> {
        let _ = (offset, segments);
        None
    }

    /// Writes one range and waits.
    fn write_wait(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        wait_for(|done| {
            self.write(vec![Transfer {
                offset,
                segments: segments.clone(),
                done,
            }]);
        })
    }

    /// As [`write_wait`](Self::write_wait), for the program's own call: RLIMIT_FSIZE of this moment binds the calling thread, as
    /// it does in pwrite(2). What is written for others, or later, must not meet it here.
    fn write_bound(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        self.write_wait(offset, segments)
    }

    /// Returns the stored size in bytes.
    ///
    /// # Errors
    /// Whatever the store says.
    fn len(&self) -> StoreResult<u64>;

    /// Sets the stored size; bytes it grows over read as zeros.
    ///
    /// # Errors
    /// Whatever the store says.
    fn set_len(&self, len: u64) -> StoreResult<()>;

    /// Reserves space so that writing `range` cannot fail for want of it, without changing the size.
    ///
    /// # Errors
    /// `ENOSPC`, `EDQUOT`; `EOPNOTSUPP` where the store cannot reserve.
    fn allocate(&self, range: Range<u64>) -> StoreResult<()>;

    /// Makes `range` read as zeros and gives its space back where the store can; the size stays.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the store cannot.
    fn punch(&self, range: Range<u64>) -> StoreResult<()>;

    /// Changes a range in a way only some stores can.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the store cannot, `EINVAL` for a range it cannot.
    fn rearrange(&self, how: Rearrange, range: Range<u64>) -> StoreResult<()> {
        let _ = how;
        Err(StoreError {
            operation: Operation::Punch,
            offset: range.start,
            len: range.end.saturating_sub(range.start),
            errno: Errno::EOPNOTSUPP,
        })
    }

    /// Returns how many bytes the store could still take, over all its files; `None` where it cannot tell.
    fn space_left(&self) -> Option<u64> {
        None
    }

    /// Makes everything that has completed durable.
    ///
    /// # Errors
    /// Whatever the store says; then nothing is known about what is durable.
    fn sync(&self, scope: SyncScope) -> StoreResult<()>;

    /// Finds the next data or hole at or after `offset`; `None` past the end.
    ///
    /// # Errors
    /// Whatever the store says.
    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>>;
}

/// Runs `start` with a completion and waits until that is called; `EIO` when it is dropped instead.
pub fn wait_for(start: impl FnOnce(Completion)) -> Progress<StoreError> {
    let slot = Arc::new((Mutex::new(None), Condvar::new()));
    let answer = Answer(Arc::clone(&slot));
    start(Box::new(move |outcome| answer.tell(outcome)));
    let mut outcome = slot.0.lock();
    loop {
        if let Some(outcome) = outcome.take() {
            return outcome;
        }
        outcome = slot.1.wait(outcome);
    }
}

/// What is told to whoever waits: an error when it is dropped untold, as by a store that panics in a thread of its own.
struct Answer(Arc<(Mutex<Option<Progress<StoreError>>>, Condvar)>);

impl Answer {
    fn tell(&self, outcome: Progress<StoreError>) {
        self.0.0.lock().get_or_insert(outcome);
        self.0.1.notify_all();
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // Told already, it stays what it is, or nobody waits any more.
        self.tell(Progress::stopped(
            0,
            StoreError {
                operation: Operation::Attributes,
                offset: 0,
                len: 0,
                errno: Errno::EIO,
            },
        ));
    }
}
