//! Locks and time under shuttle, whose tasks are coroutines of one thread.
//!
//! An untimed wait that nobody ends is a deadlock, and is reported as one. A timed wait may end at any moment, as it may
//! outside, and moves the clock: deadlines come after so many waits, the same ones in each replay of a schedule.

use std::ops::{Deref, DerefMut};
use std::sync::{OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use shuttle::sync::atomic::{AtomicU64, Ordering};

pub use shuttle::sync::{RwLockReadGuard, RwLockWriteGuard};

/// How long a timed wait takes at most.
const STEP: Duration = Duration::from_millis(10);
/// Deadlines farther away than this do not come: nobody waits for background work that begins in an hour.
const NEVER: Duration = Duration::from_secs(600);

shuttle::lazy_static! {
    /// Nanoseconds that have passed in this execution.
    static ref PASSED: AtomicU64 = AtomicU64::new(0);
}

/// Returns the time that deadlines are measured on.
#[must_use]
pub fn now() -> Instant {
    static BEGIN: OnceLock<Instant> = OnceLock::new();
    let passed = Duration::from_nanos(PASSED.load(Ordering::SeqCst));
    *BEGIN.get_or_init(Instant::now) + passed
}

/// shuttle's mutex. Knows no poison.
#[derive(Debug, Default)]
pub struct Mutex<T>(shuttle::sync::Mutex<T>);

/// A mutex that is held.
#[derive(Debug)]
pub struct MutexGuard<'a, T> {
    held: shuttle::sync::MutexGuard<'a, T>,
    mutex: &'a Mutex<T>,
}

impl<T> Mutex<T> {
    /// Makes a mutex.
    pub const fn new(value: T) -> Self {
        Self(shuttle::sync::Mutex::new(value))
    }

    /// Takes the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard {
            held: self.0.lock().unwrap_or_else(PoisonError::into_inner),
            mutex: self,
        }
    }

    /// Returns what it guards: whoever has the mutex to himself needs no lock.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock if nobody has it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let held = match self.0.try_lock() {
            Ok(held) => held,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(MutexGuard { held, mutex: self })
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.held
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.held
    }
}

/// shuttle's read-write lock. Knows no poison.
#[derive(Debug, Default)]
pub struct RwLock<T>(shuttle::sync::RwLock<T>);

impl<T> RwLock<T> {
    /// Makes a lock.
    pub const fn new(value: T) -> Self {
        Self(shuttle::sync::RwLock::new(value))
    }

    /// Takes it shared.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes it exclusive.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes it exclusive if nobody holds it.
    pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
        match self.0.try_write() {
            Ok(held) => Some(held),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// shuttle's condition variable.
#[derive(Debug, Default)]
pub struct Condvar(shuttle::sync::Condvar);

impl Condvar {
    /// Makes a condition variable.
    #[must_use]
    pub const fn new() -> Self {
        Self(shuttle::sync::Condvar::new())
    }

    /// Sleeps until notified.
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        let MutexGuard { held, mutex } = guard;
        let held = self.0.wait(held);
        MutexGuard {
            held: held.unwrap_or_else(PoisonError::into_inner),
            mutex,
        }
    }

    /// Sleeps a little, or until `deadline` if that comes sooner; until notified where it never comes.
    pub fn wait_until<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        deadline: Instant,
    ) -> MutexGuard<'a, T> {
        let left = deadline.saturating_duration_since(now());
        if left > NEVER {
            return self.wait(guard);
        }
        let mutex = guard.mutex;
        drop(guard);
        // Whoever would notify runs when the scheduler says so.
        shuttle::thread::yield_now();
        let step = u64::try_from(left.min(STEP).as_nanos()).unwrap_or(u64::MAX);
        PASSED.fetch_add(step, Ordering::SeqCst);
        mutex.lock()
    }

    /// Wakes every waiter.
    pub fn notify_all(&self) {
        self.0.notify_all();
    }

    /// Wakes one waiter.
    pub fn notify_one(&self) {
        self.0.notify_one();
    }
}
