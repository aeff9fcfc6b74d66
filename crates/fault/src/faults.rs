//! The faults of a volume: its userfaultfds, the thread that reads their events, the pool.

use std::fmt;
use std::ops::{Deref, Range, RangeInclusive};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use pinfold_base::sync::Mutex;
use pinfold_base::{Errno, PAGE_SIZE};
use pinfold_cache::{CacheError, Harvest, MapOutcome};
use pinfold_mem::forked::Process;
use pinfold_mem::mapped::{self, InsertError, Registration};
use pinfold_mem::uffd::{Event, FaultKind, UffdError, tracks_stores};
use pinfold_mem::window::WindowError;
use pinfold_mem::{
    Access, Delivery, MappedMemory, Privilege, Quiet, Uffd, UserMapKind, Window, quiet,
};
use smallvec::SmallVec;

use crate::channel::{Channel, EVENTS_MAX};
use crate::file_mappings::FileMappings;
use crate::mapping::UserMapping;
use crate::refusal::{HOLD, Refusal};
use crate::slots::{Answer, Request, Slots, Taken, Waiter};
use crate::{FaultCounters, FaultSnapshot, FaultTarget};

/// Threads that serve faults with I/O, at most; more than the first when faults wait.
const WORKERS_MAX: usize = 16;
/// Threads started with the first mapping: while one reads ahead, another serves a fault.
const WORKERS_FIRST: usize = 2;

/// Threads that read events. One does; the next takes over when it leaves to serve a fault itself, which spares that fault the
/// way through another thread. The last one stays, and hands over.
const READERS: usize = 4;

/// Why a mapping could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetupError {
    /// There is no userfaultfd to be had.
    Uffd(UffdError),
    /// No memory file, or no addresses.
    Window(WindowError),
    /// Too many mappings.
    Table(InsertError),
    /// The addresses cannot be registered.
    Register(Errno),
    /// No thread to serve faults.
    Thread(Errno),
    /// A part before the end was unmapped, so it has no length to change.
    Torn,
}

impl SetupError {
    /// Returns the error number.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Uffd(error) => error.errno(),
            Self::Window(error) => error.errno(),
            Self::Table(error) => error.errno(),
            Self::Register(errno) | Self::Thread(errno) => *errno,
            Self::Torn => Errno::EFAULT,
        }
    }
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uffd(error) => error.fmt(f),
            Self::Window(error) => error.fmt(f),
            Self::Table(error) => error.fmt(f),
            Self::Register(errno) => write!(f, "registering the addresses: {errno}"),
            Self::Thread(errno) => write!(f, "starting a thread to serve faults: {errno}"),
            Self::Torn => write!(f, "a part of the mapping was unmapped"),
        }
    }
}

impl std::error::Error for SetupError {}

impl FaultCounters {
    pub(crate) fn note(&self, access: Access) {
        self.faults.bump();
        if access == Access::Write {
            self.faults_write.bump();
        }
    }
}

/// What the threads share with the mappings.
pub(crate) struct Shared {
    pub(crate) slots: Slots,
    pub(crate) counters: FaultCounters,
    /// Mappings in the order of their first addresses, and of their own: one may begin where another gave up its first
    /// pages. Nobody allocates under the lock: whoever faulted may be inside the allocator.
    table: RwLock<Vec<Arc<UserMapping>>>,
    threads: Mutex<Threads>,
    /// Refusals that stand and have to be taken back some time.
    refusals: AtomicUsize,
}

#[derive(Default)]
struct Threads {
    handles: Vec<JoinHandle<()>>,
    workers: usize,
    ended: bool,
}

/// A mapping a thread of ours works on; it is not closed before this is dropped.
struct Serving(Arc<UserMapping>);

impl Deref for Serving {
    type Target = UserMapping;

    fn deref(&self) -> &UserMapping {
        &self.0
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.end_serving();
    }
}

impl Shared {
    fn find(&self, addr: usize) -> Option<Serving> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        // Not the nearest alone: a mapping made in the gap of another one lies before the other's rest.
        let behind = table.partition_point(|mapping| key(mapping) <= (addr, usize::MAX));
        let mut before = table[..behind].iter().rev();
        let found = before.find(|mapping| mapping.contains(addr))?;
        found.begin_serving();
        Some(Serving(Arc::clone(found)))
    }

    fn all(&self) -> Vec<Serving> {
        let count = || {
            self.table
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .len()
        };
        let mut all = Vec::with_capacity(count());
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        // One that came in between has had no refusal yet that anybody would take back.
        for mapping in table.iter().take(all.capacity()) {
            mapping.begin_serving();
            all.push(Serving(Arc::clone(mapping)));
        }
        all
    }

    fn enter(&self, mapping: &Arc<UserMapping>) {
        let mut wanted = 1;
        loop {
            let mut larger = Vec::with_capacity(wanted);
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            if table.len() == table.capacity() && table.len() < larger.capacity() {
                larger.append(&mut table);
                std::mem::swap(&mut *table, &mut larger);
            }
            if table.len() < table.capacity() {
                let at = table.partition_point(|other| key(other) < key(mapping));
                table.insert(at, Arc::clone(mapping));
                drop(table);
                return;
            }
            wanted = 2 * table.len() + 1;
        }
    }

    fn leave(&self, mapping: &Arc<UserMapping>) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let at = table.partition_point(|other| key(other) < key(mapping));
        let there = table.get(at);
        if there.is_some_and(|other| Arc::ptr_eq(other, mapping)) {
            let gone = table.remove(at);
            drop(table);
            drop(gone);
        }
    }

    /// What a thread that reads events does, until they end.
    fn read_events(&self, channel: &Channel) {
        let mut events = [Event::NONE; EVENTS_MAX];
        let mut reading = channel.take_turn();
        while let Some(events) = channel.read(&mut events) {
            let mut waiting = events.iter().filter_map(|event| self.at_once(event));
            // Of those that have to wait one is served here, if another thread reads events meanwhile.
            let mine = waiting.next();
            waiting.for_each(|request| self.hand_over(request));
            let Some(request) = mine else {
                continue;
            };
            if !channel.has_resting() {
                self.hand_over(request);
                continue;
            }
            drop(reading);
            if self.serve_request(request) == Answer::Refused {
                // Whoever takes refusals back may be asleep.
                self.slots.nudge();
            }
            reading = channel.take_turn();
        }
        drop(reading);
    }

    fn hand_over(&self, request: Request) {
        self.counters.faults_handed_over.bump();
        // When serving has ended there are no mappings any more whose threads could wait.
        self.slots.submit(request);
    }

    /// Serves an event if that needs no waiting; returns what is to be served otherwise.
    fn at_once(&self, event: &Event) -> Option<Request> {
        self.counters.note(event.access);
        let mapping = self.find(event.addr)?;
        let protected = event.kind == FaultKind::WriteProtected;
        let at_once = catch_unwind(AssertUnwindSafe(|| {
            mapping.try_serve(event.addr, event.access, protected, false)
        }));
        if matches!(at_once, Ok(Some(MapOutcome::Mapped))) {
            mapping.wake(event.addr);
            return None;
        }
        Some(Request {
            addr: event.addr,
            access: event.access,
            protected,
            waiter: Waiter::Kernel {
                thread: event.thread,
            },
        })
    }

    pub(crate) fn note_refusals(&self, count: usize) {
        self.refusals.fetch_add(count, Ordering::SeqCst);
    }

    pub(crate) fn note_forgiven(&self, count: usize) {
        self.refusals.fetch_sub(count, Ordering::SeqCst);
    }

    /// Starts one more thread of the pool, up to the most.
    fn start_worker(self: &Arc<Self>) -> Result<(), SetupError> {
        let mut threads = self.threads.lock();
        if threads.ended || threads.workers >= WORKERS_MAX {
            return Ok(());
        }
        let shared = Arc::clone(self);
        let handle = spawn("pinfold-fault", move || shared.work())?;
        threads.handles.push(handle);
        threads.workers += 1;
        Ok(())
    }

    /// What a thread of the pool does.
    fn work(self: Arc<Self>) {
        while !self.slots.is_stopped() {
            if let Some(taken) = self.slots.take(self.patience()) {
                if self.slots.is_behind() {
                    // Without another thread it only takes longer.
                    let _ = self.start_worker();
                }
                self.serve(taken);
            }
            if self.refusals.load(Ordering::SeqCst) > 0 {
                self.all().iter().for_each(|mapping| mapping.forgive_old());
            }
        }
    }

    fn patience(&self) -> Option<Duration> {
        (self.refusals.load(Ordering::SeqCst) > 0).then_some(HOLD)
    }

    fn serve(&self, taken: Taken<'_>) {
        let answer = self.serve_request(taken.request());
        taken.finish(answer);
    }

    fn serve_request(&self, request: Request) -> Answer {
        let Some(mapping) = self.find(request.addr) else {
            // Unmapped meanwhile, which has sent its waiters on already.
            return Answer::Served;
        };
        if request.waiter == Waiter::Nobody {
            // What is not read ahead is read when it is wanted.
            let _ = self.guarded(|| {
                mapping.work_ahead();
                Ok(MapOutcome::Mapped)
            });
            return Answer::Served;
        }
        let outcome =
            self.guarded(|| mapping.serve(request.addr, request.access, request.protected));
        let refusal = match outcome {
            Ok(MapOutcome::Mapped) => None,
            Ok(MapOutcome::BeyondEnd) => Some(Refusal::BeyondEnd),
            Err(_) if mapping.shows_cached(request.addr) => Some(Refusal::Store),
            Err(_) => Some(Refusal::Unreadable),
        };
        if let Waiter::Kernel { thread } = request.waiter {
            match refusal {
                None => mapping.wake(request.addr),
                Some(refusal) => {
                    self.counters.faults_refused.bump();
                    mapping.refuse(request.addr, thread, refusal);
                }
            }
        }
        // Before the answer: whoever gets it may unmap at once, and would wait for us.
        drop(mapping);
        if refusal.is_none() {
            Answer::Served
        } else {
            Answer::Refused
        }
    }

    /// Turns a panic of what serves a fault into a refusal: one fault, not the pool.
    fn guarded(
        &self,
        serve: impl FnOnce() -> Result<MapOutcome, CacheError>,
    ) -> Result<MapOutcome, CacheError> {
        catch_unwind(AssertUnwindSafe(serve)).unwrap_or_else(|_| {
            self.counters.faults_panicked.bump();
            Err(CacheError::Interrupted)
        })
    }
}

fn key(mapping: &Arc<UserMapping>) -> (usize, usize) {
    (mapping.map().addr(), Arc::as_ptr(mapping).addr())
}

/// A volume's faults. Dropping it ends the threads; whoever waits then is refused.
pub struct Faults {
    shared: Arc<Shared>,
    channels: Mutex<Channels>,
    privileges: RangeInclusive<Privilege>,
    process: Process,
}

#[derive(Default)]
struct Channels {
    open: SmallVec<[Arc<Channel>; 2]>,
    /// Why stores cannot be tracked here, once that is known.
    untracked: Option<SetupError>,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults")
            .field("privileges", &self.privileges)
            .finish_non_exhaustive()
    }
}

/// What a mapping is made of.
#[derive(Debug)]
pub struct MapRequest<'a> {
    /// The file's memory.
    pub window: &'a Arc<Window>,
    /// The pages to show.
    pub pages: Range<u64>,
    /// For what.
    pub kind: UserMapKind,
    /// How its faults are served.
    pub delivery: Delivery,
    /// Let the kernel pass first stores, and find them by looking for them. Concerns [`UserMapKind::SharedWrite`] alone.
    pub tracked: bool,
    /// The file's other mappings.
    pub files: &'a Arc<FileMappings>,
}

impl Faults {
    /// Prepares to serve faults; takes nothing from the system before the first mapping. `privileges` restricts how a
    /// userfaultfd may be had.
    #[must_use]
    pub fn new(privileges: RangeInclusive<Privilege>) -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::new(Shared {
                slots: Slots::new(),
                counters: FaultCounters::default(),
                table: RwLock::new(Vec::new()),
                threads: Mutex::new(Threads::default()),
                refusals: AtomicUsize::new(0),
            }),
            channels: Mutex::new(Channels::default()),
            privileges,
            process: Process::current(),
        })
    }

    /// Returns what happened so far.
    #[must_use]
    pub fn statistics(&self) -> FaultSnapshot {
        self.shared.counters.snapshot()
    }

    /// Returns how a userfaultfd is had here, opening one for it if there is none yet.
    ///
    /// # Errors
    /// None is to be had.
    pub fn privilege(&self) -> Result<Privilege, SetupError> {
        let channels = self.channels.lock();
        if let Some(channel) = channels.open.first() {
            return Ok(channel.uffd().privilege());
        }
        drop(channels);
        Uffd::open(Delivery::Handler, self.privileges.clone(), false)
            .map(|uffd| uffd.privilege())
            .map_err(SetupError::Uffd)
    }

    /// Tells whether mappings can be tracked here ([`MapRequest::tracked`]).
    ///
    /// # Errors
    /// Why not.
    pub fn can_track(&self, delivery: Delivery) -> Result<(), SetupError> {
        self.channel(delivery, true).map(drop)
    }

    /// Opens a userfaultfd that finds stores by looking for them, if this kernel says enough about them.
    fn open_tracked(&self, delivery: Delivery) -> Result<Uffd, SetupError> {
        let uffd = Uffd::open(delivery, self.privileges.clone(), true).map_err(SetupError::Uffd)?;
        match tracks_stores(&uffd) {
            Ok(true) => Ok(uffd),
            Ok(false) => Err(SetupError::Register(Errno::EOPNOTSUPP)),
            Err(errno) => Err(SetupError::Register(errno)),
        }
    }

    /// Returns the userfaultfd of a delivery, with threads to serve its faults.
    fn channel(&self, delivery: Delivery, tracked: bool) -> Result<Arc<Channel>, SetupError> {
        let mut channels = self.channels.lock();
        let of_kind = |channel: &&Arc<Channel>| {
            channel.delivery() == delivery && channel.uffd().wp_async() == tracked
        };
        if let Some(channel) = channels.open.iter().find(of_kind) {
            if !channel.uffd().is_open() {
                // Its number may be another file's by now.
                return Err(SetupError::Uffd(UffdError::Closed));
            }
            return Ok(Arc::clone(channel));
        }
        if let (true, Some(error)) = (tracked, channels.untracked) {
            return Err(error);
        }
        if self.shared.threads.lock().workers == 0 {
            for _ in 0..WORKERS_FIRST {
                self.shared.start_worker()?;
            }
        }
        let uffd = if tracked {
            let opened = self.open_tracked(delivery);
            channels.untracked = opened.as_ref().err().copied();
            opened?
        } else {
            Uffd::open(delivery, self.privileges.clone(), false).map_err(SetupError::Uffd)?
        };
        let channel = Arc::new(Channel::new(uffd));
        if delivery == Delivery::Handler {
            for number in 0..READERS {
                let (shared, source) = (Arc::clone(&self.shared), Arc::clone(&channel));
                match spawn("pinfold-events", move || shared.read_events(&source)) {
                    Ok(handle) => self.shared.threads.lock().handles.push(handle),
                    // One does all the work. And without the channel nobody would ever tell those there are to end.
                    Err(_) if number > 0 => break,
                    Err(error) => return Err(error),
                }
            }
        }
        channels.open.push(Arc::clone(&channel));
        Ok(channel)
    }

    /// Maps pages of a file and serves their faults from here on.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub fn map(
        self: &Arc<Self>,
        request: &MapRequest<'_>,
        target: Arc<dyn FaultTarget>,
    ) -> Result<Placed, SetupError> {
        let tracked = request.tracked && request.kind == UserMapKind::SharedWrite;
        let channel = self.channel(request.delivery, tracked)?;
        let map = request
            .window
            .user_map(request.pages.clone(), request.kind)
            .map_err(SetupError::Window)?;
        let range = map.addr()..map.addr() + map.len();
        let mapping = UserMapping::new(map, channel, target, Arc::clone(&self.shared))
            .map_err(SetupError::Window)?;
        // In this order: no page is installed that write-back does not know to protect, no fault comes that nobody
        // serves, and nobody is told of an address before both.
        request.files.enter(Arc::clone(&mapping));
        let mut placed = Placed {
            mapping,
            registration: Mutex::new(None),
            files: Arc::clone(request.files),
            faults: Arc::clone(self),
            in_use: false,
        };
        let mapping = &placed.mapping;
        if mapping.is_tracked() {
            // Whoever writes everything back, or looks for old data, has to ask this file from here on.
            mapping.pages().note_dirty_file();
        }
        self.shared.enter(mapping);
        mapping
            .channel()
            .uffd()
            .register(mapping.map())
            .map_err(SetupError::Register)?;
        let memory = Arc::clone(mapping) as Arc<dyn MappedMemory>;
        let registration = mapped::insert(range, memory).map_err(SetupError::Table)?;
        placed.registration = Mutex::new(Some(registration));
        Ok(placed)
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        if !self.process.is_current() {
            // The threads are the parent's, and so is the descriptor that would stop them.
            return;
        }
        self.shared.slots.stop();
        let channels = self.channels.lock();
        for channel in &channels.open {
            channel.uffd().stop();
        }
        drop(channels);
        let handles = {
            let mut threads = self.shared.threads.lock();
            threads.ended = true;
            std::mem::take(&mut threads.handles)
        };
        for handle in handles {
            // A thread that panicked has said so; what it owed was refused.
            let _ = handle.join();
        }
    }
}

/// A mapping in its place. Dropping it unmaps.
#[derive(Debug)]
pub struct Placed {
    mapping: Arc<UserMapping>,
    /// In the process-wide table; none before it is entered and after it has left.
    registration: Mutex<Option<Registration>>,
    files: Arc<FileMappings>,
    faults: Arc<Faults>,
    /// Others may load and store there while it goes: it has moved.
    in_use: bool,
}

impl Deref for Placed {
    type Target = UserMapping;

    fn deref(&self) -> &UserMapping {
        &self.mapping
    }
}

impl Placed {
    /// Gives up a part. Its addresses may be anybody's when this returns.
    ///
    /// # Errors
    /// One range becomes two and there is no room for another, here or in the kernel.
    ///
    /// # Panics
    /// When it was not made to show all of `pages`.
    pub fn unmap(&self, pages: &Range<u64>) -> Result<(), SetupError> {
        let map = self.mapping.map();
        let shown = map.pages();
        assert!(
            shown.start <= pages.start && pages.end <= shown.end,
            "{pages:?} are not of this mapping"
        );
        let addr = |page: u64| map.addr() + ((page - shown.start) * PAGE_SIZE) as usize;
        // Held throughout, so that of two calls one comes first.
        let mut registration = self.registration.lock();
        if let Some(registration) = registration.as_mut() {
            registration
                .exclude(addr(pages.start)..addr(pages.end))
                .map_err(SetupError::Table)?;
        }
        self.mapping.find_stores(pages);
        self.mapping.give_up(pages).map_err(SetupError::Window)
    }

    /// Makes it end at page `end` instead of `now`, as mremap(2): shorter where it is, longer where it is or, if it
    /// `may_move`, elsewhere. With `tracked` as of [`MapRequest`], which may differ from before only where it may move.
    ///
    /// Other threads may load and store meanwhile. What they stored stays; where the mapping is no more their accesses are
    /// SIGSEGV, or SIGBUS at the very moment it goes. Nothing of it is pinned.
    ///
    /// # Errors
    /// [`SetupError`]; the mapping is as it was.
    pub fn remap(
        &mut self,
        now: u64,
        end: u64,
        tracked: bool,
        may_move: bool,
    ) -> Result<(), SetupError> {
        if end < now {
            return self.unmap(&(end..now));
        }
        let map = self.mapping.map();
        let whole = map.pages().start..now;
        if map.mapped().as_slice() != std::slice::from_ref(&whole) {
            return Err(SetupError::Torn);
        }
        let outcome = if tracked == self.mapping.is_tracked() {
            self.extend(end)
        } else {
            Err(SetupError::Window(WindowError::System {
                call: "mremap",
                errno: Errno::ENOMEM,
            }))
        };
        match outcome {
            Err(_) if may_move => self.move_to(end, tracked),
            outcome => outcome,
        }
    }

    fn extend(&self, end: u64) -> Result<(), SetupError> {
        let mut registration = self.registration.lock();
        let map = self.mapping.map();
        let Some(entry) = registration.as_mut() else {
            return Err(SetupError::Torn);
        };
        let old = map.mapped().last().map_or(end, |last| last.end);
        self.mapping.extend(end).map_err(SetupError::Window)?;
        let behind = map.addr() + ((end - map.pages().start) * PAGE_SIZE) as usize;
        entry.extend(behind).map_err(|refused| {
            // Nobody was told of these addresses.
            let _ = self.mapping.give_up(&(old..end));
            SetupError::Table(refused)
        })
    }

    /// Puts another mapping in the place of this one, with what was stored to this one until it went.
    fn move_to(&mut self, end: u64, tracked: bool) -> Result<(), SetupError> {
        let old = Arc::clone(&self.mapping);
        let map = old.map();
        let request = MapRequest {
            window: map.window(),
            pages: map.pages().start..end,
            kind: map.kind(),
            delivery: old.channel().delivery(),
            tracked,
            files: &self.files,
        };
        let target = Arc::clone(old.target());
        let mut new = self.faults.map(&request, target)?;
        new.mapping.set_pattern_of(&old);
        if map.kind() == UserMapKind::Private {
            // No truncation looks for copies to drop between the two.
            let _no_cut = old.pages().gate().add();
            old.carry_to(&new.mapping).map_err(SetupError::Window)?;
        }
        std::mem::swap(self, &mut new);
        new.in_use = true;
        drop(new);
        Ok(())
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if !self.faults.process.is_current() {
            // Mappings are not inherited; at these addresses there may be something else by now. Nor is the table left: a
            // look-up that was under way at the fork would be waited for for ever.
            std::mem::forget((Arc::clone(&self.mapping), Arc::clone(&self.faults)));
            std::mem::forget((Arc::clone(&self.files), self.registration.lock().take()));
            return;
        }
        // A handler that faults would wait for the pool, which waits for the locks taken here.
        let _quiet = Quiet::enter();
        // Look-ups first, then the pool: after that nobody begins anything here.
        drop(self.registration.lock().take());
        self.faults.shared.leave(&self.mapping);
        self.mapping.wait_unserved();
        let pages = self.mapping.map().pages();
        let file = Arc::clone(self.mapping.pages());
        let asks = self.in_use && self.mapping.is_tracked();
        // The page tables know of stores until they go. With others at work, nothing is mapped between the question and the
        // end, so that the answer holds.
        let _nothing_mapped = asks.then(|| file.gate().block());
        if asks {
            file.harvest(pages.clone(), Harvest::Withdraw);
        } else {
            self.mapping.find_stores(&pages);
        }
        // Unmapping whole ranges cannot fail for want of room.
        let _ = self.mapping.give_up(&pages);
        self.mapping.forgive();
        self.files.leave(&self.mapping);
        // Where it was the last that could be stored to without notice, the pages need not be asked about any more.
        self.mapping.find_stores(&pages);
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, SetupError> {
    #[cfg(all(test, not(loom)))]
    tests::take_thread()?;
    let begin = move || {
        quiet::keep_signals_away();
        work();
    };
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(begin)
        .map_err(|error| SetupError::Thread(Errno::from(error)))
}

#[cfg(all(test, not(loom)))]
mod tests;
