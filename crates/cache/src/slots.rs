//! Places for pages in the windows of mapped files.
//!
//! *Owns*: the numbers, which go on where the arena's frames end, their headers, and which file has which window. The
//! headers are made when the first window opens: a program without mappings pays nothing.
//!
//! *Does not own*: the budget (the arena's account), who must go when it is used up (`room.rs`).
//!
//! *Locking*: both locks are leaves. Faults served in signal handlers wait for them, so nobody allocates or frees under
//! them.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use pinfold_base::roomy;
use pinfold_base::sync::Mutex;
use pinfold_mem::{Frame, Window};

use crate::cache::{Cache, Header};
use crate::map::ReverseMap;

/// A window and who takes its pages out of mappings.
struct Shown {
    window: Arc<Window>,
    reverse: Arc<dyn ReverseMap>,
}

/// All slots of a cache.
pub(crate) struct Slots {
    /// How many there are, and the number of the first.
    count: usize,
    headers: OnceLock<Box<[Header]>>,
    free: Mutex<Vec<Frame>>,
    /// The windows of files that have pages, and the mappings of each, by the file's number.
    windows: Mutex<HashMap<u64, Shown>>,
}

impl Slots {
    /// Makes as many slots as there are frames: every page of the budget may be mapped.
    pub(crate) fn new(frames: usize) -> Self {
        Self {
            count: frames,
            headers: OnceLock::new(),
            free: Mutex::new(Vec::new()),
            windows: Mutex::new(HashMap::new()),
        }
    }

    fn open(&self) {
        self.headers.get_or_init(|| {
            // Lowest first, and never longer: giving one back allocates nothing.
            let numbers = self.count..2 * self.count;
            *self.free.lock() = numbers.rev().map(|at| Frame(at as u32)).collect();
            (0..self.count).map(|_| Header::default()).collect()
        });
    }

    /// Tells whether any window was ever opened.
    #[inline]
    pub(crate) fn are_open(&self) -> bool {
        self.headers.get().is_some()
    }

    #[cold]
    pub(crate) fn header(&self, slot: usize) -> &Header {
        let headers = self.headers.get();
        &headers.expect("slots are handed out once there are headers")[slot]
    }

    pub(crate) fn headers(&self) -> &[Header] {
        self.headers.get().map_or(&[], |headers| headers)
    }

    fn take(&self) -> Option<Frame> {
        self.free.lock().pop()
    }

    fn give(&self, frame: Frame) {
        self.free.lock().push(frame);
    }

    /// Returns the window of a file that has pages in it, which whoever asks keeps from going: so the file stays, and the
    /// reference returned is never the last.
    pub(crate) fn window(&self, file: u64) -> Option<Arc<Window>> {
        let windows = self.windows.lock();
        windows.get(&file).map(|shown| Arc::clone(&shown.window))
    }

    /// Returns the mappings of a file, under the same rule.
    pub(crate) fn reverse(&self, file: u64) -> Option<Arc<dyn ReverseMap>> {
        let windows = self.windows.lock();
        windows.get(&file).map(|shown| Arc::clone(&shown.reverse))
    }

    pub(crate) fn forget_window(&self, file: u64) {
        let gone = self.windows.lock().remove(&file);
        // Unmapping takes its time: not under the lock.
        drop(gone);
    }
}

/// A slot that is nobody's page yet, and a page of the budget with it.
#[derive(Debug)]
#[must_use = "dropped, it is given back"]
pub(crate) struct Slot<'a> {
    cache: &'a Cache,
    frame: Frame,
}

impl Slot<'_> {
    /// Uses it up: the page that is put there gives it back.
    pub(crate) fn into_frame(self) -> Frame {
        let frame = self.frame;
        std::mem::forget(self);
        frame
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.cache.give_slot(self.frame);
    }
}

impl Cache {
    /// Makes slots, headers and policy data for windows, and notes a file's.
    pub(crate) fn open_slots(
        &self,
        file: u64,
        window: &Arc<Window>,
        reverse: &Arc<dyn ReverseMap>,
    ) {
        self.policy.open_slots();
        self.slots.open();
        let shown = Shown {
            window: Arc::clone(window),
            reverse: Arc::clone(reverse),
        };
        roomy::lock_roomy(&self.slots.windows).insert(file, shown);
        // Noting a first store in a signal handler must find room.
        drop(roomy::lock_roomy(&self.dirty_files));
    }

    #[inline]
    pub(crate) fn in_window(&self, frame: Frame) -> bool {
        frame.0 as usize >= self.slots.count
    }

    /// Takes a slot if the budget has a page to spare; allocates nothing.
    pub(crate) fn spare_slot(&self) -> Option<Slot<'_>> {
        let mut charge = self.arena.charge(1)?;
        self.slot_from(&mut charge)
    }

    /// Takes a slot for a page that `charge` has.
    pub(crate) fn slot_from(&self, charge: &mut pinfold_mem::Charge<'_>) -> Option<Slot<'_>> {
        if charge.pages() == 0 {
            return None;
        }
        let frame = self.slots.take()?;
        charge.spend(1);
        Some(Slot { cache: self, frame })
    }

    /// Ends a slot whose page is in no list and no window any more; its page of the budget is anybody's.
    pub(crate) fn give_slot(&self, frame: Frame) {
        self.give_slot_number(frame);
        self.arena.uncharge(1);
    }

    /// As [`Cache::give_slot`], for a caller that keeps the page of the budget.
    pub(crate) fn give_slot_number(&self, frame: Frame) {
        self.slots.give(frame);
    }
}
