//! Direct reads that go to the store from the thread that submits them, many at a time and without a thread each.
//!
//! *Owns*: which reads may, and what their completions do, which run on a thread of the store's, or of one who waits for
//! another read, that must not wait: whatever might is left to a thread of the pool.
//!
//! *Does not own*: everything else, which is a call in the pool. Above all writes: one holds the inode's lock and blocks the
//! gate to its completion (D-9), and both belong to the thread that took them.
//!
//! *Locking*: nothing is held while a read is with the store, as with any direct read (SEMANTICS.md section C).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pinfold_base::{Errno, Progress, page_span};
use pinfold_mem::{Direction, Loan, Segments, mapped};
use pinfold_store::{Operation, StoreError, Transfer};

use super::{Attendance, Call, Job, Outcome, Submitted, make};
use crate::error::Error;
use crate::file::File;
use crate::inode::Inode;
use crate::io::CALL_BYTES_MAX;

/// Gives a read to the store; gives the buffer back where the read has to be a call of the pool's.
pub(super) fn begin<B>(file: &Arc<File>, call: &Arc<Call<B>>, buf: B, offset: u64) -> Result<(), B>
where
    B: AsMut<[u8]> + Send + 'static,
{
    let access = file.access();
    let inode = file.inode();
    // A store that touches the memory itself needs memory that is there; other nodes need a glock.
    if !access.direct || !access.read || inode.shared().is_some() || inode.object().copies() {
        return Err(buf);
    }
    let mut loan = Loan::new(buf);
    let Ok(segments) = catch_unwind(AssertUnwindSafe(|| loan.lend())) else {
        // The call will panic again, where that is its own loss.
        return Err(loan.take_back());
    };
    let submitted = &inode.engine().submitted;
    if !suits(inode, &segments, offset) || !submitted.begin_straight() {
        drop(segments);
        return Err(loan.take_back());
    }
    let want = segments.bytes() as u64;
    let ended = Ended {
        file: Arc::clone(file),
        call: Arc::clone(call),
        loan,
        offset,
    };
    let over = Arc::new(AtomicBool::new(false));
    let mut sent = Sent {
        ended: Some(ended),
        want,
        over: Arc::clone(&over),
        submitted: Arc::clone(submitted),
    };
    let transfer = Transfer {
        offset,
        segments,
        done: Box::new(move |moved| sent.end(moved)),
    };
    if let Some(queue) = inode.object().read_attended(transfer) {
        submitted.look_after(&queue);
        // Set once: each call is begun once.
        let _ = call.attendance.set(Attendance {
            queue,
            over,
            submitted: Arc::clone(submitted),
        });
    }
    Ok(())
}

/// Tells whether nothing has to be waited for, and nothing refused, zeroed or cut off, before or after the transfer.
fn suits(inode: &Inode, segments: &Segments, offset: u64) -> bool {
    let [span] = segments.spans() else {
        return false;
    };
    let geometry = inode.object().geometry();
    let (addr, len) = (span.as_ptr().addr(), span.len());
    let block = u64::from(geometry.block.max(1));
    let aligned = !geometry.direct
        || ((offset | len as u64).is_multiple_of(block)
            && addr.is_multiple_of(geometry.memory.max(1) as usize));
    let below_end = offset
        .checked_add(len as u64)
        .is_some_and(|end| end <= inode.len());
    if !aligned || !below_end || len > CALL_BYTES_MAX {
        return false;
    }
    if mapped::any() && mapped::touches(addr, len) {
        return false;
    }
    // What is cached and newer has to be stored first.
    let pages = page_span(offset, len as u64);
    let newer = inode.pages().next_dirty(pages.start);
    newer.is_none_or(|page| page >= pages.end)
}

/// A read that is with the store. Dropped untold, as by a store that panics, it has failed: somebody waits for it.
struct Sent<B: AsMut<[u8]> + Send + 'static> {
    ended: Option<Ended<B>>,
    want: u64,
    over: Arc<AtomicBool>,
    submitted: Arc<Submitted>,
}

impl<B: AsMut<[u8]> + Send + 'static> Sent<B> {
    fn end(&mut self, moved: Progress<StoreError>) {
        let Some(ended) = self.ended.take() else {
            return;
        };
        // First: whoever waits need not reap any more, whatever comes of it.
        self.over.store(true, Ordering::Release);
        let rest = ended.judge(self.want, moved);
        self.submitted.end_straight(rest);
    }
}

impl<B: AsMut<[u8]> + Send + 'static> Drop for Sent<B> {
    fn drop(&mut self) {
        let offset = self.ended.as_ref().map_or(0, |ended| ended.offset);
        let error = StoreError {
            operation: Operation::Read,
            offset,
            len: self.want,
            errno: Errno::EIO,
        };
        self.end(Progress::stopped(0, error));
    }
}

/// A read whose transfer has ended.
struct Ended<B> {
    file: Arc<File>,
    call: Arc<Call<B>>,
    loan: Loan<B>,
    offset: u64,
}

impl<B: AsMut<[u8]> + Send + 'static> Ended<B> {
    /// Tells what it came to; returns what a thread that may wait has to do.
    fn judge(self, want: u64, moved: Progress<StoreError>) -> Option<Job> {
        let Self {
            file,
            call,
            loan,
            offset,
        } = self;
        let short = match &moved.stop {
            None => moved.done < want,
            // All but the first are a queue's that tries nothing again.
            Some(error) => matches!(
                error.errno,
                Errno::EFAULT | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EAGAIN | Errno::EINTR
            ),
        };
        if short {
            // A hole behind the end of the store's file, or memory that is bad in part: a call knows what to do.
            return Some(Box::new(move || {
                make(file, Direction::Target, loan.take_back(), offset, &call);
            }));
        }
        let progress = moved.map_stop(|error| Error::store("read", error));
        let outcome = Outcome::Moved(progress, loan);
        // Whoever lets go of a file last writes it back, and a buffer may do anything when it is dropped.
        let Some(last) = Arc::into_inner(file) else {
            call.tell(outcome);
            let unwanted = Arc::into_inner(call)?;
            return Some(Box::new(move || drop(unwanted)));
        };
        Some(Box::new(move || {
            drop(last);
            call.tell(outcome);
        }))
    }
}
