//! Signals as scenarios need them: counted, aimed at one thread, copying memory or loading from it while they interrupt.
//!
//! *Owns*: the handlers it installs, until the guard is dropped.
//!
//! *Does not own*: SIGSEGV and SIGBUS, which are [`crate::copy`]'s.
//!
//! *Locking*: none; handlers touch atomics and run [`copy_nofault`], nothing else.

use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

use pinfold_base::Errno;

use super::view::View;
use super::{Protection, Region, touch};
use crate::copy::copy_nofault;

/// Signal numbers run from 1 to 64.
const SIGNALS: usize = 65;

static RECEIVED: [AtomicU64; SIGNALS] = [const { AtomicU64::new(0) }; SIGNALS];
/// Copies in handlers whose outcome was not what it must be.
static WRONG_COPIES: AtomicU64 = AtomicU64::new(0);
/// Where [`Handler::loading`] loads from.
static LOADED_FROM: AtomicUsize = AtomicUsize::new(0);
static LOADED_LEN: AtomicUsize = AtomicUsize::new(0);
/// Loads in handlers that nobody served.
static FAILED_LOADS: AtomicU64 = AtomicU64::new(0);
/// A page that can be copied, with one behind it that cannot; leaked, so that a late handler finds it.
static GOOD_THEN_BAD: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

/// A handler in force; dropping it puts back what was there before.
pub struct Handler {
    signal: libc::c_int,
    before: libc::sigaction,
    count_before: u64,
}

impl std::fmt::Debug for Handler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Handler({}: {} received)", self.signal, self.received())
    }
}

impl Handler {
    /// Counts a signal instead of letting it do what it does.
    ///
    /// # Errors
    /// `EINVAL` for a number that is no signal or one that cannot be caught.
    pub fn counting(signal: i32) -> Result<Self, Errno> {
        Self::install(signal, count)
    }

    /// Counts a signal, and in its handler makes copies without faults: those that must come through whole around one
    /// that must stop at its first byte (SEMANTICS.md A-5).
    ///
    /// # Errors
    /// As [`Handler::counting`]; `ENOMEM`.
    pub fn copying(signal: i32) -> Result<Self, Errno> {
        if GOOD_THEN_BAD.load(Ordering::Acquire).is_null() {
            let region = Region::pages(2)?;
            region.fill(0..Region::PAGE, PATTERN)?;
            region.protect(Region::PAGE..2 * Region::PAGE, Protection::None)?;
            let region = Box::leak(Box::new(region));
            GOOD_THEN_BAD.store(region.addr.as_ptr(), Ordering::Release);
        }
        Self::install(signal, count_and_copy)
    }

    /// Counts a signal, and in its handler loads a byte of `view`, each time of another page.
    ///
    /// The view has to stay mapped until the guard is dropped; one handler of this sort at a time.
    ///
    /// # Errors
    /// As [`Handler::counting`].
    pub fn loading(signal: i32, view: View<'static>) -> Result<Self, Errno> {
        touch::install();
        let start = view.part(0..view.len());
        LOADED_FROM.store(start.expose_provenance(), Ordering::SeqCst);
        LOADED_LEN.store(view.len(), Ordering::SeqCst);
        Self::install(signal, count_and_load)
    }

    /// Returns how often the signal came since the handler was installed.
    #[must_use]
    pub fn received(&self) -> u64 {
        received(self.signal).load(Ordering::SeqCst) - self.count_before
    }

    fn install(signal: i32, handler: extern "C" fn(libc::c_int)) -> Result<Self, Errno> {
        if matches!(signal, libc::SIGSEGV | libc::SIGBUS) {
            return Err(Errno::EINVAL);
        }
        let count_before = received(signal).load(Ordering::SeqCst);
        // SAFETY: all-zero bytes are a valid sigaction (SIG_DFL, empty mask).
        let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
        new.sa_sigaction = handler as *const () as usize;
        new.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
        // SAFETY: as above.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: `new` is complete and its handler async-signal-safe: atomics and copies only.
        let done = unsafe { libc::sigaction(signal, &raw const new, &raw mut before) };
        if done != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(Self {
            signal,
            before,
            count_before,
        })
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // SAFETY: `before` is what sigaction(2) gave us for this very signal.
        unsafe { libc::sigaction(self.signal, &raw const self.before, std::ptr::null_mut()) };
    }
}

/// Returns how many copies inside handlers came out wrong, in this process so far.
#[must_use]
pub fn wrong_copies() -> u64 {
    WRONG_COPIES.load(Ordering::SeqCst)
}

/// Returns how many loads inside handlers met a fault that nobody resolved, in this process so far.
#[must_use]
pub fn failed_loads() -> u64 {
    FAILED_LOADS.load(Ordering::SeqCst)
}

/// Sends a signal to one thread of this process, as gettid(2) numbers it.
///
/// # Errors
/// `ESRCH` when the thread has ended.
pub fn send_to_thread(thread: i32, signal: i32) -> Result<(), Errno> {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: no memory is involved; the target is a thread of this process.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
    if sent == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error().into())
    }
}

const PATTERN: u8 = 0x5a;

fn received(signal: libc::c_int) -> &'static AtomicU64 {
    let at = usize::try_from(signal).unwrap_or(0);
    RECEIVED.get(at).unwrap_or(&RECEIVED[0])
}

extern "C" fn count(signal: libc::c_int) {
    received(signal).fetch_add(1, Ordering::SeqCst);
}

extern "C" fn count_and_copy(signal: libc::c_int) {
    count(signal);
    let good = GOOD_THEN_BAD.load(Ordering::Acquire);
    let bad = good.wrapping_add(Region::PAGE);
    let mut sink = [0u8; 256];
    // What is interrupted may be about to tell of either outcome: the last one here is not the only one.
    for fails in [false, true, false] {
        let from = if fails { bad } else { good };
        sink.fill(0);
        // SAFETY: the pages of a leaked region may be read as far as Rust is concerned, and nobody references them; the copy
        // reports the fault. `sink` is ours.
        let copied = unsafe { copy_nofault(sink.as_mut_ptr(), from, sink.len()) };
        let right = if fails {
            copied.done == 0 && copied.stop.is_some()
        } else {
            copied.stop.is_none() && sink == [PATTERN; 256]
        };
        if !right {
            WRONG_COPIES.fetch_add(1, Ordering::SeqCst);
        }
    }
}

extern "C" fn count_and_load(signal: libc::c_int) {
    let turn = received(signal).fetch_add(1, Ordering::SeqCst);
    let pages = LOADED_LEN.load(Ordering::SeqCst) / Region::PAGE;
    let start = LOADED_FROM.load(Ordering::SeqCst);
    // A stride that is prime to any power of two: the next page is far away, and all have their turn.
    let page = (turn as usize).wrapping_mul(37) % pages.max(1);
    let from = std::ptr::with_exposed_provenance::<u8>(start + page * Region::PAGE);
    let mut byte = 0u8;
    // SAFETY: a byte of a view, into which no reference exists (`loading`); `byte` is ours.
    if unsafe { touch::copy(&raw mut byte, from, 1) }.is_err() {
        FAILED_LOADS.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// the verdict on a copy is its own, whatever a handler copied between its fault and its end.
    #[test]
    fn a5_copies_in_a_handler_do_not_change_the_verdict_on_the_one_they_interrupt() {
        let handler = Handler::copying(libc::SIGUSR1).unwrap();
        // SAFETY: no memory is involved.
        let me = unsafe { libc::gettid() };
        let half = crate::region_for_tests::Half::new();
        let over = std::sync::atomic::AtomicBool::new(false);
        let rounds = AtomicU64::new(0);
        let mut sink = vec![0u8; 8192];
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                // One for each round at most: a thread that is sent more than it can handle does nothing else.
                let mut seen = 0;
                while !over.load(Ordering::Relaxed) {
                    let now = rounds.load(Ordering::Relaxed);
                    if now == seen {
                        std::thread::yield_now();
                        continue;
                    }
                    seen = now;
                    send_to_thread(me, libc::SIGUSR1).unwrap();
                }
            });
            while handler.received() < 8 {
                rounds.fetch_add(1, Ordering::Relaxed);
                // SAFETY: reads test memory, writes our own vector.
                let whole = unsafe { copy_nofault(sink.as_mut_ptr(), half.as_ptr(), 4096) };
                assert_eq!((whole.done, whole.stop), (4096, None));
                // SAFETY: as above.
                let part = unsafe { copy_nofault(sink.as_mut_ptr(), half.as_ptr(), 8192) };
                assert!(part.done == 4096 && part.stop.is_some());
            }
            over.store(true, Ordering::Relaxed);
            sender.join().unwrap();
        });
        assert_eq!(wrong_copies(), 0);
    }

    /// a signal that comes between a copy's fault and its end, at that very place each time: while the handler of the
    /// fault runs it waits, and as soon as that has returned it interrupts the copy, which has not told its verdict yet.
    #[test]
    fn a5_a_copy_interrupted_after_its_fault_tells_of_its_own_fault() {
        static DOWN: AtomicUsize = AtomicUsize::new(0);
        static BETWEEN: AtomicU64 = AtomicU64::new(0);
        /// On top of ours: asks for the signal, then lets ours divert the copy.
        extern "C" fn on_top(
            signal: libc::c_int,
            info: *mut libc::siginfo_t,
            context: *mut libc::c_void,
        ) {
            // SAFETY: the kernel passes the interrupted context.
            let interrupted = unsafe { &*context.cast::<libc::ucontext_t>() };
            // SAFETY: the mask of that context, and a signal there is.
            let nested =
                unsafe { libc::sigismember(&raw const interrupted.uc_sigmask, libc::SIGUSR1) };
            if nested == 0 {
                BETWEEN.fetch_add(1, Ordering::SeqCst);
                // SAFETY: blocked here (`sa_mask`), so it comes when this handler has returned.
                unsafe { libc::raise(libc::SIGUSR1) };
            }
            // SAFETY: the address was taken from the action in force before, an SA_SIGINFO handler.
            let down = unsafe {
                std::mem::transmute::<
                    usize,
                    extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void),
                >(DOWN.load(Ordering::SeqCst))
            };
            down(signal, info, context);
        }
        let name =
            "region::signal::tests::a5_a_copy_interrupted_after_its_fault_tells_of_its_own_fault";
        if !crate::region_for_tests::alone(name, None) {
            return;
        }
        crate::copy::install();
        let handler = Handler::copying(libc::SIGUSR1).unwrap();
        // SAFETY: all-zero is SIG_DFL with an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_top as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: a live signal set and a signal there is.
        unsafe { libc::sigaddset(&raw mut action.sa_mask, libc::SIGUSR1) };
        // SAFETY: as for `action`.
        let mut below: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: both structures live.
        unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, &raw mut below) };
        DOWN.store(below.sa_sigaction, Ordering::SeqCst);
        let half = crate::region_for_tests::Half::new();
        let mut sink = vec![0u8; 8192];
        for _ in 0..100 {
            for good in [0, 96, 4096] {
                let before = BETWEEN.load(Ordering::SeqCst);
                let at = half.as_ptr().wrapping_add(4096 - good);
                // SAFETY: reads test memory, writes our own vector.
                let part = unsafe { copy_nofault(sink.as_mut_ptr(), at, 4096 + good) };
                let bad = half.addr() + 4096;
                assert_eq!(part.done, good as u64);
                assert!(
                    matches!(part.stop, Some(crate::CopyStop::NeedFault { addr, .. }) if addr == bad),
                    "{:?}",
                    part.stop
                );
                assert!(
                    BETWEEN.load(Ordering::SeqCst) > before,
                    "nothing came between"
                );
            }
        }
        assert_eq!(handler.received(), BETWEEN.load(Ordering::SeqCst));
        assert_eq!(wrong_copies(), 0);
    }

    #[test]
    fn a_signal_to_a_thread_is_counted_and_its_copies_come_out_right() {
        let handler = Handler::copying(libc::SIGUSR2).unwrap();
        // SAFETY: no memory is involved.
        let me = unsafe { libc::gettid() };
        for _ in 0..10 {
            send_to_thread(me, libc::SIGUSR2).unwrap();
        }
        assert_eq!(handler.received(), 10);
        assert_eq!(wrong_copies(), 0);
    }

    #[test]
    fn numbers_that_cannot_be_caught_are_refused() {
        assert_eq!(
            Handler::counting(libc::SIGKILL).map(drop),
            Err(Errno::EINVAL)
        );
        assert_eq!(
            Handler::counting(libc::SIGBUS).map(drop),
            Err(Errno::EINVAL)
        );
        assert_eq!(Handler::counting(1000).map(drop), Err(Errno::EINVAL));
    }
}
