//! Waiting for readers that took no lock: two counters that readers enter in turn.
//!
//! What Linux calls SRCU, small. A reader enters the counter of the present epoch, looks, and leaves; a writer takes the
//! thing away first and then waits until every reader that may still see it has left. Readers never wait, allocate or fail,
//! so a signal handler may be one; it may even interrupt another reader.
//!
//! Every access to a counter is a read-modify-write. In a counter's modification order either the reader's entry comes
//! first, and the writer sees it, or the writer's look does, and the reader sees all that the writer did before it: there is
//! no third outcome (the argument of SEMANTICS.md section E). Two turns are needed because a reader may have chosen its
//! counter before the last turn and enter it only now.

// Readers here are faults and copies, which a task of shuttle ends without another in between.
#[cfg(not(shuttle))]
use pinfold_base::sync::{AtomicUsize, Ordering};
#[cfg(shuttle)]
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counters an epoch is spread over, so that threads seldom share a cache line.
#[cfg(not(loom))]
const STRIPES: usize = 16;
#[cfg(loom)]
const STRIPES: usize = 1;

/// A counter with its cache line to itself.
#[repr(align(128))]
struct Stripe(AtomicUsize);

/// Readers on their way, by epoch.
pub(crate) struct Epochs {
    now: AtomicUsize,
    inside: [[Stripe; STRIPES]; 2],
}

/// A reader inside; leaves when dropped.
pub(crate) struct Reading<'a>(&'a Stripe);

impl Epochs {
    #[cfg(not(loom))]
    pub(crate) const fn new() -> Self {
        Self {
            now: AtomicUsize::new(0),
            inside: [const { [const { Stripe(AtomicUsize::new(0)) }; STRIPES] }; 2],
        }
    }

    #[cfg(loom)]
    pub(crate) fn new() -> Self {
        let stripes = || std::array::from_fn(|_| Stripe(AtomicUsize::new(0)));
        Self {
            now: AtomicUsize::new(0),
            inside: [stripes(), stripes()],
        }
    }

    /// Enters. What a writer takes away from here on stays usable until the result is dropped.
    #[inline]
    pub(crate) fn enter(&self) -> Reading<'_> {
        // Any counter will do: a stale one is waited for as well.
        let epoch = self.now.load(Ordering::Relaxed) & 1;
        let stripe = &self.inside[epoch][own_stripe()];
        stripe.0.fetch_add(1, Ordering::AcqRel);
        Reading(stripe)
    }

    /// Waits until every reader that entered before this call has left. One writer at a time.
    pub(crate) fn synchronize(&self) {
        for _ in 0..2 {
            let epoch = self.now.fetch_xor(1, Ordering::AcqRel) & 1;
            for stripe in &self.inside[epoch] {
                let mut turns = 0;
                while stripe.0.fetch_add(0, Ordering::AcqRel) != 0 {
                    back_off(&mut turns);
                }
            }
        }
    }
}

impl Drop for Reading<'_> {
    #[inline]
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Picks a counter by the stack in use: threads have their own, and no thread-local storage is touched, whose first use may
/// allocate.
#[cfg(not(loom))]
#[inline]
fn own_stripe() -> usize {
    let here = 0u8;
    ((&raw const here).addr() >> 16) % STRIPES
}

#[cfg(loom)]
fn own_stripe() -> usize {
    0
}

/// Waits a little: the wait is for a few instructions of another thread, unless that thread is not running.
#[cfg(not(loom))]
pub(crate) fn back_off(turns: &mut u32) {
    /// Yields before the first sleep.
    const YIELDS: u32 = 32;
    *turns = turns.saturating_add(1);
    if *turns <= YIELDS {
        std::thread::yield_now();
    } else {
        std::thread::sleep(std::time::Duration::from_micros(50));
    }
}

#[cfg(loom)]
pub(crate) fn back_off(_turns: &mut u32) {
    loom::thread::yield_now();
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize as Loom;

    /// What readers look at: a "pointer" to one of three objects, and whether each still exists.
    struct World {
        epochs: Epochs,
        current: Loom,
        alive: [Loom; 3],
    }

    fn read(world: &World) {
        let _inside = world.epochs.enter();
        let at = world.current.load(Ordering::Acquire);
        let alive = world.alive[at].load(Ordering::Relaxed);
        assert_eq!(alive, 1, "freed under a reader");
    }

    #[test]
    fn nothing_is_freed_under_a_reader() {
        // Unbounded, the writer's waiting takes hours to explore.
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let world = Arc::new(World {
                epochs: Epochs::new(),
                current: Loom::new(0),
                alive: std::array::from_fn(|_| Loom::new(1)),
            });
            let reader = {
                let world = Arc::clone(&world);
                loom::thread::spawn(move || read(&world))
            };
            // Twice: a reader may have chosen its counter before the first change and enter it before the second.
            for gone in 0..2 {
                world.current.store(gone + 1, Ordering::Release);
                world.epochs.synchronize();
                world.alive[gone].store(0, Ordering::Relaxed);
            }
            reader.join().unwrap();
        });
    }
}
