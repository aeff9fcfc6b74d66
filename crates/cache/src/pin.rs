//! Pages pinned for device I/O (SEMANTICS.md section E).
//!
//! *Owns*: the pin, given back by `Drop`, and its count: acquired equals released when nothing is under way. Debug builds
//! remember where each pin was taken ([`Cache::pins_held`](crate::Cache::pins_held)), and panic with that place when one is
//! given back that is not held.
//!
//! *Does not own*: the transfer.
//!
//! *Locking*: a pin for a transfer is a leaf. Whoever holds one takes no lock of classes 1 to 5 until the transfer has
//! ended: truncation, eviction and the move between homes wait for it. What the program keeps pinned is waited for with
//! nothing held ([`FilePages::kept_page`]), not for ever, and not at all by the thread that took the pin
//! ([`FilePages::keeps_itself`]): it would wait for itself.

use pinfold_base::sync::path::{AtomicUsize, Ordering};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::panic::Location;
use std::sync::Arc;

use std::time::Instant;

use pinfold_base::Errno;
use pinfold_base::sync::Mutex;
use pinfold_base::sync::thread::{self, ThreadId};
use pinfold_mem::{Access, Frame, Segments};
use smallvec::SmallVec;

mod run;

pub use run::PinnedRun;

use crate::CacheError;
use crate::file::FilePages;
use crate::folio::Folio;
use crate::lease::PageRef;
use crate::map::{MapOutcome, MapTarget};
use crate::state::{PinKind, pins};

/// A page whose memory stays where it is while a device uses it.
#[derive(Debug)]
pub struct PagePin {
    file: Arc<FilePages>,
    page: u64,
    frame: Frame,
    kind: PinKind,
    term: Term,
    note: Note,
}

/// How long a pin may last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Term {
    /// One transfer: whoever wants the page gone waits.
    Transfer,
    /// As long as the program likes: nobody whose own thread may hold it waits. It was taken by that thread.
    Program(ThreadId),
}

/// The pages of a file that the program keeps pinned.
#[derive(Debug, Default)]
pub(crate) struct KeptPins {
    /// Pins, and those being taken or given back.
    count: AtomicUsize,
    /// Of each page, the threads that took its pins.
    pages: Mutex<BTreeMap<u64, SmallVec<[ThreadId; 1]>>>,
}

impl KeptPins {
    /// Notes a pin that this thread is about to take, under the page's lock.
    fn add(&self, page: u64) -> ThreadId {
        let thread = thread::current().id();
        self.count.fetch_add(1, Ordering::AcqRel);
        self.pages.lock().entry(page).or_default().push(thread);
        thread
    }

    /// Notes that a pin is gone, or was not taken.
    fn remove(&self, page: u64, thread: ThreadId) {
        let mut pages = self.pages.lock();
        if let Entry::Occupied(mut threads) = pages.entry(page) {
            let list = threads.get_mut();
            if let Some(at) = list.iter().position(|&other| other == thread) {
                list.swap_remove(at);
            }
            if list.is_empty() {
                threads.remove();
            }
        }
        drop(pages);
        self.count.fetch_sub(1, Ordering::AcqRel);
    }

    fn any(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }

    /// Tells whether any pin of these pages is of a thread that `which` says.
    fn any_of(&self, pages: Range<u64>, which: impl Fn(ThreadId) -> bool) -> bool {
        let of = |threads: &SmallVec<[ThreadId; 1]>| threads.iter().copied().any(&which);
        self.any()
            && self
                .pages
                .lock()
                .range(pages)
                .any(|(_, threads)| of(threads))
    }
}

/// Where a pin was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PinSite {
    /// The page's number in its file.
    pub page: u64,
    /// What for.
    pub kind: PinKind,
    /// The call that took it.
    pub place: &'static Location<'static>,
}

/// A page that the program keeps pinned ([`FilePages::kept_page`]).
#[derive(Debug, Clone, Copy)]
pub struct Kept(Frame, u64);

/// Why a page was not pinned at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PinRefusal {
    /// Not cached, being filled or changed, or to be written to and not dirty.
    Cold,
    /// It has as many pins as it may have (`ENOMEM`).
    TooMany,
}

#[cfg(debug_assertions)]
pub(crate) mod sites {
    //! The pins that are held, by number.

    use std::collections::BTreeMap;

    use pinfold_base::sync::Mutex;

    use super::PinSite;

    /// Names a pin in the list.
    #[derive(Debug)]
    pub(crate) struct Note(u64, PinSite);

    #[derive(Debug, Default)]
    pub(crate) struct Sites(Mutex<(u64, BTreeMap<u64, PinSite>)>);

    impl Sites {
        pub(super) fn add(&self, site: PinSite) -> Note {
            let mut held = self.0.lock();
            held.0 += 1;
            let number = held.0;
            held.1.insert(number, site);
            Note(number, site)
        }

        pub(super) fn remove(&self, note: &Note) {
            let was = self.0.lock().1.remove(&note.0);
            assert!(
                was.is_some(),
                "a pin that is not held is given back: {:?}",
                note.1
            );
        }

        pub(crate) fn list(&self) -> Vec<PinSite> {
            self.0.lock().1.values().copied().collect()
        }
    }
}

#[cfg(not(debug_assertions))]
pub(crate) mod sites {
    use super::PinSite;

    #[derive(Debug)]
    pub(crate) struct Note;

    #[derive(Debug, Default)]
    pub(crate) struct Sites;

    impl Sites {
        #[inline(always)]
        pub(super) fn add(&self, _site: PinSite) -> Note {
            Note
        }

        #[inline(always)]
        pub(super) fn remove(&self, _note: &Note) {}

        pub(crate) fn list(&self) -> Vec<PinSite> {
            Vec::new()
        }
    }
}

use sites::Note;

impl FilePages {
    /// Brings a page in and pins it; `None` beyond the end. Pinned for writing it is dirty from now on (INV3), and no
    /// write-back makes it clean before the pin is gone. Nothing may be held.
    ///
    /// A pinned page does not move: whoever wants it mapped as well calls [`FilePages::pin_mapped`].
    ///
    /// # Errors
    /// As of [`FilePages::map`]; [`CacheError::TooManyPins`], with nothing changed.
    #[track_caller]
    pub fn pin(self: &Arc<Self>, page: u64, kind: PinKind) -> Result<Option<PagePin>, CacheError> {
        // Against the gate whatever the kind: who blocks it to drop pages has seen which of them are kept.
        let Some((gate, folio)) = self.lock_valid(page, true)? else {
            return Ok(None);
        };
        if kind == PinKind::Write {
            self.make_dirty(&folio);
        }
        let pin = self.pin_locked(&folio, kind)?;
        drop(folio);
        drop(gate);
        if kind == PinKind::Write {
            self.note_dirty_file();
        }
        Ok(Some(pin))
    }

    /// As [`FilePages::pin`], and installs the page in a mapping, for stores if it is pinned for writing. It stays
    /// installed as long as it is pinned, unless the program takes it out: eviction passes pinned pages by, and write-back
    /// does not protect those a device writes to.
    ///
    /// # Errors
    /// As of [`FilePages::map`]; [`CacheError::TooManyPins`].
    #[track_caller]
    pub fn pin_mapped(
        self: &Arc<Self>,
        page: u64,
        kind: PinKind,
        target: &dyn MapTarget,
    ) -> Result<Option<PagePin>, CacheError> {
        let access = match kind {
            PinKind::Read => Access::Read,
            PinKind::Write => Access::Write,
        };
        loop {
            if self.map(page, access, page..page + 1, None, target)? == MapOutcome::BeyondEnd {
                return Ok(None);
            }
            // As in `map` and `pin`: nothing that lets stores in is installed against the gate, and nothing is kept.
            let Some((_gate, folio)) = self.lock_valid(page, true)? else {
                return Ok(None);
            };
            // Evicted and read again since it was mapped: it has to move once more before it may be pinned.
            if folio.in_window() {
                let pin = self.pin_locked(&folio, kind)?;
                self.install_again(folio, access, target)?;
                return Ok(Some(pin));
            }
        }
    }

    #[track_caller]
    fn pin_locked(
        self: &Arc<Self>,
        folio: &Folio<'_>,
        kind: PinKind,
    ) -> Result<PagePin, CacheError> {
        let (page, frame) = (folio.page(), folio.frame());
        // Before the pin, under the lock that those take who look.
        let thread = self.kept.add(page);
        match self.cache().header(frame).state.pin_locked(kind) {
            Ok(_) => Ok(self.pinned(page, frame, kind, Term::Program(thread))),
            Err(errno) => {
                self.kept.remove(page, thread);
                // Valid and locked by us, so nothing else refuses; but an answer is better than a promise.
                Err(match errno {
                    Errno::ENOMEM => CacheError::TooManyPins,
                    _ => CacheError::WouldBlock,
                })
            }
        }
    }

    /// Finds a page of `range` that the program keeps pinned. While the caller blocks the gate the answer stays: a page is
    /// pinned for long only with the right to add pages.
    ///
    /// Who is to drop those pages gives back everything it holds and [waits](FilePages::wait_unkept): the program may be
    /// about to pin the next page, to fault, or to make another call on this file (D-4).
    #[must_use]
    pub fn kept_page(&self, range: Range<u64>) -> Option<Kept> {
        if !self.kept.any() {
            return None;
        }
        self.cached_pages(range).into_iter().find_map(|page| {
            let kept = Kept(self.get(page)?.frame(), page);
            (pins(self.cache().header(kept.0).state.load()) > 0).then_some(kept)
        })
    }

    /// Tells whether the calling thread itself took a pin of any of these pages that is kept: then it must not wait.
    #[must_use]
    pub fn keeps_itself(&self, pages: Range<u64>) -> bool {
        let this = thread::current().id();
        self.kept.any_of(pages, |thread| thread == this)
    }

    /// Sleeps until a page that was kept is pinned no longer; false when `deadline` came first: who keeps it may wait for
    /// the caller. Nothing may be held.
    #[must_use]
    pub fn wait_unkept(&self, kept: Kept, deadline: Instant) -> bool {
        let (Kept(frame, page), cache) = (kept, self.cache());
        let (key, state) = (self.key(page), &cache.header(frame).state);
        // A pinned frame keeps its page: one that holds another now was let go.
        let unkept = |state| pins(state) == 0 || !cache.header(frame).is(key);
        cache
            .waits
            .wait(frame.0 as usize, state, Some(deadline), unkept)
    }

    /// Takes a pin of a page; returns its frame.
    fn find_and_pin(&self, page: u64, kind: PinKind) -> Result<Frame, PinRefusal> {
        for frame in self.cache().index.candidates(self.key(page).hash()) {
            if self.pin_frame(frame, page, kind)? {
                return Ok(frame);
            }
        }
        Err(PinRefusal::Cold)
    }

    /// Takes a pin of a page if that frame holds it, ready; tells whether.
    fn pin_frame(&self, frame: Frame, page: u64, kind: PinKind) -> Result<bool, PinRefusal> {
        let (key, cache) = (self.key(page), self.cache());
        let header = cache.header(frame);
        if !header.is(key) {
            return Ok(false);
        }
        match header.state.pin_ready(kind) {
            // A pinned frame keeps its page, so now it tells whose it is.
            Ok(_) if header.is(key) => Ok(true),
            Ok(_) => {
                if header.state.unpin(kind) {
                    cache.wake(frame);
                }
                Ok(false)
            }
            Err(Errno::ENOMEM) => Err(PinRefusal::TooMany),
            Err(_) => Ok(false),
        }
    }

    /// Pins a page for one transfer in place of a reference to it. Waits for nobody, as [`FilePages::try_pin_run`].
    ///
    /// # Errors
    /// [`PinRefusal`]; the reference has been given back then.
    #[track_caller]
    pub fn pin_found(
        self: &Arc<Self>,
        found: PageRef<'_>,
        kind: PinKind,
    ) -> Result<PagePin, PinRefusal> {
        let (page, frame) = (found.page(), found.frame());
        // Dropped at the end: the page has one of the two all along.
        match self.cache().header(frame).state.pin_ready(kind) {
            Ok(_) => Ok(self.pinned(page, frame, kind, Term::Transfer)),
            Err(Errno::ENOMEM) => Err(PinRefusal::TooMany),
            Err(_) => Err(PinRefusal::Cold),
        }
    }

    #[track_caller]
    fn pinned(self: &Arc<Self>, page: u64, frame: Frame, kind: PinKind, term: Term) -> PagePin {
        self.cache().counters.foll_pin_acquired.bump();
        let place = Location::caller();
        let note = self.cache().pin_sites.add(PinSite { page, kind, place });
        PagePin {
            file: Arc::clone(self),
            page,
            frame,
            kind,
            term,
            note,
        }
    }

    /// Makes an empty list for the memory of pinned pages of this file.
    #[must_use]
    pub fn segments(&self) -> Segments {
        self.homes().segments()
    }
}

impl Folio<'_> {
    /// Tells whether the program itself keeps the page pinned, perhaps in the very thread that asks.
    pub(crate) fn is_kept(&self) -> bool {
        let page = self.page();
        self.file().kept.any_of(page..page + 1, |_| true)
    }
}

impl PagePin {
    /// Returns the page's number.
    #[must_use]
    pub fn page(&self) -> u64 {
        self.page
    }

    /// Returns the library's own address of the page, good while this exists.
    #[must_use]
    pub fn addr(&self) -> *mut u8 {
        self.file.homes().addr(self.frame, self.page)
    }

    /// Appends bytes `at .. at + len` of the page to a list that [`FilePages::segments`] of its file made.
    ///
    /// # Panics
    /// When the range leaves the page.
    pub fn push(&self, segments: &mut Segments, at: usize, len: usize) {
        let homes = self.file.homes();
        homes.push(segments, self.frame, self.page, at, len);
    }
}

impl Drop for PagePin {
    fn drop(&mut self) {
        let cache = self.file.cache();
        cache.pin_sites.remove(&self.note);
        // Counted first: who is woken by the last pin finds the counts equal.
        cache.counters.foll_pin_released.bump();
        if cache.header(self.frame).state.unpin(self.kind) {
            cache.wake(self.frame);
        }
        // Last: until then there is something to be waited for that only this thread ends.
        if let Term::Program(thread) = self.term {
            self.file.kept.remove(self.page, thread);
        }
    }
}
