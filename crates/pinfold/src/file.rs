//! One open file description: what `open` returns.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use pinfold_base::sync::Mutex;
use pinfold_base::{Errno, PAGE_SIZE, Progress, page_span};
use pinfold_cache::{Lease, ReadAhead, Sample, Want};
use pinfold_lock::Mode;
use pinfold_mem::{AlignedBuf, IovCursor, Quiet};
use pinfold_store::{Seek, SyncScope};

use crate::error::{Error, ErrorKind, Result};
use crate::inode::Inode;
use crate::io::{CALL_BYTES_MAX, IoOptions, check_range};
use crate::node::Node;

/// Rounds of gathering pages for a lease before their bytes are copied instead.
const LEND_TRIES_MAX: u32 = 4;

/// What an open file description may do, and how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Access {
    /// Reading is allowed.
    pub read: bool,
    /// Writing is allowed.
    pub write: bool,
    /// Writes go to the end whatever the offset says (O_APPEND).
    pub append: bool,
    /// I/O by-passes the cache (O_DIRECT).
    pub direct: bool,
    /// Writes return when they are durable (O_DSYNC).
    pub dsync: bool,
}

/// An open file.
///
/// Offsets and lengths are bytes. All methods may be called from several threads; the file position of `Read`, `Write`
/// and `Seek` is shared by them.
pub struct File {
    node: Node,
    inode: Arc<Inode>,
    access: Access,
    ahead: ReadAhead,
    seen: Mutex<Sample>,
    position: Mutex<u64>,
    /// The path it was opened by, for messages.
    path: OnceLock<PathBuf>,
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File")
            .field("inode", &self.inode)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

impl File {
    pub(crate) fn new(node: Node, inode: Arc<Inode>, access: Access) -> Self {
        let seen = inode.opened();
        Self {
            node,
            inode,
            access,
            ahead: ReadAhead::default(),
            seen: Mutex::new(seen),
            position: Mutex::new(0),
            path: OnceLock::new(),
        }
    }

    /// Returns the path it was opened by, where there was one.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.get().map(PathBuf::as_path)
    }

    /// Names the path it was opened by.
    pub(crate) fn set_path(&self, path: &Path) {
        let _ = self.path.set(path.to_owned());
    }

    /// Begins a call: no handler of the program runs on top of our locks until the result is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Forked`] in a child of the process that has the engine.
    pub(crate) fn enter(&self, operation: &'static str) -> Result<Quiet> {
        if !self.inode.engine().process.is_current() {
            return Err(Error::new(operation, ErrorKind::Forked).at_path_of(self));
        }
        Ok(Quiet::enter())
    }

    /// As [`Inode::sync_range`], reporting through this description.
    pub(crate) fn sync_range(&self, bytes: Range<u64>, scope: SyncScope) -> Result<()> {
        self.inode.gather_stored("sync")?;
        self.inode.sync_range(bytes, scope, &self.seen)
    }

    /// Returns the inode's name-space side.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Returns what this description may do.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    pub(crate) fn inode(&self) -> &Arc<Inode> {
        &self.inode
    }

    pub(crate) fn ahead(&self) -> &ReadAhead {
        &self.ahead
    }

    /// Returns the size in bytes. In a volume with glocks that is the size on all nodes; the last known one where the
    /// node has withdrawn.
    #[must_use]
    pub fn len(&self) -> u64 {
        let len = self.inode.len_now("read the size of");
        len.unwrap_or_else(|_| self.inode.len())
    }

    /// Tells whether the file is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn may_read(&self, operation: &'static str) -> Result<()> {
        if self.access.read {
            return Ok(());
        }
        Err(Error::invalid(operation, Errno::EBADF))
    }

    fn may_write(&self, operation: &'static str) -> Result<()> {
        if self.access.write {
            return Ok(());
        }
        Err(Error::invalid(operation, Errno::EBADF))
    }

    /// Reads at `offset` into `buf`; returns the bytes read, fewer only at the end of the file or before an error.
    ///
    /// # Errors
    /// `EBADF` if not open for reading, `EINVAL` for an offset no file reaches, `EFAULT`, the store's errors.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let mut cursor = IovCursor::from_mut_slice(buf);
        posix(self.read_cursor(&mut cursor, offset, &IoOptions::default()))
    }

    /// Reads at `offset` into several buffers in turn.
    ///
    /// # Errors
    /// As [`File::read_at`].
    pub fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> Result<usize> {
        let mut cursor = IovCursor::target(bufs);
        posix(self.read_cursor(&mut cursor, offset, &IoOptions::default()))
    }

    /// Writes `buf` at `offset` (at the end, if open for appending); returns the bytes written, fewer only before an
    /// error.
    ///
    /// # Errors
    /// `EBADF` if not open for writing, `EINVAL` for an offset no file reaches, `EFBIG`, `EFAULT`, `ENOSPC`, the store's
    /// errors.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<usize> {
        let mut cursor = IovCursor::from_slice(buf);
        posix(self.write_cursor(&mut cursor, offset, &IoOptions::default()))
    }

    /// Writes several buffers in turn at `offset`.
    ///
    /// # Errors
    /// As [`File::write_at`].
    pub fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> Result<usize> {
        let mut cursor = IovCursor::source(bufs);
        posix(self.write_cursor(&mut cursor, offset, &IoOptions::default()))
    }

    /// Writes at the end whatever others write meanwhile; returns where, and the bytes written.
    ///
    /// # Errors
    /// As [`File::write_at`].
    pub fn append(&self, buf: &[u8]) -> Result<(u64, usize)> {
        let how = IoOptions {
            append: true,
            ..IoOptions::default()
        };
        let mut cursor = IovCursor::from_slice(buf);
        let (progress, end) = self.write_and_place(&mut cursor, 0, &how);
        let done = posix(progress)?;
        Ok((end - done as u64, done))
    }

    /// Reads at `offset` into whatever the cursor names; bad addresses end it with `EFAULT` after the bytes before them.
    pub fn read_cursor(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> Progress<Error> {
        let checks = self
            .may_read("read")
            .and_then(|()| check_range("read", offset, cursor.count()))
            .and_then(|()| self.enter("read"));
        let _quiet = match checks {
            Ok(quiet) => quiet,
            Err(error) => return Progress::stopped(0, error),
        };
        let held_back = cursor.count().saturating_sub(CALL_BYTES_MAX);
        cursor.truncate(CALL_BYTES_MAX);
        let progress = if self.access.direct {
            self.read_direct(cursor, offset, how)
        } else {
            self.read_buffered(cursor, offset, how)
        };
        if held_back > 0 {
            cursor.reexpand(cursor.count() + held_back);
        }
        progress
    }

    /// Writes what the cursor names at `offset`; bad addresses end it with `EFAULT` after the bytes before them.
    pub fn write_cursor(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> Progress<Error> {
        self.write_and_place(cursor, offset, how).0
    }

    /// Writes, and tells the offset behind the last byte written.
    fn write_and_place(
        &self,
        cursor: &mut IovCursor<'_>,
        offset: u64,
        how: &IoOptions<'_>,
    ) -> (Progress<Error>, u64) {
        let checks = self
            .may_write("write")
            .and_then(|()| check_range("write", offset, cursor.count()))
            .and_then(|()| self.enter("write"));
        let _quiet = match checks {
            Ok(quiet) => quiet,
            Err(error) => return (Progress::stopped(0, error), offset),
        };
        if cursor.count() == 0 {
            return (Progress::complete(0), offset);
        }
        let how = IoOptions {
            append: how.append || self.access.append,
            dsync: how.dsync || self.access.dsync,
            ..*how
        };
        let (progress, end) = if self.access.direct {
            self.write_direct(cursor, offset, &how)
        } else {
            self.write_buffered(cursor, offset, &how)
        };
        if how.dsync
            && progress.done > 0
            && let Err(error) = self.inode.sync(SyncScope::Data, &self.seen)
        {
            // A sync error replaces the count (section C).
            return (Progress::stopped(0, error), end);
        }
        (progress, end)
    }

    /// Reads at the file position and moves it by what was read.
    pub fn read_next_cursor(
        &self,
        cursor: &mut IovCursor<'_>,
        how: &IoOptions<'_>,
    ) -> Progress<Error> {
        let mut position = self.position.lock();
        let progress = self.read_cursor(cursor, *position, how);
        *position += progress.done;
        progress
    }

    /// Writes at the file position (the end, if open for appending) and moves it by what was written.
    pub fn write_next_cursor(
        &self,
        cursor: &mut IovCursor<'_>,
        how: &IoOptions<'_>,
    ) -> Progress<Error> {
        let mut position = self.position.lock();
        let (progress, end) = self.write_and_place(cursor, *position, how);
        if progress.done > 0 {
            *position = end;
        }
        progress
    }

    /// Lends the cached bytes at `offset` for a reply that is sent from our frames: at most `len` bytes, fewer at the end
    /// of the file. Where too much is lent out already, or pages come and go too fast, the bytes are a copy.
    ///
    /// # Errors
    /// As [`File::read_at`], when not even the first byte can be had.
    pub fn lend(&self, offset: u64, len: usize) -> Result<Lease> {
        self.may_read("read")?;
        check_range("read", offset, len)?;
        let _quiet = self.enter("read")?;
        let pages = self.inode.pages();
        self.inode.check_lease("read")?;
        if offset.saturating_add(len as u64) > pages.end() {
            // Another node may have made it longer.
            self.inode.len_now("read")?;
        }
        let mut stop = offset.saturating_add(len as u64);
        for _ in 0..LEND_TRIES_MAX {
            let span = page_span(offset, stop.min(pages.end()).saturating_sub(offset));
            // At most what `len` spans, a usize.
            let Some(mut lease) = Lease::reserve(pages, (span.end - span.start) as usize) else {
                break;
            };
            let Some(missing) = self.gather(&mut lease, offset..stop, span.end) else {
                return Ok(lease);
            };
            // Nothing is lent while this thread waits: a direct write may want those pages gone, and this one after.
            drop(lease);
            let want = Want {
                pages: span.end.saturating_sub(missing).max(1),
                ahead: Some(&self.ahead),
                nowait: false,
            };
            let read = self
                .inode
                .hold_pages(Mode::Shared, false)
                .and_then(|_held| pages.read(missing, &want).map(drop));
            match read {
                Ok(()) => {}
                Err(error) if missing * PAGE_SIZE <= offset => {
                    return Err(Error::cache("read", error));
                }
                Err(_) => stop = missing * PAGE_SIZE,
            }
        }
        let len = stop.min(pages.end()).saturating_sub(offset);
        // At most `len` as it was given, a usize.
        let mut copy = AlignedBuf::zeroed(len as usize);
        let mut cursor = IovCursor::from_mut_slice(&mut copy.as_mut_slice()[..len as usize]);
        let done = posix(self.read_buffered(&mut cursor, offset, &IoOptions::default()))?;
        Ok(Lease::of_copy(pages, copy, done))
    }

    /// Adds what is cached of `bytes`, up to page `last`, without waiting; returns the first page that is not.
    fn gather(&self, lease: &mut Lease, bytes: Range<u64>, last: u64) -> Option<u64> {
        let pages = self.inode.pages();
        let mut pos = bytes.start;
        while pos < bytes.end.min(pages.end()) {
            let (page, at) = (pos / PAGE_SIZE, (pos % PAGE_SIZE) as usize);
            if page >= last {
                // The file has grown since the lease was reserved: by then it had ended here.
                return None;
            }
            let want = Want {
                pages: 1,
                ahead: Some(&self.ahead),
                nowait: true,
            };
            let Ok(found) = pages.read(page, &want) else {
                return Some(page);
            };
            // The size again, after the page was seen valid (B-4).
            let end = bytes.end.min(pages.end());
            let n = end.saturating_sub(pos).min(PAGE_SIZE - at as u64);
            if n == 0 {
                return None;
            }
            if !lease.push(found, at, n as usize) {
                return Some(page);
            }
            pos += n;
            if !pos.is_multiple_of(PAGE_SIZE) {
                // The end, of the bytes or of the file. Were the file to grow now, this page would be lent twice,
                // which is more than was reserved.
                return None;
            }
        }
        None
    }

    /// Sets the size: what is cut off is gone, what is added reads as zeros.
    ///
    /// # Errors
    /// `EINVAL` if not open for writing, `EFBIG`, the store's errors; `EBUSY` if pages that would be cut off stay pinned
    /// ([`Mapping::pin`](crate::Mapping::pin)).
    pub fn set_len(&self, len: u64) -> Result<()> {
        self.may_write("set the size of")
            .map_err(|_| Error::invalid("set the size of", Errno::EINVAL))?;
        let _quiet = self.enter("set the size of")?;
        self.inode.set_len(len)
    }

    /// Writes back and makes data, size and times durable. Reports each write-back error of this file once per
    /// open file.
    ///
    /// # Errors
    /// The error of a write-back since the last report, or of this one.
    pub fn sync_all(&self) -> Result<()> {
        let _quiet = self.enter("sync")?;
        self.inode.gather_stored("sync")?;
        self.inode.sync(SyncScope::All, &self.seen)
    }

    /// Writes back and makes data durable, and of the rest what is needed to read it.
    ///
    /// # Errors
    /// As [`File::sync_all`].
    pub fn sync_data(&self) -> Result<()> {
        let _quiet = self.enter("sync")?;
        self.inode.gather_stored("sync")?;
        self.inode.sync(SyncScope::Data, &self.seen)
    }

    /// Starts nothing that lasts: writes back the dirty pages of `range` and waits, without making them durable
    /// (sync_file_range).
    ///
    /// # Errors
    /// The first error of storing a page.
    pub fn write_back(&self, range: Range<u64>) -> Result<()> {
        let _quiet = self.enter("write back")?;
        self.inode
            .flush_range(range)
            .map_err(|error| Error::store("write back", error))
    }

    /// Writes back and drops the cached pages: the next read comes from the store.
    ///
    /// # Errors
    /// The first error of storing a page.
    pub fn drop_cache(&self) -> Result<()> {
        let _quiet = self.enter("drop cached pages of")?;
        self.inode.drop_cache()
    }

    /// Finds the next data or hole at or after `offset`, dirty pages counting as data; `None` past the end.
    ///
    /// # Errors
    /// The store's errors.
    pub fn seek_to(&self, what: Seek, offset: u64) -> Result<Option<u64>> {
        if offset >= self.len() {
            return Ok(None);
        }
        let _quiet = self.enter("seek in")?;
        let _held = self.inode.hold_uncached("seek in", Mode::Shared, false)?;
        // What is dirty has to be there to be found: the store knows nothing of it yet.
        self.inode.flush()?;
        self.inode
            .object()
            .seek(what, offset)
            .map_err(|error| Error::store("seek in", error))
    }

    /// Ends this description: writes back what is dirty if it was the last one, and tells about errors not yet reported.
    ///
    /// Dropping does the same in silence.
    ///
    /// # Errors
    /// The error of a write-back since the last report.
    pub fn close(self) -> Result<()> {
        let _quiet = self.enter("close")?;
        self.inode.flush()?;
        match self
            .inode
            .pages()
            .errors()
            .check_and_advance(&mut self.seen.lock())
        {
            None => Ok(()),
            Some(errno) => Err(Error::new("close", ErrorKind::Store(errno))),
        }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _quiet = Quiet::enter();
        self.inode.closed();
        if !self.inode.engine().process.is_current() {
            // The counts that follow are the parent's as well.
            return;
        }
        self.node.file_closed();
    }
}

fn posix(progress: Progress<Error>) -> Result<usize> {
    // A call moves at most CALL_BYTES_MAX bytes, a usize.
    progress.posix().map(|done| done as usize)
}

impl io::Read for &File {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut cursor = IovCursor::from_mut_slice(buf);
        Ok(posix(
            self.read_next_cursor(&mut cursor, &IoOptions::default()),
        )?)
    }
}

impl io::Write for &File {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut cursor = IovCursor::from_slice(buf);
        Ok(posix(
            self.write_next_cursor(&mut cursor, &IoOptions::default()),
        )?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl io::Seek for &File {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let mut position = self.position.lock();
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(by) => position.checked_add_signed(by),
            SeekFrom::End(by) => self.len().checked_add_signed(by),
        };
        match target.filter(|&offset| offset <= pinfold_base::units::FILE_SIZE_MAX) {
            Some(offset) => {
                *position = offset;
                Ok(offset)
            }
            None => Err(Errno::EINVAL.into()),
        }
    }
}
