//! An object that fails where a test says.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pinfold_base::{Errno, Progress};
use pinfold_mem::Segments;

use crate::object::{
    Completion, Geometry, Object, Operation, Seek, StoreError, StoreResult, SyncScope, Transfer,
};

/// The operations a rule applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// Any of them.
    Any,
    /// One kind.
    Only(Operation),
}

/// What happens instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing is done, and this is the error.
    Fail(Errno),
    /// The first bytes are transferred, then this is the error; operations that transfer nothing just fail.
    FailAfter(u64, Errno),
    /// The first bytes are transferred and no reason is given, as at the end of a file; others run as they are.
    Short(u64),
    /// It runs as it is, this much later, or when the rules are forgotten. Transfers wait in a thread of their own, others
    /// in the caller's.
    Delay(Duration),
}

/// One rule; the first that applies is followed.
#[derive(Debug, Clone)]
pub struct Rule {
    /// Which operations.
    pub on: On,
    /// Which bytes: it applies when the operation touches one of them. `None`: wherever. Operations
    /// without a range (sync) are touched by `None` only.
    pub range: Option<Range<u64>>,
    /// How many it lets pass first.
    pub skip: u64,
    /// How many it then applies to; `u64::MAX`: all.
    pub times: u64,
    /// What happens to them.
    pub action: Action,
}

impl Rule {
    /// Makes a rule for every operation of kind `on`, wherever.
    #[must_use]
    pub const fn new(on: On, action: Action) -> Self {
        Self {
            on,
            range: None,
            skip: 0,
            times: u64::MAX,
            action,
        }
    }

    /// Restricts it to the `n`th operation it would apply to, counted from 1.
    #[must_use]
    pub const fn nth(mut self, n: u64) -> Self {
        self.skip = n.saturating_sub(1);
        self.times = 1;
        self
    }

    /// Restricts it to operations that touch `range`.
    #[must_use]
    pub fn within(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Tells whether it applies, and counts that.
    fn strike(&mut self, operation: Operation, offset: u64, len: u64) -> bool {
        let on = match self.on {
            On::Any => true,
            On::Only(only) => only == operation,
        };
        let touches = self
            .range
            .as_ref()
            .is_none_or(|range| offset < range.end && offset.saturating_add(len) > range.start);
        if !on || !touches || self.times == 0 {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.times = if self.times == u64::MAX {
            u64::MAX
        } else {
            self.times - 1
        };
        true
    }
}

/// Passes operations on to another object, except where a rule says otherwise.
#[derive(Debug)]
pub struct FaultyObject {
    inner: Arc<dyn Object>,
    shared: Arc<Shared>,
}

/// What delayed transfers need as well.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    cleared: Condvar,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    struck: u64,
    /// How often rules were forgotten.
    clearings: u64,
}

impl Shared {
    /// Waits as a rule says that applied after so many clearings.
    fn delay(&self, time: Duration, clearings: u64) {
        let until = Instant::now() + time;
        let mut state = self.state.lock();
        while state.clearings == clearings {
            if self.cleared.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
    }
}

impl FaultyObject {
    /// Wraps `inner`, without rules at first.
    #[must_use]
    pub fn new(inner: Arc<dyn Object>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            shared: Arc::default(),
        })
    }

    /// Adds a rule after those there are.
    pub fn add(&self, rule: Rule) {
        self.shared.state.lock().rules.push(rule);
    }

    /// Forgets all rules, and delays no longer what they delay.
    pub fn clear(&self) {
        let mut state = self.shared.state.lock();
        state.rules.clear();
        state.clearings += 1;
        drop(state);
        self.shared.cleared.notify_all();
    }

    /// Returns how often a rule applied.
    #[must_use]
    pub fn struck(&self) -> u64 {
        self.shared.state.lock().struck
    }

    /// Returns what is to happen instead, and how often rules had been forgotten when that was decided.
    fn action(&self, operation: Operation, offset: u64, len: u64) -> Option<(Action, u64)> {
        let mut state = self.shared.state.lock();
        let rule = state
            .rules
            .iter_mut()
            .find_map(|rule| rule.strike(operation, offset, len).then_some(rule.action))?;
        state.struck += 1;
        Some((rule, state.clearings))
    }

    fn transfer(&self, operation: Operation, batch: Vec<Transfer>) {
        let mut untouched = Vec::with_capacity(batch.len());
        for transfer in batch {
            let (offset, len) = (transfer.offset, transfer.segments.bytes() as u64);
            let failed = move |errno| StoreError {
                operation,
                offset,
                len,
                errno,
            };
            match self.action(operation, offset, len) {
                None => untouched.push(transfer),
                Some((Action::Fail(errno), _)) => {
                    (transfer.done)(Progress::stopped(0, failed(errno)))
                }
                Some((Action::FailAfter(bytes, errno), _)) => {
                    let then = move |p: Progress<StoreError>| Progress {
                        stop: p.stop.or(Some(failed(errno))),
                        ..p
                    };
                    start(&self.inner, operation, vec![prefix(transfer, bytes, then)]);
                }
                Some((Action::Short(bytes), _)) => {
                    start(&self.inner, operation, vec![prefix(transfer, bytes, |p| p)]);
                }
                Some((Action::Delay(time), clearings)) => {
                    let (inner, shared) = (Arc::clone(&self.inner), Arc::clone(&self.shared));
                    std::thread::spawn(move || {
                        shared.delay(time, clearings);
                        start(&inner, operation, vec![transfer]);
                    });
                }
            }
        }
        if !untouched.is_empty() {
            start(&self.inner, operation, untouched);
        }
    }

    fn check(&self, operation: Operation, offset: u64, len: u64) -> StoreResult<()> {
        match self.action(operation, offset, len) {
            None | Some((Action::Short(_), _)) => Ok(()),
            Some((Action::Fail(errno) | Action::FailAfter(_, errno), _)) => Err(StoreError {
                operation,
                offset,
                len,
                errno,
            }),
            Some((Action::Delay(time), clearings)) => {
                self.shared.delay(time, clearings);
                Ok(())
            }
        }
    }
}

fn start(inner: &Arc<dyn Object>, operation: Operation, batch: Vec<Transfer>) {
    match operation {
        Operation::Write => inner.write(batch),
        _ => inner.read(batch),
    }
}

/// Shortens a transfer to its first bytes and lets `then` have a look at the outcome.
fn prefix(
    transfer: Transfer,
    bytes: u64,
    then: impl FnOnce(Progress<StoreError>) -> Progress<StoreError> + Send + 'static,
) -> Transfer {
    let done: Completion = transfer.done;
    Transfer {
        offset: transfer.offset,
        segments: transfer
            .segments
            .slice(0, usize::try_from(bytes).unwrap_or(usize::MAX)),
        done: Box::new(move |p| done(then(p))),
    }
}

fn len_of(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

impl Object for FaultyObject {
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
        self.transfer(Operation::Read, batch);
    }

    fn read_here(&self, offset: u64, segments: &Segments) -> Option<Progress<StoreError>> {
        // What was refused here is asked for again elsewhere: a rule that counts would be used up by that.
        let always = |rule: &Rule| {
            matches!(rule.action, Action::Fail(_)) && rule.skip == 0 && rule.times == u64::MAX
        };
        if !self.shared.state.lock().rules.iter().all(always) {
            return None;
        }
        let len = segments.bytes() as u64;
        match self.check(Operation::Read, offset, len) {
            Ok(()) => self.inner.read_here(offset, segments),
            Err(error) => Some(Progress::stopped(0, error)),
        }
    }

    fn write(&self, batch: Vec<Transfer>) {
        self.transfer(Operation::Write, batch);
    }

    fn space_left(&self) -> Option<u64> {
        self.inner.space_left()
    }

    fn len(&self) -> StoreResult<u64> {
        self.check(Operation::Attributes, 0, 0)?;
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        self.check(Operation::SetLen, len, 0)?;
        self.inner.set_len(len)
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        self.check(Operation::Allocate, range.start, len_of(&range))?;
        self.inner.allocate(range)
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        self.check(Operation::Punch, range.start, len_of(&range))?;
        self.inner.punch(range)
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        self.check(Operation::Sync, 0, 0)?;
        self.inner.sync(scope)
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.check(Operation::Seek, offset, 0)?;
        self.inner.seek(what, offset)
    }
}
