//! Reads that those who wait for them reap: the kernel's queue for direct I/O (io_submit(2)).
//!
//! By way of a ring's thread a read takes two changes of thread: the submitter wakes it, and it wakes who waits. Here the
//! caller submits, and takes in what has ended when it waits. Unlike a ring of the caller's own the queue is nobody's: any
//! thread may reap what another has submitted, which may have ended since, and no system call of the program is ever
//! interrupted because a transfer has completed.
//!
//! *Owns*: the queue, what is under way in it, whose turn it is to reap.
//!
//! *Does not own*: what an outcome means, and reads whose end nobody asks for: somebody has to.
//!
//! *Locking*: two leaves (class 6), around the requests under way and around the turn. System calls are made, and completions
//! run, with neither.
//!
//! ```text
//!  submit ─► under way ─► reaped by one of those who wait, for all of them ─► completion
//! ```

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use pinfold_base::{Errno, Progress};
use smallvec::SmallVec;

use super::{Op, Request, Shared};
use crate::quiet::Quiet;

/// Requests of one queue that are with the kernel at a time. All processes together may have 65,536 (fs.aio-max-nr).
pub const ATTENDED_MAX: usize = if cfg!(test) { 16 } else { 256 };
/// Completions taken in at once.
const REAPED_MAX: usize = 32;
/// The longest time that whoever reaps waits at once; the program's signals may have to wait as long for its thread.
const TURN: Duration = Duration::from_millis(50);
/// IOCB_CMD_PREAD.
const READ: u16 = 0;

/// `struct iocb`.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    #[cfg(target_endian = "little")]
    key: u32,
    rw_flags: i32,
    #[cfg(target_endian = "big")]
    key: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    addr: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_file: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

/// The queue.
pub struct Attended {
    /// The kernel's name for it.
    context: libc::c_ulong,
    flights: Mutex<Flights>,
    turn: Mutex<Turn>,
    reaped: Condvar,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Flights {
    slots: Vec<Option<Request>>,
    free: Vec<usize>,
}

#[derive(Default)]
struct Turn {
    /// Somebody reaps.
    taken: bool,
    /// Others wait until he is done.
    waiting: usize,
}

impl fmt::Debug for Attended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attended")
            .field("under_way", &self.under_way())
            .finish_non_exhaustive()
    }
}

impl Attended {
    /// Asks the kernel for a queue.
    ///
    /// # Errors
    /// What io_setup(2) says: `EAGAIN` when the system has no room, `ENOSYS` and `EPERM` where it is refused.
    pub(super) fn new(shared: Arc<Shared>) -> Result<Self, Errno> {
        let mut context: libc::c_ulong = 0;
        let (entries, place) = (ATTENDED_MAX as libc::c_long, &raw mut context);
        // SAFETY: the call stores a number to `context`, which lives.
        let status = unsafe { libc::syscall(libc::SYS_io_setup, entries, place) };
        if status != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(Self {
            context,
            flights: Mutex::default(),
            turn: Mutex::default(),
            reaped: Condvar::new(),
            shared,
        })
    }

    /// Returns how many requests are with the kernel, or have ended and were not reaped.
    #[must_use]
    pub fn under_way(&self) -> usize {
        let flights = self.flights.lock();
        flights.slots.len() - flights.free.len()
    }

    /// Starts a read of one span by a descriptor for direct transfers; gives the request back where the kernel takes it not,
    /// or there is no room.
    ///
    /// Its completion is told what the kernel did with all of it at once: nothing is tried again, and nothing continued.
    #[expect(
        clippy::result_large_err,
        reason = "the request itself, which goes the other way at once"
    )]
    pub(super) fn submit(&self, request: Request) -> Result<(), Request> {
        let &[span] = request.segments.spans() else {
            return Err(request);
        };
        // The kernel takes less than 2 GiB at a time, and offsets up to i64::MAX.
        let (Ok(offset), Op::Read) = (i64::try_from(request.offset), request.op) else {
            return Err(request);
        };
        let mut control = Iocb {
            opcode: READ,
            file: request.file.as_raw_fd().cast_unsigned(),
            addr: span.as_ptr().expose_provenance() as u64,
            len: span.len() as u64,
            offset,
            ..Iocb::default()
        };
        // Entered before: it may have ended, and be reaped, before the call returns.
        let mut flights = self.flights.lock();
        let slot = match flights.free.pop() {
            Some(slot) => slot,
            None if flights.slots.len() < ATTENDED_MAX => {
                flights.slots.push(None);
                flights.slots.len() - 1
            }
            None => return Err(request),
        };
        flights.slots[slot] = Some(request);
        drop(flights);
        control.data = slot as u64;
        self.shared.counters.submitted.bump();
        let list = [&raw mut control];
        // SAFETY: the kernel copies the control block, which lives, and writes to the request's memory until its completion is
        // reaped: so long the request, entered above, keeps memory and descriptor.
        let taken = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.context,
                1 as libc::c_long,
                list.as_ptr(),
            )
        };
        if taken == 1 {
            self.shared.counters.pieces_plain.bump();
            return Ok(());
        }
        let request = self.take(slot);
        // Whoever gets it back hands it to a ring, which counts it again.
        self.shared.counters.completed.bump();
        request.map_or(Ok(()), Err)
    }

    fn take(&self, slot: usize) -> Option<Request> {
        let mut flights = self.flights.lock();
        let request = flights.slots.get_mut(slot)?.take()?;
        flights.free.push(slot);
        Some(request)
    }

    /// Waits until `over` says so, reaping; `over` must become true by a completion of this queue. It is asked with a leaf held.
    ///
    /// Returns earlier only in a process that is not the one that made the queue. Nothing may be held.
    pub fn wait_until(&self, over: impl Fn() -> bool) {
        let mut turn = self.turn.lock();
        loop {
            if over() {
                return;
            }
            if turn.taken {
                turn.waiting += 1;
                self.reaped.wait(&mut turn);
                turn.waiting -= 1;
                continue;
            }
            turn.taken = true;
            drop(turn);
            let mine = Reaping(self);
            let alive = self.reap(TURN).is_ok();
            drop(mine);
            if !alive {
                return;
            }
            turn = self.turn.lock();
        }
    }

    /// Reaps what has ended, unless somebody does; does not wait.
    pub fn poll(&self) {
        let mut turn = self.turn.lock();
        if turn.taken {
            return;
        }
        turn.taken = true;
        drop(turn);
        let _mine = Reaping(self);
        while matches!(self.reap(Duration::ZERO), Ok(REAPED_MAX)) {}
    }

    /// Runs the completions of what has ended, or ends within `patience`; returns how many. It is the caller's turn.
    fn reap(&self, patience: Duration) -> Result<usize, Errno> {
        // A handler that faults on a mapping must not find this thread with a lock that its fault is served with.
        let _quiet = Quiet::enter();
        let mut events = [Event::default(); REAPED_MAX];
        let mut patience = libc::timespec {
            tv_sec: 0,
            tv_nsec: patience.subsec_nanos().into(),
        };
        let (least, most) = (1 as libc::c_long, REAPED_MAX as libc::c_long);
        let (to, until) = (events.as_mut_ptr(), &raw mut patience);
        // SAFETY: the kernel stores at most as many events as there is room for, and reads the time; both live.
        let found =
            unsafe { libc::syscall(libc::SYS_io_getevents, self.context, least, most, to, until) };
        let Ok(found) = usize::try_from(found) else {
            return match std::io::Error::last_os_error().into() {
                Errno::EINTR => Ok(0),
                errno => Err(errno),
            };
        };
        let ended: SmallVec<[(Request, i64); REAPED_MAX]> = events[..found]
            .iter()
            // The slot is ours, so it fits.
            .filter_map(|event| Some((self.take(event.data as usize)?, event.result)))
            .collect();
        for (request, result) in ended {
            let Request {
                file,
                segments,
                done,
                ..
            } = request;
            // Released first: whoever waits for the completion may count on descriptor and memory being free.
            drop((file, segments));
            let outcome = match u64::try_from(result) {
                Ok(bytes) => Progress::complete(bytes),
                // Error numbers are small.
                Err(_) => Progress::stopped(0, Errno::from_raw(-result as i32)),
            };
            self.shared.complete(done, outcome);
        }
        Ok(found)
    }
}

impl Drop for Attended {
    fn drop(&mut self) {
        // Nobody else has it. Completions that are owed are run; a store that does not answer is waited for, as by a ring.
        while self.under_way() > 0 && self.reap(TURN).is_ok() {}
        // SAFETY: the queue is ours, and nobody uses it any more.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

/// Somebody's turn to reap; panics included, the next gets it.
struct Reaping<'a>(&'a Attended);

impl Drop for Reaping<'_> {
    fn drop(&mut self) {
        let mut turn = self.0.turn.lock();
        turn.taken = false;
        if turn.waiting > 0 {
            // All of them: what has ended may be anybody's, and one of the others has to go on.
            self.0.reaped.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::Write as _;
    use std::os::fd::OwnedFd;
    use std::sync::mpsc::{Sender, channel};

    use super::*;
    use crate::span::{AlignedBuf, Segments};

    const PAGE: usize = 4096;
    const PATIENCE: Duration = Duration::from_secs(120);

    fn queue() -> Arc<Attended> {
        Arc::new(Attended::new(Arc::default()).unwrap())
    }

    fn file(pages: usize) -> Arc<OwnedFd> {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..pages * PAGE).map(|at| (at / PAGE) as u8).collect();
        file.write_all(&bytes).unwrap();
        Arc::new(OwnedFd::from(file))
    }

    fn read(
        file: &Arc<OwnedFd>,
        page: usize,
        segments: Segments,
        done: impl FnOnce(Progress<Errno>) + Send + 'static,
    ) -> Request {
        Request {
            op: Op::Read,
            file: Arc::clone(file),
            offset: (page * PAGE) as u64,
            segments,
            block: 1,
            done: Box::new(done),
        }
    }

    fn one_page(file: &Arc<OwnedFd>, page: usize, tell: &Sender<Progress<Errno>>) -> Request {
        let buf = Arc::new(AlignedBuf::zeroed(PAGE));
        let tell = tell.clone();
        read(file, page, Segments::of_buf(&buf, PAGE), move |outcome| {
            let _ = tell.send(outcome);
        })
    }

    #[test]
    fn a_read_is_told_when_it_is_reaped_and_not_before() {
        let (queue, file, (tell, told)) = (queue(), file(3), channel());
        let buf = Arc::new(AlignedBuf::zeroed(2 * PAGE));
        let request = read(&file, 1, Segments::of_buf(&buf, 2 * PAGE), move |outcome| {
            tell.send(outcome).unwrap();
        });
        queue.submit(request).unwrap();
        assert!(told.try_recv().is_err());
        assert_eq!(queue.under_way(), 1);
        queue.wait_until(|| queue.under_way() == 0);
        assert_eq!(told.try_recv(), Ok(Progress::complete(2 * PAGE as u64)));
        let bytes = Segments::of_buf(&buf, 2 * PAGE).to_vec();
        assert!(bytes[..PAGE].iter().all(|&byte| byte == 1));
        assert!(bytes[PAGE..].iter().all(|&byte| byte == 2));
        let counted = queue.shared.counters.snapshot();
        assert_eq!((counted.submitted, counted.completed), (1, 1));
    }

    #[test]
    fn what_the_kernel_refuses_is_told_or_given_back() {
        let (queue, file, (tell, told)) = (queue(), file(1), channel());
        // Behind the end: nothing, and no error.
        queue.submit(one_page(&file, 1, &tell)).unwrap();
        queue.poll();
        assert_eq!(told.recv_timeout(PATIENCE), Ok(Progress::complete(0)));
        let mut nowhere = Segments::new(Arc::new(()));
        let addr = std::ptr::with_exposed_provenance_mut(PAGE);
        // SAFETY: only the kernel accesses it, which copes with bad addresses.
        unsafe { nowhere.push_raw(addr, PAGE) };
        let bad = tell.clone();
        let request = read(&file, 0, nowhere, move |outcome| {
            bad.send(outcome).unwrap();
        });
        queue.submit(request).unwrap();
        queue.poll();
        let outcome = told.recv_timeout(PATIENCE);
        assert_eq!(outcome, Ok(Progress::stopped(0, Errno::EFAULT)));
        // A descriptor that nobody can read through is refused before there is anything to reap.
        let deaf = std::fs::File::options().write(true).open("/dev/null");
        let deaf = Arc::new(OwnedFd::from(deaf.unwrap()));
        let mut write = one_page(&file, 0, &tell);
        write.op = Op::Write;
        assert!(queue.submit(one_page(&deaf, 0, &tell)).is_err());
        assert!(queue.submit(write).is_err());
        assert_eq!(queue.under_way(), 0);
    }

    #[test]
    fn a_full_queue_gives_requests_back_until_some_are_reaped() {
        let (queue, file, (tell, told)) = (queue(), file(1), channel());
        for _ in 0..ATTENDED_MAX {
            queue.submit(one_page(&file, 0, &tell)).unwrap();
        }
        let beyond = queue.submit(one_page(&file, 0, &tell)).unwrap_err();
        queue.wait_until(|| queue.under_way() < ATTENDED_MAX);
        queue.submit(beyond).unwrap();
        queue.wait_until(|| queue.under_way() == 0);
        assert_eq!(told.try_iter().count(), ATTENDED_MAX + 1);
    }

    /// One reaps for all; whoever is let go leaves the turn to somebody else.
    #[test]
    fn everybody_who_waits_is_let_go() {
        const ROUNDS: usize = 200;
        let (queue, file) = (queue(), file(4));
        let threads: Vec<_> = (0..4)
            .map(|page| {
                let (queue, file) = (Arc::clone(&queue), Arc::clone(&file));
                std::thread::spawn(move || {
                    for _ in 0..ROUNDS {
                        let (tell, told) = channel();
                        queue.submit(one_page(&file, page, &tell)).unwrap();
                        let outcome = Cell::new(None);
                        queue.wait_until(|| {
                            outcome.set(told.try_recv().ok());
                            outcome.get().is_some()
                        });
                        assert_eq!(outcome.get(), Some(Progress::complete(PAGE as u64)));
                    }
                })
            })
            .collect();
        let begun = std::time::Instant::now();
        while !threads.iter().all(std::thread::JoinHandle::is_finished) {
            assert!(begun.elapsed() < PATIENCE, "somebody waits for ever");
            std::thread::sleep(Duration::from_millis(1));
        }
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(queue.under_way(), 0);
    }

    #[test]
    fn completions_that_nobody_has_reaped_run_when_the_queue_goes() {
        let (queue, file, (tell, told)) = (queue(), file(1), channel());
        queue.submit(one_page(&file, 0, &tell)).unwrap();
        drop(queue);
        assert_eq!(told.try_recv(), Ok(Progress::complete(PAGE as u64)));
    }
}
