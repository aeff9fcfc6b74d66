//! One source for three worlds: the real locks and atomics; loom's under `--cfg loom`, for one protocol at a time; shuttle's
//! under `--cfg shuttle`, for whole paths.
//!
//! Code that several threads meet in uses these names only, so that the model checker and the scheduler run the very code
//! that ships. [`path`] has the atomics that are part of no protocol of their own: shuttle may switch tasks at them, loom takes
//! no notice.

#[cfg(not(any(loom, shuttle)))]
pub use std::sync::Arc;
#[cfg(not(any(loom, shuttle)))]
pub use std::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

#[cfg(loom)]
pub use loom::sync::Arc;
#[cfg(loom)]
pub use loom::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

#[cfg(shuttle)]
pub use shuttle::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
#[cfg(shuttle)]
pub use std::sync::Arc;

pub use imp::{Condvar, Mutex, MutexGuard, now};
#[cfg(shuttle)]
pub use imp::{RwLock, RwLockReadGuard, RwLockWriteGuard};
#[cfg(not(shuttle))]
pub use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Atomics of whole paths: the size of a file, what is counted, where a page is.
pub mod path {
    #[cfg(shuttle)]
    pub use shuttle::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering,
    };
    #[cfg(not(shuttle))]
    pub use std::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering,
    };
}

/// Threads, or tasks of the scheduler.
pub mod thread {
    #[cfg(shuttle)]
    pub use shuttle::thread::{Builder, JoinHandle, ThreadId, current};
    #[cfg(not(shuttle))]
    pub use std::thread::{Builder, JoinHandle, ThreadId, current};
}

#[cfg(shuttle)]
#[path = "sync/shuttle.rs"]
mod imp;

#[cfg(not(any(loom, shuttle)))]
mod imp {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{PoisonError, TryLockError};
    use std::time::Instant;

    pub use std::sync::MutexGuard;

    /// Returns the time that deadlines are measured on.
    #[inline]
    #[must_use]
    pub fn now() -> Instant {
        Instant::now()
    }

    /// A mutex that waits on a futex and allocates nothing, contended or not: one that the fault path takes must not
    /// enter the program's allocator, whose lock the faulting thread may hold. Knows no poison.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(std::sync::Mutex<T>);

    impl<T> Mutex<T> {
        /// Makes a mutex.
        pub const fn new(value: T) -> Self {
            Self(std::sync::Mutex::new(value))
        }

        /// Takes the lock.
        #[inline]
        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// Returns what it guards: whoever has the mutex to himself needs no lock.
        #[inline]
        pub fn get_mut(&mut self) -> &mut T {
            self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
        }

        /// Takes the lock if nobody has it.
        #[inline]
        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            match self.0.try_lock() {
                Ok(guard) => Some(guard),
                Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            }
        }
    }

    /// A condition variable whose `wait` takes and returns the guard. Notifying nobody costs no system call.
    ///
    /// What waiters look at is changed under the mutex, or the mutex is taken between the change and the notification: so
    /// whoever did not see the change is counted when the notifier looks.
    #[derive(Debug, Default)]
    pub struct Condvar {
        inner: std::sync::Condvar,
        waiters: AtomicU32,
    }

    impl Condvar {
        /// Makes a condition variable.
        #[must_use]
        pub const fn new() -> Self {
            Self {
                inner: std::sync::Condvar::new(),
                waiters: AtomicU32::new(0),
            }
        }

        /// Sleeps until notified; spurious wake-ups happen.
        pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
            self.waiters.fetch_add(1, Ordering::Relaxed);
            let guard = self
                .inner
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
            self.waiters.fetch_sub(1, Ordering::Relaxed);
            guard
        }

        /// Sleeps until notified or until `deadline`.
        pub fn wait_until<'a, T>(
            &self,
            guard: MutexGuard<'a, T>,
            deadline: Instant,
        ) -> MutexGuard<'a, T> {
            let left = deadline.saturating_duration_since(Instant::now());
            self.waiters.fetch_add(1, Ordering::Relaxed);
            let (guard, _timed_out) = self
                .inner
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner);
            self.waiters.fetch_sub(1, Ordering::Relaxed);
            guard
        }

        /// Wakes every waiter.
        pub fn notify_all(&self) {
            if self.waiters.load(Ordering::Relaxed) > 0 {
                self.inner.notify_all();
            }
        }

        /// Wakes one waiter.
        pub fn notify_one(&self) {
            if self.waiters.load(Ordering::Relaxed) > 0 {
                self.inner.notify_one();
            }
        }
    }
}

#[cfg(loom)]
mod imp {
    use std::time::Instant;

    pub use loom::sync::MutexGuard;

    /// Returns the time that deadlines are measured on.
    #[inline]
    #[must_use]
    pub fn now() -> Instant {
        Instant::now()
    }

    /// loom's mutex with the interface of `parking_lot`'s.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        /// Makes a mutex.
        pub fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        /// Takes the lock.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().expect("loom aborts on panic, so no poison")
        }

        /// Returns what it guards: whoever has the mutex to himself needs no lock.
        pub fn get_mut(&mut self) -> &mut T {
            self.0
                .get_mut()
                .expect("loom aborts on panic, so no poison")
        }

        /// Takes the lock if nobody has it.
        pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok()
        }
    }

    /// loom's condition variable.
    #[derive(Debug)]
    pub struct Condvar(loom::sync::Condvar);

    impl Default for Condvar {
        fn default() -> Self {
            Self::new()
        }
    }

    impl Condvar {
        /// Makes a condition variable.
        #[must_use]
        pub fn new() -> Self {
            Self(loom::sync::Condvar::new())
        }

        /// Sleeps until notified.
        pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
            self.0
                .wait(guard)
                .expect("loom aborts on panic, so no poison")
        }

        /// Sleeps until notified: loom has no clock.
        pub fn wait_until<'a, T>(
            &self,
            guard: MutexGuard<'a, T>,
            _deadline: Instant,
        ) -> MutexGuard<'a, T> {
            self.wait(guard)
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
}
