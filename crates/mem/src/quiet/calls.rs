//! Calls under way that signals may interrupt: those that began while the process had no mapping.
//!
//! Whoever makes the first mapping has to wait for them. They pay for it next to nothing: a thread notes its calls in a place
//! of its own, with plain stores, and the one who waits makes the processors agree on what was stored (membarrier(2)).
//!
//! *Owns*: the places. *Does not own*: who is quiet. *Locking*: none; nobody here waits with anything held.
//!
//! ```text
//!  call:  note it -> any mapping? -> yes: strike it off, block signals         first mapping:  count it -> membarrier
//!                                    no:  go on; strike it off at the end                      -> wait until nothing is noted
//! ```
//! Either the call sees that there is a mapping, or its note is seen.

use std::cell::Cell;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, compiler_fence};
use std::time::{Duration, Instant};

use crate::epochs::back_off;

/// Threads with a place of their own; others share one.
const PLACES: usize = 512;
/// A call may wait for a store that does not answer, and a program for its mapping: after so long the call stays as it is.
const PATIENCE: Duration = Duration::from_secs(30);

#[repr(align(64))]
struct Place {
    taken: AtomicBool,
    /// Calls of its thread under way, nested ones included.
    depth: AtomicU32,
}

static OWN: [Place; PLACES] = [const {
    Place {
        taken: AtomicBool::new(false),
        depth: AtomicU32::new(0),
    }
}; PLACES];
static SHARED: Place = Place {
    taken: AtomicBool::new(true),
    depth: AtomicU32::new(0),
};

const UNKNOWN: u16 = u16::MAX;
const NO_OWN: u16 = u16::MAX - 1;
/// Of a thread that signals never interrupt.
const EXEMPT: u16 = u16::MAX - 2;

thread_local! {
    static MINE: Cell<u16> = const { Cell::new(UNKNOWN) };
    /// Gives the place back when the thread ends.
    static LEASE: Lease = const { Lease(Cell::new(NO_OWN)) };
}

struct Lease(Cell<u16>);

impl Drop for Lease {
    fn drop(&mut self) {
        MINE.set(NO_OWN);
        if let Some(place) = OWN.get(usize::from(self.0.get())) {
            place.taken.store(false, Ordering::Release);
        }
    }
}

/// A call that is noted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Noted(u16);

/// Notes a call of this thread, before it looks whether there is a mapping.
#[inline]
pub(super) fn begin() -> Noted {
    let mine = match MINE.get() {
        UNKNOWN => deal(),
        mine => mine,
    };
    match OWN.get(usize::from(mine)) {
        // Nobody else stores there.
        Some(place) => {
            let depth = place.depth.load(Ordering::Relaxed);
            place.depth.store(depth + 1, Ordering::Relaxed);
        }
        None if mine == EXEMPT => {}
        None => {
            SHARED.depth.fetch_add(1, Ordering::SeqCst);
        }
    }
    // The processor may still take them the other way round: `wait_for_all` sees to that.
    compiler_fence(Ordering::SeqCst);
    Noted(mine)
}

/// Strikes a call off.
#[inline]
pub(super) fn end(noted: Noted) {
    match OWN.get(usize::from(noted.0)) {
        Some(place) => {
            let depth = place.depth.load(Ordering::Relaxed);
            place.depth.store(depth - 1, Ordering::Release);
        }
        None if noted.0 == EXEMPT => {}
        None => {
            SHARED.depth.fetch_sub(1, Ordering::Release);
        }
    }
}

/// Leaves this thread's calls out from now on. None is under way.
pub(super) fn exempt() {
    MINE.set(EXEMPT);
}

#[cold]
fn deal() -> u16 {
    let free = |place: &Place| {
        !place.taken.load(Ordering::Relaxed) && !place.taken.swap(true, Ordering::Acquire)
    };
    // Fewer than u16 can count.
    let own = OWN.iter().position(free).map_or(NO_OWN, |at| at as u16);
    let kept = LEASE.try_with(|lease| lease.0.set(own)).is_ok();
    if !kept && let Some(place) = OWN.get(usize::from(own)) {
        // The thread is about to end.
        place.taken.store(false, Ordering::Release);
    }
    let mine = if kept { own } else { NO_OWN };
    MINE.set(mine);
    mine
}

/// Waits for every call that began before what the caller has just made known; calls of this very thread do not count.
pub(super) fn wait_for_all() {
    barrier();
    let mine = OWN.get(usize::from(MINE.get()));
    let until = Instant::now() + PATIENCE;
    for place in OWN.iter().chain([&SHARED]) {
        let mut turns = 0;
        while place.depth.load(Ordering::Acquire) != 0
            && !mine.is_some_and(|mine| std::ptr::eq(mine, place))
            && Instant::now() < until
        {
            back_off(&mut turns);
        }
    }
}

/// Has every running thread of the process pass a full fence. Without the system call a store may go unseen for the moment it
/// takes to leave its processor.
fn barrier() {
    static REGISTERED: Once = Once::new();
    let call = |command: libc::c_int| {
        // SAFETY: no memory is involved.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }
    };
    REGISTERED.call_once(|| {
        call(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
    });
    call(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn whoever_waits_waits_for_calls_of_others_and_places_come_back() {
        for _ in 0..3 {
            let ended = Arc::new(AtomicBool::new(false));
            let (tell, told) = std::sync::mpsc::channel();
            let theirs = Arc::clone(&ended);
            let other = std::thread::spawn(move || {
                let (outer, inner) = (begin(), begin());
                end(inner);
                tell.send(outer.0).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                theirs.store(true, Ordering::SeqCst);
                end(outer);
            });
            let place = told.recv().unwrap();
            let own = begin();
            wait_for_all();
            assert!(ended.load(Ordering::SeqCst), "a call was under way");
            end(own);
            other.join().unwrap();
            assert!(!OWN[usize::from(place)].taken.load(Ordering::SeqCst));
        }
    }
}
