//! The node's own clock: monotonic, and going on while the machine sleeps.

use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;

/// A moment, in time since the machine started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(Duration);

impl Time {
    /// The machine's start.
    pub const ZERO: Self = Self(Duration::ZERO);

    /// Reads CLOCK_BOOTTIME. A lease ends while a machine is suspended, so time spent asleep must count; a wall clock may
    /// be set back.
    #[must_use]
    pub fn now() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        // Neither is negative: the clock starts at zero.
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanoseconds = u32::try_from(now.tv_nsec).unwrap_or(0);
        Self(Duration::new(seconds, nanoseconds))
    }

    /// The moment so long after the machine's start.
    #[must_use]
    pub const fn from_start(elapsed: Duration) -> Self {
        Self(elapsed)
    }

    /// The moment `later` than this one.
    #[must_use]
    pub const fn after(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later))
    }

    /// How long this is after `earlier`; zero if it is before.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// Told when a [`HandClock`] was moved.
pub(crate) trait Ticked: Send + Sync {
    fn ticked(&self);
}

/// Where a node takes the time from.
#[derive(Debug, Clone)]
pub enum Clock {
    /// The machine's.
    Machine,
    /// A test's.
    Hand(HandClock),
}

impl Clock {
    pub(crate) fn now(&self) -> Time {
        match self {
            Self::Machine => Time::now(),
            Self::Hand(hand) => hand.now(),
        }
    }

    /// Tells whether it moves by itself.
    pub(crate) fn goes(&self) -> bool {
        matches!(self, Self::Machine)
    }

    pub(crate) fn subscribe(&self, whom: Weak<dyn Ticked>) {
        if let Self::Hand(hand) = self {
            hand.inner.lock().told.push(whom);
        }
    }
}

/// A clock that stands still until a test moves it.
#[derive(Clone, Default)]
pub struct HandClock {
    inner: Arc<Mutex<Hand>>,
}

#[derive(Default)]
struct Hand {
    elapsed: Duration,
    told: Vec<Weak<dyn Ticked>>,
}

impl std::fmt::Debug for HandClock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HandClock({:?})", self.now())
    }
}

impl HandClock {
    /// A clock at the machine's start.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What it shows.
    #[must_use]
    pub fn now(&self) -> Time {
        Time(self.inner.lock().elapsed)
    }

    /// Moves it on; what has become due is done by the nodes' threads soon after.
    pub fn advance(&self, by: Duration) {
        let told: Vec<_> = {
            let mut hand = self.inner.lock();
            hand.elapsed += by;
            hand.told.iter().filter_map(Weak::upgrade).collect()
        };
        for node in told {
            node.ticked();
        }
    }
}
