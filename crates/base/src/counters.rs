//! Event counters: cheap to bump from any thread, read together for statistics and tests.
//!
//! A pair such as `pins_acquired`/`pins_released` is equal at rest; tests check that when they end.

use std::sync::atomic::{AtomicU64, Ordering};

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

/// Defines a set of counters and the plain struct that a snapshot of them is.
#[macro_export]
macro_rules! counter_set {
    ($(#[$meta:meta])* $set:ident, $snapshot:ident { $($(#[$doc:meta])* $name:ident,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Default)]
        pub struct $set { $($(#[$doc])* pub $name: $crate::counters::Counter,)* }

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
