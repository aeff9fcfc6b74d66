//! Direct I/O: SEMANTICS.md section C, the part that keeps the cache honest.
//!
//! Ordinary memory is given to the kernel as it is; memory that is mapped from a file goes through a buffer of our own, which is
//! filled and emptied with nothing held.
//!
//! A write blocks the gate until it has completed, so that nobody refills its range from the store meanwhile (C-1), and
//! invalidates what it covers before and after, whatever the outcome (C-10). A read writes back what is dirty in its
//! range first. Bytes the device moved before a bad buffer are told: the prefix, not the error.

use pinfold_base::{Errno, PAGE_SIZE, Progress, page_span};
use pinfold_cache::CacheError;
use pinfold_mem::{AlignedBuf, IovCursor, Segments, faultin, mapped};
use pinfold_store::{Object, StoreError};

use crate::error::Error;
use crate::file::File;
use crate::inode::Inode;
use crate::io::{IoOptions, bad_buffer, clamp_write, copy_waiting};

/// Bytes moved at once by way of a buffer of our own (section C).
const BOUNCE_BYTES: usize = 1 << 20;
/// The same for what is appended: so much goes in one piece.
const APPEND_BOUNCE_BYTES: usize = 16 << 20;

impl File {
    pub(crate) fn read_direct(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> Progress<Error> {
        let inode = self.inode();
        let end = inode.len();
        // At the end there is nothing to read, whatever the alignment (section C).
        if cursor.count() == 0 || offset >= end {
            return Progress::complete(0);
        }
        let object = inode.object().as_ref();
        if let Err(error) = check_alignment("read", object, offset, cursor) {
            return Progress::stopped(0, error);
        }
        if touches_mappings(cursor) {
            return self.read_bounced(cursor, offset, how);
        }
        let wanted = offset..offset.saturating_add(cursor.count() as u64);
        if how.nowait
            && inode
                .pages()
                .next_dirty(offset / PAGE_SIZE)
                .is_some_and(|page| page * PAGE_SIZE < wanted.end)
        {
            return Progress::stopped(0, Error::cache("read", CacheError::WouldBlock));
        }
        if let Err(error) = inode.flush_range(wanted) {
            return Progress::stopped(0, Error::store("read", error));
        }
        // Nothing past the block that holds the end is touched.
        let block = u64::from(object.geometry().block.max(1));
        let reach = end.div_ceil(block).saturating_mul(block) - offset;
        let below_end = end - offset;
        let held_back = cursor.count();
        cursor.truncate(usize::try_from(reach).unwrap_or(usize::MAX));
        let asked = cursor.count() as u64;
        let submit = |segments: &Segments| object.read_wait(offset, segments);
        let mut moved = transfer(cursor, submit);
        if let Some(Stop::BadBuffer) = moved.stop {
            // The kernel may refuse the whole for one bad page: what is good of it is still to be had.
            let good = accessible(cursor, PAGE_SIZE as usize);
            if good > moved.done as usize {
                let whole = cursor.truncate(good);
                moved.done = moved.done.max(transfer(cursor, submit).done);
                cursor.reexpand(whole);
            }
        }
        let mut done = moved.done.min(below_end);
        if moved.stop.is_none() && moved.done < asked.min(below_end) {
            // The store's file is shorter than ours: the rest is a hole.
            cursor.advance(done as usize);
            done += fill_with_zeros(cursor, asked.min(below_end) - done);
        } else {
            // At most the cursor's count.
            cursor.advance(done as usize);
        }
        cursor.reexpand(held_back - done as usize);
        Progress {
            done,
            stop: moved.stop.map(|stop| stop.named("read", offset, held_back)),
        }
    }

    /// Writes past the cache; returns the offset behind the last byte as well.
    pub(crate) fn write_direct(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> (Progress<Error>, u64) {
        if touches_mappings(cursor) {
            return self.write_bounced(cursor, offset, how);
        }
        self.write_direct_round(cursor, offset, how, true)
    }

    /// Reads past the cache into memory that is mapped from a file: the kernel is never given such an address, so that
    /// no transfer waits for a fault, nor a fault for the transfer (D-1, D-2).
    fn read_bounced(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> Progress<Error> {
        let asked = cursor.count();
        let mut done = 0;
        let stop = loop {
            let len = cursor.count().min(BOUNCE_BYTES);
            if len == 0 {
                break None;
            }
            let mut buf = AlignedBuf::zeroed(len);
            let bounce = &mut buf.as_mut_slice()[..len];
            let mut inner = IovCursor::from_mut_slice(bounce);
            let moved = self.read_direct(&mut inner, offset + done, how);
            // At most BOUNCE_BYTES.
            let got = moved.done as usize;
            let delivered = copy_waiting(cursor, &mut bounce[..got]);
            done += delivered as u64;
            if delivered < got {
                break Some(bad_buffer("read", offset, asked));
            }
            if moved.stop.is_some() || got < len {
                break moved.stop;
            }
        };
        Progress { done, stop }
    }

    /// Writes memory that is mapped from a file past the cache.
    fn write_bounced(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> (Progress<Error>, u64) {
        let object = self.inode().object().as_ref();
        if let Err(error) = check_alignment("write", object, offset, cursor) {
            return (Progress::stopped(0, error), offset);
        }
        let asked = cursor.count();
        let block = object.geometry().block.max(1) as usize;
        let (mut done, mut end) = (0, offset);
        let stop = loop {
            // What is appended must not be torn by others who append.
            let most = if how.append {
                APPEND_BOUNCE_BYTES
            } else {
                BOUNCE_BYTES
            };
            let len = cursor.count().min(most);
            if len == 0 {
                break None;
            }
            let mark = cursor.mark();
            let mut buf = AlignedBuf::zeroed(len);
            let bounce = &mut buf.as_mut_slice()[..len];
            let got = copy_waiting(cursor, bounce);
            cursor.restore(mark);
            let whole = if got < len { got - got % block } else { got };
            if whole == 0 {
                break Some(bad_buffer("write", offset, asked));
            }
            let mut inner = IovCursor::from_slice(&bounce[..whole]);
            let (moved, behind) = self.write_direct_round(&mut inner, offset + done, how, true);
            // At most `whole`.
            cursor.advance(moved.done as usize);
            done += moved.done;
            end = behind;
            if moved.stop.is_some() || moved.done < whole as u64 {
                break moved.stop;
            }
            if got < len {
                break Some(bad_buffer("write", offset, asked));
            }
        };
        (Progress { done, stop }, end)
    }

    fn write_direct_round(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
        retry: bool,
    ) -> (Progress<Error>, u64) {
        let inode = self.inode();
        let refuse = |error| (Progress::stopped(0, error), offset);
        // Extending or sub-page writes have the file to themselves; others share it.
        let aligned = (offset | cursor.count() as u64).is_multiple_of(PAGE_SIZE);
        let inside = offset.saturating_add(cursor.count() as u64) <= inode.len();
        let shared = aligned && inside && !how.append;
        let locks = (
            shared.then(|| inode.lock_shared()),
            (!shared).then(|| inode.lock_exclusive()),
        );
        if shared && offset.saturating_add(cursor.count() as u64) > inode.len() {
            // It was cut off before the lock was ours.
            drop(locks);
            return self.write_direct_round(cursor, offset, how, retry);
        }
        let offset = if how.append { inode.len() } else { offset };
        let allowed = match clamp_write(
            offset,
            cursor.count(),
            inode.len(),
            inode.engine().file_size_limit,
        ) {
            Ok(allowed) => allowed,
            Err(error) => return refuse(error),
        };
        let held_back = cursor.truncate(allowed) - allowed;
        let outcome = write_locked(inode, cursor, offset, how);
        drop(locks);
        let mut end = offset + outcome.done;
        let mut progress = outcome.map_stop(|stop| stop.named("write", offset, allowed));
        let bad_buffer = matches!(&progress.stop, Some(error) if error.errno() == Errno::EFAULT);
        if bad_buffer && retry {
            // Nothing is held here. The kernel may refuse the whole for one bad page: what is good of it still goes.
            let good = accessible(cursor, inode.object().geometry().block.max(1) as usize);
            if good > 0 {
                let whole = cursor.truncate(good);
                let (more, more_end) = self.write_direct_round(cursor, end, how, false);
                cursor.reexpand(whole - more.done as usize);
                progress.done += more.done;
                end = more_end;
            }
        }
        cursor.reexpand(cursor.count() + held_back);
        (progress, end)
    }
}

/// The part of a direct write that runs under the inode's lock.
fn write_locked(
    inode: &Inode,
    cursor: &mut IovCursor<'_>,
    offset: u64,
    how: &IoOptions<'_>,
) -> Progress<Stop> {
    let object = inode.object().as_ref();
    if let Err(error) = check_alignment("write", object, offset, cursor) {
        return Progress::stopped(0, Stop::Refused(error));
    }
    let pages = inode.pages();
    let count = cursor.count();
    if how.nowait && pages.resident(page_span(offset, count as u64)) > 0 {
        return Progress::stopped(
            0,
            Stop::Refused(Error::cache("write", CacheError::WouldBlock)),
        );
    }
    let _blocked = pages.gate().block();
    let moved = past_cache(inode, offset, count, || {
        let moved = transfer(cursor, |segments| object.write_wait(offset, segments));
        if met_bad_memory(cursor, &moved) {
            return forget_prefix(inode);
        }
        moved
    });
    // At most the cursor's count.
    cursor.advance(moved.done as usize);
    moved
}

/// Tells whether a write stopped where memory is bad, which XFS may call an error of the device.
fn met_bad_memory(cursor: &mut IovCursor<'_>, moved: &Progress<Stop>) -> bool {
    match &moved.stop {
        Some(Stop::BadBuffer) => true,
        Some(Stop::Io(error)) if error.errno == Errno::EIO => {
            let mark = cursor.mark();
            // At most the cursor's count.
            cursor.advance(moved.done as usize);
            let next = cursor.copy_slice_nofault(&mut [0]);
            cursor.restore(mark);
            next.stop.is_some()
        }
        _ => false,
    }
}

/// Counts nothing of a write that met bad memory, and takes back what it made the store's file longer.
///
/// The kernel's file systems are not to be trusted with the rest of the last block then (T39): XFS zeroes again what it
/// wrote there, tells it as done and makes the next call an EIO; ext4 leaves blocks that show what they held before. What
/// is good goes once more, by itself.
fn forget_prefix(inode: &Inode) -> Progress<Stop> {
    let (object, end) = (inode.object(), inode.pages().end());
    if object.len().is_ok_and(|len| len > end) {
        // Should that fail as well, the next change of the size does it.
        let _ = object.set_len(end);
    }
    Progress::stopped(0, Stop::BadBuffer)
}

/// Has `submit` store `count` bytes at `offset`, and sees to it that the cache keeps no older copy of them and the file
/// reaches to their end. The caller holds the inode's lock and blocks the gate.
pub(crate) fn past_cache<E: From<StoreError>>(
    inode: &Inode,
    offset: u64,
    count: usize,
    submit: impl FnOnce() -> Progress<E>,
) -> Progress<E> {
    let pages = inode.pages();
    let range = page_span(offset, count as u64);
    if offset > pages.end() {
        pages.zero_past_end(pages.end());
    }
    // The pages at both ends may hold bytes beside the range: those must be stored before the pages go.
    let bytes = range.start * PAGE_SIZE..range.end.saturating_mul(PAGE_SIZE);
    if let Err(error) = inode.flush_range(bytes) {
        return Progress::stopped(0, error.into());
    }
    pages.invalidate(range.clone());
    let moved = submit();
    if moved.done > 0 {
        let end = pages.end();
        pages.set_end(end.max(offset + moved.done));
        inode.note_growth(end);
        inode.touch_modified();
    }
    // After the size is raised, and on errors too: what was submitted may have been stored (C-2, C-10).
    pages.invalidate(range);
    moved
}

/// Tells whether any memory ahead is mapped from a file.
fn touches_mappings(cursor: &IovCursor<'_>) -> bool {
    mapped::any()
        && cursor
            .spans_ahead()
            .any(|span| mapped::touches(span.addr, span.len))
}

fn check_alignment(
    operation: &'static str,
    object: &dyn Object,
    offset: u64,
    cursor: &IovCursor<'_>,
) -> Result<(), Error> {
    let geometry = object.geometry();
    if !geometry.direct {
        return Ok(());
    }
    let block = u64::from(geometry.block.max(1));
    let lengths = cursor
        .spans_ahead()
        .all(|span| (span.len as u64).is_multiple_of(block));
    let memory = cursor
        .spans_ahead()
        .all(|span| span.addr.is_multiple_of(geometry.memory.max(1) as usize));
    if offset.is_multiple_of(block) && lengths && memory {
        return Ok(());
    }
    Err(Error::invalid(operation, Errno::EINVAL)
        .at_range(offset..offset.saturating_add(cursor.count() as u64)))
}

/// Why a direct transfer stopped: the memory, the device, or it never began.
enum Stop {
    BadBuffer,
    Io(StoreError),
    Refused(Error),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Io(error)
    }
}

impl Stop {
    fn named(self, operation: &'static str, offset: u64, count: usize) -> Error {
        match self {
            Self::BadBuffer => bad_buffer(operation, offset, count),
            Self::Io(error) => Error::store(operation, error),
            Self::Refused(error) => error,
        }
    }
}

/// Moves what the cursor names between its own memory and the store; does not advance the cursor.
///
/// Memory is not looked at beforehand: that would cost the ordinary case a page-table walk a page.
fn transfer(
    cursor: &IovCursor<'_>,
    submit: impl Fn(&Segments) -> Progress<StoreError>,
) -> Progress<Stop> {
    let Ok(moved) = Segments::lend_user(cursor, submit) else {
        // A mapping's memory: as if it were not resident, which leads to the bounce buffer.
        return Progress::stopped(0, Stop::BadBuffer);
    };
    moved.map_stop(|error| {
        if error.errno == Errno::EFAULT {
            Stop::BadBuffer
        } else {
            Stop::Io(error)
        }
    })
}

/// Returns how much from the cursor's position on is accessible, in whole granules. Nothing may be held.
fn accessible(cursor: &IovCursor<'_>, granule: usize) -> usize {
    let count = cursor.count();
    let good = count - faultin::fault_in_cursor(cursor, count);
    good - good % granule
}

/// Writes zeros to the next `bytes` of a target cursor; returns how many.
fn fill_with_zeros(cursor: &mut IovCursor<'_>, bytes: u64) -> u64 {
    let mut zeros = [0u8; PAGE_SIZE as usize];
    let mut left = bytes;
    while left > 0 {
        let n = left.min(PAGE_SIZE) as usize;
        let copied = cursor.copy_slice_nofault(&mut zeros[..n]);
        left -= copied.done;
        if copied.stop.is_some() {
            break;
        }
    }
    bytes - left
}
