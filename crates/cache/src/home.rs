//! The move of a page from an arena frame to the window of its file.
//!
//! *Owns*: the order of steps. Claim the frame (no new references; readers that look wait for the lock); put the bytes
//! into the window, which the caller does, with the same system call that maps them where it can; list the slot and strike
//! the frame off under one index lock; let go of the frame, or leave it to those who still read from it.
//!
//! *Does not own*: why a page moves, room for it.
//!
//! *Locking*: the folio's lock throughout; index shard, policy and free list are leaves. Nothing is allocated.

use pinfold_mem::Frame;

use crate::folio::Folio;
use crate::slots::Slot;
use crate::state::{DIRTY, ERROR, HOME_WINDOW, TOWRITE, UPTODATE, WRITEBACK, pins};

/// A locked page that is on its way: dropped early, it stays where it was.
#[derive(Debug)]
pub(crate) struct Moving<'a> {
    /// `None` once the move has ended.
    on_the_way: Option<(Folio<'a>, Slot<'a>)>,
    page: u64,
    frame: Frame,
}

impl<'a> Moving<'a> {
    /// Claims a locked, valid page.
    ///
    /// # Errors
    /// Gives the page back while it is pinned or under write-back.
    pub(crate) fn begin(folio: Folio<'a>, slot: Slot<'a>) -> Result<Self, Folio<'a>> {
        let (page, frame) = (folio.page(), folio.frame());
        if !folio.cache().header(frame).state.begin_move() {
            return Err(folio);
        }
        Ok(Self {
            on_the_way: Some((folio, slot)),
            page,
            frame,
        })
    }

    pub(crate) fn page(&self) -> u64 {
        self.page
    }

    /// Returns the frame that still has the bytes.
    pub(crate) fn frame(&self) -> Frame {
        self.frame
    }

    /// Copies the bytes by the library's own address, into memory that the caller has populated, and ends the move.
    pub(crate) fn by_hand(self) -> Folio<'a> {
        if let Some((folio, _)) = &self.on_the_way {
            folio.homes().fill_window(self.page, self.frame);
        }
        self.finish()
    }

    /// Ends the move: the bytes are in the window.
    pub(crate) fn finish(mut self) -> Folio<'a> {
        let (mut folio, slot) = self
            .on_the_way
            .take()
            .expect("only this and `drop` take it, and both consume it");
        let cache = folio.cache();
        let from = self.frame;
        let old = cache.header(from);
        let (key, kept) = (old.key(), old.state.load() & (DIRTY | TOWRITE | ERROR));
        let to = slot.into_frame();
        let new = cache.header(to);
        new.assign(key);
        // Locked by the same holder, whose guard names it from here on.
        new.state.install(HOME_WINDOW);
        new.state.set(UPTODATE | kept);
        let hash = key.hash();
        let shard = cache.index.lock(hash);
        cache.index.insert(&shard, hash, to);
        cache.index.remove(&shard, hash, from);
        drop(shard);
        cache.policy.rehome(from, to, hash);
        cache.counters.moved.bump();
        let left = old.state.end_move();
        folio.set_frame(to);
        if left.free {
            cache.arena.free(from);
            cache.note_progress();
        }
        if left.sleepers {
            cache.wake(from);
        }
        folio
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        if let Some((folio, _slot)) = &self.on_the_way {
            folio.cache().header(self.frame).state.undo_move();
            // Where it stays nothing maps it.
            folio.untrack();
        }
    }
}

impl Folio<'_> {
    /// Sleeps until nobody pins or stores the page. Pins and write-back are leaves: whoever has them waits for no folio.
    pub(crate) fn wait_movable(&self) {
        self.cache().wait(self.frame(), |state| {
            state & WRITEBACK == 0 && pins(state) == 0
        });
    }
}

#[cfg(all(test, not(loom)))]
pub(crate) mod tests {
    use std::cell::RefCell;
    use std::ops::Range;
    use std::sync::Arc;

    use pinfold_base::Errno;
    use pinfold_mem::uffd::{InstallStop, Installed};
    use pinfold_mem::{Access, RawSpan};
    use pinfold_store::testing::MemoryObject;

    use crate::file::Attempt;
    use crate::map::{MapOutcome, MapTarget, ReverseMap};
    use crate::{Cache, CacheConfig, FilePages, MEMORY_MIN, Want};

    type Step = Box<dyn FnOnce()>;

    thread_local! {
        static AT_NEXT_LOOK: RefCell<Option<Step>> = const { RefCell::new(None) };
    }

    /// Called between the look at an entry of the index and the look at the frame it names.
    pub(crate) fn look() {
        let step = AT_NEXT_LOOK.with_borrow_mut(Option::take);
        if let Some(step) = step {
            step();
        }
    }

    /// A mapping that is never touched.
    struct Nobody(Range<u64>);

    impl MapTarget for Nobody {
        fn covers(&self) -> Range<u64> {
            self.0.clone()
        }

        fn shared(&self) -> bool {
            true
        }

        fn copy(&self, _page: u64, _from: RawSpan, _protect: bool) -> Installed {
            Installed {
                pages: 0,
                stop: Some(InstallStop::Other(Errno::ENOSYS)),
            }
        }

        fn resume(&self, pages: Range<u64>, _protect: bool) -> Installed {
            Installed {
                pages: (pages.end - pages.start) as usize,
                stop: None,
            }
        }

        fn unprotect(&self, _pages: Range<u64>) {}
    }

    impl ReverseMap for Nobody {
        fn unmap(&self, _pages: Range<u64>) {}

        fn protect(&self, _pages: Range<u64>) {}
    }

    #[test]
    fn a_page_that_moves_behind_a_look_is_found_all_the_same() {
        const PAGES: u64 = 40;
        let cache = Cache::new(CacheConfig {
            memory: MEMORY_MIN,
            ..CacheConfig::default()
        })
        .unwrap();
        let store = MemoryObject::with(&vec![7; PAGES as usize * 4096]);
        let file = FilePages::new(&cache, store, PAGES * 4096);
        file.open_window(PAGES, Arc::new(Nobody(0..PAGES))).unwrap();
        let want = Want {
            pages: 1,
            ahead: None,
            nowait: false,
        };
        for page in 0..PAGES {
            drop(file.read(page, &want).unwrap());
        }
        // What is gone leaves places in the index before those that follow: where a look has been already.
        file.discard(0..PAGES / 2);
        for page in PAGES / 2..PAGES {
            let theirs = Arc::clone(&file);
            AT_NEXT_LOOK.set(Some(Box::new(move || {
                let target = Nobody(0..PAGES);
                let mapped = theirs.map(page, Access::Read, page..page + 1, None, &target);
                assert_eq!(mapped.unwrap(), MapOutcome::Mapped);
            })));
            match file.try_lock(page) {
                Attempt::Locked(folio) => assert!(folio.in_window(), "page {page} has moved"),
                Attempt::Busy(_) => panic!("nobody has page {page}"),
                Attempt::Gone => panic!("page {page} is cached, a truncation would miss it"),
            }
        }
    }
}
