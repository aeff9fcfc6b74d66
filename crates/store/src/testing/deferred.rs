//! An object whose transfers wait until the test lets them go.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pinfold_base::{Errno, Progress};

use crate::object::{
    Geometry, Object, Operation, Seek, StoreError, StoreResult, SyncScope, Transfer,
};

/// What is known of a transfer that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queued {
    /// Counted from the object's first transfer; stays the same while others come and go.
    pub number: u64,
    /// Read or write.
    pub operation: Operation,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// When a transfer waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// Before any byte moves.
    Start,
    /// After the bytes moved, before the completion is called.
    Completion,
    /// Not at all.
    Nothing,
}

/// What is left to do for a transfer that waits.
enum Rest {
    All(Transfer),
    Completion(Box<dyn FnOnce() + Send>, Box<dyn FnOnce(StoreError) + Send>),
}

/// Holds transfers in a queue. Dropping it lets all go; other operations pass.
pub struct DeferredObject {
    inner: Arc<dyn Object>,
    queue: Arc<Queue>,
}

struct Queue {
    state: Mutex<State>,
    more: Condvar,
}

struct State {
    hold: Hold,
    next: u64,
    waiting: Vec<(Queued, Rest)>,
}

impl std::fmt::Debug for DeferredObject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeferredObject")
            .field("inner", &self.inner)
            .field("queued", &self.queued())
            .finish()
    }
}

impl Queue {
    fn push(&self, queued: Queued, rest: Rest) {
        self.state.lock().waiting.push((queued, rest));
        self.more.notify_all();
    }
}

impl DeferredObject {
    /// Wraps `inner`; transfers wait before any byte moves.
    #[must_use]
    pub fn new(inner: Arc<dyn Object>) -> Arc<Self> {
        Self::holding(inner, Hold::Start)
    }

    /// Wraps `inner`; transfers run at once and their completions wait.
    #[must_use]
    pub fn holding_completions(inner: Arc<dyn Object>) -> Arc<Self> {
        Self::holding(inner, Hold::Completion)
    }

    fn holding(inner: Arc<dyn Object>, hold: Hold) -> Arc<Self> {
        Arc::new(Self {
            inner,
            queue: Arc::new(Queue {
                state: Mutex::new(State {
                    hold,
                    next: 0,
                    waiting: Vec::new(),
                }),
                more: Condvar::new(),
            }),
        })
    }

    /// Lists what waits, in the order it came.
    #[must_use]
    pub fn queued(&self) -> Vec<Queued> {
        let state = self.queue.state.lock();
        state.waiting.iter().map(|(queued, _)| *queued).collect()
    }

    /// Waits until at least `count` transfers wait; false when `timeout` passes first.
    #[must_use]
    pub fn wait_queued(&self, count: usize, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.queue.state.lock();
        while state.waiting.len() < count {
            if self.queue.more.wait_until(&mut state, deadline).timed_out() {
                return state.waiting.len() >= count;
            }
        }
        true
    }

    /// Lets the transfer at `index` of [`queued`](Self::queued) go; false when there is none.
    pub fn release(&self, index: usize) -> bool {
        let rest = self.take(index);
        rest.map(|(queued, rest)| self.proceed(queued, rest))
            .is_some()
    }

    /// Lets transfers go in the order of `numbers`; returns how many of them waited.
    pub fn release_numbers(&self, numbers: &[u64]) -> usize {
        let waited = numbers.iter().filter(|&&number| {
            let index = self
                .queued()
                .iter()
                .position(|queued| queued.number == number);
            index.is_some_and(|index| self.release(index))
        });
        waited.count()
    }

    /// Lets all that wait now go, in the order they came; returns how many.
    pub fn release_all(&self) -> usize {
        let waiting = std::mem::take(&mut self.queue.state.lock().waiting);
        let count = waiting.len();
        for (queued, rest) in waiting {
            self.proceed(queued, rest);
        }
        count
    }

    /// Lets all go, now and from now on.
    pub fn open(&self) {
        self.queue.state.lock().hold = Hold::Nothing;
        self.release_all();
    }

    /// Ends the transfer at `index` with an error and nothing done; false when there is none.
    pub fn fail(&self, index: usize, errno: Errno) -> bool {
        let Some((queued, rest)) = self.take(index) else {
            return false;
        };
        let error = StoreError {
            operation: queued.operation,
            offset: queued.offset,
            len: queued.len,
            errno,
        };
        match rest {
            Rest::All(transfer) => (transfer.done)(Progress::stopped(0, error)),
            Rest::Completion(_, fail) => fail(error),
        }
        true
    }

    fn take(&self, index: usize) -> Option<(Queued, Rest)> {
        let mut state = self.queue.state.lock();
        (index < state.waiting.len()).then(|| state.waiting.remove(index))
    }

    fn proceed(&self, queued: Queued, rest: Rest) {
        match rest {
            Rest::All(transfer) => self.start(queued.operation, transfer),
            Rest::Completion(complete, _) => complete(),
        }
    }

    fn start(&self, operation: Operation, transfer: Transfer) {
        match operation {
            Operation::Write => self.inner.write(vec![transfer]),
            _ => self.inner.read(vec![transfer]),
        }
    }

    fn hold(&self, operation: Operation, transfer: Transfer) {
        let (hold, queued) = {
            let mut state = self.queue.state.lock();
            let queued = Queued {
                number: state.next,
                operation,
                offset: transfer.offset,
                len: transfer.segments.bytes() as u64,
            };
            state.next += 1;
            (state.hold, queued)
        };
        match hold {
            Hold::Nothing => self.start(operation, transfer),
            Hold::Start => self.queue.push(queued, Rest::All(transfer)),
            Hold::Completion => {
                let queue = Arc::clone(&self.queue);
                let done = transfer.done;
                let keep = Box::new(move |outcome| {
                    // The completion is called by whichever of the two runs.
                    let done = Arc::new(Mutex::new(Some(done)));
                    let other = Arc::clone(&done);
                    let complete = move || {
                        let done = done.lock().take();
                        if let Some(done) = done {
                            done(outcome);
                        }
                    };
                    let fail = move |error| {
                        let done = other.lock().take();
                        if let Some(done) = done {
                            done(Progress::stopped(0, error));
                        }
                    };
                    queue.push(queued, Rest::Completion(Box::new(complete), Box::new(fail)));
                });
                self.start(
                    operation,
                    Transfer {
                        done: keep,
                        ..transfer
                    },
                );
            }
        }
    }
}

impl Drop for DeferredObject {
    fn drop(&mut self) {
        self.open();
    }
}

impl Object for DeferredObject {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn readable(&self) -> bool {
        self.inner.readable()
    }

    fn take_up(&self, token: u64) -> StoreResult<()> {
        self.inner.take_up(token)
    }

    fn read(&self, batch: Vec<Transfer>) {
        for transfer in batch {
            self.hold(Operation::Read, transfer);
        }
    }

    fn write(&self, batch: Vec<Transfer>) {
        for transfer in batch {
            self.hold(Operation::Write, transfer);
        }
    }

    fn len(&self) -> StoreResult<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        self.inner.set_len(len)
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        self.inner.allocate(range)
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        self.inner.punch(range)
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        self.inner.sync(scope)
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.inner.seek(what, offset)
    }
}
