//! A userfaultfd and the turns its readers take: the way in which faults of one delivery and one tracking arrive.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pinfold_base::sync::{Mutex, MutexGuard};
use pinfold_mem::uffd::Event;
use pinfold_mem::{Delivery, Uffd};

/// Events taken up at once.
pub(crate) const EVENTS_MAX: usize = 32;
/// How long the reader of events rests after the kernel refused to give any.
const REST: Duration = Duration::from_millis(10);

/// The userfaultfd that mappings of one delivery and one tracking are registered with.
pub struct Channel {
    uffd: Uffd,
    /// Held by the thread that reads events.
    reading: Mutex<()>,
    /// Readers that wait for their turn.
    resting: AtomicUsize,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uffd.fmt(f)
    }
}

impl Channel {
    pub(crate) fn new(uffd: Uffd) -> Self {
        Self {
            uffd,
            reading: Mutex::new(()),
            resting: AtomicUsize::new(0),
        }
    }

    pub(crate) fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Waits for the turn to read events.
    pub(crate) fn take_turn(&self) -> MutexGuard<'_, ()> {
        self.resting.fetch_add(1, Ordering::SeqCst);
        let turn = self.reading.lock();
        self.resting.fetch_sub(1, Ordering::SeqCst);
        turn
    }

    /// Tells whether another reader waits for its turn.
    pub(crate) fn has_resting(&self) -> bool {
        self.resting.load(Ordering::SeqCst) > 0
    }

    /// Returns how threads that fault are served.
    #[must_use]
    pub fn delivery(&self) -> Delivery {
        self.uffd.delivery()
    }

    /// Waits for events; `None` after [`Uffd::stop`].
    pub(crate) fn read<'e>(&self, events: &'e mut [Event; EVENTS_MAX]) -> Option<&'e [Event]> {
        loop {
            match self.uffd.read_events(events) {
                Ok(0) => return None,
                Ok(count) => return Some(&events[..count]),
                // Threads wait on us: giving up would hang them, trying without a pause would burn a processor.
                Err(_) => std::thread::sleep(REST),
            }
        }
    }
}
