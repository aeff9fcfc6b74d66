//! The two-state lock between page-cache fills and whoever must not see them (SEMANTICS.md section D).
//!
//! ADD (pages may be inserted) is shared by fillers, BLOCK (they may not) by direct writes, truncation and punches;
//! the two exclude each other. It is fair: a waiting BLOCK stops new ADDs and the other way round, in batches, which
//! is safe only because nobody holds either while a fault is resolved (D-3); [`fdm`](crate::fdm), which does, never asks for
//! the gate that it holds.

use pinfold_base::rank::{self, Held, Rank};
use pinfold_base::sync::{AtomicI64, Condvar, Mutex, Ordering};

/// Added while somebody waits, so that the fast path of neither side succeeds.
#[derive(Debug, Default)]
struct Queue {
    waiting_add: usize,
    waiting_block: usize,
    /// Which side goes next when both wait.
    block_next: bool,
}

/// The lock. Positive: that many ADDs; negative: that many BLOCKs.
#[derive(Debug)]
pub struct Gate {
    count: AtomicI64,
    /// Non-zero while anybody sleeps: sends newcomers to the slow path.
    contended: AtomicI64,
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            count: AtomicI64::new(0),
            contended: AtomicI64::new(0),
            queue: Mutex::new(Queue::default()),
            changed: Condvar::new(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Add,
    Block,
}

impl Side {
    const fn sign(self) -> i64 {
        match self {
            Self::Add => 1,
            Self::Block => -1,
        }
    }
}

/// The right to insert pages.
#[derive(Debug)]
pub struct AddGuard<'a> {
    gate: &'a Gate,
    _held: Held,
}

/// The right to rely on nobody inserting pages.
#[derive(Debug)]
pub struct BlockGuard<'a> {
    gate: &'a Gate,
    _held: Held,
}

impl Gate {
    /// Waits for the right to insert pages.
    #[inline]
    #[track_caller]
    pub fn add(&self) -> AddGuard<'_> {
        let held = rank::enter(Rank::Invalidate);
        self.enter(Side::Add);
        AddGuard {
            gate: self,
            _held: held,
        }
    }

    /// Takes the right to insert pages if nobody blocks it.
    #[must_use]
    pub fn try_add(&self) -> Option<AddGuard<'_>> {
        if self.contended.load(Ordering::Relaxed) != 0 || !self.try_enter(Side::Add) {
            return None;
        }
        Some(AddGuard {
            gate: self,
            _held: rank::enter(Rank::Invalidate),
        })
    }

    /// Waits until nobody inserts pages, and keeps it so.
    #[track_caller]
    pub fn block(&self) -> BlockGuard<'_> {
        let held = rank::enter(Rank::Invalidate);
        self.enter(Side::Block);
        BlockGuard {
            gate: self,
            _held: held,
        }
    }

    /// Lets a gate that the calling thread blocks go for the time of `meanwhile`, which may wait for another one.
    pub(crate) fn unblocked(&self, meanwhile: impl FnOnce()) {
        /// Blocks the gate again, panics included: the guard of it is still about.
        struct Again<'a>(&'a Gate);
        impl Drop for Again<'_> {
            fn drop(&mut self) {
                self.0.enter(Side::Block);
            }
        }
        self.leave(Side::Block);
        let _again = Again(self);
        meanwhile();
    }

    #[inline]
    fn enter(&self, side: Side) {
        if self.contended.load(Ordering::Relaxed) == 0 && self.try_enter(side) {
            return;
        }
        self.enter_slow(side);
    }

    fn try_enter(&self, side: Side) -> bool {
        let mut count = self.count.load(Ordering::Relaxed);
        loop {
            if count.signum() == -side.sign() {
                return false;
            }
            match self.count.compare_exchange_weak(
                count,
                count + side.sign(),
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(now) => count = now,
            }
        }
    }

    #[cold]
    fn enter_slow(&self, side: Side) {
        let mut queue = self.queue.lock();
        self.contended.fetch_add(1, Ordering::Relaxed);
        match side {
            Side::Add => queue.waiting_add += 1,
            Side::Block => queue.waiting_block += 1,
        }
        loop {
            let others_turn = match side {
                Side::Add => queue.block_next && queue.waiting_block > 0,
                Side::Block => !queue.block_next && queue.waiting_add > 0,
            };
            // Announced above, tested here, both in the one order of `count`: either this sees the leaver's zero, or the
            // leaver takes over from this and sees `contended`. Two plain words would need full fences (E-1).
            self.count.fetch_add(0, Ordering::AcqRel);
            if !others_turn && self.try_enter(side) {
                break;
            }
            queue = self.changed.wait(queue);
        }
        match side {
            Side::Add => queue.waiting_add -= 1,
            Side::Block => queue.waiting_block -= 1,
        }
        // The last of this side's batch hands the turn over.
        let batch_done = match side {
            Side::Add => queue.waiting_add == 0,
            Side::Block => queue.waiting_block == 0,
        };
        if batch_done {
            queue.block_next = side == Side::Add;
        }
        self.contended.fetch_sub(1, Ordering::Relaxed);
        drop(queue);
        self.changed.notify_all();
    }

    #[inline]
    fn leave(&self, side: Side) {
        let before = self.count.fetch_sub(side.sign(), Ordering::AcqRel);
        debug_assert_eq!(before.signum(), side.sign(), "the gate was left twice");
        if before == side.sign() && self.contended.load(Ordering::Relaxed) != 0 {
            // Taking the lock orders this wake-up after the sleeper's test (D-7).
            drop(self.queue.lock());
            self.changed.notify_all();
        }
    }
}

impl Drop for AddGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.gate.leave(Side::Add);
    }
}

impl Drop for BlockGuard<'_> {
    fn drop(&mut self) {
        self.gate.leave(Side::Block);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicI32};
    use std::time::{Duration, Instant};

    #[test]
    fn each_side_is_shared_with_itself() {
        let gate = Gate::default();
        let (a, b) = (gate.add(), gate.add());
        drop((a, b));
        let (a, b) = (gate.block(), gate.block());
        assert!(gate.try_add().is_none());
        drop((a, b));
        assert!(gate.try_add().is_some());
    }

    /// D-7, D-8: a lost wake-up would be a hang, starvation a count.
    #[test]
    fn the_sides_exclude_each_other_and_neither_starves() {
        let gate = Arc::new(Gate::default());
        let inside = Arc::new(AtomicI32::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let counts: Vec<_> = (0..4)
            .map(|i| {
                let (gate, inside, stop) = (gate.clone(), inside.clone(), stop.clone());
                std::thread::spawn(move || {
                    let mut rounds = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        let sign = if i % 2 == 0 { 1 } else { -1 };
                        let add = (sign == 1).then(|| gate.add());
                        let block = (sign == -1).then(|| gate.block());
                        let seen = inside.fetch_add(sign, Ordering::SeqCst) + sign;
                        assert_eq!(seen.signum(), sign);
                        inside.fetch_sub(sign, Ordering::SeqCst);
                        drop((add, block));
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        stop.store(true, Ordering::Relaxed);
        for count in counts {
            assert!(count.join().unwrap() > 100);
        }
    }
}
