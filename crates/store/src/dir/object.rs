//! One file of a kernel filesystem as an [`Object`].
//!
//! *Owns*: the file's descriptors, the choice between direct and buffered transfers, alignments.
//!
//! *Does not own*: names, attributes other than the size and the modification time, rings.
//!
//! *Locking*: a leaf (class 6) around the descriptors; no transfer is made under it.
//!
//! A file has up to two descriptors for each right: a *direct* one for whole blocks, and a *plain* one for what is not a
//! whole block. Bytes travel by this table; `tail` is the last page when the size is not a multiple of the block:
//!
//! | range | read | write |
//! |---|---|---|
//! | whole blocks, memory aligned | direct | direct |
//! | unaligned head or tail of a range, to the page border | plain | plain |
//! | the file's tail | plain | plain, by the row above |
//! | little besides the file's tail ([`PLAIN_WHOLE_MAX`]) | plain, all of it | |
//! | memory not aligned, or direct transfers refused | plain | plain |
//!
//! A tail is written through the kernel's cache and made durable by [`DirObject::sync`], so the file is never longer than
//! its last byte, not even between two system calls. Its page stays in the kernel's cache: reading it back
//! through the plain descriptor costs no device read, where a direct read would first have to flush it. The
//! plain descriptor is set to random access, so that the kernel never reads neighbours ahead into a cache that nobody uses.
//!
//! The border between the two ways is a page border whenever both are used for one range: a direct write of blocks in a
//! page that a plain write dirties at the same moment could not invalidate that page.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;
use pinfold_base::{Errno, PAGE_SIZE, Progress};
use pinfold_mem::Segments;
use pinfold_mem::limits;
use pinfold_mem::uring::{Attended, Engine, Op, Request};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom, Statx, Timespec, Timestamps};

use crate::object::{
    Completion, Geometry, Object, Operation, Rearrange, Seek, StoreError, StoreResult, SyncScope,
    Transfer, wait_for,
};

mod files;
mod here;
mod split;

use files::{Files, Pair};
use here::Here;
use split::{Parts, Split, Way};

/// A read of the file's tail takes up to this many bytes before it along through the plain descriptor: one system call
/// instead of two transfers. More would let the kernel cache what is cached here.
pub const PLAIN_WHOLE_MAX: u64 = 16 << 10;
/// A waited-for transfer of registered memory at least this long goes through the ring. The hand-over to the ring's thread and
/// back costs what fixed buffers save at 1 MiB (reads: 54-77 against 58-63 us of CPU); at 4 MiB it is half (170 against 66-87).
const RING_WAIT_MIN: usize = 1 << 20;
/// The size above which a larger transfer is no faster on the devices measured.
const TRANSFER_BEST: u32 = 1 << 20;
/// Tries of a system call that answers `EINTR`.
const INTERRUPTIONS_MAX: u32 = 100;

/// A file that can be opened again by what it is, not by where it was: its name may be gone.
pub trait Reopen: Send + Sync + std::fmt::Debug {
    /// Opens the file with `flags` (an access mode, perhaps `O_DIRECT`), with the calling thread's rights.
    ///
    /// # Errors
    /// What open(2) says.
    fn reopen(&self, flags: OFlags) -> Result<OwnedFd, Errno>;
}

/// One file of a kernel filesystem. Bytes can be moved once [`grant`](Self::grant) or [`adopt`](Self::adopt)
/// has brought a descriptor.
#[derive(Debug)]
pub struct DirObject {
    core: Arc<Core>,
    engine: Arc<Engine>,
}

/// What completions share with the object.
#[derive(Debug)]
struct Core {
    origin: Arc<dyn Reopen>,
    files: RwLock<Files>,
    /// The reader's of them, for faults that are served in their own threads.
    here: Here,
    /// A direct transfer was refused although it was aligned as asked: none is tried again.
    refused: AtomicBool,
    /// Whether there is a descriptor to read through, as in `files`: asked for by every buffered write.
    readable: AtomicBool,
    /// The size as last seen. A hint that tells where the tail is; a wrong one costs time only.
    len_seen: AtomicU64,
}

impl DirObject {
    /// Makes an object without descriptors.
    #[must_use]
    pub fn new(origin: Arc<dyn Reopen>, engine: Arc<Engine>) -> Self {
        Self {
            core: Arc::new(Core {
                origin,
                files: RwLock::new(Files::default()),
                here: Here::default(),
                refused: AtomicBool::new(false),
                readable: AtomicBool::new(false),
                len_seen: AtomicU64::new(0),
            }),
            engine,
        }
    }

    /// Obtains descriptors for an opener, with the rights of the calling thread, and counts the opener.
    ///
    /// The rights are checked for every opener, also where earlier ones have brought the descriptors already. What is there
    /// is kept: an opener for reading after one for writing leaves a file that can be read and written.
    ///
    /// # Errors
    /// What open(2) says: `EACCES`, `EROFS`, `ETXTBSY`, and `EMFILE` or `ENFILE` when descriptors run out. The
    /// opener is not counted then, and nothing changes.
    pub fn grant(&self, read: bool, write: bool) -> Result<(), Errno> {
        let Some(mode) = files::access_mode(read, write) else {
            self.core.files.write().openers += 1;
            return Ok(());
        };
        // Opened outside the lock: it may take long, and nobody's transfer should wait for it.
        let plain = self.core.origin.reopen(mode)?;
        let wanted = self.core.files.read().want(read, write);
        let pair = if wanted {
            let pair = Pair::new(plain, |flags| self.core.origin.reopen(mode | flags))?;
            self.note_len(&pair);
            Some(pair)
        } else {
            None
        };
        let mut files = self.core.files.write();
        if let Some(pair) = pair {
            files.add(pair, read, write);
            self.core.note_readable(&files);
        }
        files.openers += 1;
        drop(files);
        self.core.note_here();
        Ok(())
    }

    /// Takes over a descriptor that somebody has, such as the one that created the file, and counts its opener.
    ///
    /// # Errors
    /// `EMFILE` or `ENFILE` when no descriptor is left for direct transfers.
    pub fn adopt(&self, plain: OwnedFd, read: bool, write: bool) -> Result<(), Errno> {
        if let Some(mode) = files::access_mode(read, write) {
            files::clear_status(&plain)?;
            // A mode such as 0200 lets the creator read through what creation gave him, but not open again; then
            // transfers are buffered.
            let pair = Pair::new(plain, |flags| self.core.origin.reopen(mode | flags))?;
            self.note_len(&pair);
            let mut files = self.core.files.write();
            files.add(pair, read, write);
            self.core.note_readable(&files);
        }
        self.core.files.write().openers += 1;
        self.core.note_here();
        Ok(())
    }

    /// Counts an opener out. The descriptors stay for later openers and for write-back, until
    /// [`close_idle`](Self::close_idle).
    pub fn revoke(&self) {
        let mut files = self.core.files.write();
        debug_assert!(files.openers > 0, "an opener that was never counted");
        files.openers = files.openers.saturating_sub(1);
    }

    /// Closes the descriptors if no opener is left; tells whether none is held now. Transfers in flight keep
    /// theirs until they end; new ones get `EBADF`.
    pub fn close_idle(&self) -> bool {
        let mut files = self.core.files.write();
        if files.openers > 0 {
            return false;
        }
        let closed = std::mem::take(&mut *files);
        self.core.note_readable(&files);
        drop(files);
        self.core.note_here();
        drop(closed);
        true
    }

    /// Returns how many descriptors are held.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        self.core.files.read().descriptors()
    }

    /// Returns the attributes of the stored file; its size and times are not those of a file that has dirty pages.
    ///
    /// # Errors
    /// What statx(2) says.
    pub fn stat(&self) -> StoreResult<Statx> {
        let file = self.any_file(Operation::Attributes)?;
        files::stat(&file).map_err(|errno| error(Operation::Attributes, 0, 0, errno))
    }

    /// Sets the modification time and leaves the access time alone.
    ///
    /// # Errors
    /// What futimens(2) says.
    pub fn set_times(&self, modified: Timespec) -> StoreResult<()> {
        let file = self.any_file(Operation::Attributes)?;
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: libc::UTIME_OMIT,
            },
            last_modification: modified,
        };
        retry(|| rustix::fs::futimens(&file, &times))
            .map_err(|errno| error(Operation::Attributes, 0, 0, errno))
    }

    /// Makes `range` read as zeros, keeping its space; `keep_size` leaves a size that ends before it alone.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the filesystem cannot.
    pub fn zero_range(&self, range: Range<u64>, keep_size: bool) -> StoreResult<()> {
        let mode = FallocateFlags::ZERO_RANGE | keep(keep_size);
        self.fallocate(Operation::Punch, mode, range)
    }

    /// Removes `range` from the file: what follows moves down and the size shrinks.
    ///
    /// # Errors
    /// `EINVAL` when the range is not made of whole filesystem blocks or reaches the end; `EOPNOTSUPP` where
    /// the filesystem cannot.
    pub fn collapse_range(&self, range: Range<u64>) -> StoreResult<()> {
        self.fallocate(Operation::Punch, FallocateFlags::COLLAPSE_RANGE, range)
    }

    /// Inserts a hole at `range`: what was there moves up and the size grows.
    ///
    /// # Errors
    /// As for [`collapse_range`](Self::collapse_range).
    pub fn insert_range(&self, range: Range<u64>) -> StoreResult<()> {
        self.fallocate(Operation::Punch, FallocateFlags::INSERT_RANGE, range)
    }

    /// Reserves `range` and lets the size grow to its end.
    ///
    /// # Errors
    /// `ENOSPC`, `EDQUOT`, `EFBIG`; `EOPNOTSUPP` where the filesystem cannot.
    pub fn allocate_and_grow(&self, range: Range<u64>) -> StoreResult<()> {
        self.fallocate(Operation::Allocate, FallocateFlags::empty(), range)
    }

    fn fallocate(
        &self,
        operation: Operation,
        mode: FallocateFlags,
        range: Range<u64>,
    ) -> StoreResult<()> {
        let len = range.end.saturating_sub(range.start);
        let failed = |errno| error(operation, range.start, len, errno);
        let file = self.writer(operation)?;
        retry(|| rustix::fs::fallocate(&file, mode, range.start, len)).map_err(failed)?;
        if !mode.contains(FallocateFlags::KEEP_SIZE) {
            self.refresh_len(&file).map_err(failed)?;
        }
        Ok(())
    }

    /// Returns the descriptor to change the file through; without one, opens it for this once.
    fn writer(&self, operation: Operation) -> StoreResult<Arc<OwnedFd>> {
        self.file(operation, OFlags::WRONLY, |files| files.writer.as_ref())
    }

    /// Returns any descriptor; without one, opens the file for this once.
    fn any_file(&self, operation: Operation) -> StoreResult<Arc<OwnedFd>> {
        self.file(operation, OFlags::RDONLY, Files::any)
    }

    fn file(
        &self,
        operation: Operation,
        mode: OFlags,
        choose: impl Fn(&Files) -> Option<&Pair>,
    ) -> StoreResult<Arc<OwnedFd>> {
        if let Some(pair) = choose(&self.core.files.read()) {
            return Ok(Arc::clone(&pair.plain));
        }
        self.core
            .origin
            .reopen(mode | OFlags::CLOEXEC)
            .map(Arc::new)
            .map_err(|errno| error(operation, 0, 0, errno))
    }

    fn note_len(&self, pair: &Pair) {
        self.core.len_seen.fetch_max(pair.len, Ordering::Relaxed);
    }

    fn refresh_len(&self, file: &OwnedFd) -> Result<u64, Errno> {
        let len = retry(|| rustix::fs::fstat(file))?.st_size as u64;
        self.core.len_seen.store(len, Ordering::Relaxed);
        Ok(len)
    }

    fn start(&self, op: Op, batch: Vec<Transfer>) {
        let pair = self.core.pair(op);
        let mut requests = Vec::with_capacity(batch.len());
        for transfer in batch {
            let Some(pair) = &pair else {
                let len = transfer.segments.bytes() as u64;
                let refusal = error(operation(op), transfer.offset, len, Errno::EBADF);
                (transfer.done)(Progress::stopped(0, refusal));
                continue;
            };
            let split = self
                .core
                .split(op, pair, transfer.offset, &transfer.segments);
            self.prepare(op, pair, split, transfer, &mut requests);
        }
        self.engine.submit(requests);
    }

    /// Tells whether a transfer that is waited for costs less by way of the ring.
    fn ring_is_cheaper(&self, segments: &Segments) -> bool {
        segments.bytes() >= RING_WAIT_MIN && self.engine.is_registered(segments)
    }

    /// Moves one range in the calling thread, part by part.
    fn transfer_here(&self, op: Op, offset: u64, segments: &Segments) -> Progress<StoreError> {
        let len = segments.bytes() as u64;
        let named = |errno| error(operation(op), offset, len, errno);
        let Some(pair) = self.core.pair(op) else {
            return Progress::stopped(0, named(Errno::EBADF));
        };
        self.transfer_by(&pair, op, offset, segments)
    }

    /// As [`DirObject::transfer_here`], by given descriptors. Allocates nothing for one span that is one part.
    fn transfer_by(
        &self,
        pair: &Pair,
        op: Op,
        offset: u64,
        segments: &Segments,
    ) -> Progress<StoreError> {
        let len = segments.bytes() as u64;
        let named = |errno| error(operation(op), offset, len, errno);
        let split = self.core.split(op, pair, offset, segments);
        let transfer = match op {
            Op::Read => Engine::read_wait,
            Op::Write => Engine::write_wait,
        };
        let mut done = 0;
        let mut stop = None;
        for part in split.parts() {
            let (from, want) = ((part.start - offset) as usize, part.end - part.start);
            let part_segments;
            let memory = if want == len {
                segments
            } else {
                part_segments = segments.slice(from, want as usize);
                &part_segments
            };
            let plain = || transfer(&pair.plain, part.start, memory, 1);
            let progress = match (part.way, &pair.direct) {
                (Way::Direct, Some(direct)) => {
                    let progress = transfer(direct, part.start, memory, pair.block);
                    if split::refuses_direct(progress) {
                        self.core.refused.store(true, Ordering::Relaxed);
                        plain()
                    } else {
                        progress
                    }
                }
                _ => plain(),
            };
            done += progress.done;
            stop = progress.stop;
            if stop.is_some() || progress.done < want {
                break;
            }
        }
        if op == Op::Write && done > 0 {
            self.core
                .len_seen
                .fetch_max(offset + done, Ordering::Relaxed);
        }
        match stop {
            Some(errno) => Progress::stopped(done, named(errno)),
            None => Progress::complete(done),
        }
    }

    /// Turns a transfer into requests, one for each part of its range.
    fn prepare(
        &self,
        op: Op,
        pair: &Pair,
        split: Split,
        transfer: Transfer,
        requests: &mut Vec<Request>,
    ) {
        let Transfer {
            offset,
            segments,
            done,
        } = transfer;
        let done = finish(
            Arc::clone(&self.core),
            op,
            offset,
            segments.bytes() as u64,
            done,
        );
        if let [only] = split.parts() {
            requests.push(self.request(op, pair, only.way, offset, segments, done));
            return;
        }
        let parts = Parts::new(split.parts(), done);
        for (number, part) in split.parts().iter().enumerate() {
            let (from, len) = (
                (part.start - offset) as usize,
                (part.end - part.start) as usize,
            );
            let part_segments = segments.slice(from, len);
            let parts = Arc::clone(&parts);
            let done = Box::new(move |progress| parts.settle(number, progress));
            requests.push(self.request(op, pair, part.way, part.start, part_segments, done));
        }
    }

    fn request(
        &self,
        op: Op,
        pair: &Pair,
        way: Way,
        offset: u64,
        segments: Segments,
        done: pinfold_mem::uring::Done,
    ) -> Request {
        let done = match op {
            Op::Read => done,
            Op::Write => past_lowered_limit(&pair.plain, offset, &segments, done),
        };
        let plain = |segments, done| Request {
            op,
            file: Arc::clone(&pair.plain),
            offset,
            segments,
            block: 1,
            done,
        };
        let (Way::Direct, Some(direct)) = (way, &pair.direct) else {
            return plain(segments, done);
        };
        // Refused at the first transfer, as some filesystems do: go on by the plain way, here and from now on.
        let (core, engine) = (Arc::clone(&self.core), Arc::downgrade(&self.engine));
        let again = plain(segments.clone(), done);
        Request {
            op,
            file: Arc::clone(direct),
            offset,
            segments,
            block: pair.block,
            done: Box::new(move |progress: Progress<Errno>| {
                match engine.upgrade() {
                    Some(engine) if split::refuses_direct(progress) => {
                        core.refused.store(true, Ordering::Relaxed);
                        engine.submit([again]);
                    }
                    _ => {
                        let Request {
                            file,
                            segments,
                            done,
                            ..
                        } = again;
                        // As the engine does: released before the completion may count on it.
                        drop((file, segments));
                        done(progress);
                    }
                }
            }),
        }
    }
}

impl Core {
    /// Called with the lock of `files` held, after they changed.
    fn note_readable(&self, files: &Files) {
        self.readable
            .store(files.reader.is_some(), Ordering::Release);
    }

    /// Called after `files` changed, with nothing held.
    fn note_here(&self) {
        self.here.follow(|| self.files.read().reader.clone());
    }

    fn pair(&self, op: Op) -> Option<Pair> {
        let files = self.files.read();
        match op {
            Op::Read => files.reader.clone(),
            Op::Write => files.writer.clone(),
        }
    }

    fn split(&self, op: Op, pair: &Pair, offset: u64, segments: &Segments) -> Split {
        let direct = pair.direct.is_some() && !self.refused.load(Ordering::Relaxed);
        let len_seen = match op {
            Op::Read => Some(self.len_seen.load(Ordering::Relaxed)),
            Op::Write => None,
        };
        Split::of(
            offset,
            segments,
            direct.then_some(pair.alignment()),
            len_seen,
        )
    }
}

/// Wraps the completion of a write: what RLIMIT_FSIZE refuses is written with the limit out of the way. Whoever writes
/// is bound by it when he writes; what has come this far was acknowledged, perhaps under a higher one.
fn past_lowered_limit(
    file: &Arc<OwnedFd>,
    offset: u64,
    segments: &Segments,
    done: pinfold_mem::uring::Done,
) -> pinfold_mem::uring::Done {
    let (file, segments) = (Arc::clone(file), segments.clone());
    Box::new(move |progress| {
        let mut progress = progress;
        if progress.stop == Some(Errno::EFBIG) {
            let from = progress.done;
            let left = segments.bytes() as u64 - from;
            let rest = segments.slice(from as usize, left as usize);
            let write = || Engine::write_wait(&file, offset + from, &rest, 1);
            if let Some(more) = limits::without_file_size_limit(write) {
                progress = Progress {
                    done: from + more.done,
                    stop: more.stop,
                };
            }
        }
        // Released before the completion may count on it.
        drop((file, segments));
        done(progress);
    })
}

/// Wraps a store completion for an engine: names the operation and the range, and notes the size a write reached.
fn finish(
    core: Arc<Core>,
    op: Op,
    offset: u64,
    len: u64,
    done: Completion,
) -> pinfold_mem::uring::Done {
    Box::new(move |progress| {
        if op == Op::Write && progress.done > 0 {
            core.len_seen
                .fetch_max(offset + progress.done, Ordering::Relaxed);
        }
        drop(core);
        done(progress.map_stop(|errno| error(operation(op), offset, len, errno)));
    })
}

impl Object for DirObject {
    fn geometry(&self) -> Geometry {
        let files = self.core.files.read();
        let direct = files
            .any()
            .filter(|pair| pair.direct.is_some() && !self.core.refused.load(Ordering::Relaxed));
        Geometry {
            block: direct.map_or(1, |pair| pair.block),
            memory: direct.map_or(1, |pair| pair.memory),
            transfer_best: TRANSFER_BEST,
            direct: direct.is_some(),
        }
    }

    fn readable(&self) -> bool {
        self.core.readable.load(Ordering::Acquire)
    }

    fn read(&self, batch: Vec<Transfer>) {
        self.start(Op::Read, batch);
    }

    fn write(&self, batch: Vec<Transfer>) {
        self.start(Op::Write, batch);
    }

    fn read_attended(&self, transfer: Transfer) -> Option<Arc<Attended>> {
        let direct = self.core.pair(Op::Read).and_then(|pair| {
            let (offset, segments) = (transfer.offset, &transfer.segments);
            let split = self.core.split(Op::Read, &pair, offset, segments);
            let file = pair.direct.clone().filter(|_| split.is_direct())?;
            Some((pair, file))
        });
        let Some((pair, file)) = direct else {
            self.read(vec![transfer]);
            return None;
        };
        let Transfer {
            offset,
            segments,
            done,
        } = transfer;
        let len = segments.bytes() as u64;
        let request = Request {
            op: Op::Read,
            file,
            offset,
            segments,
            block: pair.block,
            done: finish(Arc::clone(&self.core), Op::Read, offset, len, done),
        };
        match self.engine.read_attended(request) {
            Ok(queue) => Some(queue),
            Err(Request { segments, done, .. }) => {
                let request = self.request(Op::Read, &pair, Way::Direct, offset, segments, done);
                self.engine.submit([request]);
                None
            }
        }
    }

    fn read_wait(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        if self.ring_is_cheaper(segments) {
            return wait_for(|done| {
                self.read(vec![Transfer {
                    offset,
                    segments: segments.clone(),
                    done,
                }]);
            });
        }
        self.transfer_here(Op::Read, offset, segments)
    }

    fn read_here(&self, offset: u64, segments: &Segments) -> Option<Progress<StoreError>> {
        if segments.spans().len() != 1 {
            return None;
        }
        let here = &self.core.here;
        here.with(|pair| self.transfer_by(pair, Op::Read, offset, segments))
    }

    fn write_wait(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        let end = offset.saturating_add(segments.bytes() as u64);
        // Whoever writes is bound by the limit before he comes here. What it refuses now was accepted under a higher one:
        // here it would be SIGXFSZ for the program's thread, on the ring's it is an error that can be mended.
        let past_limit = limits::file_size().is_some_and(|limit| end > limit);
        if past_limit || self.ring_is_cheaper(segments) {
            return wait_for(|done| {
                self.write(vec![Transfer {
                    offset,
                    segments: segments.clone(),
                    done,
                }]);
            });
        }
        self.transfer_here(Op::Write, offset, segments)
    }

    fn write_bound(&self, offset: u64, segments: &Segments) -> Progress<StoreError> {
        if self.ring_is_cheaper(segments) {
            return self.write_wait(offset, segments);
        }
        self.transfer_here(Op::Write, offset, segments)
    }

    fn len(&self) -> StoreResult<u64> {
        let file = self.any_file(Operation::Attributes)?;
        self.refresh_len(&file)
            .map_err(|errno| error(Operation::Attributes, 0, 0, errno))
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        let file = self.writer(Operation::SetLen)?;
        retry(|| rustix::fs::ftruncate(&file, len))
            .map_err(|errno| error(Operation::SetLen, len, 0, errno))?;
        self.core.len_seen.store(len, Ordering::Relaxed);
        Ok(())
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        self.fallocate(Operation::Allocate, FallocateFlags::KEEP_SIZE, range)
    }

    fn rearrange(&self, how: Rearrange, range: Range<u64>) -> StoreResult<()> {
        match how {
            Rearrange::Zero => self.zero_range(range, true),
            Rearrange::Collapse => self.collapse_range(range),
            Rearrange::Insert => self.insert_range(range),
        }
    }

    fn space_left(&self) -> Option<u64> {
        let file = self.any_file(Operation::Attributes).ok()?;
        let space = rustix::fs::fstatvfs(&*file).ok()?;
        Some(space.f_bavail.saturating_mul(space.f_frsize))
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.fallocate(Operation::Punch, mode, range)
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        // The writer's descriptor by preference: it is the one that has seen every write-back error of a tail.
        let file = self.file(Operation::Sync, OFlags::RDONLY, |files| {
            files.writer.as_ref().or_else(|| files.any())
        })?;
        let synced = match scope {
            SyncScope::Data => retry(|| rustix::fs::fdatasync(&file)),
            SyncScope::All => retry(|| rustix::fs::fsync(&file)),
        };
        synced.map_err(|errno| error(Operation::Sync, 0, 0, errno))
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        let file = self.any_file(Operation::Seek)?;
        let to = match what {
            Seek::Data => SeekFrom::Data(offset),
            Seek::Hole => SeekFrom::Hole(offset),
        };
        // Nothing uses the descriptor's position: every transfer names its offset.
        match retry(|| rustix::fs::seek(&file, to)) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(error(Operation::Seek, offset, 0, errno)),
        }
    }
}

fn keep(size: bool) -> FallocateFlags {
    if size {
        FallocateFlags::KEEP_SIZE
    } else {
        FallocateFlags::empty()
    }
}

fn operation(op: Op) -> Operation {
    match op {
        Op::Read => Operation::Read,
        Op::Write => Operation::Write,
    }
}

fn error(operation: Operation, offset: u64, len: u64, errno: Errno) -> StoreError {
    StoreError {
        operation,
        offset,
        len,
        errno,
    }
}

/// Makes a system call again while a signal interrupts it, within a bound.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> Result<T, Errno> {
    let mut tries = 0;
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) if tries < INTERRUPTIONS_MAX => tries += 1,
            result => return result.map_err(|e| Errno::from_raw(e.raw_os_error())),
        }
    }
}

/// The page as the border between direct and plain parts, in bytes.
const PAGE: u64 = PAGE_SIZE;

#[cfg(test)]
mod tests;
