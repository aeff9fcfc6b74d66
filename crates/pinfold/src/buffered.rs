//! Buffered reads and writes: SEMANTICS.md section B.
//!
//! Copy first, without faults, under the folio lock (write) or a reference (read). Only a copy that came to nothing
//! lets go of everything and brings the memory in; after two fruitless rounds at one place the bytes go through a
//! bounce buffer. Every round commits a byte, or asks for fewer, or makes the next byte resident: it ends.

use pinfold_base::{PAGE_SIZE, Progress};
use pinfold_cache::{CacheError, PageRef, Want};
use pinfold_lock::{MayDemote, Mode};
use pinfold_mem::{AlignedBuf, CopyStop, IovCursor, Segments};
use pinfold_store::StoreError;
use std::sync::Arc;

use crate::direct::{Cached, past_cache};
use crate::engine::Reserve;
use crate::error::Error;
use crate::file::File;
use crate::io::{IoOptions, Next, Stalls, bad_buffer, bounce_in, clamp_write, copy_waiting};

const PAGE: usize = PAGE_SIZE as usize;

impl File {
    pub(crate) fn read_buffered(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> Progress<Error> {
        let pages = self.inode().pages();
        let (mut pos, mut done) = (offset, 0u64);
        let mut stalls = Stalls::default();
        if let Err(error) = self.inode().check_lease("read") {
            return Progress::stopped(0, error);
        }
        let stop = loop {
            if cursor.count() == 0 {
                break None;
            }
            if pos >= pages.end() {
                if how.nowait && done > 0 {
                    // To ask again might be to wait, and there is something to tell.
                    break None;
                }
                match self.has_grown_past(pos, how) {
                    Ok(true) => {}
                    Ok(false) => break None,
                    Err(error) => break Some(error),
                }
            }
            if let Err(error) = how.check_cancelled() {
                break Some(Error::cache("read", error));
            }
            let (page, at) = (pos / PAGE_SIZE, (pos % PAGE_SIZE) as usize);
            let cached = pages.read_cached(page, self.ahead());
            let found = match cached {
                Some(found) => found,
                None => match self.read_missing(pos, cursor.count(), how) {
                    Ok(Some(found)) => found,
                    // The size is another: looked at again.
                    Ok(None) => continue,
                    Err(error) => break Some(Error::cache("read", error)),
                },
            };
            // The size again, after the page was seen valid: data is visible before size (B-4).
            let below_end = usize::try_from(pages.end().saturating_sub(pos)).unwrap_or(usize::MAX);
            let want = below_end.min(PAGE - at).min(cursor.count());
            let copied = found.copy_out(at, want, cursor);
            pos += copied.done;
            done += copied.done;
            if copied.done > 0 {
                stalls.progressed();
            }
            let Some(stop) = copied.stop else {
                continue;
            };
            if copied.done > 0 {
                // What could be copied was; the next round starts at the failing byte.
                continue;
            }
            match read_stalled(found, at, want, stop, cursor, &mut stalls) {
                Ok(moved) => {
                    pos += moved;
                    done += moved;
                }
                Err(()) => break Some(bad_buffer("read", offset, cursor.count())),
            }
        };
        Progress { done, stop }
    }

    /// Tells whether another node has made the file longer than `pos`, which is at the end as far as known here.
    fn has_grown_past(&self, pos: u64, how: &IoOptions<'_>) -> Result<bool, Error> {
        let inode = self.inode();
        let held = inode.hold_uncached("read", Mode::Shared, how.nowait)?;
        Ok(held.is_some() && pos < inode.len())
    }

    /// Brings in the page at `pos` and those of the same request behind it; `None` where the file ends before it. What is
    /// copied out later is kept by the reference: the glock that it was read under is let go here.
    #[cold]
    fn read_missing(
        &self,
        pos: u64,
        count: usize,
        how: &IoOptions<'_>,
    ) -> Result<Option<PageRef<'_>>, CacheError> {
        let _held = self.inode().hold_pages(Mode::Shared, how.nowait)?;
        let end = self.inode().len();
        if pos >= end {
            return Ok(None);
        }
        let want = Want {
            pages: (end - pos)
                .min(count as u64)
                .saturating_add(pos % PAGE_SIZE)
                .div_ceil(PAGE_SIZE),
            ahead: Some(self.ahead()),
            nowait: how.nowait,
        };
        self.inode().pages().read(pos / PAGE_SIZE, &want).map(Some)
    }

    /// Writes through the cache; returns the offset behind the last byte as well.
    pub(crate) fn write_buffered(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> (Progress<Error>, u64) {
        if !self.inode().object().readable() {
            return self.write_through(cursor, offset, how);
        }
        let mut write = Write {
            file: self,
            how,
            pos: offset,
            placed: false,
            done: 0,
            stalls: Stalls::default(),
            held_back: 0,
            weak: None,
        };
        let stop = loop {
            match write.locked_rounds(cursor) {
                Rounds::Ended(stop) => break stop,
                Rounds::Fault(stop, bytes) => {
                    // Nothing is held here (rule zero).
                    match write.stalls.resolve(stop, cursor, bytes) {
                        Next::Retry => {}
                        Next::BadBuffer => {
                            break Some(bad_buffer("write", write.pos, cursor.count()));
                        }
                        Next::Bounce => {
                            let (buf, len) = bounce_in(cursor);
                            if len == 0 {
                                break Some(bad_buffer("write", write.pos, cursor.count()));
                            }
                            if let Err(error) = write.write_bounced(cursor, buf, len) {
                                break Some(error);
                            }
                        }
                    }
                }
            }
        };
        cursor.reexpand(cursor.count() + write.held_back);
        (
            Progress {
                done: write.done,
                stop,
            },
            write.pos,
        )
    }

    /// Writes a file that cannot be read: straight to the store, byte by byte as given, so that no page ever needs its
    /// other bytes.
    fn write_through(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> (Progress<Error>, u64) {
        let inode = self.inode();
        let (mut pos, mut done) = (offset, 0u64);
        let mut placed = false;
        let stop = loop {
            if cursor.count() == 0 {
                break None;
            }
            let mark = cursor.mark();
            let (buf, len) = bounce_in(cursor);
            if len == 0 {
                break Some(bad_buffer("write", pos, cursor.count()));
            }
            let _exclusive = inode.lock_exclusive();
            let _held = match inode.hold("write", Mode::Exclusive) {
                Ok(held) => held,
                Err(error) => {
                    cursor.restore(mark);
                    break Some(error);
                }
            };
            if how.append && !placed {
                pos = inode.len();
            }
            placed = true;
            let len = match clamp_write(pos, len, inode.len(), inode.engine().file_size_limit) {
                Ok(len) => len,
                Err(error) => {
                    cursor.restore(mark);
                    break Some(error);
                }
            };
            let segments = Segments::of_buf(&Arc::new(buf), len);
            let _blocked = inode.pages().gate().block();
            let written: Progress<Unstored> = past_cache(inode, pos, len, || {
                let mut written = inode.object().write_wait(pos, &segments);
                written.done = written.done.min(len as u64);
                written.map_stop(Unstored::Store)
            });
            cursor.restore(mark);
            // At most BOUNCE_BYTES.
            cursor.advance(written.done as usize);
            pos += written.done;
            done += written.done;
            match written.stop {
                Some(Unstored::Store(error)) => break Some(Error::store("write", error)),
                // Nothing of such a file is ever dirty, and it has no mappings.
                Some(Unstored::Cached) => {
                    break Some(Error::invalid("write", pinfold_base::Errno::EBUSY));
                }
                None => {}
            }
            if written.done == 0 {
                // The store took nothing and gave no reason: asking again would not end.
                break Some(Error::invalid("write", pinfold_base::Errno::EIO));
            }
        };
        (Progress { done, stop }, pos)
    }
}

/// Why bytes did not reach the store.
enum Unstored {
    Store(StoreError),
    Cached,
}

impl From<StoreError> for Unstored {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<Cached> for Unstored {
    fn from(_: Cached) -> Self {
        Self::Cached
    }
}

/// Goes on after a copy out of a page that came to nothing; returns the bytes moved through a bounce buffer, if any.
///
/// Apart from its caller because of the buffer, whose room on the stack every read would pay for.
#[cold]
#[inline(never)]
fn read_stalled(
    found: PageRef<'_>,
    at: usize,
    want: usize,
    stop: CopyStop,
    cursor: &mut IovCursor<'_>,
    stalls: &mut Stalls,
) -> Result<u64, ()> {
    let mut bounce = [0u8; PAGE];
    found.read(at, &mut bounce[..want]);
    // Nothing is held from here on (rule zero).
    drop(found);
    match stalls.resolve(stop, cursor, want) {
        Next::Retry => Ok(0),
        Next::BadBuffer => Err(()),
        Next::Bounce => match copy_waiting(cursor, &mut bounce[..want]) as u64 {
            0 => Err(()),
            moved => {
                stalls.progressed();
                Ok(moved)
            }
        },
    }
}

/// How a series of rounds under the inode's lock ended.
enum Rounds {
    /// All done, or stopped for good.
    Ended(Option<Error>),
    /// The byte the cursor is at could not be copied; so many bytes were wanted.
    Fault(CopyStop, usize),
}

/// One buffered write under way.
struct Write<'a> {
    file: &'a File,
    how: &'a IoOptions<'a>,
    pos: u64,
    /// Whether position and length have been settled under the lock.
    placed: bool,
    done: u64,
    stalls: Stalls,
    /// Bytes the limits took off the cursor's count.
    held_back: usize,
    /// What is left of the glock while memory is brought in (MAY_DEMOTE).
    weak: Option<MayDemote<'a>>,
}

impl Write<'_> {
    /// Runs rounds under the inode's lock until all is written, something stops it, or memory has to be brought in.
    fn locked_rounds(&mut self, cursor: &mut IovCursor<'_>) -> Rounds {
        let file = self.file;
        let inode = file.inode();
        let _exclusive = if self.how.nowait {
            match inode.try_lock_exclusive() {
                Some(guard) => guard,
                None => return Rounds::Ended(Some(Error::cache("write", CacheError::WouldBlock))),
            }
        } else {
            inode.lock_exclusive()
        };
        // Taken anew in each series, unless nobody wanted it: between two of them other nodes may have cut the file (B-7).
        let weak = self.weak.take();
        let held = match inode.hold_pages_again(weak, Mode::Exclusive, self.how.nowait) {
            Ok(held) => held,
            Err(error) => return Rounds::Ended(Some(Error::cache("write", error))),
        };
        if let Err(error) = self.place(cursor) {
            return Rounds::Ended(Some(error));
        }
        let before = inode.len();
        let ended = self.rounds(cursor);
        inode.note_growth(before);
        if let Rounds::Fault(..) = ended {
            self.weak = inode.weaken(held);
        }
        ended
    }

    /// The rounds themselves.
    fn rounds(&mut self, cursor: &mut IovCursor<'_>) -> Rounds {
        // A copy that stopped inside a page whose rest is not valid commits nothing; the next asks for what was good.
        let mut only = usize::MAX;
        while cursor.count() > 0 {
            let at = (self.pos % PAGE_SIZE) as usize;
            let bytes = (PAGE - at).min(cursor.count()).min(only);
            match self.round(at, bytes, cursor) {
                Err(error) => return Rounds::Ended(Some(error)),
                Ok(Round::Wrote) => {
                    only = usize::MAX;
                    self.stalls.progressed();
                }
                Ok(Round::OnlyGood(good)) => only = good,
                Ok(Round::Fault(stop)) => return Rounds::Fault(stop, bytes),
            }
        }
        Rounds::Ended(None)
    }

    /// Settles where the write goes and how much of it, once; under the lock that excludes other extenders (B-5).
    fn place(&mut self, cursor: &mut IovCursor<'_>) -> Result<(), Error> {
        let inode = self.file.inode();
        if self.how.append && (self.done == 0 || self.pos < inode.len()) {
            // After a fault others may have appended: the rest goes behind them, never over them.
            self.pos = inode.len();
        }
        if self.placed {
            return Ok(());
        }
        let engine = inode.engine();
        let allowed = clamp_write(
            self.pos,
            cursor.count(),
            inode.len(),
            engine.file_size_limit,
        )?;
        self.held_back = cursor.truncate(allowed) - allowed;
        let to = self.pos + cursor.count() as u64;
        let taken = inode.size_allowed(self.pos, to)? - self.pos;
        self.held_back += cursor.count() - usize::try_from(taken).unwrap_or(usize::MAX);
        cursor.truncate(usize::try_from(taken).unwrap_or(usize::MAX));
        self.placed = true;
        if engine.reserve(cursor.count() as u64, inode.object().as_ref()) == Reserve::Exactly {
            self.reserve_exactly(cursor)?;
        }
        Ok(())
    }

    /// Makes the store allocate what is about to be written, as far as it has room: ENOSPC is told now.
    fn reserve_exactly(&mut self, cursor: &mut IovCursor<'_>) -> Result<(), Error> {
        let object = self.file.inode().object();
        let whole = self.pos..self.pos + cursor.count() as u64;
        let refused = match object.allocate(whole.clone()) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if refused.errno == pinfold_base::Errno::EOPNOTSUPP {
            return Ok(());
        }
        // Page by page: the longest prefix that fits is written (section B: maximal prefix).
        let mut fits = self.pos;
        while fits < whole.end {
            let next = (fits / PAGE_SIZE + 1) * PAGE_SIZE;
            if object.allocate(fits..next.min(whole.end)).is_err() {
                break;
            }
            fits = next.min(whole.end);
        }
        if fits == self.pos {
            return Err(Error::store("write", refused));
        }
        let allowed = usize::try_from(fits - self.pos).unwrap_or(usize::MAX);
        self.held_back += cursor.truncate(allowed) - allowed;
        Ok(())
    }

    /// One page's round: throttle, lock, copy, commit.
    fn round(
        &mut self,
        at: usize,
        bytes: usize,
        cursor: &mut IovCursor<'_>,
    ) -> Result<Round, Error> {
        let inode = self.file.inode();
        let pages = inode.pages();
        let told = |error| Error::cache("write", error);
        inode
            .engine()
            .cache
            .throttle(&self.how.pace())
            .map_err(told)?;
        self.how.check_cancelled().map_err(told)?;
        let old_end = pages.end();
        if self.pos > old_end {
            // What lies between the old end and the new data must read as zeros (INV7).
            pages.zero_past_end(old_end);
        }
        let folio = pages
            .write_begin(self.pos / PAGE_SIZE, at, at + bytes, self.how.nowait)
            .map_err(told)?;
        let copied = folio.copy_in(at, bytes, cursor);
        // At most a page.
        let good = copied.done as usize;
        if good == 0 || (good < bytes && !folio.is_uptodate()) {
            // Nothing becomes visible and the file does not grow (B-2, B-3).
            drop(folio);
            cursor.revert(good);
            return Ok(match copied.stop {
                Some(stop) if good == 0 => Round::Fault(stop),
                _ => Round::OnlyGood(good),
            });
        }
        self.pos += good as u64;
        self.done += good as u64;
        folio.commit_to(self.pos);
        // At once and not when the call ends: it may have to wait for its own pages to be written back.
        pages.note_dirty_file();
        inode.touch_modified();
        Ok(Round::Wrote)
    }

    /// Writes bytes that were taken into a bounce buffer: a copy from there cannot fault.
    fn write_bounced(
        &mut self,
        cursor: &mut IovCursor<'_>,
        mut buf: AlignedBuf,
        len: usize,
    ) -> Result<(), Error> {
        let mut bounced = IovCursor::from_slice(&buf.as_mut_slice()[..len]);
        let outcome = self.locked_rounds(&mut bounced);
        // What was not written is still the caller's.
        cursor.revert(bounced.count());
        self.stalls.progressed();
        match outcome {
            Rounds::Ended(None) => Ok(()),
            Rounds::Ended(Some(error)) => Err(error),
            Rounds::Fault(..) => Err(bad_buffer("write", self.pos, len)),
        }
    }
}

/// How one round ended.
enum Round {
    /// What was asked for is in the file, or its good part.
    Wrote,
    /// Nothing is, but so many bytes could be copied: ask for just those.
    OnlyGood(usize),
    /// Not one byte could be copied.
    Fault(CopyStop),
}
