//! One mapping of a file into the program's memory.
//!
//! *Owns*: which of its addresses are still ours, what is installed around a fault and what is read ahead of it, the
//! refusals that stand; what it has shown (`mapping/shown.rs`), its use as a buffer (`mapping/memory.rs`).
//!
//! *Does not own*: the page and its state (`pinfold-cache`), who reads events and who waits ([`crate::faults`]).
//!
//! *Locking*: `live` for reading around each page-table operation, for writing where addresses come and go; a leaf under
//! which nothing is allocated or freed.

mod memory;
mod shown;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use pinfold_base::{Errno, PAGE_SIZE};
use pinfold_cache::{
    AROUND_MAX, CacheError, FilePages, MapOutcome, MapTarget, SIGNAL_MOVES_MAX, Walks,
};
use pinfold_mem::{
    Access, Delivery, InstallStop, Installed, RawSpan, UserMap, UserMapKind, futex,
    window::WindowError,
};
use smallvec::{SmallVec, smallvec};

use crate::channel::Channel;
use crate::faults::Shared;
use crate::refusal::{Refusal, Refusals};
use crate::slots::{Request, Waiter};
use crate::{Fault, FaultTarget};
use shown::Shown;

const PAGE: usize = PAGE_SIZE as usize;
/// Pages installed around a fault at most, as in Linux: an aligned block of so many.
const AROUND_PAGES: u64 = 16;
/// The same where the program walks through, or says so: pages that it comes to next, in its direction.
const AROUND_PAGES_WALK: u64 = 64;
/// The same after [`WALK_STEPS`] faults that followed each other: a fault costs as much as a page or twenty.
const AROUND_PAGES_LONG_WALK: u64 = AROUND_MAX as u64;
const WALK_STEPS: u64 = 3;
/// Runs of pages that lose their entries together without allocating.
const PARTS_MAX: usize = 64;

/// What the program is about to do with mapped bytes, as in madvise(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Advice {
    /// Nothing in particular: neighbours of a page are mapped with it, and sequences are read ahead.
    #[default]
    Normal = 0,
    /// Touch pages here and there: nothing is brought in beside them.
    Random = 1,
    /// Walk through: more is mapped at once.
    Sequential = 2,
    /// Need the bytes soon: reading them starts now, of a range larger than half of the budget its beginning.
    WillNeed = 3,
    /// Not need the bytes soon: they leave this mapping; in a private one, with what was stored to it.
    DontNeed = 4,
}

/// One address range that shows pages of a file.
///
/// Its first address never changes: one that moves is another. Parts of it are given up
/// ([`Placed::unmap`](crate::Placed::unmap)) and added behind its end ([`Placed::remap`](crate::Placed::remap)), and every page-table
/// operation first makes sure that its addresses are still ours.
pub struct UserMapping {
    map: UserMap,
    channel: Arc<Channel>,
    target: Arc<dyn FaultTarget>,
    shared: Arc<Shared>,
    /// Pages not given up. Held for reading while pages are installed, for writing while some are given up.
    live: RwLock<SmallVec<[Range<u64>; 1]>>,
    /// Where stores may come without notice: the pages that have, or had, an entry here.
    shown: Option<Shown>,
    walks: Walks,
    /// Whether somebody has been asked to make room in the cache.
    makes_room: AtomicBool,
    advice: AtomicU8,
    refusals: Refusals,
    /// Pool threads that serve a fault in it.
    serving: AtomicU32,
    /// Where the file's list has it; the list's lock guards it.
    pub(crate) listed_at: AtomicUsize,
}

impl fmt::Debug for UserMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserMapping")
            .field("map", &self.map)
            .field("delivery", &self.channel.delivery())
            .finish_non_exhaustive()
    }
}

impl UserMapping {
    pub(crate) fn new(
        map: UserMap,
        channel: Arc<Channel>,
        target: Arc<dyn FaultTarget>,
        shared: Arc<Shared>,
    ) -> Result<Arc<Self>, WindowError> {
        let shown = Shown::of(&map, &channel).map_err(no_record)?;
        Ok(Arc::new(Self {
            live: RwLock::new(smallvec![map.pages()]),
            shown,
            map,
            channel,
            target,
            shared,
            walks: Walks::default(),
            makes_room: AtomicBool::new(false),
            advice: AtomicU8::new(Advice::Normal as u8),
            refusals: Refusals::default(),
            serving: AtomicU32::new(0),
            listed_at: AtomicUsize::new(usize::MAX),
        }))
    }

    /// Returns the address range.
    #[must_use]
    pub fn map(&self) -> &UserMap {
        &self.map
    }

    /// Returns how faults in it are delivered, and by what right.
    #[must_use]
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    pub(crate) fn target(&self) -> &Arc<dyn FaultTarget> {
        &self.target
    }

    /// Takes over what the program said it was about to do with another mapping.
    pub(crate) fn set_pattern_of(&self, other: &Self) {
        let pattern = other.advice.load(Ordering::Relaxed);
        self.advice.store(pattern, Ordering::Relaxed);
    }

    /// Returns the pages it shows.
    #[must_use]
    pub fn pages(&self) -> &Arc<FilePages> {
        self.target.pages()
    }

    /// Sets what is installed around a fault and read ahead of it. Takes the lasting kinds; the others change nothing.
    pub fn set_pattern(&self, advice: Advice) {
        if matches!(advice, Advice::Normal | Advice::Random | Advice::Sequential) {
            self.advice.store(advice as u8, Ordering::Relaxed);
        }
    }

    /// Drops page-table entries; in a private mapping, the program's copies with them.
    ///
    /// # Errors
    /// `ENOMEM` where a part was given up.
    pub fn drop_entries(&self, pages: Range<u64>) -> Result<(), Errno> {
        self.map.drop_entries(pages)
    }

    /// Tells whether all of `pages` are still mapped.
    #[must_use]
    pub fn holds(&self, pages: &Range<u64>) -> bool {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        clip(&live, pages).is_some_and(|part| part.end == pages.end)
    }

    pub(crate) fn contains(&self, addr: usize) -> bool {
        self.map
            .page_at(addr)
            .is_some_and(|page| self.holds(&(page..page + 1)))
    }

    /// Gives up pages and unmaps them. Nothing is installed there any more when this returns.
    ///
    /// # Errors
    /// A range becomes two and the process has as many mappings as it may. Nothing has changed then.
    pub(crate) fn give_up(&self, pages: &Range<u64>) -> Result<(), WindowError> {
        let ranges = || {
            self.live
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .len()
        };
        let mut wanted = ranges() + 1;
        loop {
            // Allocated, and below freed, without the lock: faults in signal handlers wait for it.
            let mut left: SmallVec<[Range<u64>; 1]> = SmallVec::with_capacity(wanted);
            let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
            if live.len() >= left.capacity() {
                wanted = live.len() + 1;
                continue;
            }
            self.map.unmap(pages.clone())?;
            if let Some(addr) = self.map.addr_of(pages.start) {
                // Who waits for a page of these is not served any more, and would wait for ever: it is told what is there
                // now.
                let _ = self.channel.uffd().wake(addr, bytes(pages));
            }
            let parts = live.iter().flat_map(|range| {
                [
                    range.start..range.end.min(pages.start),
                    range.start.max(pages.end)..range.end,
                ]
            });
            left.extend(parts.filter(|range| !range.is_empty()));
            std::mem::swap(&mut *live, &mut left);
            drop(live);
            return Ok(());
        }
    }

    /// Makes it longer in its place, up to page `end`.
    ///
    /// # Errors
    /// As of [`UserMap::extend`]; nothing has changed then.
    pub(crate) fn extend(&self, end: u64) -> Result<(), WindowError> {
        if let Some(shown) = &self.shown {
            shown.ensure(end).map_err(no_record)?;
        }
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        let was = self.map.pages().end;
        self.map.extend(end)?;
        // One range, as it has to be to become longer: nothing is allocated or freed.
        if let [range] = &mut live[..] {
            if let Some(shown) = &self.shown {
                // What it showed there before it was made shorter.
                shown.remove(&(range.end..was.min(end)));
            }
            range.end = end;
        }
        Ok(())
    }

    /// Carries the program's copies to another private mapping of the same pages. Nothing is installed here any more when
    /// this returns: a store would stay behind.
    ///
    /// # Errors
    /// As of [`UserMap::carry_to`].
    pub(crate) fn carry_to(&self, to: &Self) -> Result<(), WindowError> {
        // Faults that come meanwhile wait for this lock; after a failure they are served as ever.
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        self.map.carry_to(&to.map, self.channel.uffd())?;
        live.clear();
        Ok(())
    }

    /// Notes a pool thread at work here; must be undone by [`UserMapping::end_serving`].
    pub(crate) fn begin_serving(&self) {
        self.serving.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn end_serving(&self) {
        if self.serving.fetch_sub(1, Ordering::SeqCst) == 1 {
            futex::wake(&self.serving, u32::MAX);
        }
    }

    /// Waits until no pool thread serves a fault here; none can begin to any more.
    pub(crate) fn wait_unserved(&self) {
        loop {
            match self.serving.load(Ordering::SeqCst) {
                0 => return,
                busy => futex::wait(&self.serving, busy, None),
            }
        }
    }

    fn is_private(&self) -> bool {
        self.map.kind() == UserMapKind::Private
    }

    /// Describes a fault that is installed at `place`.
    fn fault_on<'a>(&'a self, page: u64, access: Access, place: &'a Place<'_>) -> Fault<'a> {
        let advice = self.advice.load(Ordering::Relaxed);
        let random = advice == Advice::Random as u8;
        let walk = self.walks.at(page);
        let long = if walk.step(page) < WALK_STEPS {
            AROUND_PAGES_WALK
        } else {
            AROUND_PAGES_LONG_WALK
        };
        let (start, block) = if random {
            (page, 1)
        } else if walk.precedes(page) {
            ((page + 1).saturating_sub(long), long.min(page + 1))
        } else if advice == Advice::Sequential as u8 || walk.follows(page) {
            (page, long)
        } else {
            (page - page % AROUND_PAGES, AROUND_PAGES)
        };
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let inside = live.iter().find(|range| range.contains(&page));
        let around = inside.map_or(page..page, |range| {
            range.start.max(start)..range.end.min(start + block)
        });
        Fault {
            page,
            // Stores to a private mapping are the kernel's to copy: it wants the page to read.
            access: if self.is_private() {
                Access::Read
            } else {
                access
            },
            around,
            // A thread that reads events has no signals waiting for it, and each fault less saves it two changes of thread.
            moves: match self.channel.delivery() {
                Delivery::Inline => SIGNAL_MOVES_MAX,
                Delivery::Handler => AROUND_MAX,
            },
            ahead: (!random).then_some(walk),
            to: place,
        }
    }

    /// Serves a fault as far as that needs no waiting, but for the store where it `may_read`; may run in a signal handler.
    pub(crate) fn try_serve(
        &self,
        addr: usize,
        access: Access,
        protected: bool,
        may_read: bool,
    ) -> Option<MapOutcome> {
        let place = Place(self, protected);
        let fault = self.fault_on(self.map.page_at(addr)?, access, &place);
        self.look_ahead(&fault);
        let outcome = self.target.try_fault(&fault, may_read)?;
        self.shared.counters.faults_minor.bump();
        Some(outcome)
    }

    /// Serves a fault, whatever it takes. Nothing is held.
    pub(crate) fn serve(
        &self,
        addr: usize,
        access: Access,
        protected: bool,
    ) -> Result<MapOutcome, CacheError> {
        let place = Place(self, protected);
        let Some(page) = self.map.page_at(addr) else {
            return Ok(MapOutcome::Mapped);
        };
        self.serve_fault(&self.fault_on(page, access, &place))
    }

    /// Has somebody else start reading ahead, and make room, if it is time: who waits for this fault does not wait for that.
    fn look_ahead(&self, fault: &Fault<'_>) {
        let due = fault
            .ahead
            .is_some_and(|walk| self.walks.note(fault.page, walk));
        let short =
            self.pages().cache_arc().is_short() && !self.makes_room.swap(true, Ordering::Relaxed);
        if !due && !short {
            return;
        }
        let request = Request {
            addr: self.map.addr_of(fault.page).unwrap_or(self.map.addr()),
            access: Access::Read,
            protected: false,
            waiter: Waiter::Nobody,
        };
        if !self.shared.slots.offer(request) {
            // Another fault will ask again.
            if let Some(walk) = fault.ahead.filter(|_| due) {
                self.walks.put_off(walk);
            }
            if short {
                self.makes_room.store(false, Ordering::Relaxed);
            }
        }
    }

    /// Starts reading what faults have asked for, and makes room for the next.
    pub(crate) fn work_ahead(&self) {
        self.pages().start_walks(&self.walks);
        if self.makes_room.load(Ordering::Relaxed) {
            self.pages().cache_arc().keep_spare();
            self.makes_room.store(false, Ordering::Relaxed);
        }
    }

    fn serve_fault(&self, fault: &Fault<'_>) -> Result<MapOutcome, CacheError> {
        self.look_ahead(fault);
        let counters = &self.shared.counters;
        if self.pages().get(fault.page).is_some() {
            counters.faults_minor.bump();
        } else {
            counters.faults_major.bump();
        }
        self.target.fault(fault)
    }

    /// Does what a fault on `page` does, in the calling thread, which gets the error instead of a signal. Nothing is held.
    ///
    /// # Errors
    /// As [`FaultTarget::fault`].
    pub fn bring_in(&self, page: u64, access: Access) -> Result<MapOutcome, CacheError> {
        self.shared.counters.note(access);
        let place = Place(self, false);
        self.serve_fault(&self.fault_on(page, access, &place))
    }

    /// Makes sure that the thread which waits for `addr` in the kernel does so no longer: it faults again.
    pub(crate) fn wake(&self, addr: usize) {
        let _ = self.channel.uffd().wake(addr - addr % PAGE, PAGE);
    }

    /// Tells whether the page an address shows is cached: what failed then was not reading it.
    pub(crate) fn shows_cached(&self, addr: usize) -> bool {
        self.map
            .page_at(addr)
            .is_some_and(|page| self.pages().get(page).is_some())
    }

    /// Gives a thread that waits in the kernel its SIGBUS.
    pub(crate) fn refuse(&self, addr: usize, thread: u32, refusal: Refusal) {
        let Some(page) = self.map.page_at(addr) else {
            return;
        };
        // Looked at under the lock that `forgive` takes after the file has grown.
        let still = || refusal != Refusal::BeyondEnd || self.is_known_beyond(page);
        let poison = |page: u64| self.poison(page);
        let waiter = (thread, addr);
        if self.refusals.refuse(page, waiter, refusal, still, poison) {
            self.shared.note_refusals(1);
        }
        self.wake(addr);
    }

    /// Makes the next access to a page end in SIGBUS; false when it could not be.
    fn poison(&self, page: u64) -> bool {
        let uffd = self.channel.uffd();
        // For writing: nothing is installed between these steps, or what is would lose its protection.
        let live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        let Some(addr) = self.map.addr_of(page) else {
            return false;
        };
        if !uffd.can_poison() || !live.iter().any(|range| range.contains(&page)) {
            return false;
        }
        // Poison goes where nothing is, not even the mark that a zapped page was protected.
        let _ = self.map.drop_entries(page..page + 1);
        let _ = uffd.unprotect(addr, PAGE);
        uffd.poison(addr, PAGE).is_ok()
    }

    /// Takes back every refusal: pages that were refused are tried afresh.
    pub(crate) fn forgive(&self) {
        let undone = self.refusals.forgive(|page| {
            let _ = self.map.drop_entries(page..page + 1);
        });
        self.shared.note_forgiven(undone);
    }

    /// Takes back the refusals that have stood long enough for their threads to notice.
    pub(crate) fn forgive_old(&self) {
        let undone = self.refusals.forgive_old(|page| {
            let _ = self.map.drop_entries(page..page + 1);
        });
        self.shared.note_forgiven(undone);
    }

    /// Makes pages read-only; no store to them is under way when it returns. Private copies are not the file's.
    pub(crate) fn protect(&self, pages: &Range<u64>) {
        if self.map.kind() != UserMapKind::SharedWrite {
            return;
        }
        self.each_live(pages, |addr, len| {
            // It fails only for a range that is not registered, where nobody stores.
            let _ = self.channel.uffd().protect(addr, len);
        });
    }

    /// Takes runs of pages out of the page tables; not a private mapping's, which would lose the program's copies. Tells
    /// `refused` those that the kernel would not.
    pub(crate) fn unmap_runs(&self, runs: &[Range<u64>], refused: &mut dyn FnMut(Range<u64>)) {
        if !self.is_private() {
            self.drop_live(runs, refused);
        }
    }

    /// Takes the program's copies of pages away, in a private mapping.
    pub(crate) fn drop_copies(&self, pages: &Range<u64>) {
        if self.is_private() {
            self.drop_live(std::slice::from_ref(pages), &mut |_| {});
        }
    }

    fn drop_live(&self, runs: &[Range<u64>], refused: &mut dyn FnMut(Range<u64>)) {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let parts: SmallVec<[Range<u64>; PARTS_MAX]> = runs
            .iter()
            .flat_map(|run| live.iter().map(move |range| overlap(run, range)))
            .filter(|part| !part.is_empty())
            .collect();
        if !parts.is_empty() && self.map.drop_many(&parts).is_err() {
            parts.into_iter().for_each(refused);
        }
    }

    /// Shows the address and length of every part of `pages` that is still mapped; none is given up meanwhile.
    fn each_live(&self, pages: &Range<u64>, mut show: impl FnMut(usize, usize)) {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        for range in live.iter() {
            let part = range.start.max(pages.start)..range.end.min(pages.end);
            if let Some(addr) = self.map.addr_of(part.start)
                && !part.is_empty()
            {
                show(addr, bytes(&part));
            }
        }
    }

    /// Runs an installation on the part of `pages`, from the first on, that is still mapped.
    fn install(
        &self,
        pages: Range<u64>,
        install: impl FnOnce(usize, usize) -> Installed,
    ) -> Installed {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let place =
            clip(&live, &pages).and_then(|part| Some((self.map.addr_of(part.start)?, part)));
        let Some((addr, part)) = place else {
            return Installed {
                pages: 0,
                stop: Some(InstallStop::Gone),
            };
        };
        let mut installed = install(addr, bytes(&part));
        self.note_shown(part.start..part.start + installed.pages as u64);
        if part.end < pages.end && installed.stop.is_none() {
            installed.stop = Some(InstallStop::Gone);
        }
        let counters = &self.shared.counters;
        counters.pages_installed.add(installed.pages as u64);
        installed
    }

    /// Tells whether a page is known to lie beyond the end of the file, where nobody may touch it.
    fn is_known_beyond(&self, page: u64) -> bool {
        self.target.knows_end() && self.is_beyond(page)
    }

    /// Tells whether a page lies beyond the end of the file, where nobody may touch it.
    fn is_beyond(&self, page: u64) -> bool {
        page >= self.pages().end().div_ceil(PAGE_SIZE)
    }
}

/// Where a fault's page goes, and whether it was mapped for reading when the fault was taken.
struct Place<'a>(&'a UserMapping, bool);

impl MapTarget for Place<'_> {
    fn covers(&self) -> Range<u64> {
        self.0.map.pages()
    }

    fn shared(&self) -> bool {
        !self.0.is_private()
    }

    fn protected(&self) -> bool {
        self.1
    }

    fn tracked(&self) -> bool {
        self.0.is_tracked()
    }

    fn may_have_shown(&self, page: u64) -> bool {
        let shown = self.0.shown.as_ref();
        shown.is_some_and(|shown| shown.contains(page))
    }

    fn copy(&self, page: u64, from: RawSpan, protect: bool) -> Installed {
        let pages = page..page + (from.len / PAGE) as u64;
        self.0.install(pages, |addr, len| {
            let from = RawSpan { len, ..from };
            self.0.channel.uffd().copy(addr, from, protect)
        })
    }

    fn resume(&self, pages: Range<u64>, protect: bool) -> Installed {
        // A private page is shared until the kernel copies it at the first store, which we need not know of.
        let protect = protect && !self.0.is_private();
        self.0.install(pages, |addr, len| {
            self.0.channel.uffd().resume(addr, len, protect)
        })
    }

    fn unprotect(&self, pages: Range<u64>) {
        self.0.each_live(&pages, |addr, len| {
            let _ = self.0.channel.uffd().unprotect(addr, len);
        });
    }
}

/// There is no memory to remember what is shown.
fn no_record(errno: Errno) -> WindowError {
    WindowError::System {
        call: "mmap",
        errno,
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    a.start.max(b.start)..a.end.min(b.end)
}

/// Returns the part of `pages`, from the first on, that one of the ranges holds.
fn clip(live: &[Range<u64>], pages: &Range<u64>) -> Option<Range<u64>> {
    let range = live.iter().find(|range| range.contains(&pages.start))?;
    Some(pages.start..pages.end.min(range.end))
}

fn bytes(pages: &Range<u64>) -> usize {
    // Parts of an address range: they fit.
    ((pages.end - pages.start) * PAGE_SIZE) as usize
}
