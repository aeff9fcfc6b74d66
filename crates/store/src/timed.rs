//! A limit on how long a store may take to answer.
//!
//! *Owns*: the list of what is under way in the limited objects of a volume, the thread that ends what takes too long, and
//! the memory of transfers: a store that answers late reads and writes buffers of this module, never a cached page, a
//! pinned one or the caller's own, so nothing is reused under a device (SEMANTICS.md section E). The price is one copy of
//! every byte, and what is in flight comes on top of the volume's budget.
//!
//! *Does not own*: what an error means: write-back reports it through the file's errseq, a fault is SIGBUS.
//!
//! *Locking*: one leaf lock around the list, with nothing called under it; completions run with none held.
//!
//! ```text
//!  begin ─► under way ── answer ──────────────────────────► told
//!    │         '─ too long ─► told EIO, late ── answer ───► gone
//!    '─► behind a late change of the same bytes ─► under way, or too long
//! ```
//!
//! A write that was given up may still reach the store, and make its file longer: whoever reads or changes those bytes
//! waits until it has, or until his own time is over, so that older bytes never overwrite newer ones.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pinfold_base::counters::Counter;
use pinfold_base::sync::{Condvar, Mutex};
use pinfold_base::{Errno, Progress};
use pinfold_mem::{AlignedBuf, Segments, quiet};

use crate::object::{
    Completion, Geometry, Object, Operation, Rearrange, Seek, StoreError, StoreResult, SyncScope,
    Transfer, wait_for,
};

/// Operations of a volume that are late at most: with so many, the store counts as gone, and what comes is refused at once
/// until one of them ends. Bounds the memory and the threads that a dead store keeps.
const LATE_MAX: usize = 16;
/// Bytes that nothing can be about.
const NOTHING: Range<u64> = 0..0;

/// Begins an operation once it may; told its number.
type Start = Box<dyn FnOnce(u64) + Send>;

/// How long the store of a volume may take, for all its objects.
#[derive(Debug)]
pub struct TimeLimit {
    after: Duration,
    list: Arc<List>,
}

/// What is known of a volume's limited operations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TimeLimitSnapshot {
    /// Operations ended with `EIO` because the store did not answer in time, or is taken for gone.
    pub expired: u64,
    /// Operations given up that the store has still not ended.
    pub late: u64,
}

struct List {
    state: Mutex<State>,
    changed: Condvar,
    expired: Counter,
}

#[derive(Default)]
struct State {
    next: u64,
    objects: u64,
    /// By number, so the oldest, whose time ends first, comes first.
    under_way: BTreeMap<u64, Flight>,
    late: BTreeMap<u64, Late>,
    /// Whether somebody watches the time.
    watched: bool,
    over: bool,
}

/// An operation somebody waits for.
struct Flight {
    about: About,
    deadline: Instant,
    /// How it begins; none when it has.
    waits: Option<Start>,
    /// Where the bytes go that the store reads.
    target: Option<Segments>,
    done: Completion,
}

/// An operation that nobody waits for any more.
struct Late {
    object: u64,
    changes: Range<u64>,
}

/// What an operation is about.
#[derive(Clone)]
struct About {
    object: u64,
    operation: Operation,
    bytes: Range<u64>,
    /// The bytes that may change later if it is given up.
    changes: Range<u64>,
}

impl About {
    fn error(&self) -> StoreError {
        StoreError {
            operation: self.operation,
            offset: self.bytes.start,
            len: self.bytes.end - self.bytes.start,
            errno: Errno::EIO,
        }
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl fmt::Debug for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("List")
            .field("under_way", &state.under_way.len())
            .field("late", &state.late.len())
            .finish_non_exhaustive()
    }
}

impl TimeLimit {
    /// Makes a limit of `after`; the thread that keeps it begins with the first operation and ends with the limit.
    #[must_use]
    pub fn new(after: Duration) -> Arc<Self> {
        Arc::new(Self {
            after,
            list: Arc::new(List {
                state: Mutex::default(),
                changed: Condvar::new(),
                expired: Counter::default(),
            }),
        })
    }

    /// Returns the limit.
    #[must_use]
    pub fn after(&self) -> Duration {
        self.after
    }

    /// Returns what happened so far.
    #[must_use]
    pub fn statistics(&self) -> TimeLimitSnapshot {
        TimeLimitSnapshot {
            expired: self.list.expired.get(),
            late: self.list.state.lock().late.len() as u64,
        }
    }

    /// Ends everything that is under way as if its time were over.
    pub fn expire(&self) {
        let until = self.list.state.lock().next;
        while self.list.give_up(|number, _| number < until) {}
    }

    /// Runs something of the volume that is about no file, within the limit, in a thread of its own.
    ///
    /// # Errors
    /// Its own; `EIO` when it does not end in time.
    pub fn run<T: Send + 'static>(
        self: &Arc<Self>,
        operation: Operation,
        work: impl FnOnce() -> StoreResult<T> + Send + 'static,
    ) -> StoreResult<T> {
        let about = About {
            object: u64::MAX,
            operation,
            bytes: NOTHING,
            changes: NOTHING,
        };
        self.blocking(about, work)
    }

    /// Lists an operation and begins it, unless it has to wait for one that is late.
    fn begin(
        self: &Arc<Self>,
        about: About,
        target: Option<Segments>,
        done: Completion,
        start: Start,
    ) {
        let mut state = self.list.state.lock();
        if state.late.len() >= LATE_MAX {
            drop(state);
            self.list.expired.bump();
            drop((target, start));
            return done(Progress::stopped(0, about.error()));
        }
        self.watch(&mut state);
        let number = state.next;
        state.next += 1;
        let (waits, now) = match state.is_blocked(&about) {
            true => (Some(start), None),
            false => (None, Some(start)),
        };
        let flight = Flight {
            about,
            deadline: Instant::now() + self.after,
            waits,
            target,
            done,
        };
        state.under_way.insert(number, flight);
        drop(state);
        self.list.changed.notify_all();
        if let Some(start) = now {
            start(number);
        }
    }

    /// Sees to it that somebody watches the time.
    fn watch(&self, state: &mut State) {
        if state.watched {
            return;
        }
        let list = Arc::clone(&self.list);
        let spawned = std::thread::Builder::new()
            .name("pinfold-limit".into())
            .spawn(move || list.watch());
        // Tried again with the next operation.
        state.watched = spawned.is_ok();
    }

    /// Runs `work` in a thread of its own and waits for it within the limit.
    fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        about: About,
        work: impl FnOnce() -> StoreResult<T> + Send + 'static,
    ) -> StoreResult<T> {
        let slot = Arc::new(Mutex::new(None));
        let (ours, error) = (Arc::clone(self), about.error());
        let outcome = wait_for(|done| {
            let theirs = Arc::clone(&slot);
            let start: Start = Box::new(move |number| {
                let answer = Answer::new(&ours, number);
                let spawned = std::thread::Builder::new()
                    .name("pinfold-store".into())
                    .spawn(move || {
                        quiet::keep_signals_away();
                        *theirs.lock() = Some(work());
                        answer.tell(Progress::complete(0), None);
                    });
                // Where there is no thread for it, the answer that goes with the closure is an error.
                drop(spawned);
            });
            self.begin(about, None, done, start);
        });
        match (outcome.stop, slot.lock().take()) {
            (None, Some(result)) => result,
            (Some(error), _) => Err(error),
            (None, None) => Err(error),
        }
    }
}

impl Drop for TimeLimit {
    fn drop(&mut self) {
        self.list.state.lock().over = true;
        self.list.changed.notify_all();
    }
}

impl State {
    fn is_blocked(&self, about: &About) -> bool {
        self.late
            .values()
            .any(|late| late.object == about.object && overlap(&late.changes, &about.bytes))
    }

    /// Takes what need not wait any more.
    fn unblocked(&mut self) -> Vec<(u64, Start)> {
        let waiting: Vec<u64> = self
            .under_way
            .iter()
            .filter(|(_, flight)| flight.waits.is_some() && !self.is_blocked(&flight.about))
            .map(|(&number, _)| number)
            .collect();
        waiting
            .into_iter()
            .filter_map(|number| {
                let start = self.under_way.get_mut(&number)?.waits.take()?;
                Some((number, start))
            })
            .collect()
    }
}

impl List {
    /// Ends what takes too long, until the limit goes.
    fn watch(&self) {
        quiet::keep_signals_away();
        loop {
            let now = Instant::now();
            while self.give_up(|_, flight| flight.deadline <= now) {}
            let state = self.state.lock();
            if state.over {
                return;
            }
            let next = state.under_way.first_key_value();
            match next.map(|(_, flight)| flight.deadline) {
                Some(deadline) if deadline <= Instant::now() => {}
                Some(deadline) => drop(self.changed.wait_until(state, deadline)),
                None => drop(self.changed.wait(state)),
            }
        }
    }

    /// Tells the oldest operation, if `which` says so, that the store does not answer; false when there is none.
    fn give_up(&self, which: impl Fn(u64, &Flight) -> bool) -> bool {
        let mut state = self.state.lock();
        let Some(oldest) = state.under_way.first_entry() else {
            return false;
        };
        if !which(*oldest.key(), oldest.get()) {
            return false;
        }
        let (number, flight) = oldest.remove_entry();
        if flight.waits.is_none() {
            let late = Late {
                object: flight.about.object,
                changes: flight.about.changes.clone(),
            };
            state.late.insert(number, late);
        }
        drop(state);
        self.expired.bump();
        let error = flight.about.error();
        // The lender of the memory waits for every list of it to go.
        drop((flight.target, flight.waits));
        (flight.done)(Progress::stopped(0, error));
        true
    }

    /// Notes that the store has ended an operation; tells who waits for it, or lets go those who wait for its end.
    fn settle(&self, number: u64, outcome: Progress<StoreError>, bytes: Option<&Segments>) {
        let mut state = self.state.lock();
        if let Some(flight) = state.under_way.remove(&number) {
            drop(state);
            if let (Some(target), Some(bytes)) = (&flight.target, bytes) {
                let got = usize::try_from(outcome.done).unwrap_or(usize::MAX);
                copy(&bytes.slice(0, got), target);
            }
            drop(flight.target);
            return (flight.done)(outcome);
        }
        if state.late.remove(&number).is_some() {
            let free = state.unblocked();
            drop(state);
            for (number, start) in free {
                start(number);
            }
        }
    }
}

/// Copies as far as both reach.
fn copy(from: &Segments, to: &Segments) {
    let mut piece = [0; 4096];
    let mut at = 0;
    loop {
        let got = from.copy_to(at, &mut piece);
        if got == 0 || to.copy_from(at, &piece[..got]) < got {
            return;
        }
        at += got;
    }
}

/// What has to be told about an operation; an error when it is dropped untold.
struct Answer {
    limit: Arc<TimeLimit>,
    number: u64,
    told: bool,
}

impl Answer {
    fn new(limit: &Arc<TimeLimit>, number: u64) -> Self {
        Self {
            limit: Arc::clone(limit),
            number,
            told: false,
        }
    }

    fn tell(mut self, outcome: Progress<StoreError>, bytes: Option<&Segments>) {
        self.told = true;
        self.limit.list.settle(self.number, outcome, bytes);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.told {
            let error = StoreError {
                operation: Operation::Attributes,
                offset: 0,
                len: 0,
                errno: Errno::EIO,
            };
            let outcome = Progress::stopped(0, error);
            self.limit.list.settle(self.number, outcome, None);
        }
    }
}

/// An object that answers in time, if with an error.
pub struct TimedObject {
    inner: Arc<dyn Object>,
    limit: Arc<TimeLimit>,
    number: u64,
}

impl fmt::Debug for TimedObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TimedObject")
            .field("inner", &self.inner)
            .field("after", &self.limit.after)
            .finish_non_exhaustive()
    }
}

impl TimedObject {
    /// Puts a limit on what `inner` does. Its own transfers must not wait in the submitting thread.
    #[must_use]
    pub fn new(inner: Arc<dyn Object>, limit: &Arc<TimeLimit>) -> Arc<Self> {
        let mut state = limit.list.state.lock();
        state.objects += 1;
        Arc::new(Self {
            inner,
            limit: Arc::clone(limit),
            number: state.objects,
        })
    }

    fn transfer(&self, operation: Operation, transfer: Transfer) {
        let len = transfer.segments.bytes();
        let offset = transfer.offset;
        let bytes = offset..offset.saturating_add(len as u64);
        let about = About {
            object: self.number,
            operation,
            bytes: bytes.clone(),
            changes: match operation {
                Operation::Write => bytes,
                _ => NOTHING,
            },
        };
        let own = Segments::of_buf(&Arc::new(AlignedBuf::zeroed(len)), len);
        let target = match operation {
            Operation::Write => {
                copy(&transfer.segments, &own);
                drop(transfer.segments);
                None
            }
            _ => Some(transfer.segments),
        };
        // The object is kept, and with it what it does its transfers with, until the store has ended this one.
        let (inner, limit) = (Arc::clone(&self.inner), Arc::clone(&self.limit));
        let start: Start = Box::new(move |number| {
            let answer = Answer::new(&limit, number);
            let (kept, filled) = (Arc::clone(&inner), own.clone());
            let batch = vec![Transfer {
                offset,
                segments: own,
                done: Box::new(move |outcome| {
                    answer.tell(outcome, Some(&filled));
                    drop(kept);
                }),
            }];
            match operation {
                Operation::Write => inner.write(batch),
                _ => inner.read(batch),
            }
        });
        self.limit.begin(about, target, transfer.done, start);
    }

    fn call<T: Send + 'static>(
        &self,
        operation: Operation,
        bytes: Range<u64>,
        changes: Range<u64>,
        work: impl FnOnce(&dyn Object) -> StoreResult<T> + Send + 'static,
    ) -> StoreResult<T> {
        let about = About {
            object: self.number,
            operation,
            bytes,
            changes,
        };
        let inner = Arc::clone(&self.inner);
        self.limit.blocking(about, move || work(inner.as_ref()))
    }
}

impl Object for TimedObject {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn readable(&self) -> bool {
        self.inner.readable()
    }

    fn copies(&self) -> bool {
        true
    }

    fn take_up(&self, token: u64) -> StoreResult<()> {
        self.call(Operation::TakeUp, NOTHING, NOTHING, move |object| {
            object.take_up(token)
        })
    }

    fn read(&self, batch: Vec<Transfer>) {
        for transfer in batch {
            self.transfer(Operation::Read, transfer);
        }
    }

    fn write(&self, batch: Vec<Transfer>) {
        for transfer in batch {
            self.transfer(Operation::Write, transfer);
        }
    }

    fn len(&self) -> StoreResult<u64> {
        self.call(Operation::Attributes, 0..u64::MAX, NOTHING, |object| {
            object.len()
        })
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        let all = 0..u64::MAX;
        self.call(Operation::SetLen, all.clone(), all, move |object| {
            object.set_len(len)
        })
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        let bytes = range.clone();
        self.call(Operation::Allocate, bytes, NOTHING, move |object| {
            object.allocate(range)
        })
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        let bytes = range.clone();
        self.call(Operation::Punch, bytes.clone(), bytes, move |object| {
            object.punch(range)
        })
    }

    fn rearrange(&self, how: Rearrange, range: Range<u64>) -> StoreResult<()> {
        let bytes = range.start..u64::MAX;
        self.call(Operation::Punch, bytes.clone(), bytes, move |object| {
            object.rearrange(how, range)
        })
    }

    fn space_left(&self) -> Option<u64> {
        // Asked of the store's file system, which is not waited for when it cannot tell.
        self.call(Operation::Attributes, NOTHING, NOTHING, |object| {
            Ok(object.space_left())
        })
        .ok()
        .flatten()
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        self.call(Operation::Sync, NOTHING, NOTHING, move |object| {
            object.sync(scope)
        })
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        let bytes = offset..u64::MAX;
        self.call(Operation::Seek, bytes, NOTHING, move |object| {
            object.seek(what, offset)
        })
    }
}

#[cfg(test)]
mod tests;
