//! Sizes of growing files: what a program may be told of a size that the kernel does not know yet.
//!
//! The kernel learns a file's new size when the call that grew it ends: a wake-up after our answer, or several requests
//! later. Until then it cuts reads off at the old size and mappings fault there. Whoever asks for the size is shown
//! what *we* answer, though, so a size told too early is one that cannot be read up to (SEMANTICS.md T14); and one held back
//! too long is less than what a finished write covered.
//!
//! *Owns*: for each file the size as of the answered requests, and whether the kernel is known to have it; the threads
//! that wait until it has.
//!
//! *Does not own*: sizes, which are the volume's.
//!
//! *Locking*: one mutex for each file, a leaf.
//!
//! ```text
//!            a request begins to grow the file
//!   settled ───────────────────────────────────▶ growing ──▶ answered ──▶ settled
//!                                                   ▲           │
//!                                                   └───────────┘ the next request
//! ```
//!
//! Only *settled* sizes need no care. From *answered* to *settled* there is no message, but there are proofs, since the
//! kernel holds the inode's lock for the length of a call that grows a file: a request of another thread that needs
//! that lock, any question of the thread that grew it, the end of the open file, or having had the lock ourselves.

use std::ffi::OsStr;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fuser::{FileAttr, INodeNo, Notifier, ReplyAttr};
use parking_lot::{Condvar, Mutex};

/// How long a question waits for the kernel to learn a size, before it is answered nevertheless, unless the mount says
/// otherwise.
///
/// Long against a call of some requests; bearable for who lists a directory while one call writes gigabytes. It also ends
/// the wait where somebody in the kernel asks while holding the inode's lock.
pub(crate) const WAIT: Duration = Duration::from_secs(1);
/// Threads that wait for inodes' locks: as many long calls at a time do not delay questions about other files.
const SETTLERS: usize = 4;
/// Questions that wait at once; more are answered right away.
const WAITING_MAX: usize = 256;
/// The number by which the kernel says that it cannot name a thread.
const NO_THREAD: u32 = 0;
/// A name that no directory has.
const NO_NAME: &str = "/";
/// How long the kernel may use a size that was held back: not at all.
const NOT_AT_ALL: Duration = Duration::ZERO;

/// How far the kernel knows the size of one file.
#[derive(Debug, Default)]
pub(crate) struct Growth(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    growing: Option<Growing>,
    /// Counts requests for good, so that a proof about earlier ones is never taken for one about later ones.
    requests: u64,
}

/// A size that the kernel may not know.
#[derive(Debug)]
struct Growing {
    /// Bytes, as of the requests that have been answered.
    answered: u64,
    /// Requests that grow the file and have not been answered.
    under_way: usize,
    /// Where the last of them came from.
    by: Grower,
    /// When the last answer was given.
    since: Instant,
}

/// Whoever made a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grower {
    /// The thread's number.
    pub(crate) thread: u32,
    /// The open file, where there is one.
    pub(crate) handle: Option<u64>,
}

/// The size that may be told of a file, once the kernel knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unsettled {
    /// Bytes.
    pub(crate) len: u64,
    requests: u64,
}

impl Growth {
    /// Begins a request that may grow the file beyond `len`, its size so far.
    pub(crate) fn begin(&self, by: Grower, len: u64) {
        let mut state = self.0.lock();
        state.requests += 1;
        let growing = state.growing.get_or_insert(Growing {
            answered: len,
            under_way: 0,
            by,
            since: Instant::now(),
        });
        growing.under_way += 1;
        growing.by = by;
    }

    /// Ends it; the file reaches to `end` at least. To be called before the answer, on which the asker may act at once.
    pub(crate) fn end(&self, end: u64) {
        if let Some(growing) = &mut self.0.lock().growing {
            growing.answered = growing.answered.max(end);
            growing.under_way = growing.under_way.saturating_sub(1);
            growing.since = Instant::now();
        }
    }

    /// Notes a request that the kernel makes under the inode's lock: all that grew the file has ended.
    pub(crate) fn settle(&self) {
        self.0.lock().growing = None;
    }

    /// Notes that an open file is closed: a call that it grew the file by has ended.
    pub(crate) fn close(&self, handle: u64) {
        let mut state = self.0.lock();
        if state
            .growing
            .as_ref()
            .is_some_and(|growing| growing.under_way == 0 && growing.by.handle == Some(handle))
        {
            state.growing = None;
        }
    }

    /// Returns what may be told to `thread` once the kernel knows it; `None` if it knows the size, or if the last answer was
    /// given `wait_max` ago.
    pub(crate) fn unsettled(&self, thread: u32, wait_max: Duration) -> Option<Unsettled> {
        let mut state = self.0.lock();
        let growing = state.growing.as_ref()?;
        // A thread makes one call at a time: that it asks says that its last one has ended.
        let own = growing.by.thread == thread && thread != NO_THREAD;
        // No question waits longer, so none begins to.
        let long_ago = growing.since.elapsed() >= wait_max;
        if growing.under_way == 0 && (own || long_ago) {
            state.growing = None;
            return None;
        }
        Some(Unsettled {
            len: growing.answered,
            requests: state.requests,
        })
    }

    /// Notes that the kernel has had the inode's lock free since `seen` was returned.
    fn passed(&self, seen: Unsettled) {
        let mut state = self.0.lock();
        let answered = state.growing.as_ref().is_some_and(|g| g.under_way == 0);
        if answered && state.requests == seen.requests {
            state.growing = None;
        }
    }
}

/// A question for a file's attributes that waits for the kernel.
#[derive(Debug)]
pub(crate) struct Question {
    number: INodeNo,
    growth: Arc<Growth>,
    seen: Unsettled,
    attr: FileAttr,
    /// When it is answered in any case.
    deadline: Instant,
    /// Taken by whoever answers.
    reply: Mutex<Option<ReplyAttr>>,
    answered: Condvar,
}

impl Question {
    /// A question for `attr`, whose size has been held back to that of `seen`.
    pub(crate) fn new(
        number: INodeNo,
        (growth, seen): (Arc<Growth>, Unsettled),
        attr: FileAttr,
        wait_max: Duration,
        reply: ReplyAttr,
    ) -> Self {
        Self {
            number,
            growth,
            seen,
            attr,
            deadline: Instant::now() + wait_max,
            reply: Mutex::new(Some(reply)),
            answered: Condvar::new(),
        }
    }

    fn is_answered(&self) -> bool {
        self.reply.lock().is_none()
    }

    fn answer(&self) {
        let reply = self.reply.lock().take();
        if let Some(reply) = reply {
            reply.attr(&NOT_AT_ALL, &self.attr);
            self.answered.notify_all();
        }
    }

    /// Waits until it is answered, or has to be.
    fn wait(&self) {
        let mut reply = self.reply.lock();
        while reply.is_some()
            && !self
                .answered
                .wait_until(&mut reply, self.deadline)
                .timed_out()
        {}
    }
}

/// Answers questions for attributes when the kernel knows the size.
///
/// Some threads wait for inodes' locks. Whoever holds one waits for threads that serve requests or for the one that
/// invalidates; none of these waits for those. One more thread answers what has waited long enough.
#[derive(Debug)]
pub(crate) struct Settler {
    queues: OnceLock<Queues>,
    wait_max: Duration,
}

#[derive(Debug)]
struct Queues {
    unsettled: SyncSender<Arc<Question>>,
    waiting: SyncSender<Arc<Question>>,
}

impl Settler {
    /// Makes one without threads, whose questions are to wait so long at most.
    pub(crate) fn new(wait_max: Duration) -> Self {
        Self {
            queues: OnceLock::new(),
            wait_max,
        }
    }

    /// Returns how long a question waits at most.
    pub(crate) fn wait_max(&self) -> Duration {
        self.wait_max
    }

    /// Starts the threads; they end with this.
    pub(crate) fn start(&self, notifier: &Notifier) -> std::io::Result<()> {
        let (unsettled, questions) = sync_channel(WAITING_MAX);
        let questions = Arc::new(Mutex::new(questions));
        for _ in 0..SETTLERS {
            let (notifier, questions) = (notifier.clone(), Arc::clone(&questions));
            std::thread::Builder::new()
                .name("pinfold-settle".into())
                .spawn(move || settle(&notifier, &questions))?;
        }
        let (waiting, questions) = sync_channel(WAITING_MAX);
        std::thread::Builder::new()
            .name("pinfold-overdue".into())
            .spawn(move || answer_overdue(&questions))?;
        // Started once for each session.
        let _ = self.queues.set(Queues { unsettled, waiting });
        Ok(())
    }

    /// Answers when the kernel knows the size, or when it has waited long enough.
    pub(crate) fn answer_settled(&self, question: Question) {
        let question = Arc::new(question);
        // The watched queue first: what is only there is answered in time, what is only in the other might never be.
        let queued = self.queues.get().is_some_and(|queues| {
            queues.waiting.try_send(Arc::clone(&question)).is_ok()
                && queues.unsettled.try_send(Arc::clone(&question)).is_ok()
        });
        if !queued {
            question.answer();
        }
    }
}

fn settle(notifier: &Notifier, questions: &Mutex<Receiver<Arc<Question>>>) {
    loop {
        let next = questions.lock().recv();
        let Ok(question) = next else {
            return;
        };
        // One that waited too long has been answered; its lock may be held for as long again.
        if question.is_answered() {
            continue;
        }
        // Linux up to 6.18 takes the lock of the inode that is said to be a directory before it finds that it is none:
        // all there is to wait for a call that holds the lock. Later kernels look first and say so at once; what
        // remains there is the moment between our answer and the end of the call.
        let outcome = notifier.inval_entry(question.number, OsStr::new(NO_NAME));
        tracing::trace!(?outcome, number = question.number.0, "had the inode's lock");
        question.growth.passed(question.seen);
        question.answer();
    }
}

fn answer_overdue(questions: &Receiver<Arc<Question>>) {
    for question in questions {
        question.wait();
        question.answer();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Never over by itself.
    const LONG: Duration = Duration::from_secs(3600);
    const ONE: Grower = Grower {
        thread: 101,
        handle: Some(7),
    };
    const OTHER: Grower = Grower {
        thread: 102,
        handle: Some(8),
    };
    const NOBODY: Grower = Grower {
        thread: NO_THREAD,
        handle: None,
    };

    fn told(growth: &Growth, asker: Grower) -> Option<u64> {
        growth.unsettled(asker.thread, LONG).map(|seen| seen.len)
    }

    #[test]
    fn a_size_is_held_back_until_its_request_is_answered() {
        let growth = Growth::default();
        assert_eq!(told(&growth, OTHER), None);
        growth.begin(ONE, 10);
        assert_eq!(told(&growth, OTHER), Some(10));
        assert_eq!(told(&growth, ONE), Some(10));
        growth.end(30);
        assert_eq!(told(&growth, OTHER), Some(30));
        growth.begin(ONE, 30);
        assert_eq!(
            told(&growth, OTHER),
            Some(30),
            "the next request of the call"
        );
    }

    #[test]
    fn a_failed_request_takes_nothing_back() {
        let growth = Growth::default();
        growth.begin(ONE, 10);
        growth.end(20);
        growth.begin(ONE, 20);
        growth.end(0);
        assert_eq!(told(&growth, OTHER), Some(20));
    }

    #[test]
    fn the_thread_that_grew_it_proves_that_its_call_has_ended() {
        let growth = Growth::default();
        growth.begin(ONE, 0);
        growth.end(20);
        assert_eq!(told(&growth, ONE), None);
        assert_eq!(told(&growth, OTHER), None, "and that holds for others");
    }

    #[test]
    fn a_thread_without_a_number_proves_nothing() {
        let growth = Growth::default();
        growth.begin(NOBODY, 0);
        growth.end(20);
        assert_eq!(told(&growth, NOBODY), Some(20));
    }

    #[test]
    fn closing_the_file_that_grew_it_settles_the_size_and_closing_another_does_not() {
        let growth = Growth::default();
        growth.begin(ONE, 0);
        growth.end(20);
        growth.close(8);
        assert_eq!(told(&growth, OTHER), Some(20));
        growth.close(7);
        assert_eq!(told(&growth, OTHER), None);
    }

    #[test]
    fn a_size_that_nobody_asked_for_settles_with_time() {
        let growth = Growth::default();
        growth.begin(ONE, 0);
        growth.end(20);
        assert_eq!(told(&growth, OTHER), Some(20));
        assert_eq!(growth.unsettled(OTHER.thread, Duration::ZERO), None);
        assert_eq!(told(&growth, OTHER), None, "and that holds from then on");
    }

    #[test]
    fn having_had_the_lock_proves_nothing_of_later_requests() {
        let growth = Growth::default();
        growth.begin(ONE, 0);
        growth.end(20);
        let seen = growth.unsettled(OTHER.thread, LONG).unwrap();
        growth.begin(ONE, 20);
        growth.passed(seen);
        assert_eq!(told(&growth, OTHER), Some(20), "one is under way");
        growth.end(40);
        growth.passed(seen);
        assert_eq!(told(&growth, OTHER), Some(40), "it has ended since");
        let seen = growth.unsettled(OTHER.thread, LONG).unwrap();
        growth.passed(seen);
        assert_eq!(told(&growth, OTHER), None);
        growth.begin(ONE, 40);
        growth.end(60);
        growth.passed(seen);
        assert_eq!(told(&growth, OTHER), Some(60), "it was settled in between");
    }
}
