//! Event counters: cheap to bump from any thread, read together for statistics and tests.
//!
//! A pair such as `pins_acquired`/`pins_released` is equal at rest; tests check that when they end.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// A number that only grows. Relaxed: it orders nothing.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Makes a counter at zero.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Counts one event.
    #[inline]
    pub fn bump(&self) {
        self.add(1);
    }

    /// Counts `n` events.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Returns the count so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Lines a [`SpreadCounter`] is spread over.
const LINES: usize = 32;

thread_local! {
    /// Which line this thread counts on; needs no destructor, so that the first count allocates nothing.
    static LINE: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Threads that have counted on a line so far: deals the lines out in turn.
static DEALT: AtomicUsize = AtomicUsize::new(0);

/// A counter for what every thread does all the time: each counts on a cache line that few others write to, so that
/// counting costs no transfer between processors. Reading it adds the lines up.
#[derive(Debug, Default)]
pub struct SpreadCounter([Line; LINES]);

#[derive(Debug, Default)]
#[repr(align(64))]
struct Line(AtomicU64);

impl SpreadCounter {
    /// Counts one event.
    #[inline]
    pub fn bump(&self) {
        let line = LINE.get();
        let line = if line < LINES { line } else { deal() };
        self.0[line].0.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the count so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0
            .iter()
            .map(|line| line.0.load(Ordering::Relaxed))
            .sum()
    }
}

/// Gives this thread its line.
#[cold]
fn deal() -> usize {
    let line = DEALT.fetch_add(1, Ordering::Relaxed) % LINES;
    LINE.set(line);
    line
}

/// Defines a set of counters, of type [`Counter`] where none is named, and the plain struct that a snapshot of them is.
#[macro_export]
macro_rules! counter_set {
    ($(#[$meta:meta])* $set:ident, $snapshot:ident { $($(#[$doc:meta])* $name:ident $(: $kind:ty)?,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Default)]
        pub struct $set { $($(#[$doc])* pub $name: $crate::counter_kind!($($kind)?),)* }

        /// Values of the counters at one moment.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub struct $snapshot { $($(#[$doc])* pub $name: u64,)* }

        impl $set {
            /// Reads every counter; not one instant for all of them.
            #[must_use]
            pub fn snapshot(&self) -> $snapshot {
                $snapshot { $($name: self.$name.get(),)* }
            }
        }

        impl $snapshot {
            /// Lists names and values, for printing.
            #[must_use]
            pub fn rows(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

/// The type of one counter of a [`counter_set`].
#[doc(hidden)]
#[macro_export]
macro_rules! counter_kind {
    () => {
        $crate::counters::Counter
    };
    ($kind:ty) => {
        $kind
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_counter_loses_nothing() {
        let counter = SpreadCounter::default();
        std::thread::scope(|scope| {
            for _ in 0..2 * LINES {
                scope.spawn(|| (0..1000).for_each(|_| counter.bump()));
            }
        });
        assert_eq!(counter.get(), 2000 * LINES as u64);
    }
}
