//! How a call wants its I/O done, and the checks every call starts with.

use pinfold_base::sync::path::{AtomicBool, Ordering};
use std::sync::Arc;

use pinfold_base::units::FILE_SIZE_MAX;
use pinfold_base::{Errno, PAGE_SIZE};
use pinfold_cache::{CacheError, Pace};
use pinfold_mem::{AlignedBuf, CopyStop, IovCursor, clock, faultin, limits};

use crate::error::{Error, ErrorKind};

/// The most bytes one call moves, as in Linux.
pub const CALL_BYTES_MAX: usize = 0x7fff_f000;
/// Fruitless rounds at one place before the bytes go through a bounce buffer.
const FRUITLESS_MAX: u32 = 2;
/// The size of a bounce buffer.
pub(crate) const BOUNCE_BYTES: usize = 64 << 10;
/// Times one byte's page is brought in for a copy with nothing held.
const BRING_IN_MAX: u32 = 64;
/// How much is brought in at once after a copy came to nothing, as gfs2's window.
const WINDOW_BYTES: usize = 1 << 20;

/// Ends calls that are under way: they return the bytes done so far, or `EINTR`.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Makes a token that has not been used.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the calls that were given this token, now and later.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Tells whether the token was used.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn flag(&self) -> &AtomicBool {
        &self.0
    }
}

/// Per-call options, as the flags of preadv2 and pwritev2.
#[derive(Debug, Clone, Copy, Default)]
pub struct IoOptions<'a> {
    /// Fail with `EAGAIN` rather than wait (RWF_NOWAIT).
    pub nowait: bool,
    /// Return only when the data is durable (RWF_DSYNC).
    pub dsync: bool,
    /// Write at the end whatever the offset says (RWF_APPEND).
    pub append: bool,
    /// Lets another thread end the call.
    pub cancel: Option<&'a Cancel>,
}

impl IoOptions<'_> {
    pub(crate) fn pace(&self) -> Pace<'_> {
        Pace {
            nowait: self.nowait,
            cancelled: self.cancel.map(Cancel::flag),
        }
    }

    pub(crate) fn check_cancelled(&self) -> Result<(), CacheError> {
        match self.cancel {
            Some(cancel) if cancel.is_cancelled() => Err(CacheError::Interrupted),
            _ => Ok(()),
        }
    }
}

/// Checks the position and length of a call as Linux does, before anything else.
pub(crate) fn check_range(operation: &'static str, offset: u64, count: usize) -> Result<(), Error> {
    let fits = offset <= FILE_SIZE_MAX
        && (count as u64)
            .checked_add(offset)
            .is_some_and(|end| end <= FILE_SIZE_MAX);
    if fits {
        return Ok(());
    }
    Err(Error::invalid(operation, Errno::EINVAL)
        .at_range(offset..offset.saturating_add(count as u64)))
}

/// Clamps a write to the limits; `pos` is where it will begin, `end` the file's size now.
///
/// Signals SIGXFSZ like the kernel when RLIMIT_FSIZE leaves nothing.
pub(crate) fn clamp_write(
    pos: u64,
    count: usize,
    end: u64,
    obey_rlimit: bool,
) -> Result<usize, Error> {
    let mut count = count.min(CALL_BYTES_MAX);
    let asked = pos..pos.saturating_add(count as u64);
    let limit = || {
        if asked.end <= end {
            limits::file_size_lately(clock::now_ns())
        } else {
            limits::file_size()
        }
    };
    let too_big = || Error::invalid("write", Errno::EFBIG).at_range(asked.clone());
    if obey_rlimit && let Some(limit) = limit() {
        if pos >= limit {
            limits::raise_file_size_signal();
            return Err(too_big());
        }
        count = count.min(usize::try_from(limit - pos).unwrap_or(usize::MAX));
    }
    // The last byte a page index can reach without the cache's arithmetic ever saturating.
    let max = FILE_SIZE_MAX - FILE_SIZE_MAX % PAGE_SIZE;
    if pos >= max {
        return Err(too_big());
    }
    Ok(count.min(usize::try_from(max - pos).unwrap_or(usize::MAX)))
}

/// What to do after a copy that came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Copy again: the next byte was brought in.
    Retry,
    /// Go through a bounce buffer: bringing it in did not help.
    Bounce,
    /// Nobody can make this memory accessible.
    BadBuffer,
}

/// Counts fruitless rounds at one place of a call.
#[derive(Debug, Default)]
pub(crate) struct Stalls(u32);

impl Stalls {
    /// Notes that bytes were moved.
    pub(crate) fn progressed(&mut self) {
        self.0 = 0;
    }

    /// Resolves a copy that came to nothing. Nothing may be held (INV9).
    pub(crate) fn resolve(&mut self, stop: CopyStop, cursor: &IovCursor<'_>, bytes: usize) -> Next {
        if let CopyStop::Fatal { .. } = stop {
            return Next::BadBuffer;
        }
        self.0 += 1;
        let window = bytes.max(1).max(WINDOW_BYTES.min(cursor.count()));
        if faultin::fault_in_cursor(cursor, window) == window {
            return Next::BadBuffer;
        }
        if self.0 > FRUITLESS_MAX {
            Next::Bounce
        } else {
            Next::Retry
        }
    }
}

/// Takes up to [`BOUNCE_BYTES`] from a source cursor with faults allowed and nothing held; the cursor advances.
///
/// Returns no bytes when the next one is not accessible.
pub(crate) fn bounce_in(cursor: &mut IovCursor<'_>) -> (AlignedBuf, usize) {
    let mut buf = AlignedBuf::zeroed(BOUNCE_BYTES.min(cursor.count().max(1)));
    let n = buf.len().min(cursor.count());
    let copied = copy_waiting(cursor, &mut buf.as_mut_slice()[..n]);
    (buf, copied)
}

/// Copies between a cursor and a slice of the library's own with nothing held, bringing in what the copy meets; returns the
/// bytes moved, fewer than there are only before one that nobody can make accessible.
///
/// A page that is brought in can be gone again before it is copied, but hardly so often in a row.
pub(crate) fn copy_waiting(cursor: &mut IovCursor<'_>, slice: &mut [u8]) -> usize {
    let want = slice.len().min(cursor.count());
    let (mut done, mut tries) = (0, 0);
    while done < want {
        let copied = cursor.copy_slice_waiting(&mut slice[done..want]);
        // At most the slice's length.
        done += copied.done as usize;
        let Some(stop) = copied.stop else {
            continue;
        };
        tries = if copied.done > 0 { 0 } else { tries + 1 };
        let hopeless = matches!(stop, CopyStop::Fatal { .. }) || tries > BRING_IN_MAX;
        if hopeless || faultin::fault_in_cursor(cursor, 1) == 1 {
            break;
        }
    }
    done
}

pub(crate) fn bad_buffer(operation: &'static str, offset: u64, count: usize) -> Error {
    Error::new(operation, ErrorKind::BadBuffer)
        .at_range(offset..offset.saturating_add(count as u64))
}
