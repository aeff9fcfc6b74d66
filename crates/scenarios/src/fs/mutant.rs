//! File systems that are wrong on purpose: a check that never failed is not yet a check.
//!
//! *Owns*: [`Mutant`], which wraps any back end and breaks one promise, and the list of [`Mutation`]s.
//!
//! *Does not own*: which scenario must notice which mutation; the tests of this crate say that.
//!
//! *Locking*: none.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pinfold_base::Errno;
use pinfold_base::rank::{self, Rank};
use pinfold_mem::Direction;
use pinfold_mem::region::view::{Sharing, View};
use pinfold_mem::region::{At, Region, UserIov};
use serde::{Deserialize, Serialize};

use super::{Allocate, Fs, Handle, How, Kind, Mapped, Open, Pins, Refusal, Troubled};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mutation {
    /// A failed write leaves a longer file.
    GrowOnFailure,
    /// A failed write at the file position moves it.
    MoveOnFailure,
    /// A transfer that could do only a prefix reports EFAULT.
    LosePrefix,
    /// A transfer of nothing is EFAULT.
    RefuseNothing,
    /// Behind the committed part of a short write, garbage shows for a moment.
    ShowGarbage,
    /// A short write leaves garbage behind its committed part.
    KeepGarbage,
    /// The size grows before the data is there.
    SizeFirst,
    /// Writes do half of what they are asked.
    Halve,
    /// EFBIG and EINVAL are confused.
    ConfuseErrors,
    /// Every 50th write is EFAULT.
    FaultNowAndThen,
    /// RWF_NOWAIT is ignored.
    IgnoreNowait,
    /// Direct reads do not see what is cached.
    StaleDirect,
    /// A large write starts with its end.
    BackToFront,
    /// A cancelled call goes on.
    IgnoreCancel,
    /// fsync never ends.
    HangInSync,
    /// fsync never reports an error.
    ForgetErrors,
    /// fsync reports an error for ever.
    RepeatErrors,
    /// One file's writes wait for five seconds.
    StarveOne,
    /// The process dies.
    Die,
    /// Every write of a page or more leaves garbage at its start.
    Corrupt,
    /// Every direct read brings garbage at its start.
    CorruptDirectRead,
    /// A file that grows shows garbage at its old end.
    GrowGarbage,
    /// An append is two.
    TornAppend,
    /// A direct write is done when the next one comes.
    LateDirect,
    /// A direct write does nothing, and says so.
    IdleDirect,
    /// A shared mapping is a private one.
    Separate,
    /// msync always succeeds.
    LaxMsync,
    /// A record in bad memory is no error.
    SwallowFaults,
    /// fsync takes two seconds.
    SlowSync,
    /// Each transfer leaves a pin behind.
    LeakPins,
    /// O_DSYNC and RWF_DSYNC are ignored.
    IgnoreDsync,
    /// A leaf's lock is held around every transfer.
    HoldALock,
}

/// A file system with one promise broken.
#[derive(Debug)]
pub struct Mutant {
    inner: Box<dyn Fs>,
    mutation: Mutation,
    /// Transfers so far, for [`Mutation::LeakPins`].
    transfers: Arc<AtomicU64>,
}

impl Mutant {
    /// Breaks `inner`.
    #[must_use]
    pub fn new(inner: Box<dyn Fs>, mutation: Mutation) -> Self {
        Self {
            inner,
            mutation,
            transfers: Arc::default(),
        }
    }
}

impl Fs for Mutant {
    fn kind(&self) -> Kind {
        self.inner.kind()
    }

    fn dir(&self) -> &Path {
        self.inner.dir()
    }

    fn open(&self, name: &str, how: Open) -> Result<Box<dyn Handle>, Errno> {
        if self.mutation == Mutation::Die {
            std::process::abort();
        }
        let how = Open {
            dsync: how.dsync && self.mutation != Mutation::IgnoreDsync,
            ..how
        };
        let inner = self.inner.open(name, how)?;
        Ok(Box::new(MutantFile {
            inner,
            aside: self.inner.open(name, Open::EXISTING)?,
            transfers: Arc::clone(&self.transfers),
            late: Mutex::new(None),
            mutation: self.mutation,
            how,
            starved: name == "writer-1",
            calls: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }))
    }

    fn cancels(&self) -> bool {
        self.inner.cancels()
    }

    fn faults_inline(&self) -> bool {
        self.inner.faults_inline()
    }

    fn pins(&self) -> Option<Pins> {
        let pins = self.inner.pins()?;
        let leaked = match self.mutation {
            Mutation::LeakPins => self.transfers.load(Ordering::Relaxed),
            _ => 0,
        };
        Some(Pins {
            acquired: pins.acquired + leaked,
            ..pins
        })
    }

    fn troubled(&self) -> Result<Troubled, String> {
        let Troubled {
            fs,
            turn,
            write_back,
        } = self.inner.troubled()?;
        Ok(Troubled {
            fs: Box::new(Self::new(fs, self.mutation)),
            turn,
            write_back,
        })
    }

    fn volatile(&self) -> Result<Box<dyn Fs>, String> {
        Ok(Box::new(Self::new(self.inner.volatile()?, self.mutation)))
    }
}

#[derive(Debug)]
struct MutantFile {
    inner: Box<dyn Handle>,
    /// The same file by another descriptor, without O_DIRECT or O_APPEND.
    aside: Box<dyn Handle>,
    transfers: Arc<AtomicU64>,
    /// What [`Mutation::LateDirect`] has not written yet, and where it belongs.
    late: Mutex<Option<(Region, usize, u64)>>,
    mutation: Mutation,
    how: Open,
    /// Whether [`Mutation::StarveOne`] means this file.
    starved: bool,
    calls: AtomicU64,
    /// Error number of the last failed fsync, or 0.
    failed: AtomicU64,
}

/// How long [`Mutation::StarveOne`] holds up a write: longer than patient tests of T60 wait.
const STARVED: Duration = Duration::from_secs(9);
/// How long [`Mutation::SlowSync`] takes: longer than T50 allows.
const SLOW_SYNC: Duration = Duration::from_secs(6);

/// Byte that no scenario writes.
const GARBAGE: u8 = 0xee;

impl MutantFile {
    fn how<'a>(&self, how: How<'a>) -> How<'a> {
        How {
            nowait: how.nowait && self.mutation != Mutation::IgnoreNowait,
            dsync: how.dsync && self.mutation != Mutation::IgnoreDsync,
            cancel: how
                .cancel
                .filter(|_| self.mutation != Mutation::IgnoreCancel),
        }
    }

    fn start(&self, at: At) -> Result<u64, Errno> {
        match at {
            _ if self.how.append => self.inner.size(),
            At::Position => self.inner.position(),
            At::Offset(offset) => Ok(offset),
        }
    }

    /// What is wrong with a transfer whatever its direction: what it returns instead, if so.
    fn refused(&self, iov: &UserIov<'_>) -> Option<Errno> {
        let nothing = iov.bytes() == 0 && !iov.spans().is_empty();
        (nothing && self.mutation == Mutation::RefuseNothing).then_some(Errno::EFAULT)
    }

    fn reported(&self, asked: usize, result: Result<usize, Errno>) -> Result<usize, Errno> {
        match (self.mutation, result) {
            (Mutation::LosePrefix, Ok(done)) if 0 < done && done < asked => Err(Errno::EFAULT),
            (Mutation::ConfuseErrors, Err(Errno::EFBIG)) => Err(Errno::EINVAL),
            (Mutation::ConfuseErrors, Err(Errno::EINVAL)) => Err(Errno::EFBIG),
            (_, result) => result,
        }
    }

    /// What a mutant does before the bytes move.
    fn before_write(&self, from: &UserIov<'_>, start: u64) -> Result<(), Errno> {
        match self.mutation {
            Mutation::FaultNowAndThen => {
                let call = self.calls.fetch_add(1, Ordering::Relaxed);
                if call % 50 == 49 {
                    return Err(Errno::EFAULT);
                }
            }
            Mutation::SizeFirst => {
                let end = start + from.bytes() as u64;
                if end > self.inner.size()? {
                    self.inner.truncate(end)?;
                }
            }
            Mutation::StarveOne if self.starved => std::thread::sleep(STARVED),
            _ => {}
        }
        Ok(())
    }

    /// What a mutant does after the bytes moved, or did not.
    fn after_write(
        &self,
        asked: usize,
        start: u64,
        done: Result<usize, Errno>,
    ) -> Result<(), Errno> {
        match (self.mutation, done) {
            (Mutation::GrowOnFailure, Err(_)) if self.inner.size()? <= start => {
                self.inner.truncate(start + 1)
            }
            (Mutation::ShowGarbage | Mutation::KeepGarbage, Ok(done)) if done < asked => {
                self.put_garbage(start + done as u64)
            }
            (Mutation::Corrupt, Ok(done)) if done >= Region::PAGE => self.put_garbage(start),
            _ => Ok(()),
        }
    }

    fn put_garbage(&self, at: u64) -> Result<(), Errno> {
        let region = Region::pages(2)?;
        let old = region.iov(0..64);
        if self.aside.read(&old, At::Offset(at), How::PLAIN)? < 64 {
            return Ok(());
        }
        region.fill(Region::PAGE..Region::PAGE + 64, GARBAGE)?;
        let garbage = region.iov(Region::PAGE..Region::PAGE + 64);
        self.aside.write(&garbage, At::Offset(at), How::PLAIN)?;
        if self.mutation == Mutation::ShowGarbage {
            std::thread::sleep(Duration::from_micros(100));
            self.aside.write(&old, At::Offset(at), How::PLAIN)?;
        }
        Ok(())
    }

    /// Writes what was to be written before, and keeps `from` for the next time.
    fn write_late(&self, from: &UserIov<'_>, start: u64) -> Result<usize, Errno> {
        let len = from.bytes();
        let mut bytes = vec![0; len];
        let mut cursor = from.cursor(Direction::Source);
        if cursor.copy_slice_nofault(&mut bytes).done < len as u64 {
            return Err(Errno::EFAULT);
        }
        let region = Region::pages(len.div_ceil(Region::PAGE))?;
        region.put(0, &bytes)?;
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((region, len, at)) = late.replace((region, len, start)) {
            self.inner
                .write(&region.iov(0..len), At::Offset(at), How::PLAIN)?;
        }
        Ok(len)
    }

    /// Writes as one append what others may come between.
    fn append_in_parts(&self, from: &UserIov<'_>, how: How<'_>) -> Result<usize, Errno> {
        let half = from.bytes() / 2;
        let first = self.inner.write(&from.part(0..half), At::Position, how)?;
        std::thread::yield_now();
        let rest = from.part(half..from.bytes());
        Ok(first + self.inner.write(&rest, At::Position, how)?)
    }

    /// Writes a large source from its last part to its first.
    fn write_backwards(&self, from: &UserIov<'_>, start: u64) -> Result<usize, Errno> {
        const PART: usize = 1 << 20;
        let parts = from.bytes() / PART;
        for part in (0..parts).rev() {
            let bytes = part * PART..(part + 1) * PART;
            let at = At::Offset(start + bytes.start as u64);
            self.inner.write(&from.part(bytes), at, How::PLAIN)?;
        }
        Ok(parts * PART)
    }
}

impl Handle for MutantFile {
    fn read(&self, to: &UserIov<'_>, at: At, how: How<'_>) -> Result<usize, Errno> {
        if let Some(errno) = self.refused(to) {
            return Err(errno);
        }
        self.transfers.fetch_add(1, Ordering::Relaxed);
        let start = self.start(at)?;
        let _held = (self.mutation == Mutation::HoldALock).then(|| rank::enter(Rank::Leaf));
        let result = self.inner.read(to, at, self.how(how));
        if self.mutation == Mutation::MoveOnFailure && result.is_err() && at == At::Position {
            self.inner.seek(start + 1)?;
        }
        if self.mutation == Mutation::CorruptDirectRead && self.how.direct {
            let mut garbage = [GARBAGE; 8];
            let _ = to
                .cursor(Direction::Target)
                .copy_slice_nofault(&mut garbage);
        }
        if self.mutation == Mutation::StaleDirect && self.how.direct {
            let mut zeros = vec![0; to.bytes()];
            let _ = to.cursor(Direction::Target).copy_slice_nofault(&mut zeros);
        }
        self.reported(to.bytes(), result)
    }

    fn write(&self, from: &UserIov<'_>, at: At, how: How<'_>) -> Result<usize, Errno> {
        if let Some(errno) = self.refused(from) {
            return Err(errno);
        }
        self.transfers.fetch_add(1, Ordering::Relaxed);
        let start = self.start(at)?;
        let size = self.inner.size()?;
        self.before_write(from, start)?;
        let how = self.how(how);
        let halved = from.part(0..from.bytes() / 2);
        let result = match self.mutation {
            Mutation::BackToFront if from.bytes() > 64 << 20 => self.write_backwards(from, start),
            Mutation::LateDirect if self.how.direct => self.write_late(from, start),
            Mutation::IdleDirect if self.how.direct => Ok(0),
            Mutation::TornAppend if self.how.append => self.append_in_parts(from, how),
            Mutation::Halve if from.bytes() > 1 => self.inner.write(&halved, at, how),
            _ => self.inner.write(from, at, how),
        };
        self.after_write(from.bytes(), start, result)?;
        if self.mutation == Mutation::GrowGarbage && size < start {
            self.put_garbage(size)?;
        }
        if self.mutation == Mutation::MoveOnFailure && result.is_err() && at == At::Position {
            self.inner.seek(start + 1)?;
        }
        self.reported(from.bytes(), result)
    }

    fn seek(&self, offset: u64) -> Result<(), Errno> {
        self.inner.seek(offset)
    }

    fn position(&self) -> Result<u64, Errno> {
        self.inner.position()
    }

    fn size(&self) -> Result<u64, Errno> {
        self.inner.size()
    }

    fn truncate(&self, size: u64) -> Result<(), Errno> {
        let before = self.inner.size()?;
        self.inner.truncate(size)?;
        if self.mutation == Mutation::GrowGarbage && before < size {
            self.put_garbage(before)?;
        }
        Ok(())
    }

    fn allocate(&self, mode: Allocate, range: Range<u64>) -> Result<(), Errno> {
        self.inner.allocate(mode, range)
    }

    fn sync(&self) -> Result<(), Errno> {
        let result = self.inner.sync();
        match (self.mutation, result) {
            (Mutation::HangInSync, _) => loop {
                std::thread::park();
            },
            (Mutation::SlowSync, result) => {
                std::thread::sleep(SLOW_SYNC);
                result
            }
            (Mutation::ForgetErrors, _) => Ok(()),
            (Mutation::RepeatErrors, Err(errno)) => {
                self.failed
                    .store(errno.raw().unsigned_abs().into(), Ordering::Relaxed);
                Err(errno)
            }
            (Mutation::RepeatErrors, Ok(())) if self.failed.load(Ordering::Relaxed) != 0 => {
                Err(Errno::EIO)
            }
            (_, result) => result,
        }
    }

    fn sync_data(&self) -> Result<(), Errno> {
        self.inner.sync_data()
    }

    fn drop_cache(&self) -> Result<(), Errno> {
        self.inner.drop_cache()
    }

    fn map(&self, range: Range<u64>, sharing: Sharing) -> Result<Box<dyn Mapped>, Refusal> {
        let sharing = match self.mutation {
            Mutation::Separate => Sharing::Private,
            _ => sharing,
        };
        let inner = self.inner.map(range, sharing)?;
        if self.mutation == Mutation::LaxMsync {
            return Ok(Box::new(LaxMap { inner }));
        }
        Ok(inner)
    }

    fn extents(&self, into: &UserIov<'_>) -> Result<usize, Refusal> {
        match self.inner.extents(into) {
            Err(Refusal::Failed(Errno::EFAULT)) if self.mutation == Mutation::SwallowFaults => {
                Ok(0)
            }
            extents => extents,
        }
    }

    fn transfer(
        &self,
        direction: Direction,
        iov: &UserIov<'_>,
        offset: u64,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<usize, Refusal> {
        if matches!(direction, Direction::Source) && self.mutation == Mutation::LateDirect {
            meanwhile();
            return Ok(self.write_late(iov, offset)?);
        }
        self.inner.transfer(direction, iov, offset, meanwhile)
    }
}

/// A mapping whose msync looks at nothing.
#[derive(Debug)]
struct LaxMap {
    inner: Box<dyn Mapped>,
}

impl Mapped for LaxMap {
    fn view(&self) -> View<'_> {
        self.inner.view()
    }

    fn sync(&self, range: Range<usize>, flags: i32) -> Result<(), Refusal> {
        // What can be stored is: only the answer is wrong.
        let _ = self.inner.sync(range, flags);
        Ok(())
    }

    fn forget(&self, range: Range<usize>) -> Result<(), Refusal> {
        self.inner.forget(range)
    }

    fn resident(&self, range: Range<usize>) -> Result<Vec<bool>, Refusal> {
        self.inner.resident(range)
    }

    fn unmap(&mut self, range: Range<usize>) -> Result<(), Refusal> {
        self.inner.unmap(range)
    }
}
