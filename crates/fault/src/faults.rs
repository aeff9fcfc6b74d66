//! The faults of a volume: its userfaultfds, the thread that reads their events, the pool.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, Range, RangeInclusive};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use pinfold_base::sync::{Mutex, MutexGuard};
use pinfold_base::{Errno, PAGE_SIZE};
use pinfold_cache::{CacheError, MapOutcome};
use pinfold_mem::forked::Process;
use pinfold_mem::mapped::{self, InsertError, Registration};
use pinfold_mem::uffd::{Event, FaultKind, UffdError};
use pinfold_mem::window::WindowError;
use pinfold_mem::{
    Access, Delivery, MappedMemory, Privilege, Quiet, Uffd, UserMapKind, Window, quiet,
};

use crate::channel::{Channel, EVENTS_MAX};
use crate::file_mappings::FileMappings;
use crate::mapping::UserMapping;
use crate::refusal::{HOLD, Refusal};
use crate::slots::{Answer, Request, Slots, Taken, Waiter};
use crate::{FaultCounters, FaultSnapshot, FaultTarget};

/// Threads that serve faults with I/O, at most; the first is started with the first mapping, more when faults wait.
const WORKERS_MAX: usize = 16;

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
    /// Mappings by their first address, and by themselves: one may begin where another gave up its first pages.
    table: RwLock<BTreeMap<(usize, usize), Arc<UserMapping>>>,
    threads: Mutex<Threads>,
    /// Held by the thread that reads events.
    reading: Mutex<()>,
    /// Readers that wait for their turn.
    resting: AtomicUsize,
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
        let mut before = table.range(..=(addr, usize::MAX)).rev();
        let (_, found) = before.find(|(_, mapping)| mapping.contains(addr))?;
        found.begin_serving();
        Some(Serving(Arc::clone(found)))
    }

    fn all(&self) -> Vec<Serving> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let serving = |mapping: &Arc<UserMapping>| {
            mapping.begin_serving();
            Serving(Arc::clone(mapping))
        };
        table.values().map(serving).collect()
    }

    fn enter(&self, mapping: &Arc<UserMapping>) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.insert(key(mapping), Arc::clone(mapping));
    }

    fn leave(&self, mapping: &Arc<UserMapping>) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.remove(&key(mapping));
    }

    /// What a thread that reads events does, until they end.
    fn read_events(&self, channel: &Channel) {
        let mut events = [Event::NONE; EVENTS_MAX];
        let mut reading = self.take_turn();
        while let Some(events) = channel.read(&mut events) {
            let mut waiting = events.iter().filter_map(|event| self.at_once(event));
            // Of those that have to wait one is served here, if another thread reads events meanwhile.
            let mine = waiting.next();
            waiting.for_each(|request| self.hand_over(request));
            let Some(request) = mine else {
                continue;
            };
            if self.resting.load(Ordering::SeqCst) == 0 {
                self.hand_over(request);
                continue;
            }
            drop(reading);
            if self.serve_request(request) == Answer::Refused {
                // Whoever takes refusals back may be asleep.
                self.slots.nudge();
            }
            reading = self.take_turn();
        }
        drop(reading);
    }

    fn take_turn(&self) -> MutexGuard<'_, ()> {
        self.resting.fetch_add(1, Ordering::SeqCst);
        let turn = self.reading.lock();
        self.resting.fetch_sub(1, Ordering::SeqCst);
        turn
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
    handler: Option<Arc<Channel>>,
    inline: Option<Arc<Channel>>,
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
                table: RwLock::new(BTreeMap::new()),
                threads: Mutex::new(Threads::default()),
                reading: Mutex::new(()),
                resting: AtomicUsize::new(0),
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
        let open = channels.handler.as_ref().or(channels.inline.as_ref());
        if let Some(channel) = open {
            return Ok(channel.uffd().privilege());
        }
        drop(channels);
        Uffd::open(Delivery::Handler, self.privileges.clone(), false)
            .map(|uffd| uffd.privilege())
            .map_err(SetupError::Uffd)
    }

    /// Returns the userfaultfd of a delivery, with threads to serve its faults.
    fn channel(&self, delivery: Delivery) -> Result<Arc<Channel>, SetupError> {
        let mut channels = self.channels.lock();
        let place = match delivery {
            Delivery::Handler => &mut channels.handler,
            Delivery::Inline => &mut channels.inline,
        };
        if let Some(channel) = place {
            return Ok(Arc::clone(channel));
        }
        if self.shared.threads.lock().workers == 0 {
            self.shared.start_worker()?;
        }
        let uffd =
            Uffd::open(delivery, self.privileges.clone(), false).map_err(SetupError::Uffd)?;
        let channel = Arc::new(Channel::new(uffd));
        if delivery == Delivery::Handler {
            for _ in 0..READERS {
                let (shared, source) = (Arc::clone(&self.shared), Arc::clone(&channel));
                let handle = spawn("pinfold-events", move || shared.read_events(&source))?;
                self.shared.threads.lock().handles.push(handle);
            }
        }
        Ok(Arc::clone(place.insert(channel)))
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
        let channel = self.channel(request.delivery)?;
        let map = request
            .window
            .user_map(request.pages.clone(), request.kind)
            .map_err(SetupError::Window)?;
        let range = map.addr()..map.addr() + map.len();
        let mapping = UserMapping::new(map, channel, target, Arc::clone(&self.shared));
        // In this order: no page is installed that write-back does not know to protect, no fault comes that nobody
        // serves, and nobody is told of an address before both.
        request.files.enter(Arc::clone(&mapping));
        let mut placed = Placed {
            mapping,
            registration: Mutex::new(None),
            files: Arc::clone(request.files),
            faults: Arc::clone(self),
        };
        let mapping = &placed.mapping;
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
        for channel in channels.handler.iter().chain(&channels.inline) {
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
    /// `ENOMEM`: one range becomes two and there is no room for another, here or in the kernel.
    pub fn unmap(&self, pages: &Range<u64>) -> Result<(), Errno> {
        let map = self.mapping.map();
        let addr = |page: u64| map.addr() + ((page - map.pages().start) * PAGE_SIZE) as usize;
        if pages.start < map.pages().start || pages.end > map.pages().end || pages.is_empty() {
            return Err(Errno::EINVAL);
        }
        // Held throughout, so that of two calls one comes first.
        let mut registration = self.registration.lock();
        if let Some(registration) = registration.as_mut() {
            registration
                .exclude(addr(pages.start)..addr(pages.end))
                .map_err(InsertError::errno)?;
        }
        self.mapping.give_up(pages)
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if !self.faults.process.is_current() {
            // Mappings are not inherited; at these addresses there may be something else by now.
            return;
        }
        // A handler that faults would wait for the pool, which waits for the locks taken here.
        let _quiet = Quiet::enter();
        // Look-ups first, then the pool: after that nobody begins anything here.
        drop(self.registration.lock().take());
        self.faults.shared.leave(&self.mapping);
        self.mapping.wait_unserved();
        // Unmapping whole ranges cannot fail for want of room.
        let _ = self.mapping.give_up(&self.mapping.map().pages());
        self.mapping.forgive();
        self.files.leave(&self.mapping);
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, SetupError> {
    let begin = move || {
        quiet::keep_signals_away();
        work();
    };
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(begin)
        .map_err(|error| SetupError::Thread(Errno::from(error)))
}
