//! A userfaultfd with what has been learnt about it: the way in which faults of one delivery arrive.

use std::fmt;
use std::time::Duration;

use pinfold_mem::uffd::Event;
use pinfold_mem::{Delivery, Uffd};

/// Events taken up at once.
pub(crate) const EVENTS_MAX: usize = 32;
/// How long the reader of events rests after the kernel refused to give any.
const REST: Duration = Duration::from_millis(10);

/// The userfaultfd that mappings of one delivery are registered with.
pub struct Channel {
    uffd: Uffd,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uffd.fmt(f)
    }
}

impl Channel {
    pub(crate) fn new(uffd: Uffd) -> Self {
        Self { uffd }
    }

    pub(crate) fn uffd(&self) -> &Uffd {
        &self.uffd
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
