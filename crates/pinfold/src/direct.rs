//! Direct I/O: SEMANTICS.md section C.
//!
//! *Owns*: the order of steps that keeps the cache honest, and what a call does about memory it cannot have at once.
//!
//! A write blocks the gate until it has completed, so that nobody refills its range from the store meanwhile (C-1), and
//! invalidates what it covers before and after, whatever the outcome (C-10). A read writes back what is dirty in its
//! range first. Bytes the device moved before a bad buffer are told: the prefix, not the error.
//!
//! *Locking*: inode lock, gate, and last the pins of buffers that are mapped from files; those are back before anything
//! else is taken. Memory that is not there is brought in with nothing held, and what was checked is checked again. (An
//! optional mode, in a module of its own, tries that with the gate blocked first.)
//!
//! ```text
//!  round: lock, block the gate, drop cached pages | pin, transfer, unpin | drop cached pages, let go of all
//!    |- all of it moved ─────────────► done
//!    |- stopped at a cold page ──────► bring it in; next round, from the byte reached
//!    |- twice at the same byte ──────► by way of a buffer of our own, filled or emptied with nothing held (C-7)
//!    |- a cached page will not go ───► through the cache, and store it from there (T40)
//!    '- plain memory refused ────────► what is accessible of it, then EFAULT
//! ```

mod fdm;

use pinfold_base::{Errno, PAGE_SIZE, Progress, page_span};
use pinfold_cache::{CacheError, Harvest};
use pinfold_lock::Mode;
use pinfold_mem::lend::Limits;
use pinfold_mem::{AlignedBuf, IovCursor, PinStop, Segments, faultin, mapped};
use pinfold_store::{Object, Seek, StoreError};

use crate::error::Error;
use crate::file::File;
use crate::inode::Inode;
use crate::io::{IoOptions, bad_buffer, clamp_write, copy_waiting};
use crate::shared::Hold;

/// Bytes moved at once by way of a buffer of our own (section C).
const BOUNCE_BYTES: usize = 1 << 20;
/// The same for what is appended: so much goes in one piece.
const APPEND_BOUNCE_BYTES: usize = 16 << 20;
/// Mapped bytes that one transfer pins at most.
const PIN_BYTES_MAX: usize = 1 << 20;
/// The same as a share of the budget: others need frames while a device is slow.
const PIN_SHARE: usize = 8;
/// Times a write tries to get its range out of the cache before it goes through the cache.
const INVALIDATE_TRIES_MAX: u32 = 2;

impl File {
    pub(crate) fn read_direct(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> Progress<Error> {
        // At the end there is nothing to read, whatever the alignment (section C).
        if cursor.count() == 0 {
            return Progress::complete(0);
        }
        let inode = self.inode();
        // As for the transfer itself: SH would take DF away from other nodes, which do the same.
        let known = inode.hold_uncached("read", Mode::Deferred, how.nowait);
        match known.map(|_held| inode.len()) {
            Ok(len) if offset < len => {}
            Ok(_) => return Progress::complete(0),
            Err(error) => return Progress::stopped(0, error),
        }
        let object = self.inode().object().as_ref();
        if let Err(error) = check_alignment("read", object, offset, cursor) {
            return Progress::stopped(0, error);
        }
        let mut call = Call::new("read", self.inode(), offset, cursor, how);
        let mut done_before = 0;
        let stop = loop {
            let round = if call.bounces() {
                self.read_bounced(cursor, offset + done_before, how)
            } else {
                self.read_round(cursor, offset + done_before, how)
            };
            // The one place that counts: a retry goes on from here and adds nothing again (C-5).
            done_before += round.done;
            if let Some(stop) = call.judge(round, cursor) {
                break stop;
            }
            if offset + done_before >= self.inode().len() {
                break None;
            }
        };
        call.finish(cursor);
        Progress {
            done: done_before,
            stop,
        }
    }

    /// Writes past the cache; returns the offset behind the last byte as well.
    pub(crate) fn write_direct(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> (Progress<Error>, u64) {
        let mut call = Call::new("write", self.inode(), offset, cursor, how);
        let (mut done_before, mut end) = (0, offset);
        let stop = loop {
            let at = offset + done_before;
            let (round, behind) = match call.way {
                Way::Pinned => self.write_round(cursor, at, how),
                Way::Bounced => self.write_bounced(cursor, at, how),
                Way::Cached => self.write_cached_instead(cursor, at, how),
            };
            if round.done > 0 {
                end = behind;
            }
            done_before += round.done;
            if let Some(stop) = call.judge(round, cursor) {
                break stop;
            }
        };
        call.finish(cursor);
        let progress = Progress {
            done: done_before,
            stop,
        };
        (progress, end)
    }

    fn read_round(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> Progress<Stop> {
        let inode = self.inode();
        let held = match inode.hold_uncached("read", Mode::Deferred, how.nowait) {
            Ok(held) => held,
            Err(error) => return Progress::stopped(0, Stop::Refused(error)),
        };
        // Looked at in every round: nothing was held in between (C-9).
        let end = inode.len();
        if offset >= end {
            return Progress::complete(0);
        }
        let object = inode.object().as_ref();
        let wanted = offset..offset.saturating_add(cursor.count() as u64);
        let known_dirty = || {
            let (pages, concerned) = (inode.pages(), page_span(offset, cursor.count() as u64));
            pages.harvest(concerned.clone(), Harvest::Try);
            let next = pages.next_known_dirty(concerned.start);
            next.is_some_and(|page| page < concerned.end)
        };
        if how.nowait && known_dirty() {
            let error = Error::cache("read", CacheError::WouldBlock);
            return Progress::stopped(0, Stop::Refused(error));
        }
        if let Err(error) = inode.make_stored(wanted) {
            return Progress::stopped(0, Stop::Io(error));
        }
        // Nothing past the block that holds the end is touched.
        let block = u64::from(object.geometry().block.max(1));
        let reach = end.div_ceil(block).saturating_mul(block) - offset;
        let below_end = end - offset;
        let held_back = cursor.count();
        cursor.truncate(usize::try_from(reach).unwrap_or(usize::MAX));
        let (moved, lent) = transfer(inode, cursor, |segments| object.read_wait(offset, segments));
        // What follows may touch memory that is not there.
        drop(held);
        let wanted = (lent as u64).min(below_end);
        let mut done = moved.done.min(below_end);
        // At most the cursor's count.
        cursor.advance(done as usize);
        let mut stop = moved.stop;
        if done < wanted && matches!(stop, None | Some(Stop::Pin(_))) {
            // The store's file is shorter than ours: the rest is a hole.
            done += fill_with_zeros(cursor, wanted - done);
            if done < wanted {
                stop = Some(Stop::BadBuffer);
            }
        }
        if done == below_end {
            stop = None;
        }
        cursor.reexpand(held_back - done as usize);
        Progress { done, stop }
    }

    /// Reads some into a buffer of our own and from there, with nothing held, to where it belongs.
    fn read_bounced(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> Progress<Stop> {
        let len = cursor.count().min(BOUNCE_BYTES);
        let mut buf = AlignedBuf::zeroed(len);
        let bounce = &mut buf.as_mut_slice()[..len];
        let mut inner = IovCursor::from_mut_slice(bounce);
        let moved = self.read_round(&mut inner, offset, how);
        // At most BOUNCE_BYTES.
        let got = moved.done as usize;
        let delivered = copy_waiting(cursor, &mut bounce[..got]);
        Progress {
            done: delivered as u64,
            stop: if delivered < got {
                Some(Stop::BadBuffer)
            } else {
                moved.stop
            },
        }
    }

    /// Takes some into a buffer of our own, with nothing held, and writes that.
    fn write_bounced(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> (Progress<Stop>, u64) {
        let object = self.inode().object().as_ref();
        if let Err(error) = check_alignment("write", object, offset, cursor) {
            return (Progress::stopped(0, Stop::Refused(error)), offset);
        }
        let block = object.geometry().block.max(1) as usize;
        // What is appended must not be torn by others who append.
        let most = if how.append {
            APPEND_BOUNCE_BYTES
        } else {
            BOUNCE_BYTES
        };
        let len = cursor.count().min(most);
        let mark = cursor.mark();
        let mut buf = AlignedBuf::zeroed(len);
        let bounce = &mut buf.as_mut_slice()[..len];
        let got = copy_waiting(cursor, bounce);
        cursor.restore(mark);
        let whole = if got < len { got - got % block } else { got };
        if whole == 0 {
            return (Progress::stopped(0, Stop::BadBuffer), offset);
        }
        let mut inner = IovCursor::from_slice(&bounce[..whole]);
        let (mut moved, end) = self.write_round(&mut inner, offset, how);
        // At most `whole`.
        cursor.advance(moved.done as usize);
        if moved.stop.is_none() && moved.done == whole as u64 && got < len {
            moved.stop = Some(Stop::BadBuffer);
        }
        (moved, end)
    }

    /// Writes some through the cache and stores it from there: a cached page of the range would not go (section C).
    fn write_cached_instead(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> (Progress<Stop>, u64) {
        let mark = cursor.mark();
        let most = if how.append {
            cursor.count()
        } else {
            BOUNCE_BYTES
        };
        let asked = most.min(cursor.count()) as u64;
        let (written, end) = cursor.truncated(most, |part| self.write_buffered(part, offset, how));
        if written.done > 0
            && let Err(error) = self.inode().flush_range(end - written.done..end)
        {
            // As if it had not been written: what the device refused is no direct write.
            cursor.restore(mark);
            return (Progress::stopped(0, Stop::Io(error)), offset);
        }
        let mut written = written.map_stop(Stop::Refused);
        if written.stop.is_none() && written.done < asked {
            written.stop = Some(Stop::Limit);
        }
        (written, end)
    }

    fn write_round(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> (Progress<Stop>, u64) {
        let inode = self.inode();
        // Extending or sub-page writes have the file to themselves; others share it.
        let len = cursor.count() as u64;
        let inside = || offset.saturating_add(len) <= inode.len();
        let may_share = (offset | len).is_multiple_of(PAGE_SIZE) && !how.append;
        let refused = |error| (Progress::stopped(0, Stop::Refused(error)), offset);
        let mut shared = None;
        if may_share && inside() {
            let lock = inode.lock_shared();
            let held = match hold_direct(inode, Mode::Deferred, how) {
                Ok(held) => held,
                Err(error) => return refused(error),
            };
            // It may have been cut off before the lock was ours (C-9).
            let sole = !inside() || (held.is_some() && has_hole(inode, offset, len));
            shared = (!sole).then_some((held, lock));
        }
        let _exclusive = match shared {
            Some(_) => None,
            None => {
                let lock = inode.lock_exclusive();
                match hold_direct(inode, Mode::Exclusive, how) {
                    Ok(held) => Some((held, lock)),
                    Err(error) => return refused(error),
                }
            }
        };
        let offset = if how.append { inode.len() } else { offset };
        let allowed = match clamp_write(
            offset,
            cursor.count(),
            inode.len(),
            inode.engine().file_size_limit,
        ) {
            Ok(allowed) => allowed,
            Err(error) => return (Progress::stopped(0, Stop::Refused(error)), offset),
        };
        let mut moved =
            cursor.truncated(allowed, |cursor| write_locked(inode, cursor, offset, how));
        if moved.stop.is_none() && moved.done == allowed as u64 && cursor.count() > 0 {
            moved.stop = Some(Stop::Limit);
        }
        let end = offset + moved.done;
        (moved, end)
    }
}

/// How the next bytes of a call go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Between the store and the caller's memory, pinned where it is mapped.
    Pinned,
    /// By way of a buffer of our own.
    Bounced,
    /// Through the cache.
    Cached,
}

/// What one call has met so far: decides how it goes on, and that it ends.
struct Call<'a> {
    operation: &'static str,
    offset: u64,
    asked: usize,
    how: &'a IoOptions<'a>,
    /// How bytes go about which nothing is known.
    usual: Way,
    way: Way,
    /// Bytes brought in at once: what one transfer may pin, so that what is brought in last does not push out the first.
    window: usize,
    /// What is written of accessible memory before memory that is not is a multiple of so many bytes.
    granule: usize,
    /// Rounds at one place that moved nothing although its memory was brought in.
    fruitless: u32,
    /// Bytes behind memory that nobody can access; set once it was looked for.
    beyond_good: Option<usize>,
}

impl<'a> Call<'a> {
    fn new(
        operation: &'static str,
        inode: &Inode,
        offset: u64,
        cursor: &IovCursor<'_>,
        how: &'a IoOptions<'a>,
    ) -> Self {
        // An append goes in one piece, and what is pinned may stop half way.
        // A store that touches the memory itself needs memory that is there.
        let usual = if inode.object().copies() {
            Way::Bounced
        } else {
            Way::Pinned
        };
        let way = if how.append && touches_mappings(cursor) {
            Way::Bounced
        } else {
            usual
        };
        Self {
            operation,
            offset,
            asked: cursor.count(),
            how,
            usual,
            way,
            window: pin_bytes_max(inode),
            granule: inode.object().geometry().block.max(1) as usize,
            fruitless: 0,
            beyond_good: None,
        }
    }

    fn bounces(&self) -> bool {
        self.way == Way::Bounced
    }

    fn bad_buffer(&self) -> Error {
        bad_buffer(self.operation, self.offset, self.asked)
    }

    /// Decides after a round: the call's end and its error, or `None` to go on as [`Call::way`] says. Nothing is held.
    fn judge(
        &mut self,
        round: Progress<Stop>,
        cursor: &mut IovCursor<'_>,
    ) -> Option<Option<Error>> {
        let way = std::mem::replace(&mut self.way, self.usual);
        if round.done > 0 {
            self.fruitless = 0;
        }
        let Some(stop) = round.stop else {
            if cursor.count() > 0 && round.done > 0 && way != Way::Pinned {
                // One piece of several.
                if self.how.append {
                    self.way = way;
                }
                return self.interrupted();
            }
            let bad = self.beyond_good.filter(|&bytes| bytes > 0);
            return Some(bad.map(|_| self.bad_buffer()));
        };
        match stop {
            Stop::Pin(why) => self.resolve(why, round.done, cursor),
            Stop::CopyFault if self.beyond_good.is_none() => {
                // The kernel may refuse the whole for one bad page: what is good of it still goes.
                let good = accessible(cursor, self.granule);
                if good == 0 {
                    return Some(Some(self.bad_buffer()));
                }
                self.beyond_good = Some(cursor.truncate(good) - good);
                None
            }
            Stop::CopyFault | Stop::BadBuffer => Some(Some(self.bad_buffer())),
            Stop::Cached => {
                self.way = Way::Cached;
                self.interrupted()
            }
            Stop::Limit => Some(None),
            Stop::Io(error) => Some(Some(Error::store(self.operation, error))),
            Stop::Refused(error) => Some(Some(error)),
        }
    }

    /// Goes on unless somebody has ended the call.
    fn interrupted(&self) -> Option<Option<Error>> {
        let error = self.how.check_cancelled().err()?;
        Some(Some(Error::cache(self.operation, error)))
    }

    /// Brings in memory that could not be pinned.
    fn resolve(
        &mut self,
        why: PinStop,
        progressed: u64,
        cursor: &IovCursor<'_>,
    ) -> Option<Option<Error>> {
        match why {
            PinStop::Forbidden => return Some(Some(self.bad_buffer())),
            PinStop::TooMany if progressed == 0 => {
                let error = Error::cache(self.operation, CacheError::TooManyPins);
                return Some(Some(error));
            }
            PinStop::Private => {
                self.way = Way::Bounced;
                return self.interrupted();
            }
            PinStop::Full | PinStop::TooMany if progressed > 0 => return self.interrupted(),
            PinStop::Cold | PinStop::Full | PinStop::TooMany => {}
        }
        if self.how.nowait {
            return Some(Some(Error::cache(self.operation, CacheError::WouldBlock)));
        }
        self.fruitless += 1;
        if self.fruitless > 1 {
            // It was brought in and is gone again, perhaps because it lies in what is being written (C-7).
            self.fruitless = 0;
            self.way = Way::Bounced;
            return self.interrupted();
        }
        let window = cursor.count().min(self.window);
        if faultin::fault_in_cursor(cursor, window) == window {
            return Some(Some(self.bad_buffer()));
        }
        self.interrupted()
    }

    /// Gives the cursor back what was held back behind inaccessible memory.
    fn finish(&self, cursor: &mut IovCursor<'_>) {
        if let Some(bytes) = self.beyond_good {
            cursor.reexpand(cursor.count() + bytes);
        }
    }
}

/// Takes the glock for a direct write.
fn hold_direct<'a>(inode: &'a Inode, mode: Mode, how: &IoOptions<'_>) -> Result<Hold<'a>, Error> {
    let held = inode.hold_pages(mode, how.nowait);
    held.map_err(|error| Error::cache("write", error))
}

/// Tells whether a write would fill a hole, which other nodes must not see half done; also where the store cannot tell.
fn has_hole(inode: &Inode, offset: u64, len: u64) -> bool {
    let hole = inode.object().seek(Seek::Hole, offset);
    !hole.is_ok_and(|hole| hole.is_some_and(|at| at >= offset.saturating_add(len)))
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
    let blocked = pages.gate().block();
    let moved = if inode.engine().faults_disabled_mapping && !how.nowait && touches_mappings(cursor)
    {
        fdm::write(inode, cursor, offset, &blocked)
    } else {
        past_cache(inode, offset, count, || {
            store(inode, cursor, |segments| {
                write_bound(inode, offset, segments)
            })
        })
    };
    // At most the cursor's count.
    cursor.advance(moved.done as usize);
    moved
}

/// Writes what is lent, bound by RLIMIT_FSIZE where this process' binds writers.
fn write_bound(inode: &Inode, offset: u64, segments: &Segments) -> Progress<StoreError> {
    if inode.engine().file_size_limit {
        inode.object().write_bound(offset, segments)
    } else {
        inode.object().write_wait(offset, segments)
    }
}

/// Has `submit` store what the cursor names, as far as it can be lent at once; does not advance the cursor.
fn store(
    inode: &Inode,
    cursor: &mut IovCursor<'_>,
    submit: impl Fn(&Segments) -> Progress<StoreError>,
) -> Progress<Stop> {
    let (moved, _) = transfer(inode, cursor, submit);
    if met_bad_memory(cursor, &moved) {
        return forget_prefix(inode);
    }
    moved
}

/// Tells whether a write stopped where memory is bad, which XFS may call an error of the device.
fn met_bad_memory(cursor: &mut IovCursor<'_>, moved: &Progress<Stop>) -> bool {
    match &moved.stop {
        Some(Stop::CopyFault) => true,
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
    Progress::stopped(0, Stop::CopyFault)
}

/// Has `submit` store `count` bytes at `offset`, and sees to it that the cache keeps no older copy of them and the file
/// reaches to their end. The caller holds the inode's lock and blocks the gate; `submit` takes neither those nor folios.
pub(crate) fn past_cache<E: From<StoreError> + From<Cached>>(
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
    // Stores go on in a mapping that has its entries: one between these steps would keep the page, with bytes older than
    // those about to be stored (C-1). The gate keeps new entries off.
    pages.harvest(range.clone(), Harvest::Withdraw);
    let mut tries = 0;
    loop {
        if let Err(error) = inode.make_stored(bytes.clone()) {
            return Progress::stopped(0, error.into());
        }
        if pages.invalidate(range.clone()) {
            break;
        }
        // A store through a mapping came in between, or a transfer writes to the page, or the program keeps it.
        tries += 1;
        if tries == INVALIDATE_TRIES_MAX {
            return Progress::stopped(0, Cached.into());
        }
    }
    let moved = submit();
    if moved.done > 0 {
        let end = pages.end();
        pages.set_end(end.max(offset + moved.done));
        inode.note_growth(end);
        // Where other nodes write past the cache as well, the times are the store's.
        if !inode.is_deferred() {
            inode.touch_modified();
        }
    }
    // After the size is raised, and on errors too: what was submitted may have been stored (C-2, C-10).
    pages.invalidate(range);
    moved
}

/// Returns how many mapped bytes one transfer may pin.
fn pin_bytes_max(inode: &Inode) -> usize {
    let share = inode.engine().cache.pages_max() / PIN_SHARE;
    PIN_BYTES_MAX.min(share.max(1) * PAGE_SIZE as usize)
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

/// A cached page of the range is dirty again, or kept by the program: it cannot be by-passed (ENOTBLK).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cached;

/// Why a round of direct I/O stopped.
enum Stop {
    /// Memory of a mapping is not to be pinned as it is. The only one that a retry can help.
    Pin(PinStop),
    /// The kernel refused other memory.
    CopyFault,
    /// Nobody can access the memory.
    BadBuffer,
    /// A cached page would not go.
    Cached,
    /// The file may not become longer: the call ends short. To ask for more would be a call of its own, and a signal.
    Limit,
    Io(StoreError),
    Refused(Error),
}

impl From<StoreError> for Stop {
    fn from(error: StoreError) -> Self {
        Self::Io(error)
    }
}

impl From<Cached> for Stop {
    fn from(_: Cached) -> Self {
        Self::Cached
    }
}

/// Moves what the cursor names between the store and the memory itself, as far as that can be lent at once; does not
/// advance the cursor. Returns how many bytes the transfer was for as well.
///
/// Pins are held during this call alone. Plain memory is not looked at beforehand: that would cost the ordinary case a
/// page-table walk a page.
fn transfer(
    inode: &Inode,
    cursor: &IovCursor<'_>,
    submit: impl Fn(&Segments) -> Progress<StoreError>,
) -> (Progress<Stop>, usize) {
    let geometry = inode.object().geometry();
    let limits = Limits {
        mapped_max: pin_bytes_max(inode),
        granule: if geometry.direct {
            geometry.block.max(1) as usize
        } else {
            1
        },
    };
    let lending = Segments::lend_user(cursor, &limits, submit);
    let mut moved = lending.outcome.unwrap_or(Progress::complete(0));
    // What a store boasts of beyond that, nobody has asked of it.
    moved.done = moved.done.min(lending.bytes as u64);
    let mut moved = moved.map_stop(|error| match error.errno {
        Errno::EFAULT => Stop::CopyFault,
        _ => Stop::Io(error),
    });
    if moved.stop.is_none() {
        moved.stop = lending.stop.map(Stop::Pin);
    }
    (moved, lending.bytes)
}

/// Returns how much from the cursor's position on is accessible, in whole granules. Nothing may be held.
fn accessible(cursor: &IovCursor<'_>, granule: usize) -> usize {
    let count = cursor.count();
    let good = count - faultin::fault_in_cursor(cursor, count);
    good - good % granule
}

/// Writes zeros to the next `bytes` of a target cursor; returns how many, fewer only before inaccessible memory. Nothing
/// may be held.
fn fill_with_zeros(cursor: &mut IovCursor<'_>, bytes: u64) -> u64 {
    let mut zeros = [0u8; PAGE_SIZE as usize];
    let mut left = bytes;
    while left > 0 {
        let n = left.min(PAGE_SIZE) as usize;
        let copied = copy_waiting(cursor, &mut zeros[..n]);
        left -= copied as u64;
        if copied < n {
            break;
        }
    }
    bytes - left
}
