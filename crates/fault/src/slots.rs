//! Faults that need more than their own thread can do: handed to the pool, and waited for where the faulting thread does
//! so itself.
//!
//! *Owns*: a fixed number of slots, who may touch which when, and the sleeping for one of them.
//!
//! *Does not own*: the threads that serve, the answer.
//!
//! *Locking*: none: a word a slot. The side of the faulting thread allocates nothing and takes nothing, for it runs in a
//! signal handler.
//!
//! ```text
//!        claim           post            take                 finish
//!  FREE -------> CLAIMED ----> POSTED ---------> TAKEN -+-----------------> FREE               (an event)
//!   ^                                                   +---> SERVED or REFUSED -+             (a thread that waits)
//!   +--------------------------------- the thread has read the answer <---------+
//! ```

use std::time::Duration;

// The kernel sleeps on these words, which the tasks of shuttle do not: no fault is served there.
#[cfg(not(shuttle))]
use pinfold_base::sync::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence};
use pinfold_mem::Access;
#[cfg(shuttle)]
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence};

/// Faults under way at once; a thread that faults beyond that waits for a slot.
#[cfg(not(loom))]
pub(crate) const SLOTS_MAX: usize = 256;
#[cfg(loom)]
pub(crate) const SLOTS_MAX: usize = 1;

const FREE: u32 = 0;
const CLAIMED: u32 = 1;
const POSTED: u32 = 2;
const TAKEN: u32 = 3;
const SERVED: u32 = 4;
const REFUSED: u32 = 5;

/// Who is to be told of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waiter {
    /// A thread asleep in the kernel: installing the page wakes it.
    Kernel {
        /// As gettid(2) names it.
        thread: u32,
    },
    /// A thread in its signal handler, which sleeps on the slot.
    Slot,
    /// Nobody: what faults at the address have asked to be read ahead.
    Nobody,
}

/// In place of a thread's number, which is lower: [`Waiter::Nobody`].
const NOBODY: u32 = u32::MAX;

/// A fault to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) addr: usize,
    pub(crate) access: Access,
    /// The page was mapped, for reading only.
    pub(crate) protected: bool,
    pub(crate) waiter: Waiter,
}

/// How a fault ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Repeat the instruction.
    Served,
    /// SIGBUS.
    Refused,
}

#[derive(Debug)]
struct Slot {
    state: AtomicU32,
    addr: AtomicUsize,
    write: AtomicBool,
    protected: AtomicBool,
    /// The thread of [`Waiter::Kernel`]; 0 for [`Waiter::Slot`], [`NOBODY`].
    thread: AtomicU32,
}

/// The faults handed over.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: [Slot; SLOTS_MAX],
    /// Counts posts: what servers sleep on.
    posted: AtomicU32,
    /// Counts slots that became free while somebody wanted one: what those sleep on.
    freed: AtomicU32,
    wanting: AtomicU32,
    /// Where the next look for a posted slot begins, so that none is passed over for ever.
    cursor: AtomicUsize,
    idle: AtomicUsize,
    stopped: AtomicBool,
}

impl Slots {
    pub(crate) fn new() -> Self {
        Self {
            slots: std::array::from_fn(|_| Slot {
                state: AtomicU32::new(FREE),
                addr: AtomicUsize::new(0),
                write: AtomicBool::new(false),
                protected: AtomicBool::new(false),
                thread: AtomicU32::new(0),
            }),
            posted: AtomicU32::new(0),
            freed: AtomicU32::new(0),
            wanting: AtomicU32::new(0),
            cursor: AtomicUsize::new(0),
            idle: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        }
    }

    /// Hands over a fault that somebody waits for in the kernel; waits for a slot if all are in use. `false`: serving has
    /// ended.
    pub(crate) fn submit(&self, request: Request) -> bool {
        self.post(request).is_some()
    }

    /// Hands over a fault of this thread and sleeps until it is answered.
    pub(crate) fn call(&self, request: Request) -> Answer {
        let Some(slot) = self.post(request) else {
            return Answer::Refused;
        };
        let answer = loop {
            match slot.state.load(Ordering::Acquire) {
                SERVED => break Answer::Served,
                REFUSED => break Answer::Refused,
                state => park::wait(&slot.state, state),
            }
        };
        self.free(slot);
        answer
    }

    /// Hands over what nobody waits for, unless serving is busy with more urgent things or has ended; tells whether it has.
    pub(crate) fn offer(&self, request: Request) -> bool {
        if self.is_stopped() {
            return false;
        }
        let slot = self.try_claim();
        slot.map(|slot| self.post_in(slot, request)).is_some()
    }

    fn post(&self, request: Request) -> Option<&Slot> {
        let slot = self.claim()?;
        self.post_in(slot, request);
        Some(slot)
    }

    fn post_in(&self, slot: &Slot, request: Request) {
        slot.addr.store(request.addr, Ordering::Relaxed);
        slot.write
            .store(request.access == Access::Write, Ordering::Relaxed);
        slot.protected.store(request.protected, Ordering::Relaxed);
        let thread = match request.waiter {
            Waiter::Kernel { thread } => thread,
            Waiter::Slot => 0,
            Waiter::Nobody => NOBODY,
        };
        slot.thread.store(thread, Ordering::Relaxed);
        slot.state.store(POSTED, Ordering::Release);
        // Either `stop`, which looks at the slots after it has said so, finds this one, or we find that it has.
        fence(Ordering::SeqCst);
        if self.stopped.load(Ordering::Relaxed) {
            self.refuse_posted();
        }
        self.posted.fetch_add(1, Ordering::SeqCst);
        park::wake(&self.posted, 1);
    }

    /// Takes a free slot; `None` once serving has ended.
    fn claim(&self) -> Option<&Slot> {
        if let Some(slot) = self.try_claim() {
            return Some(slot);
        }
        self.wanting.fetch_add(1, Ordering::SeqCst);
        let slot = loop {
            if self.stopped.load(Ordering::SeqCst) {
                break None;
            }
            let seen = self.freed.load(Ordering::Acquire);
            // Either `free` sees us want one, or we see what it has freed.
            fence(Ordering::SeqCst);
            if let Some(slot) = self.try_claim() {
                break Some(slot);
            }
            park::wait(&self.freed, seen);
        };
        self.wanting.fetch_sub(1, Ordering::SeqCst);
        slot
    }

    fn try_claim(&self) -> Option<&Slot> {
        let claim = |slot: &&Slot| {
            slot.state.load(Ordering::Relaxed) == FREE
                && slot
                    .state
                    .compare_exchange(FREE, CLAIMED, Ordering::SeqCst, Ordering::Relaxed)
                    .is_ok()
        };
        self.slots.iter().find(claim)
    }

    fn free(&self, slot: &Slot) {
        slot.state.store(FREE, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.wanting.load(Ordering::SeqCst) > 0 {
            self.freed.fetch_add(1, Ordering::SeqCst);
            park::wake(&self.freed, 1);
        }
    }

    /// Waits for a fault to serve, for at most `patience`; `None`: serving has ended, or time is up.
    pub(crate) fn take(&self, patience: Option<Duration>) -> Option<Taken<'_>> {
        let seen = self.posted.load(Ordering::SeqCst);
        if let Some(taken) = self.try_take() {
            return Some(taken);
        }
        if self.is_stopped() {
            return None;
        }
        self.idle.fetch_add(1, Ordering::SeqCst);
        park::wait_for(&self.posted, seen, patience);
        self.idle.fetch_sub(1, Ordering::SeqCst);
        self.try_take()
    }

    fn try_take(&self) -> Option<Taken<'_>> {
        let start = self.cursor.load(Ordering::Relaxed);
        for step in 0..SLOTS_MAX {
            let at = (start + step) % SLOTS_MAX;
            let slot = &self.slots[at];
            if slot.state.load(Ordering::SeqCst) == POSTED
                && slot
                    .state
                    .compare_exchange(POSTED, TAKEN, Ordering::SeqCst, Ordering::Relaxed)
                    .is_ok()
            {
                self.cursor.store(at + 1, Ordering::Relaxed);
                return Some(Taken { slots: self, slot });
            }
        }
        None
    }

    /// Tells whether a fault waits and nobody is idle who would take it.
    pub(crate) fn is_behind(&self) -> bool {
        let waits = |slot: &Slot| slot.state.load(Ordering::Relaxed) == POSTED;
        self.idle.load(Ordering::SeqCst) == 0 && self.slots.iter().any(waits)
    }

    /// Wakes a server that has slept through something other than a fault.
    pub(crate) fn nudge(&self) {
        self.posted.fetch_add(1, Ordering::SeqCst);
        park::wake(&self.posted, 1);
    }

    /// Ends serving: whoever waits or comes later is refused, servers go home.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.refuse_posted();
        self.posted.fetch_add(1, Ordering::SeqCst);
        park::wake(&self.posted, u32::MAX);
        self.freed.fetch_add(1, Ordering::SeqCst);
        park::wake(&self.freed, u32::MAX);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    fn refuse_posted(&self) {
        while let Some(taken) = self.try_take() {
            drop(taken);
        }
    }
}

/// A fault this thread serves. Dropped unanswered it is refused, so that a server that dies leaves nobody waiting.
#[derive(Debug)]
#[must_use = "dropping it refuses the fault"]
pub(crate) struct Taken<'a> {
    slots: &'a Slots,
    slot: &'a Slot,
}

impl Taken<'_> {
    pub(crate) fn request(&self) -> Request {
        Request {
            addr: self.slot.addr.load(Ordering::Relaxed),
            access: if self.slot.write.load(Ordering::Relaxed) {
                Access::Write
            } else {
                Access::Read
            },
            protected: self.slot.protected.load(Ordering::Relaxed),
            waiter: match self.slot.thread.load(Ordering::Relaxed) {
                0 => Waiter::Slot,
                NOBODY => Waiter::Nobody,
                thread => Waiter::Kernel { thread },
            },
        }
    }

    /// Answers. Who waits in the kernel has been told by other means.
    pub(crate) fn finish(self, answer: Answer) {
        self.answer(answer);
        std::mem::forget(self);
    }

    fn answer(&self, answer: Answer) {
        if self.request().waiter != Waiter::Slot {
            self.slots.free(self.slot);
            return;
        }
        let state = match answer {
            Answer::Served => SERVED,
            Answer::Refused => REFUSED,
        };
        self.slot.state.store(state, Ordering::Release);
        park::wake(&self.slot.state, 1);
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.answer(Answer::Refused);
    }
}

#[cfg(not(loom))]
mod park {
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    use pinfold_mem::futex;

    pub(super) fn wait(word: &AtomicU32, seen: u32) {
        futex::wait(word, seen, None);
    }

    pub(super) fn wait_for(word: &AtomicU32, seen: u32, limit: Option<Duration>) {
        futex::wait(word, seen, limit);
    }

    pub(super) fn wake(word: &AtomicU32, count: u32) {
        futex::wake(word, count);
    }
}

/// loom knows no futex: one bell for all words, under whose lock a sleeper compares, as the kernel does under its own.
#[cfg(loom)]
mod park {
    use std::time::Duration;

    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::sync::{Condvar, Mutex};

    loom::lazy_static! {
        static ref BELL: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
    }

    pub(super) fn wait(word: &AtomicU32, seen: u32) {
        let quiet = BELL.0.lock().expect("loom aborts on panic");
        if word.load(Ordering::SeqCst) == seen {
            drop(BELL.1.wait(quiet));
        }
    }

    pub(super) fn wait_for(word: &AtomicU32, seen: u32, _: Option<Duration>) {
        wait(word, seen);
    }

    pub(super) fn wake(_: &AtomicU32, _: u32) {
        let _quiet = BELL.0.lock();
        BELL.1.notify_all();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    use super::*;

    fn request(addr: usize) -> Request {
        Request {
            addr,
            access: Access::Read,
            protected: false,
            waiter: Waiter::Slot,
        }
    }

    /// Answers by the address: odd ones are refused.
    fn serve(slots: &Slots) {
        while !slots.is_stopped() {
            let Some(taken) = slots.take(Some(Duration::from_millis(50))) else {
                continue;
            };
            if taken.request().addr % 2 == 0 {
                taken.finish(Answer::Served);
            }
        }
    }

    #[test]
    fn every_caller_gets_the_answer_to_its_own_fault_though_slots_are_short() {
        let slots = Arc::new(Slots::new());
        let servers: Vec<_> = (0..2)
            .map(|_| {
                let slots = Arc::clone(&slots);
                thread::spawn(move || serve(&slots))
            })
            .collect();
        let right = AtomicU64::new(0);
        thread::scope(|scope| {
            for caller in 0..SLOTS_MAX + 44 {
                let (slots, right) = (&slots, &right);
                scope.spawn(move || {
                    for round in 0..20 {
                        let addr = caller * 1000 + round;
                        let expected = if addr % 2 == 0 {
                            Answer::Served
                        } else {
                            Answer::Refused
                        };
                        assert_eq!(slots.call(request(addr)), expected);
                        right.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(right.into_inner(), 20 * (SLOTS_MAX as u64 + 44));
        slots.stop();
        servers
            .into_iter()
            .for_each(|server| server.join().unwrap());
    }

    #[test]
    fn what_nobody_waits_for_takes_no_more_slots_than_are_free_and_gives_them_back() {
        let slots = Slots::new();
        let nobodys = |addr| Request {
            waiter: Waiter::Nobody,
            ..request(addr)
        };
        for round in 0..3 {
            let taken = (0..SLOTS_MAX + 5).filter(|&at| slots.offer(nobodys(at)));
            assert_eq!(taken.count(), SLOTS_MAX, "round {round}");
            for _ in 0..SLOTS_MAX {
                let taken = slots.take(None).expect("as many were handed over");
                assert_eq!(taken.request().waiter, Waiter::Nobody);
                taken.finish(Answer::Served);
            }
        }
        slots.stop();
        assert!(!slots.offer(nobodys(0)), "serving has ended");
    }

    #[test]
    fn whoever_waits_when_serving_ends_is_refused() {
        let slots = Arc::new(Slots::new());
        let callers: Vec<_> = (0..SLOTS_MAX + 10)
            .map(|at| {
                let slots = Arc::clone(&slots);
                thread::spawn(move || slots.call(request(at * 2)))
            })
            .collect();
        thread::sleep(Duration::from_millis(50));
        slots.stop();
        for caller in callers {
            assert_eq!(caller.join().unwrap(), Answer::Refused);
        }
        assert_eq!(slots.call(request(0)), Answer::Refused);
    }
}

/// Run with `RUSTFLAGS="--cfg loom" cargo test -p pinfold-fault --lib --release loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::Arc;
    use loom::thread;

    use super::*;

    fn request(addr: usize) -> Request {
        Request {
            addr,
            access: Access::Read,
            protected: false,
            waiter: Waiter::Slot,
        }
    }

    fn bounded(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.check(model);
    }

    #[test]
    fn loom_two_callers_of_one_slot_get_their_own_answers() {
        bounded(|| {
            let slots = Arc::new(Slots::new());
            let callers: Vec<_> = [1, 2]
                .map(|addr| {
                    let slots = Arc::clone(&slots);
                    thread::spawn(move || {
                        let expected = if addr == 1 {
                            Answer::Refused
                        } else {
                            Answer::Served
                        };
                        assert_eq!(slots.call(request(addr)), expected);
                    })
                })
                .into();
            let mut served = 0;
            while served < 2 {
                if let Some(taken) = slots.take(None) {
                    if taken.request().addr == 2 {
                        taken.finish(Answer::Served);
                    }
                    served += 1;
                }
            }
            for caller in callers {
                caller.join().unwrap();
            }
        });
    }

    #[test]
    fn loom_nobody_waits_for_servers_that_have_gone() {
        bounded(|| {
            let slots = Arc::new(Slots::new());
            let theirs = Arc::clone(&slots);
            let caller = thread::spawn(move || theirs.call(request(2)));
            let theirs = Arc::clone(&slots);
            let server = thread::spawn(move || {
                if let Some(taken) = theirs.take(None) {
                    taken.finish(Answer::Served);
                }
            });
            slots.stop();
            server.join().unwrap();
            // Served or refused, but answered.
            let _ = caller.join().unwrap();
        });
    }
}
