//! File transfers that complete asynchronously: io_uring, or threads where it is refused.
//!
//! *Owns*: the rings and their threads, the table of fixed buffers, short transfers and their continuation,
//! transient refusals and their bounded retry. Reads that those who wait for them reap have a queue of the kernel's own ([`Attended`]).
//!
//! *Does not own*: files (it keeps descriptors alive while they are in flight), alignment rules, what is cached.
//!
//! *Locking*: one leaf (class 6) per ring around the list of requests; no system call is made under it.
//!
//! ```text
//!  submit ──> list ──> ring thread: cut into pieces ──> submission queue ──> kernel
//!               ^            ^  continue, retry <── completion queue <──────────┘
//!               └── a completion may submit again
//! ```
//!
//! **Nobody waits in `submit`.** At most [`IN_FLIGHT_MAX`] pieces a ring are with the kernel; what comes beyond
//! that stays in the list, whose length is bounded by the memory its owners have given to transfers (every
//! request holds its pages). So a completion, which runs on the ring's thread, may submit without waiting for
//! itself.
//!
//! **Why a thread of its own submits.** The kernel finishes a request in the task that submitted it. Were that the
//! program's thread, every completion would interrupt it, and a system call of the program that does not
//! restart (`epoll_wait`) would answer `EINTR` for no reason of the program's. With the thread that also reaps,
//! work is deferred to the moment it asks (`DEFER_TASKRUN`). Measured (2-core VM, virtio disk, O_DIRECT;
//! microseconds of CPU an operation, of the whole process):
//!
//! | | caller submits, thread reaps | thread submits and reaps | `preadv` in the caller |
//! |---|---|---|---|
//! | 4 KiB, one at a time, 1 / 2 / 8 / 16 threads | 31 / 42 / 26 / 25 | 31 / 27 / 15 / 12 | 21 / 15 / 9 / 7 |
//! | the same, latency | 60 / 89 / 185 / 306 | 59 / 91 / 183 / 313 | 48 / 69 / 144 / 224 |
//! | 4 KiB, 32 a batch | 3.6 | 3.4 (fixed 3.3) | |
//! | 1 MiB, 8 a batch | 41 (fixed 20) | 47 (fixed 16) | 71 |
//!
//! A ring of the calling thread's own, submit-and-wait, costs what `preadv` does (47 / 70 / 143 / 225 us; CPU 21 /
//! 16 / 9 / 8): [`Engine::read_wait`] therefore is `preadv`.
//!
//! The engine itself, on the same machine, through a store's file (CPU an operation; the device is the bound on
//! operations a second in every row but the threads' first):
//!
//! | | ring, fixed | ring, plain | threads |
//! |---|---|---|---|
//! | 4 KiB reads, 32 a batch | 3.9 | 4.5 | 13.5 |
//! | 64 KiB reads in one run / in 16 fragments, 32 a batch | 4.2 / 8.2 | 6.7 / 7.8 | |
//! | 1 MiB reads in one run / in 256 fragments, 8 a batch | 17 / 70 | 45 / | 70 |
//! | 4 KiB / 1 MiB writes | 3.7 / 20 | | |

use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use pinfold_base::units::FILE_SIZE_MAX;
use pinfold_base::{Errno, Progress, counter_set};
use smallvec::SmallVec;

use crate::arena::Arena;
use crate::span::Segments;

mod attended;
mod flight;
mod inline;
mod pool;
mod ring;

pub use attended::{ATTENDED_MAX, Attended};

/// Pieces of one ring that are with the kernel at a time.
pub const IN_FLIGHT_MAX: usize = if cfg!(test) { 16 } else { 256 };
/// Rings of one engine.
pub const RINGS_MAX: usize = 8;
/// Threads of the fallback: as many transfers as proceed at a time.
const POOL_THREADS: usize = 8;
/// Refusals of one piece (`EINTR`, `EAGAIN`) before the error is passed on.
const RETRY_MAX: u32 = 32;
/// Fragments of one system call: IOV_MAX.
const FRAGMENTS_MAX: usize = 1024;
/// Bytes of one system call; the kernel's own limit is just under 2 GiB.
const PIECE_BYTES_MAX: usize = 1 << 30;
/// A run of registered memory at least this long is worth a submission of its own when the request has other
/// fragments: a submission costs about 3 us, fixed buffers save 2.4 us at 64 KiB and 28 us at 1 MiB.
const FIXED_RUN_MIN: usize = 128 << 10;

/// The direction of a transfer, as the file sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// From the file into memory.
    Read,
    /// From memory into the file.
    Write,
}

/// Called exactly once when a request ends, on an engine's thread or, for an empty request, in
/// [`Engine::submit`]. It must not block; it may submit.
pub type Done = Box<dyn FnOnce(Progress<Errno>) + Send>;

/// One range of one file on its way.
pub struct Request {
    /// Which way.
    pub op: Op,
    /// The file; kept open until the request has ended.
    pub file: Arc<OwnedFd>,
    /// Position of the first byte in the file.
    pub offset: u64,
    /// The memory; kept mapped until the request has ended.
    pub segments: Segments,
    /// Bytes that a short transfer must be a multiple of to be continued: the alignment of a direct descriptor, 1 for
    /// others. A read that stops elsewhere has met the end of the file.
    pub block: u32,
    /// Told the outcome: bytes done, lowest first, and the first error. A read that meets the end of the file is
    /// short and has no error.
    pub done: Done,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("op", &self.op)
            .field("offset", &self.offset)
            .field("bytes", &self.segments.bytes())
            .finish_non_exhaustive()
    }
}

impl Request {
    /// Answers a request that needs no system call: an empty one, or one that no file offset can express.
    fn settle_trivial(self) -> Option<Self> {
        let len = self.segments.bytes() as u64;
        if len == 0 {
            (self.done)(Progress::complete(0));
            return None;
        }
        // Beyond being wrong, an offset of all ones means "the current position" to io_uring.
        if self
            .offset
            .checked_add(len)
            .is_none_or(|end| end > FILE_SIZE_MAX)
        {
            (self.done)(Progress::stopped(0, Errno::EINVAL));
            return None;
        }
        Some(self)
    }
}

/// What carries the transfers out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// io_uring.
    Ring,
    /// Threads that call `preadv` and `pwritev`.
    Threads,
}

/// How to build an [`Engine`].
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// The back end; `None` takes io_uring and falls back to threads where the kernel refuses it.
    pub backend: Option<Backend>,
    /// Rings, each with a thread; 1 to [`RINGS_MAX`]. `None`: one for every four processors.
    pub rings: Option<usize>,
    /// Memory to register as fixed buffers, chunk by chunk as it becomes ready; by each ring for itself, so
    /// RLIMIT_MEMLOCK counts it once a ring.
    pub arena: Option<Arc<Arena>>,
}

impl EngineConfig {
    /// Takes what suits this machine, with `arena` as fixed buffers.
    #[must_use]
    pub fn automatic(arena: Option<Arc<Arena>>) -> Self {
        Self {
            backend: None,
            rings: None,
            arena,
        }
    }
}

counter_set! {
    /// What an engine has done.
    EngineCounters, EngineStatistics {
        /// Requests taken in.
        submitted,
        /// Requests whose completion was called; equals `submitted` at rest.
        completed,
        /// Pieces given to the kernel with a fixed buffer.
        pieces_fixed,
        /// Pieces given to the kernel otherwise.
        pieces_plain,
        /// Pieces given to the kernel again after a short transfer.
        continued,
        /// Pieces given to the kernel again after `EINTR` or `EAGAIN`.
        retried,
        /// Times a ring's thread entered the kernel.
        enters,
        /// Times a sleeping ring's thread was woken.
        wakes,
        /// Completions that panicked; the panic goes no further.
        panics,
    }
}

/// What an engine's threads and its handle share.
#[derive(Debug, Default)]
struct Shared {
    counters: EngineCounters,
    /// Chunks registered as fixed buffers, of the ring that has fewest.
    fixed_chunks: AtomicUsize,
}

impl Shared {
    /// Runs a completion. A panic in one is its owner's loss only: every other request of the ring still ends.
    fn complete(&self, done: Done, outcome: Progress<Errno>) {
        let call = std::panic::AssertUnwindSafe(|| done(outcome));
        if std::panic::catch_unwind(call).is_err() {
            self.counters.panics.bump();
        }
        self.counters.completed.bump();
    }
}

/// Carries out transfers. Dropping it waits for those in flight and in the list.
pub struct Engine {
    lanes: SmallVec<[Lane; 2]>,
    next: AtomicUsize,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    backend: Backend,
    /// The addresses of the arena whose chunks may be registered.
    arena: Range<usize>,
    /// Made for the first read that wants it; none where the kernel refuses it.
    attended: OnceLock<Option<Arc<Attended>>>,
}

/// A way to the threads.
enum Lane {
    Ring(Arc<ring::Inbox>),
    Pool(Arc<pool::Inbox>),
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("backend", &self.backend)
            .field("lanes", &self.lanes.len())
            .field("fixed_chunks", &self.fixed_chunks())
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts an engine's threads.
    ///
    /// # Errors
    /// `EAGAIN`, `ENOMEM`, `EMFILE`: no thread or descriptor to be had. With an explicit [`Backend::Ring`] also
    /// what io_uring_setup says: `ENOSYS`, `EPERM`.
    pub fn start(config: EngineConfig) -> Result<Arc<Self>, Errno> {
        let mut engine = Self {
            lanes: SmallVec::new(),
            next: AtomicUsize::new(0),
            shared: Arc::new(Shared::default()),
            threads: Vec::new(),
            backend: Backend::Ring,
            arena: config.arena.as_ref().map_or(0..0, |arena| {
                let base = arena.base() as usize;
                base..base + arena.bytes()
            }),
            attended: OnceLock::new(),
        };
        let started = match config.backend {
            Some(Backend::Threads) => Err(Errno::ENOSYS),
            _ => engine.start_rings(&config),
        };
        match (started, config.backend) {
            (Ok(()), _) => {}
            (Err(errno), Some(Backend::Ring)) => return Err(errno),
            // Whatever the reason (a sandbox, a sysctl, an old kernel, locked memory), threads do the same work.
            (Err(_), _) => engine.start_pool()?,
        }
        Ok(Arc::new(engine))
    }

    fn start_rings(&mut self, config: &EngineConfig) -> Result<(), Errno> {
        let by_processors = || std::thread::available_parallelism().map_or(1, |n| n.get() / 4);
        let rings = config
            .rings
            .unwrap_or_else(by_processors)
            .clamp(1, RINGS_MAX);
        for number in 0..rings {
            match ring::start(number, config.arena.clone(), Arc::clone(&self.shared)) {
                Ok((inbox, thread)) => {
                    self.lanes.push(Lane::Ring(inbox));
                    self.threads.push(thread);
                }
                // Fewer rings than asked for are slower, not wrong.
                Err(_) if number > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn start_pool(&mut self) -> Result<(), Errno> {
        let inbox = Arc::new(pool::Inbox::default());
        self.backend = Backend::Threads;
        self.lanes.push(Lane::Pool(Arc::clone(&inbox)));
        for number in 0..POOL_THREADS {
            match pool::start(number, Arc::clone(&inbox), Arc::clone(&self.shared)) {
                Ok(thread) => self.threads.push(thread),
                Err(_) if number > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Returns what carries the transfers out.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Returns how many of the arena's chunks are registered as fixed buffers: 0 where the kernel or RLIMIT_MEMLOCK
    /// refuses it. Registration is an optimisation; transfers work without.
    #[must_use]
    pub fn fixed_chunks(&self) -> usize {
        self.shared.fixed_chunks.load(Ordering::Relaxed)
    }

    /// Tells whether a transfer's memory, by its first byte, is likely to be registered.
    #[must_use]
    pub fn is_registered(&self, segments: &Segments) -> bool {
        let first = segments.spans().first();
        self.fixed_chunks() > 0
            && first.is_some_and(|span| self.arena.contains(&(span.as_ptr() as usize)))
    }

    /// Returns what the engine has done so far.
    #[must_use]
    pub fn statistics(&self) -> EngineStatistics {
        self.shared.counters.snapshot()
    }

    /// Starts transfers and returns at once, however many there are. The requests of one batch are given to the
    /// kernel together; nothing is promised about their order.
    pub fn submit(&self, batch: impl IntoIterator<Item = Request>) {
        let batch: SmallVec<[Request; 4]> = batch
            .into_iter()
            .filter_map(Request::settle_trivial)
            .collect();
        if batch.is_empty() {
            return;
        }
        self.shared.counters.submitted.add(batch.len() as u64);
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        match &self.lanes[turn % self.lanes.len()] {
            Lane::Ring(inbox) => inbox.push(batch, &self.shared.counters),
            Lane::Pool(inbox) => inbox.push(batch),
        }
    }

    /// Starts a direct read of one span that somebody [attends](Attended) to: its completion runs in whatever thread reaps. It is
    /// told what the kernel did at once, be that less than all, or an error that another try would not meet.
    ///
    /// # Errors
    /// The request, where there is no such queue, or no room in it.
    #[expect(
        clippy::result_large_err,
        reason = "the request itself, which goes the other way at once"
    )]
    pub fn read_attended(&self, request: Request) -> Result<Arc<Attended>, Request> {
        let queue = self.attended.get_or_init(|| {
            let made = Attended::new(Arc::clone(&self.shared));
            made.ok().map(Arc::new)
        });
        let Some(queue) = queue else {
            return Err(request);
        };
        queue.submit(request)?;
        Ok(Arc::clone(queue))
    }

    /// Reads in the calling thread: for one small range that is awaited at once this is faster than a ring (see
    /// the module's table). `block` is as in [`Request`].
    pub fn read_wait(
        file: &OwnedFd,
        offset: u64,
        segments: &Segments,
        block: u32,
    ) -> Progress<Errno> {
        inline::transfer(Op::Read, file, offset, segments, block)
    }

    /// Writes in the calling thread. Beyond RLIMIT_FSIZE the caller gets SIGXFSZ; [`Engine::submit`] does not
    /// have that effect, since the engine's threads block it.
    pub fn write_wait(
        file: &OwnedFd,
        offset: u64,
        segments: &Segments,
        block: u32,
    ) -> Progress<Errno> {
        inline::transfer(Op::Write, file, offset, segments, block)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for lane in &self.lanes {
            match lane {
                Lane::Ring(inbox) => inbox.close(),
                Lane::Pool(inbox) => inbox.close(),
            }
        }
        let here = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last handle may go with a completion, on an engine's thread: that one ends by itself.
            if thread.thread().id() != here {
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests;
