//! The handler of SIGSEGV and SIGBUS: which faults are a copy's, which a mapping's, and which somebody else's.
//!
//! *Owns*: the process's actions for both signals, and what was there before.
//!
//! *Does not own*: the copies ([`super`]), the answer to a fault in a mapping ([`crate::mapped`]).
//!
//! *Locking*: installing takes a spin lock of its own; the handler takes nothing.

use std::sync::atomic::{AtomicPtr, Ordering};

use super::{Access, arch, touching};

/// How often a handler of ours can be put on top of one that was installed over it.
const LEVELS_MAX: usize = 8;
/// The actions that were in force before ours, by level: [0] SIGSEGV, [1] SIGBUS. Leaked; written once before the handler
/// that reads them is installed.
static PREVIOUS: [[AtomicPtr<libc::sigaction>; 2]; LEVELS_MAX] =
    [const { [const { AtomicPtr::new(std::ptr::null_mut()) }; 2] }; LEVELS_MAX];
/// Our handlers, one a level. Somebody who was installed over one of them hands faults down to that very one, and it goes on
/// to what lay below it: were they one function, the two would call each other for ever.
static ENTRIES: [extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void); LEVELS_MAX] = [
    on_fault::<0>,
    on_fault::<1>,
    on_fault::<2>,
    on_fault::<3>,
    on_fault::<4>,
    on_fault::<5>,
    on_fault::<6>,
    on_fault::<7>,
];
const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// Puts our handler on top of whatever is in force, unless it is there.
pub(super) fn install() {
    static TURN: install_turn::SpinLock = install_turn::SpinLock::new();
    TURN.exclusively(|| {
        for (slot, signal) in SIGNALS.into_iter().enumerate() {
            install_one(signal, slot);
        }
    });
}

fn install_one(signal: libc::c_int, slot: usize) {
    // SAFETY: all-zero bytes are a valid sigaction (SIG_DFL, empty mask).
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only queries; `old` is a live sigaction.
    let queried = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut old) };
    if queried != 0
        || ENTRIES
            .iter()
            .any(|&ours| old.sa_sigaction == ours as usize)
    {
        return;
    }
    let unused = |level: &usize| PREVIOUS[*level][slot].load(Ordering::Relaxed).is_null();
    let Some(level) = (0..LEVELS_MAX).find(unused) else {
        return;
    };
    // Leaked on purpose: a handler on another thread may be reading it at any time.
    PREVIOUS[level][slot].store(Box::into_raw(Box::new(old)), Ordering::Release);
    // SAFETY: as above.
    let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
    new.sa_sigaction = ENTRIES[level] as usize;
    // NODEFER: a chained handler may itself copy and fault. ONSTACK: stack overflows must still be reported.
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // Other signals wait: their frames would nest on the alternate stack, which with wide vector registers holds
    // two or three. Faults do not wait: one that comes while its signal is blocked kills the process.
    // SAFETY: `sa_mask` is a live signal set.
    unsafe { libc::sigfillset(&raw mut new.sa_mask) };
    for fault in SIGNALS {
        // SAFETY: as above; the signal number is one there is.
        unsafe { libc::sigdelset(&raw mut new.sa_mask, fault) };
    }
    // SAFETY: `new` is complete, its handler is async-signal-safe (`on_fault`).
    unsafe { libc::sigaction(signal, &raw const new, std::ptr::null_mut()) };
}

/// A lock for `install` alone: usable before anything else is set up, and never held across a fault.
mod install_turn {
    use std::sync::atomic::{AtomicBool, Ordering};

    pub(super) struct SpinLock(AtomicBool);

    impl SpinLock {
        pub(super) const fn new() -> Self {
            Self(AtomicBool::new(false))
        }

        pub(super) fn exclusively(&self, work: impl FnOnce()) {
            while self.0.swap(true, Ordering::Acquire) {
                std::thread::yield_now();
            }
            work();
            self.0.store(false, Ordering::Release);
        }
    }
}

/// SIGSEGV and SIGBUS: diverts a faulting copy, has faults in mappings served, hands everything else to whoever was there
/// before.
extern "C" fn on_fault<const LEVEL: usize>(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let told = unsafe { &*info };
    // A signal that somebody sent (code 0 or below) is no fault: whatever it interrupts goes on.
    if told.si_code <= 0 {
        return chain(LEVEL, signal, info, context);
    }
    // SAFETY: SIGSEGV and SIGBUS carry an address.
    let addr = unsafe { told.si_addr() } as usize;
    // SAFETY: the kernel passes the interrupted context, ours until we return.
    let interrupted = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    if arch::divert(interrupted, addr) {
        return;
    }
    if signal == libc::SIGBUS
        && crate::mapped::any()
        && serve_mapped(addr, arch::access(interrupted))
    {
        return;
    }
    if touching::is_interrupted(interrupted) {
        return touching::give_up(interrupted, addr);
    }
    chain(LEVEL, signal, info, context);
}

/// Has a fault in a mapping served, as if nothing had happened to the thread; false when the program is to know.
#[cold]
fn serve_mapped(addr: usize, access: Access) -> bool {
    // SAFETY: the address of this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: it stays valid as long as the thread lives.
    let before = unsafe { errno.read() };
    let verdict = crate::stacks::run_apart(|| {
        crate::mapped::find(addr, |memory, _| memory.signal_fault(addr, access))
    });
    // SAFETY: as above.
    unsafe { errno.write(before) };
    verdict == Some(crate::mapped::SignalVerdict::Resolved)
}

/// Reads the records of an aarch64 signal frame: whether the fault was a store's. A store where nothing is said: whoever
/// serves it then does more than enough, where too little would repeat for ever.
#[cfg(any(target_arch = "aarch64", test))]
pub(super) fn syndrome_access(records: &[u32]) -> Access {
    const ESR_MAGIC: u32 = 0x4553_5201;
    /// "Write, not read" of a data abort.
    const WNR: u32 = 1 << 6;
    let mut at = 0;
    while let Some([magic, bytes, rest @ ..]) = records.get(at..) {
        match (*magic, rest) {
            (ESR_MAGIC, [low, ..]) if low & WNR == 0 => return Access::Read,
            (ESR_MAGIC | 0, _) => break,
            _ => {}
        }
        // A record has at least its head: a smaller size is none, and the walk must end.
        at += (*bytes as usize).max(8).div_ceil(4);
    }
    Access::Write
}

fn chain(
    level: usize,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let slot = usize::from(signal == libc::SIGBUS);
    let previous = PREVIOUS[level][slot].load(Ordering::Acquire);
    // SAFETY: either null or a leaked Box that is never freed or changed (`install_one`).
    let action = unsafe { previous.as_ref() };
    let handler = action.map_or(libc::SIG_DFL, |action| action.sa_sigaction);
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let sent = unsafe { (*info).si_code } <= 0;
    match handler {
        libc::SIG_DFL => {
            // SAFETY: all-zero is SIG_DFL with an empty mask.
            let default: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: restores the default; returning repeats the instruction, which then ends the process with
            // the right signal and core.
            unsafe { libc::sigaction(signal, &raw const default, std::ptr::null_mut()) };
            if sent {
                // There is no instruction to repeat.
                // SAFETY: async-signal-safe; the signal is not blocked here (SA_NODEFER), so this does not return.
                unsafe { libc::raise(signal) };
            }
        }
        libc::SIG_IGN if sent => {}
        // The kernel does not ignore a synchronous fault either: it would repeat for ever.
        libc::SIG_IGN => std::process::abort(),
        handler if action.is_some_and(|action| action.sa_flags & libc::SA_SIGINFO != 0) => {
            type SigInfoHandler =
                extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
            // SAFETY: SA_SIGINFO says that the address is a function of this type.
            let handler = unsafe { std::mem::transmute::<usize, SigInfoHandler>(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: without SA_SIGINFO the address is a function of this type.
            let handler =
                unsafe { std::mem::transmute::<usize, extern "C" fn(libc::c_int)>(handler) };
            handler(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::{copy_nofault, install};
    use crate::region_for_tests::{Half, alone};

    #[test]
    fn a_fault_of_somebody_else_reaches_the_handler_that_was_there_first() {
        let name = "copy::handler::tests::a_fault_of_somebody_else_reaches_the_handler_that_was_there_first";
        if !alone(name, None) {
            return;
        }
        // The handler must be process-wide, so this runs in a child that installs its own first.
        // SAFETY: the child calls async-signal-safe functions only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            extern "C" fn mine(_: libc::c_int) {
                // SAFETY: ends the child without unwinding.
                unsafe { libc::_exit(7) };
            }
            // SAFETY: installs a handler of the right type.
            unsafe { libc::signal(libc::SIGSEGV, mine as *const () as usize) };
            install();
            let half = Half::new();
            let mut sink = [0u8; 8];
            // SAFETY: diverted, as above.
            let _ = unsafe { copy_nofault(sink.as_mut_ptr(), half.as_ptr().wrapping_add(4096), 8) };
            // SAFETY: faults on purpose: the page is inaccessible.
            unsafe { half.as_ptr().wrapping_add(4096).read_volatile() };
            // SAFETY: as above.
            unsafe { libc::_exit(1) };
        }
        let mut status = 0;
        // SAFETY: waits for our child.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert!(libc::WIFEXITED(status), "status {status:#x}");
        assert_eq!(libc::WEXITSTATUS(status), 7);
    }

    #[test]
    fn a_sent_signal_does_what_it_did_before() {
        let name = "copy::handler::tests::a_sent_signal_does_what_it_did_before";
        if !alone(name, None) {
            return;
        }
        for (before, ends) in [(libc::SIG_DFL, true), (libc::SIG_IGN, false)] {
            // SAFETY: the child is one thread, and calls nothing that another could have left locked.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: sets a disposition.
                unsafe { libc::signal(libc::SIGSEGV, before) };
                install();
                // SAFETY: async-signal-safe.
                unsafe { libc::raise(libc::SIGSEGV) };
                // SAFETY: ends the child without unwinding.
                unsafe { libc::_exit(7) };
            }
            let mut status = 0;
            // SAFETY: waits for our child.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
            if ends {
                assert!(libc::WIFSIGNALED(status), "status {status:#x}");
                assert_eq!(libc::WTERMSIG(status), libc::SIGSEGV);
            } else {
                assert!(libc::WIFEXITED(status), "status {status:#x}");
            }
        }
    }

    #[test]
    fn a_syndrome_record_says_load_or_store_and_a_missing_one_store() {
        const ESR: u32 = 0x4553_5201;
        let store = [0x46, 16, 0, 0, ESR, 16, 1 << 6, 0, 0, 0];
        assert_eq!(syndrome_access(&store), Access::Write);
        let load = [0x46, 16, 0, 0, ESR, 16, 0, 0, 0, 0];
        assert_eq!(syndrome_access(&load), Access::Read);
        for odd in [
            &[][..],
            &[0, 0],
            &[5, 0, 5, 0],
            &[ESR, 8],
            &[5, u32::MAX, ESR, 8, 0, 0],
        ] {
            assert_eq!(syndrome_access(odd), Access::Write);
        }
    }

    #[test]
    fn a_handler_installed_over_ours_is_chained_to_and_may_chain_back() {
        use std::sync::atomic::AtomicUsize;
        static OURS: AtomicUsize = AtomicUsize::new(0);
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        static REACHED: AtomicUsize = AtomicUsize::new(0);
        static BAD: AtomicUsize = AtomicUsize::new(0);
        extern "C" fn theirs(
            signal: libc::c_int,
            info: *mut libc::siginfo_t,
            context: *mut libc::c_void,
        ) {
            ASKED.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the address was taken from the action that was in force, an SA_SIGINFO handler.
            let down = unsafe {
                std::mem::transmute::<
                    usize,
                    extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void),
                >(OURS.load(Ordering::Relaxed))
            };
            down(signal, info, context);
        }
        /// Makes the page accessible, so that the instruction goes on.
        extern "C" fn first(_: libc::c_int) {
            REACHED.fetch_add(1, Ordering::Relaxed);
            let page = std::ptr::with_exposed_provenance_mut(BAD.load(Ordering::Relaxed));
            // SAFETY: a page of the test's own.
            unsafe { libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_WRITE) };
        }
        let name =
            "copy::handler::tests::a_handler_installed_over_ours_is_chained_to_and_may_chain_back";
        if !alone(name, None) {
            return;
        }
        // SAFETY: all-zero is SIG_DFL with an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: a handler of the right type; whatever was installed before goes.
        unsafe { libc::signal(libc::SIGSEGV, first as *const () as usize) };
        install();
        action.sa_sigaction = theirs as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: as for `action` above.
        let mut below: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: both structures live.
        unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, &raw mut below) };
        OURS.store(below.sa_sigaction, Ordering::Relaxed);
        install();
        let half = Half::new();
        let mut sink = [0u8; 8];
        let bad = half.as_ptr().wrapping_add(4096);
        // SAFETY: diverted.
        let copied = unsafe { copy_nofault(sink.as_mut_ptr(), bad, 8) };
        assert_eq!((copied.done, ASKED.load(Ordering::Relaxed)), (0, 0));
        BAD.store(bad.expose_provenance(), Ordering::Relaxed);
        // SAFETY: faults on purpose; down through `theirs`, ours below it, to `first`.
        assert_eq!(unsafe { bad.read_volatile() }, 0);
        let asked = (
            ASKED.load(Ordering::Relaxed),
            REACHED.load(Ordering::Relaxed),
        );
        assert_eq!(asked, (1, 1));
    }
}
