//! One ring and its thread, which alone submits and reaps.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use parking_lot::Mutex;
use pinfold_base::Errno;
use rustix::event::{EventfdFlags, eventfd};
use smallvec::SmallVec;

use super::flight::{Flight, Registered, Verdict};
use super::{EngineCounters, IN_FLIGHT_MAX, Op, Request, Shared};
use crate::arena::Arena;
use crate::quiet::keep_signals_away;

/// `user_data` of the read that waits for the wake-up descriptor.
const WAKE: u64 = u64::MAX;
/// The longest pause between attempts to enter a kernel that is short of memory.
const PAUSE_MAX: Duration = Duration::from_millis(10);

/// What is to be done, and what the ring's thread is doing about it.
#[derive(Debug, Default)]
struct State {
    list: VecDeque<Request>,
    /// The thread sleeps in the kernel, or is about to: whoever adds work wakes it.
    asleep: bool,
    closing: bool,
}

/// The way to a ring's thread.
#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    wake: OwnedFd,
}

impl Inbox {
    pub fn push(&self, batch: SmallVec<[Request; 4]>, counters: &EngineCounters) {
        let asleep = {
            let mut state = self.state.lock();
            state.list.extend(batch);
            std::mem::take(&mut state.asleep)
        };
        if asleep {
            counters.wakes.bump();
            self.ring_the_bell();
        }
    }

    pub fn close(&self) {
        self.state.lock().closing = true;
        self.ring_the_bell();
    }

    fn ring_the_bell(&self) {
        // Cannot fail: the counter would have to reach 2^64 - 1 with the thread asleep.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// Starts a ring's thread; returns when the ring exists.
pub(super) fn start(
    number: usize,
    arena: Option<Arc<Arena>>,
    shared: Arc<Shared>,
) -> Result<(Arc<Inbox>, JoinHandle<()>), Errno> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| Errno::from_raw(e.raw_os_error()))?;
    let inbox = Arc::new(Inbox {
        state: Mutex::new(State::default()),
        wake,
    });
    let (report, ready) = sync_channel(1);
    let theirs = Arc::clone(&inbox);
    let thread = std::thread::Builder::new()
        .name(format!("pinfold-ring-{number}"))
        .spawn(move || run(theirs, arena, shared, &report))
        .map_err(Errno::from)?;
    match ready.recv() {
        Ok(Ok(())) => Ok((inbox, thread)),
        Ok(Err(errno)) => Err(errno),
        // The thread died before it could say why.
        Err(_) => Err(Errno::EIO),
    }
}

fn run(
    inbox: Arc<Inbox>,
    arena: Option<Arc<Arena>>,
    shared: Arc<Shared>,
    report: &SyncSender<Result<(), Errno>>,
) {
    // SIGXFSZ for a write beyond the program's RLIMIT_FSIZE must stay an error number as well.
    keep_signals_away();
    // Built here, because a single-issuer ring belongs to the task that makes it.
    match build() {
        Ok(uring) => {
            let mut ring = Ring::new(uring, inbox, arena, shared);
            let _ = report.send(Ok(()));
            ring.serve();
        }
        Err(errno) => {
            let _ = report.send(Err(errno));
        }
    }
}

/// Makes a ring whose completion queue cannot overflow: it has room for all pieces in flight and the wake-up.
fn build() -> Result<IoUring, Errno> {
    let entries = (IN_FLIGHT_MAX + 1).next_power_of_two() as u32;
    let mut modern = IoUring::builder();
    modern.setup_single_issuer().setup_defer_taskrun();
    modern
        .build(entries)
        // Before 6.1 the kernel does not know these flags.
        .or_else(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => IoUring::new(entries),
            _ => Err(e),
        })
        .map_err(Errno::from)
}

/// Everything the thread owns.
struct Ring {
    // Dropped first: once the ring is gone the kernel holds no address of what follows.
    uring: IoUring,
    inbox: Arc<Inbox>,
    shared: Arc<Shared>,
    buffers: Buffers,
    /// Boxed, because the kernel holds addresses of a piece's fragments.
    flights: Vec<Option<Box<Flight>>>,
    free: Vec<u32>,
    /// Pieces (flight, piece) to submit, continuations in front.
    ready: VecDeque<(u32, u32)>,
    in_flight: usize,
    /// Pieces that name a fixed buffer, of requests that have not ended.
    fixed_left: usize,
    /// The wake-up read is with the kernel.
    armed: bool,
    wake_value: Box<u64>,
}

impl Ring {
    fn new(
        uring: IoUring,
        inbox: Arc<Inbox>,
        arena: Option<Arc<Arena>>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            buffers: Buffers::new(&uring, arena),
            uring,
            inbox,
            shared,
            flights: Vec::new(),
            free: Vec::new(),
            ready: VecDeque::new(),
            in_flight: 0,
            fixed_left: 0,
            armed: false,
            wake_value: Box::new(0),
        }
    }

    /// Runs until closed and idle.
    fn serve(&mut self) {
        let mut pause = Duration::ZERO;
        loop {
            let closing = self.take_work();
            self.fill_queue(closing);
            let idle = self.ready.is_empty() && self.in_flight == 0;
            if closing && idle && !self.armed {
                return;
            }
            self.shared.counters.enters.bump();
            match self.uring.submit_and_wait(1) {
                Ok(_) => pause = Duration::ZERO,
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // EAGAIN, EBUSY, ENOMEM: the kernel is short of memory or wants its completions reaped. What it
                // has cannot be taken back from it, so the only way is on; the pause bounds the rate.
                Err(_) => {
                    pause = (pause * 2).clamp(Duration::from_micros(50), PAUSE_MAX);
                    std::thread::sleep(pause);
                }
            }
            self.reap();
        }
    }

    /// Takes new requests unless older pieces still wait; falls asleep (so far as `push` knows) when there is
    /// nothing to submit. Returns whether the inbox is closed.
    fn take_work(&mut self) -> bool {
        let mut taken = VecDeque::new();
        let closing = {
            let mut state = self.inbox.state.lock();
            if self.ready.is_empty() {
                std::mem::swap(&mut taken, &mut state.list);
            }
            // With pieces waiting for room, the next completion is what lets us go on, and it wakes us.
            state.asleep = true;
            state.closing
        };
        // Everything taken fits `ready` once; what comes later waits in the inbox.
        if !taken.is_empty() {
            self.buffers.follow(&self.uring, &self.shared);
        }
        if self.fixed_left == 0 {
            self.buffers.release_stopped(&self.uring);
        }
        for request in taken {
            let flight = Box::new(Flight::new(request, self.buffers.registered));
            let pieces = flight.pieces.len() as u32;
            self.fixed_left += flight.fixed_pieces();
            let number = match self.free.pop() {
                Some(number) => {
                    self.flights[number as usize] = Some(flight);
                    number
                }
                None => {
                    self.flights.push(Some(flight));
                    (self.flights.len() - 1) as u32
                }
            };
            self.ready.extend((0..pieces).map(|piece| (number, piece)));
        }
        closing
    }

    /// Moves ready pieces into the submission queue, as far as there is room.
    fn fill_queue(&mut self, closing: bool) {
        // Once closed, the bell has rung for the last time: a read armed after that would never complete.
        if !self.armed && !closing {
            let value: *mut u64 = &raw mut *self.wake_value;
            let wait = opcode::Read::new(types::Fd(self.inbox.wake.as_raw_fd()), value.cast(), 8)
                .build()
                .user_data(WAKE);
            // SAFETY: the value is boxed and the descriptor owned by `self`, which outlives the read: `serve`
            // returns only once it has completed.
            self.armed = unsafe { self.uring.submission().push(&wait) }.is_ok();
        }
        while self.in_flight < IN_FLIGHT_MAX {
            let Some(&(number, at)) = self.ready.front() else {
                break;
            };
            let flight = self.flights[number as usize]
                .as_mut()
                .expect("a flight stays until its pieces have ended");
            let entry =
                entry(flight, at as usize).user_data(u64::from(number) << 32 | u64::from(at));
            // SAFETY: the descriptor and the memory are kept by the flight, the fragments are boxed with it, and the
            // flight stays until the completion has been reaped.
            if unsafe { self.uring.submission().push(&entry) }.is_err() {
                break;
            }
            self.ready.pop_front();
            self.in_flight += 1;
            match flight.pieces[at as usize].buffer {
                Some(_) => self.shared.counters.pieces_fixed.bump(),
                None => self.shared.counters.pieces_plain.bump(),
            }
        }
    }

    /// Takes in all completions that are there, then runs those of requests that ended.
    fn reap(&mut self) {
        let mut ended: SmallVec<[Box<Flight>; 16]> = SmallVec::new();
        for event in self.uring.completion() {
            if event.user_data() == WAKE {
                self.armed = false;
                continue;
            }
            self.in_flight -= 1;
            let (number, at) = ((event.user_data() >> 32) as u32, event.user_data() as u32);
            let slot = &mut self.flights[number as usize];
            let flight = slot
                .as_mut()
                .expect("a flight stays until its pieces have ended");
            let (op, block) = (flight.request.op, flight.request.block);
            match flight.pieces[at as usize].settle(op, block, event.result()) {
                Verdict::Continue => {
                    self.shared.counters.continued.bump();
                    self.ready.push_front((number, at));
                }
                Verdict::Retry => {
                    self.shared.counters.retried.bump();
                    self.ready.push_front((number, at));
                }
                Verdict::Ended => {
                    flight.left -= 1;
                    if flight.left == 0 {
                        self.fixed_left -= flight.fixed_pieces();
                        ended.extend(slot.take());
                        self.free.push(number);
                    }
                }
            }
        }
        // Awake: what completions submit is seen by the next round without a wake-up.
        self.inbox.state.lock().asleep = false;
        for flight in ended {
            let outcome = flight.outcome();
            let Request {
                file,
                segments,
                done,
                ..
            } = flight.request;
            // Released first: whoever waits for the completion may count on descriptor and memory being free.
            drop((file, segments));
            self.shared.complete(done, outcome);
        }
    }
}

/// Makes the submission for what is left of a piece.
fn entry(flight: &mut Flight, at: usize) -> squeue::Entry {
    let Flight {
        request, pieces, ..
    } = flight;
    let piece = &mut pieces[at];
    piece.gather(&request.segments);
    let fd = types::Fd(request.file.as_raw_fd());
    let offset = request.offset + (piece.from + piece.done) as u64;
    let first = piece.fragments[0];
    let addr = first.iov_base.cast::<u8>();
    // A piece is at most PIECE_BYTES_MAX long and has at most FRAGMENTS_MAX fragments.
    let (len, count) = (first.iov_len as u32, piece.fragments.len() as u32);
    let vector = piece.fragments.as_ptr();
    match (request.op, piece.buffer) {
        (Op::Read, Some(buffer)) => opcode::ReadFixed::new(fd, addr, len, buffer)
            .offset(offset)
            .build(),
        (Op::Write, Some(buffer)) => opcode::WriteFixed::new(fd, addr, len, buffer)
            .offset(offset)
            .build(),
        (Op::Read, None) if count == 1 => opcode::Read::new(fd, addr, len).offset(offset).build(),
        (Op::Write, None) if count == 1 => opcode::Write::new(fd, addr, len).offset(offset).build(),
        (Op::Read, None) => opcode::Readv::new(fd, vector, count).offset(offset).build(),
        (Op::Write, None) => opcode::Writev::new(fd, vector, count)
            .offset(offset)
            .build(),
    }
}

/// The table of fixed buffers: the arena's chunks, as far as the kernel takes them.
struct Buffers {
    arena: Option<Arc<Arena>>,
    chunks: usize,
    /// The kernel refused a chunk.
    full: bool,
    registered: Registered,
}

impl Buffers {
    fn new(uring: &IoUring, arena: Option<Arc<Arena>>) -> Self {
        let arena = arena.filter(|arena| {
            let chunks = arena.bytes().div_ceil(arena.chunk_bytes());
            // Refused before 5.19; then transfers do without.
            u32::try_from(chunks)
                .is_ok_and(|chunks| uring.submitter().register_buffers_sparse(chunks).is_ok())
        });
        Self {
            arena,
            chunks: 0,
            full: false,
            registered: Registered::NONE,
        }
    }

    /// Registers chunks that have become ready since; cuts no more requests into fixed pieces once the arena has
    /// stopped that.
    fn follow(&mut self, uring: &IoUring, shared: &Shared) {
        let Some(arena) = &self.arena else {
            return;
        };
        if arena.fixed_stopped() {
            self.registered = Registered::NONE;
            return;
        }
        while !self.full && self.chunks < arena.chunks_ready() {
            let start = self.chunks * arena.chunk_bytes();
            let len = arena.chunk_bytes().min(arena.bytes() - start);
            let chunk = libc::iovec {
                iov_base: arena.base().wrapping_add(start).cast(),
                iov_len: len,
            };
            // The table has an entry for every chunk, at most 16384.
            let at = self.chunks as u32;
            let submitter = uring.submitter();
            // SAFETY: the chunk is populated and stays mapped and is not given back before `fixed_stopped`, after which no
            // request names it; the arena lives, which `self` holds until then or until the ring is gone.
            if unsafe { submitter.register_buffers_update(at, &[chunk], None) }.is_err() {
                // RLIMIT_MEMLOCK is used up: keep what is registered and ask no more.
                self.full = true;
                return;
            }
            self.chunks += 1;
            self.registered = Registered {
                base: arena.base() as usize,
                chunk_bytes: arena.chunk_bytes(),
                bytes: start + len,
            };
            shared
                .fixed_chunks
                .fetch_max(self.chunks, Ordering::Relaxed);
        }
    }

    /// Unregisters everything once the arena has stopped fixed buffers: they hold pages that it may have given back.
    /// Called while no request under way names one.
    fn release_stopped(&mut self, uring: &IoUring) {
        if self
            .arena
            .as_ref()
            .is_some_and(|arena| arena.fixed_stopped())
        {
            self.registered = Registered::NONE;
            // Refused only where there are none; then there is nothing to give back.
            let _ = uring.submitter().unregister_buffers();
            self.arena = None;
        }
    }
}
