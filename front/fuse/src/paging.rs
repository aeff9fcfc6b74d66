//! The threads behind shared files' pages, and the kernel as they see it.
//!
//! *Owns*: who invalidates, who serves requests that had to wait, who gets glocks for them.
//!
//! *Does not own*: which request may be served when ([`crate::pages`]).
//!
//! *Locking*: none but the queues'. Three kinds of threads, so that none waits for its like: an invalidation waits for fills and
//! stores, which wait for the store at most; a glock is waited for by threads that do nothing else.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use fuser::{Errno, INodeNo, Notifier};
use parking_lot::{Condvar, Mutex};

use crate::pages::{Pages, Work};

/// Threads of each kind.
const THREADS: usize = 4;
/// How long an invalidation is given before it is taken to wait for a page that a request of ours is to fill.
const PATIENCE: Duration = Duration::from_millis(2);
/// How long an invalidation may take before somebody is told.
const SLOW: Duration = Duration::from_secs(5);

/// What is asked of the kernel about its pages of a file.
pub(crate) trait Kernel: Send + Sync {
    /// Drops its pages of `bytes`, storing those that are dirty first. Waits for pages that are being filled or stored.
    fn invalidate(&self, number: u64, bytes: &Range<u64>);

    /// Tells it that the file reaches to `len` at least. It knows when it comes to wait for the page that holds the last byte.
    fn reach(&self, number: u64, len: u64);
}

/// Linux, by notifications.
pub(crate) struct Linux {
    pub(crate) notifier: Notifier,
    pub(crate) device: OwnedFd,
}

impl Kernel for Linux {
    fn invalidate(&self, number: u64, bytes: &Range<u64>) {
        // A length of 0 is "to the end, wherever that is".
        let offset = i64::try_from(bytes.start).unwrap_or(i64::MAX);
        let len = i64::try_from(bytes.end - bytes.start).unwrap_or(0);
        if let Err(error) = self.notifier.inval_inode(INodeNo(number), offset, len) {
            // The mount is gone, and its pages are nobody's.
            tracing::debug!(%error, number, "cannot invalidate the kernel's pages");
        }
    }

    fn reach(&self, number: u64, len: u64) {
        let message = reach_message(number, len);
        let outcome = pinfold::write_unreadable(self.device.as_fd(), &message, 1);
        tracing::trace!(?outcome, number, len, "told the kernel a size");
    }
}

/// Builds a `FUSE_NOTIFY_STORE` of the file's last byte. The kernel takes the size over before it looks for the page and the byte; that the
/// byte cannot be read keeps it from changing a page that may be in use.
fn reach_message(number: u64, len: u64) -> [u8; 40] {
    const STORE: i32 = 4;
    let mut message = [0; 40];
    message[..4].copy_from_slice(&41u32.to_ne_bytes());
    message[4..8].copy_from_slice(&STORE.to_ne_bytes());
    message[16..24].copy_from_slice(&number.to_ne_bytes());
    message[24..32].copy_from_slice(&len.saturating_sub(1).to_ne_bytes());
    message[32..36].copy_from_slice(&1u32.to_ne_bytes());
    message
}

/// A request to the kernel.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    stage: Mutex<Stage>,
    changed: Condvar,
    /// The thread that asks the kernel, once it has begun.
    thread: AtomicI32,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    /// The threads are busy with others.
    #[default]
    Queued,
    Begun,
    Ended,
}

impl Asked {
    fn reach(&self, stage: Stage) {
        *self.stage.lock() = stage;
        self.changed.notify_all();
    }

    /// Waits for its end for a moment after it has begun; tells whether it came.
    pub(crate) fn wait(&self) -> bool {
        let mut stage = self.stage.lock();
        while *stage == Stage::Queued {
            self.changed.wait(&mut stage);
        }
        let end = Instant::now() + PATIENCE;
        while *stage == Stage::Begun && !self.changed.wait_until(&mut stage, end).timed_out() {}
        *stage == Stage::Ended
    }

    /// Waits for its end, or until the kernel has come to wait for a page. That it runs, or wants to, is not enough: on a busy
    /// machine it may not even have entered the kernel for as long as others like.
    pub(crate) fn wait_or_sleeps(&self) {
        while !self.wait() && !sleeps_in_kernel(self.thread.load(Ordering::Acquire)) {}
    }
}

/// Tells whether a thread of this process waits in the kernel for a page that somebody has locked. Other waits come before the
/// size is taken over (for the address space, which other threads change).
fn sleeps_in_kernel(thread: i32) -> bool {
    let told = std::fs::read_to_string(format!("/proc/self/task/{thread}/wchan"));
    // Without /proc nobody can tell: then the moment has to do.
    told.map_or(true, |place| {
        place.contains("folio") || place.contains("page_bit")
    })
}

enum Question {
    Invalidate(u64, Range<u64>),
    Reach(u64, u64),
}

/// The queues of one mount's threads; they end with this.
pub(crate) struct Paging {
    questions: Sender<(Question, Arc<Asked>)>,
    admitted: Sender<(Arc<Pages>, Work)>,
    wanted: Sender<Arc<Pages>>,
}

impl fmt::Debug for Paging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paging").finish_non_exhaustive()
    }
}

impl Paging {
    /// Starts the threads.
    pub(crate) fn start(kernel: Arc<dyn Kernel>) -> std::io::Result<Arc<Self>> {
        let (questions, asked) = channel();
        let (admitted, works) = channel();
        let (wanted, wishes) = channel();
        let paging = Arc::new(Self {
            questions,
            admitted,
            wanted,
        });
        spawn("pinfold-inval", asked, move |(question, asked)| {
            let thread = rustix::thread::gettid().as_raw_nonzero().get();
            asked.thread.store(thread, Ordering::Release);
            Arc::as_ref(&asked).reach(Stage::Begun);
            ask(&*kernel, question);
            Arc::as_ref(&asked).reach(Stage::Ended);
        })?;
        spawn(
            "pinfold-pages",
            works,
            |(pages, work): (Arc<Pages>, Work)| {
                pages.serve(work);
            },
        )?;
        let weak: Weak<Self> = Arc::downgrade(&paging);
        spawn("pinfold-lend", wishes, move |pages: Arc<Pages>| {
            if let Some(paging) = weak.upgrade() {
                pages.borrow_mode(&paging);
            }
        })?;
        Ok(paging)
    }

    /// Has the kernel drop its pages of `bytes`.
    pub(crate) fn invalidate(&self, number: u64, bytes: Range<u64>) -> Arc<Asked> {
        self.ask(Question::Invalidate(number, bytes))
    }

    /// Tells the kernel how far the file reaches at least.
    pub(crate) fn reach(&self, number: u64, len: u64) -> Arc<Asked> {
        self.ask(Question::Reach(number, len))
    }

    fn ask(&self, question: Question) -> Arc<Asked> {
        let asked = Arc::new(Asked::default());
        if self.questions.send((question, Arc::clone(&asked))).is_err() {
            // The threads have ended, the mount with them.
            asked.reach(Stage::Ended);
        }
        asked
    }

    /// Has `work` done, which the lent mode of its file admits.
    pub(crate) fn serve(&self, pages: Arc<Pages>, work: Work) {
        if let Err(unsent) = self.admitted.send((pages, work)) {
            let (pages, work) = unsent.0;
            pages.serve(work);
        }
    }

    /// Has the glock got for requests that wait for it.
    pub(crate) fn want(&self, pages: Arc<Pages>) {
        if let Err(unsent) = self.wanted.send(pages) {
            unsent.0.refuse(Errno::EIO);
        }
    }
}

fn ask(kernel: &dyn Kernel, question: Question) {
    let begun = Instant::now();
    let number = match question {
        Question::Invalidate(number, bytes) => {
            kernel.invalidate(number, &bytes);
            number
        }
        Question::Reach(number, len) => {
            kernel.reach(number, len);
            number
        }
    };
    let took = begun.elapsed();
    if took > SLOW {
        tracing::warn!(number, ?took, "the kernel was slow to give pages up");
    }
}

/// Starts threads that take what comes out of a queue, until nobody can put anything in.
fn spawn<T: Send + 'static>(
    name: &str,
    queue: Receiver<T>,
    work: impl Fn(T) + Send + Sync + 'static,
) -> std::io::Result<()> {
    let shared = Arc::new((Mutex::new(queue), work));
    for _ in 0..THREADS {
        let shared = Arc::clone(&shared);
        std::thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                loop {
                    let next = shared.0.lock().recv();
                    let Ok(next) = next else {
                        return;
                    };
                    (shared.1)(next);
                }
            })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_told_as_the_kernels_struct() {
        let message = reach_message(7, 4097);
        assert_eq!(message[..4], 41u32.to_ne_bytes(), "with the byte behind it");
        assert_eq!(message[4..8], 4i32.to_ne_bytes());
        assert_eq!(message[8..16], [0; 8], "nobody asked");
        assert_eq!(message[16..24], 7u64.to_ne_bytes());
        assert_eq!(message[24..32], 4096u64.to_ne_bytes());
        assert_eq!(message[32..36], 1u32.to_ne_bytes());
    }
}
