//! Transfers that the caller does not wait for.
//!
//! *Owns*: the calls submitted and not yet begun, the threads that make them, and what is known of each until its [`Pending`]
//! has told it.
//!
//! *Does not own*: the transfers: a thread makes the same call that [`File::read_at`] or [`File::write_at`] would, so a direct
//! write blocks fills of its range to its completion, not to its submission (D-9), and sizes only grow (C-4). A direct read that
//! needs nobody's thread goes [straight](straight) to the store.
//!
//! *Locking*: the queue is a leaf; calls run with nothing held.
//!
//! ```text
//!  submit ─► queued ─► running ─► done ─► told by wait
//!     │        │ drop: never made  │ drop: ends by itself, its buffer with it
//!     │        ▲                   ▲
//!     '─► with the store: came to less, or to all of it
//! ```

mod straight;

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};
use pinfold_base::{Errno, Progress};
use pinfold_mem::uring::Attended;
use pinfold_mem::{Direction, IovCursor, Loan, quiet};

use crate::error::{Error, Result};
use crate::file::File;
use crate::io::{Cancel, IoOptions};

/// Calls of a volume that wait for a thread, and reads that are with the store without one, at most.
const QUEUE_MAX: usize = 1024;
/// Threads that make calls at most: so many transfers of a volume are under way at once.
const THREADS_MAX: usize = 16;
/// A thread that has had nothing to do for so long ends.
const IDLE: Duration = Duration::from_secs(5);
/// How often reads are looked after for which nobody waits.
const LOOK_AFTER: Duration = Duration::from_millis(20);

type Job = Box<dyn FnOnce() + Send>;

/// The threads that make submitted calls of a volume, begun when they are needed.
#[derive(Default)]
pub(crate) struct Submitted {
    state: Mutex<State>,
    more: Condvar,
    /// Where reads without a thread are, of a store whose reads are reaped by those who wait.
    queue: OnceLock<Arc<Attended>>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// Reads that are with the store without a thread.
    straight: usize,
    /// A thread looks after them in case that nobody waits for them.
    looked_after: bool,
}

impl State {
    fn is_full(&self) -> bool {
        self.queue.len() + self.straight >= QUEUE_MAX
    }
}

impl Submitted {
    /// Queues a call.
    fn push(self: &Arc<Self>, job: Job) -> std::result::Result<(), Errno> {
        let mut state = self.state.lock();
        if state.is_full() {
            return Err(Errno::EAGAIN);
        }
        self.provide(&mut state)?;
        state.queue.push_back(job);
        drop(state);
        self.more.notify_one();
        Ok(())
    }

    /// Sees to it that there is a thread, and one more where all have enough to do.
    fn provide(self: &Arc<Self>, state: &mut State) -> std::result::Result<(), Errno> {
        if state.idle > state.queue.len() || state.threads >= THREADS_MAX {
            return Ok(());
        }
        let ours = Arc::clone(self);
        let spawned = std::thread::Builder::new()
            .name("pinfold-call".into())
            .spawn(move || ours.serve());
        match spawned {
            Ok(_) => state.threads += 1,
            // Those there are will come to it.
            Err(_) if state.threads > 0 => {}
            Err(_) => return Err(Errno::EAGAIN),
        }
        Ok(())
    }

    /// Counts a read that goes to the store without a thread; false when there are too many calls. Until it is
    /// [over](Self::end_straight) one thread at least is there for what may have to be done about it.
    fn begin_straight(self: &Arc<Self>) -> bool {
        let mut state = self.state.lock();
        if state.is_full() || (state.threads == 0 && self.provide(&mut state).is_err()) {
            return false;
        }
        state.straight += 1;
        true
    }

    /// Has reads in `queue` looked after for which nobody waits: soon when a [`Pending`] is dropped, else within [`IDLE`].
    fn look_after(&self, queue: &Arc<Attended>) {
        self.queue.get_or_init(|| {
            // A thread that idles already waits as if there were none.
            self.more.notify_one();
            Arc::clone(queue)
        });
    }

    /// Ends such a read, with what is left to do about it. Does not wait, and takes it however many there are.
    fn end_straight(self: &Arc<Self>, rest: Option<Job>) {
        let mut state = self.state.lock();
        state.straight -= 1;
        let Some(job) = rest else {
            return;
        };
        // One thread is there: this read has kept it.
        let _ = self.provide(&mut state);
        state.queue.push_back(job);
        drop(state);
        self.more.notify_one();
    }

    /// Makes calls until there has been none for a while. The thread is nobody's to wait for: the last to let go of a
    /// file, and of its engine, may be a call.
    fn serve(&self) {
        quiet::keep_signals_away();
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
                continue;
            }
            state.idle += 1;
            let attended = self.queue.get().filter(|_| state.straight > 0);
            if let Some(queue) = attended.filter(|_| !state.looked_after) {
                state.looked_after = true;
                let waited = self.more.wait_for(&mut state, LOOK_AFTER);
                if waited.timed_out() {
                    MutexGuard::unlocked(&mut state, || queue.poll());
                }
                state.looked_after = false;
                state.idle -= 1;
                continue;
            }
            let waited = self.more.wait_for(&mut state, IDLE);
            state.idle -= 1;
            let needed = state.threads == 1 && state.straight > 0;
            if waited.timed_out() && state.queue.is_empty() && !needed {
                state.threads -= 1;
                return;
            }
        }
    }
}

/// What a submitted call came to.
#[derive(Debug)]
pub struct Completed<B> {
    /// Bytes moved, and why not all of them.
    pub progress: Progress<Error>,
    /// The buffer that was given.
    pub buf: B,
}

struct Call<B> {
    outcome: Mutex<Option<Outcome<B>>>,
    done: Condvar,
    cancel: Cancel,
    attendance: OnceLock<Attendance>,
}

/// A read whose end is asked for by who waits for it.
struct Attendance {
    queue: Arc<Attended>,
    /// Set when it has been reaped.
    over: Arc<AtomicBool>,
    /// Who looks after it when nobody waits.
    submitted: Arc<Submitted>,
}

impl Attendance {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

/// What a call came to, before it is told.
enum Outcome<B> {
    /// It was made by a thread.
    Made(Completed<B>),
    /// It went to the store straight, which may have the buffer for some microseconds yet.
    Moved(Progress<Error>, Loan<B>),
}

impl<B> Outcome<B> {
    fn completed(self) -> Completed<B> {
        match self {
            Self::Made(completed) => completed,
            Self::Moved(progress, loan) => Completed {
                progress,
                buf: loan.take_back(),
            },
        }
    }
}

impl<B> Call<B> {
    /// Reaps what has ended if the call may be among it.
    fn poll(&self) {
        if let Some(attendance) = self.attendance.get()
            && !attendance.is_over()
        {
            attendance.queue.poll();
        }
    }

    /// Reaps until the call has been.
    fn attend(&self) {
        if let Some(attendance) = self.attendance.get() {
            attendance.queue.wait_until(|| attendance.is_over());
        }
    }

    fn tell(&self, outcome: Outcome<B>) {
        *self.outcome.lock() = Some(outcome);
        self.done.notify_all();
    }
}

/// A call that was submitted.
///
/// Dropping it waits for nothing and tears nothing: a call that has not begun is not made, one under way ends by itself (a
/// write may have stored all, some, or none of its bytes), and the buffer lives as long as the call needs it.
#[must_use = "dropping it cancels the call"]
pub struct Pending<B> {
    call: Arc<Call<B>>,
}

impl<B> fmt::Debug for Pending<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("done", &self.is_done())
            .finish()
    }
}

impl<B> Pending<B> {
    /// Tells whether the call has ended: [`Pending::wait`] would not wait.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.call.poll();
        self.call.outcome.lock().is_some()
    }

    /// Ends the call soon: with the bytes moved so far, or `EINTR`. It has to be waited for all the same.
    pub fn cancel(&self) {
        self.call.cancel.cancel();
    }

    /// Waits until the call has ended.
    pub fn wait(self) -> Completed<B> {
        self.call.attend();
        let mut outcome = self.call.outcome.lock();
        loop {
            if let Some(told) = outcome.take() {
                drop(outcome);
                return told.completed();
            }
            self.call.done.wait(&mut outcome);
        }
    }

    /// Returns what the call came to.
    ///
    /// # Errors
    /// The call itself, when it has not ended yet.
    pub fn try_wait(self) -> std::result::Result<Completed<B>, Self> {
        self.call.poll();
        let outcome = self.call.outcome.lock().take();
        outcome.map(Outcome::completed).ok_or(self)
    }
}

impl<B> Drop for Pending<B> {
    fn drop(&mut self) {
        self.call.cancel.cancel();
        if let Some(attendance) = self.call.attendance.get()
            && !attendance.is_over()
        {
            attendance.submitted.more.notify_one();
        }
    }
}

impl File {
    /// Reads at `offset` into `buf`, in another thread. Calls that are under way at once have no order; of direct reads and
    /// writes of the same range the completion decides. A direct read of whole blocks below the end of the file, of which nothing
    /// newer is cached, takes no thread: of those as many are under way as are submitted, others go sixteen at a time.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let scratch = tempfile::tempdir()?;
    /// # let volume = pinfold::Volume::builder().memory(16 << 20).open_dir(scratch.path())?;
    /// use std::sync::Arc;
    ///
    /// let options = pinfold::OpenOptions::new().read(true).write(true).create(true);
    /// let file = Arc::new(volume.open("log", &options)?);
    /// let written = file.submit_write(b"in its own time".to_vec(), 0)?;
    /// // ... something else ...
    /// assert_eq!(written.wait().progress.posix()?, 15);
    /// let read = file.submit_read(vec![0; 15], 0)?.wait();
    /// assert_eq!(read.buf, b"in its own time");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// `EAGAIN` when too many calls of the volume wait already; [`ErrorKind::Forked`](crate::ErrorKind::Forked). The call's own
    /// errors are told by [`Pending::wait`].
    pub fn submit_read<B>(self: &Arc<Self>, buf: B, offset: u64) -> Result<Pending<B>>
    where
        B: AsMut<[u8]> + Send + 'static,
    {
        self.submit(Direction::Target, buf, offset)
    }

    /// Writes all of `buf` at `offset` (at the end, if open for appending), in another thread.
    ///
    /// # Errors
    /// As [`File::submit_read`].
    pub fn submit_write<B>(self: &Arc<Self>, buf: B, offset: u64) -> Result<Pending<B>>
    where
        B: AsMut<[u8]> + Send + 'static,
    {
        self.submit(Direction::Source, buf, offset)
    }

    fn submit<B>(self: &Arc<Self>, direction: Direction, buf: B, offset: u64) -> Result<Pending<B>>
    where
        B: AsMut<[u8]> + Send + 'static,
    {
        let operation = match direction {
            Direction::Target => "read",
            Direction::Source => "write",
        };
        let _quiet = self.enter(operation)?;
        let call = Arc::new(Call {
            outcome: Mutex::new(None),
            done: Condvar::new(),
            cancel: Cancel::new(),
            attendance: OnceLock::new(),
        });
        let buf = match direction {
            Direction::Target => match straight::begin(self, &call, buf, offset) {
                Ok(()) => return Ok(Pending { call }),
                Err(buf) => buf,
            },
            Direction::Source => buf,
        };
        let (file, theirs) = (Arc::clone(self), Arc::clone(&call));
        let job = move || make(file, direction, buf, offset, &theirs);
        self.inode()
            .engine()
            .submitted
            .push(Box::new(job))
            .map_err(|errno| Error::invalid(operation, errno).at_path_of(self))?;
        Ok(Pending { call })
    }
}

/// Makes a call, in a thread of its own, and tells what it came to.
fn make<B: AsMut<[u8]>>(
    file: Arc<File>,
    direction: Direction,
    mut buf: B,
    offset: u64,
    call: &Call<B>,
) {
    let operation = match direction {
        Direction::Target => "read",
        Direction::Source => "write",
    };
    let how = IoOptions {
        cancel: Some(&call.cancel),
        ..IoOptions::default()
    };
    let made = || match (how.check_cancelled(), direction) {
        (Err(error), _) => Progress::stopped(0, Error::cache(operation, error)),
        (Ok(()), Direction::Target) => {
            let mut cursor = IovCursor::from_mut_slice(buf.as_mut());
            file.read_cursor(&mut cursor, offset, &how)
        }
        (Ok(()), Direction::Source) => {
            let mut cursor = IovCursor::from_slice(buf.as_mut());
            file.write_cursor(&mut cursor, offset, &how)
        }
    };
    // A panic is this call's loss only: whoever waits for it, or for the next, must not wait for ever.
    let progress = catch_unwind(AssertUnwindSafe(made))
        .unwrap_or_else(|_| Progress::stopped(0, Error::invalid(operation, Errno::EIO)));
    // The file is let go of before the call counts as ended: who waited may close the volume.
    drop(file);
    call.tell(Outcome::Made(Completed { progress, buf }));
}
