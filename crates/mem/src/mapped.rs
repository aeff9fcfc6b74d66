//! The process-wide table of user mappings: whose is an address, and how are its bytes had without touching it.
//!
//! *Owns*: the table, and the waiting for look-ups that are under way when a mapping goes. The trait [`MappedMemory`], which
//! the room of faults implements.
//!
//! *Does not own*: the mappings, their pages, the answer to a fault.
//!
//! *Locking*: changing the table takes a mutex that no look-up takes, and costs the same however many mappings there are, nearly
//! (`table`). Look-ups take nothing and allocate nothing, so that
//! a signal handler may make them, on top of another look-up of the same thread.
//!
//! ```text
//!  find(addr):  enter epochs -> search the table -> count oneself a user of the entry -> leave epochs -> work -> uncount
//!  remove:      new table without it -> wait for epochs -> free the old table -> wait until its users are 0
//! ```
//! The work may take as long as a store takes to answer, and holds up the removal of that one mapping alone.

mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pinfold_base::Errno;
use smallvec::SmallVec;

use crate::copy::Access;
use crate::epochs::{Epochs, back_off};
use crate::lend::{PinStop, PinnedPart};
use table::Table;

/// The most address ranges the table holds; the kernel's own limit is 65530 (vm.max_map_count).
pub const MAPPINGS_MAX: usize = 32768;

/// What a signal handler was told about a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalVerdict {
    /// The access will succeed, or fault afresh: repeat the instruction.
    Resolved,
    /// The program shall have its signal: beyond the end of the file, an error of the store, nothing of ours.
    NotOurs,
}

/// What came of borrowing the library's own address of mapped bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lent {
    /// The copy moved that many bytes, at least one.
    Done(usize),
    /// The bytes cannot be had without waiting: fault them in with nothing held.
    NeedFault,
    /// No fault-in can help: a store to a mapping for reading, an access beyond the end of the file.
    Fatal,
}

/// Memory of a mapping, as copies, fault-in and the signal handler see it.
pub trait MappedMemory: Send + Sync {
    /// Serves SIGBUS at `addr`, in a thread that holds no lock of the library.
    ///
    /// Async-signal-safe: allocates nothing, takes no lock that a program can hold. Called on a stack of 128 KiB that is
    /// set aside for it, with all other signals blocked; a panic ends the process.
    fn signal_fault(&self, addr: usize, access: Access) -> SignalVerdict;

    /// Gives `copy` the library's own address of up to `len` bytes at `addr` for the time of the call, if they can be had
    /// without waiting; any lock may be held.
    ///
    /// `copy` gets an address and a length and returns the bytes it moved. It may be called for several adjacent parts
    /// in turn, and not again after it moved less than it was given. For [`Access::Write`] the bytes may be written when
    /// it is called.
    fn with_lent(
        &self,
        addr: usize,
        len: usize,
        access: Access,
        copy: &mut dyn FnMut(*mut u8, usize) -> usize,
    ) -> Lent;

    /// Pins up to `len` bytes at `addr` for a transfer that reads them, or writes to them for [`Access::Write`], as far as
    /// that needs no waiting, no fault and no I/O; any lock may be held. Memory that knows no pins is copied.
    fn pin(&self, addr: usize, len: usize, access: Access) -> PinnedPart {
        let _ = (addr, len, access);
        PinnedPart::none(PinStop::Private)
    }

    /// Makes bytes accessible, with nothing held: reads pages in; for [`Access::Write`] does what a first store does, and
    /// stores nothing. Returns the bytes NOT made accessible, counted from the first that was not.
    fn fault_in(&self, addr: usize, len: usize, access: Access) -> usize;
}

/// Why a mapping could not be entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InsertError {
    /// [`MAPPINGS_MAX`] ranges are in the table.
    TooMany,
    /// The range is empty, or part of it is in the table.
    Taken,
    /// No memory for the stacks that faults are served on.
    NoMemory,
}

impl InsertError {
    /// Returns the error number.
    #[must_use]
    pub fn errno(self) -> Errno {
        match self {
            Self::TooMany | Self::NoMemory => Errno::ENOMEM,
            Self::Taken => Errno::EEXIST,
        }
    }
}

impl fmt::Display for InsertError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany => write!(f, "{MAPPINGS_MAX} mappings are in use"),
            Self::Taken => write!(f, "the address range is mapped already"),
            Self::NoMemory => write!(f, "no memory to serve faults with"),
        }
    }
}

impl std::error::Error for InsertError {}

/// One address range of one mapping.
struct Entry {
    range: Range<usize>,
    memory: Arc<dyn MappedMemory>,
    /// Look-ups that work on it now.
    users: AtomicUsize,
}

/// The entries of one mapping.
type Entries = SmallVec<[Arc<Entry>; 1]>;

/// Ranges in the table, and mappings about to be made; what everything else depends on.
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// The table; null while it is empty. A leaked `Box`, freed by who replaces it.
static TABLE: AtomicPtr<Table> = AtomicPtr::new(std::ptr::null_mut());
/// One change at a time.
static CHANGES: Mutex<()> = Mutex::new(());
#[cfg(not(loom))]
static EPOCHS: Epochs = Epochs::new();
#[cfg(loom)]
static EPOCHS: std::sync::LazyLock<Epochs> = std::sync::LazyLock::new(Epochs::new);

/// Tells whether there is any mapping: the only cost of all this for programs without.
#[inline]
#[must_use]
pub fn any() -> bool {
    COUNT.load(Ordering::Relaxed) != 0
}

/// Changes the number of mappings there are, or are about to be.
pub(crate) fn count(by: isize) {
    COUNT.fetch_add(by.cast_unsigned(), Ordering::SeqCst);
}

/// Enters a range of addresses that `memory` answers for.
///
/// # Errors
/// See [`InsertError`].
pub fn insert(
    range: Range<usize>,
    memory: Arc<dyn MappedMemory>,
) -> Result<Registration, InsertError> {
    crate::forked::watch();
    crate::stacks::prepare().map_err(|_| InsertError::NoMemory)?;
    let entry = Arc::new(Entry {
        range,
        memory,
        users: AtomicUsize::new(0),
    });
    let added = Arc::clone(&entry);
    change(&[], &[added])?;
    let mut entries = SmallVec::new();
    entries.push(entry);
    Ok(Registration { entries })
}

/// A mapping's place in the table. Dropping it removes the mapping and waits until no look-up uses it.
///
/// Never drop it from within a look-up of the same mapping.
#[must_use = "dropping it removes the mapping from the table"]
pub struct Registration {
    entries: Entries,
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.entries.iter().map(|entry| &entry.range);
        f.debug_list().entries(ranges).finish()
    }
}

impl Registration {
    /// Removes a part of the addresses and waits until no look-up uses them; the rest stays found throughout.
    ///
    /// # Errors
    /// [`InsertError::TooMany`]: a range became two and there is no room; nothing has changed.
    pub fn exclude(&mut self, hole: Range<usize>) -> Result<(), InsertError> {
        let (gone, mut kept): (Entries, Entries) = self
            .entries
            .iter()
            .cloned()
            .partition(|entry| overlap(&entry.range, &hole));
        let rest: SmallVec<[Arc<Entry>; 2]> = gone
            .iter()
            .flat_map(|entry| {
                [entry.range.start..hole.start, hole.end..entry.range.end]
                    .map(|range| (range, &entry.memory))
            })
            .filter(|(range, _)| !range.is_empty())
            .map(|(range, memory)| {
                Arc::new(Entry {
                    range,
                    memory: Arc::clone(memory),
                    users: AtomicUsize::new(0),
                })
            })
            .collect();
        if gone.is_empty() {
            return Ok(());
        }
        change(&gone, &rest)?;
        kept.extend(rest);
        self.entries = kept;
        for entry in &gone {
            entry.drain();
        }
        Ok(())
    }

    /// Makes the highest of its ranges end at `end`, further up; all of it stays found throughout.
    ///
    /// # Errors
    /// [`InsertError::Taken`]: another mapping is in the way, or this has no ranges; nothing has changed.
    pub fn extend(&mut self, end: usize) -> Result<(), InsertError> {
        let last = self.entries.iter_mut().max_by_key(|entry| entry.range.end);
        let last = last.ok_or(InsertError::Taken)?;
        let longer = Arc::new(Entry {
            range: last.range.start..end,
            memory: Arc::clone(&last.memory),
            users: AtomicUsize::new(0),
        });
        change(&[Arc::clone(last)], &[Arc::clone(&longer)])?;
        let shorter = std::mem::replace(last, longer);
        shorter.drain();
        Ok(())
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // Removing alone needs no room, so it cannot fail.
        let _ = change(&self.entries, &[]);
        for entry in &self.entries {
            entry.drain();
        }
    }
}

impl Entry {
    /// Waits until no look-up uses it; it is in no table any more.
    fn drain(&self) {
        let mut turns = 0;
        while self.users.load(Ordering::Acquire) != 0 {
            back_off(&mut turns);
        }
    }
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Replaces the table by one without `gone` and with `added`, in one step for whoever looks.
fn change(gone: &[Arc<Entry>], added: &[Arc<Entry>]) -> Result<(), InsertError> {
    // A panic under this lock can only be one of allocation, before anything was changed.
    let _turn = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    let old = TABLE.load(Ordering::Acquire);
    // SAFETY: null or a table that only the holder of CHANGES, which is us, replaces and frees.
    let present = unsafe { old.as_ref() };
    let next = present.map_or_else(
        || Table::default().changed(gone, added),
        |table| table.changed(gone, added),
    )?;
    let (count, present_count) = (next.len(), present.map_or(0, Table::len));
    let new = if count == 0 {
        std::ptr::null_mut()
    } else {
        Box::into_raw(Box::new(next))
    };
    TABLE.store(new, Ordering::Release);
    // Both fit: the table has a limit.
    self::count(count as isize - present_count as isize);
    EPOCHS.synchronize();
    if !old.is_null() {
        // SAFETY: made by Box::into_raw above; no look-up sees it any more, and `present` is not used again.
        drop(unsafe { Box::from_raw(old) });
    }
    Ok(())
}

/// A look-up at work on an entry; keeps the entry (not the table) until dropped.
struct Using(*const Entry);

impl Using {
    /// Finds the entry with `addr`, if any.
    fn find(addr: usize) -> Option<Self> {
        let _inside = EPOCHS.enter();
        // SAFETY: null, or a table that is freed only after we have left the epochs.
        let table = unsafe { TABLE.load(Ordering::Acquire).as_ref() }?;
        let entry = table
            .at_or_after(addr)
            .filter(|entry| entry.range.start <= addr)?;
        entry.users.fetch_add(1, Ordering::AcqRel);
        Some(Self(Arc::as_ptr(entry)))
    }

    fn entry(&self) -> &Entry {
        // SAFETY: its registration holds the entry until `users` is zero, and we are counted there.
        unsafe { &*self.0 }
    }
}

impl Drop for Using {
    fn drop(&mut self) {
        self.entry().users.fetch_sub(1, Ordering::Release);
    }
}

/// Runs `work` with the mapping that has `addr` and its address range; `None` when none has it.
///
/// The mapping stays in being for the time of the call. Safe in signal handlers if `work` is.
pub fn find<R>(addr: usize, work: impl FnOnce(&dyn MappedMemory, Range<usize>) -> R) -> Option<R> {
    if !any() {
        return None;
    }
    let using = Using::find(addr)?;
    let entry = using.entry();
    Some(work(&*entry.memory, entry.range.clone()))
}

/// What lies at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// That many bytes from there belong to one mapping.
    Mapped(usize),
    /// That many bytes from there belong to none.
    Plain(usize),
}

/// Tells what lies at `addr`, clipped to `len` bytes.
#[must_use]
pub fn extent(addr: usize, len: usize) -> Extent {
    if !any() {
        return Extent::Plain(len);
    }
    let _inside = EPOCHS.enter();
    // SAFETY: null, or a table that is freed only after we have left the epochs.
    let table = unsafe { TABLE.load(Ordering::Acquire).as_ref() };
    match table.and_then(|table| table.at_or_after(addr)) {
        Some(entry) if entry.range.start <= addr => {
            Extent::Mapped((entry.range.end - addr).min(len))
        }
        Some(entry) => Extent::Plain((entry.range.start - addr).min(len)),
        None => Extent::Plain(len),
    }
}

/// Tells whether any byte of a range belongs to a mapping.
#[inline]
#[must_use]
pub fn touches(addr: usize, len: usize) -> bool {
    any() && len > 0 && extent(addr, len) != Extent::Plain(len)
}
