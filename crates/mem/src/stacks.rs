//! Stacks for signal handlers that have more to do than a signal stack has room for.
//!
//! A thread's alternate stack is often 8 KiB, a third or more of which the kernel's own frame takes; a stack of a coroutine
//! may be smaller still. Serving a fault needs more, so it is done on one of a few stacks that are set aside for it.
//!
//! *Owns*: the stacks, and who is on which.
//!
//! *Does not own*: what is done there.
//!
//! *Locking*: none. A thread that finds every stack taken sleeps on a futex; whoever is on one waits for nothing that
//! a fault of another thread could hold up, so one comes free. Nothing here allocates, or touches `errno`.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use pinfold_base::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
use rustix::thread::futex;

/// How many there are: as many faults are served in their threads at a time. A bit each in one word.
const STACKS_MAX: usize = 64;
/// Size of one; what is never used of it is not memory.
const STACK: usize = 128 << 10;
/// Below each stack, inaccessible: an overflow is a crash rather than a neighbour's corruption.
const GUARD: usize = 4096;

/// The lowest byte of the first guard; null until there are stacks. Never unmapped.
static BASE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
/// A bit set for each stack that is free.
static FREE: AtomicU64 = AtomicU64::new(u64::MAX);
/// Grows with every stack given back: what waiters sleep on.
static RETURNS: AtomicU32 = AtomicU32::new(0);
static WAITERS: AtomicU32 = AtomicU32::new(0);

/// Sets the stacks up, once.
///
/// # Errors
/// `ENOMEM`; it stays so.
pub(crate) fn prepare() -> Result<(), Errno> {
    static PREPARED: OnceLock<Result<(), Errno>> = OnceLock::new();
    *PREPARED.get_or_init(|| {
        let base = map().map_err(|errno| Errno::from_raw(errno.raw_os_error()))?;
        BASE.store(base.as_ptr(), Ordering::Release);
        Ok(())
    })
}

fn map() -> rustix::io::Result<NonNull<u8>> {
    let len = STACKS_MAX * (GUARD + STACK);
    // SAFETY: a fresh mapping at an address of the kernel's choice replaces nothing.
    let base = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::STACK,
        )
    }?
    .cast::<u8>();
    for stack in 0..STACKS_MAX {
        let guard = base.wrapping_add(stack * (GUARD + STACK)).cast();
        // SAFETY: a page of the mapping just made, in use by nobody. A failure leaves address space unused, once.
        unsafe { mprotect(guard, GUARD, MprotectFlags::empty()) }?;
    }
    NonNull::new(base).ok_or(rustix::io::Errno::NOMEM)
}

/// Runs `work` on a stack of its own, or on the present one before [`prepare`].
///
/// A panic in `work` ends the process: there is nobody to unwind to.
pub(crate) fn run_apart<R>(work: impl FnOnce() -> R) -> R {
    let base = BASE.load(Ordering::Acquire);
    if base.is_null() {
        return work();
    }
    let taken = Taken::take();
    let top = base.wrapping_add((taken.0 + 1) * (GUARD + STACK));
    let mut call = Call {
        work: Some(work),
        result: None,
    };
    // SAFETY: `top` is the aligned end of a stack that nobody else is on while `taken` lives; `enter` gets the `call` it is
    // made for, which outlives it.
    unsafe { arch::call_on(top, enter_of(&call), (&raw mut call).cast()) };
    call.result
        .expect("`enter` sets the result or ends the process")
}

struct Call<F, R> {
    work: Option<F>,
    result: Option<R>,
}

type Enter = unsafe extern "C" fn(*mut c_void);

fn enter_of<F: FnOnce() -> R, R>(_: &Call<F, R>) -> Enter {
    enter::<F, R>
}

unsafe extern "C" fn enter<F: FnOnce() -> R, R>(call: *mut c_void) {
    // SAFETY: `run_apart` passes its Call of these very types, and waits.
    let call = unsafe { &mut *call.cast::<Call<F, R>>() };
    let _off = SignalStackOff::new();
    call.result = call.work.take().map(|work| work());
}

/// While it lives, the thread has no alternate signal stack.
///
/// The kernel decides by the stack pointer whether a thread is on it already. Away from it, a signal would be put on it from
/// its top again, over the frame of the handler we came from.
struct SignalStackOff(libc::stack_t);

impl SignalStackOff {
    /// To be called away from it: from on it, the kernel refuses.
    fn new() -> Self {
        let off = libc::stack_t {
            ss_sp: std::ptr::null_mut(),
            ss_flags: libc::SS_DISABLE,
            ss_size: 0,
        };
        let mut before = off;
        // SAFETY: both structures live.
        unsafe { libc::sigaltstack(&raw const off, &raw mut before) };
        Self(before)
    }
}

impl Drop for SignalStackOff {
    fn drop(&mut self) {
        if self.0.ss_flags & libc::SS_DISABLE == 0 {
            // SAFETY: what was in force before; the thread keeps it mapped.
            unsafe { libc::sigaltstack(&raw const self.0, std::ptr::null_mut()) };
        }
    }
}

/// A stack in use, by number; given back when dropped.
struct Taken(usize);

impl Taken {
    fn take() -> Self {
        if let Some(taken) = Self::try_take() {
            return taken;
        }
        WAITERS.fetch_add(1, Ordering::SeqCst);
        let taken = loop {
            let before = RETURNS.load(Ordering::SeqCst);
            if let Some(taken) = Self::try_take() {
                break taken;
            }
            // Any outcome is a reason to look again.
            let _ = futex::wait(&RETURNS, futex::Flags::PRIVATE, before, None);
        };
        WAITERS.fetch_sub(1, Ordering::SeqCst);
        taken
    }

    fn try_take() -> Option<Self> {
        let mut free = FREE.load(Ordering::Relaxed);
        while free != 0 {
            let lowest = free & free.wrapping_neg();
            let outcome = FREE.compare_exchange_weak(
                free,
                free ^ lowest,
                Ordering::SeqCst,
                Ordering::Relaxed,
            );
            match outcome {
                Ok(_) => return Some(Self(lowest.trailing_zeros() as usize)),
                Err(now) => free = now,
            }
        }
        None
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        FREE.fetch_or(1 << self.0, Ordering::SeqCst);
        RETURNS.fetch_add(1, Ordering::SeqCst);
        if WAITERS.load(Ordering::SeqCst) > 0 {
            let _ = futex::wake(&RETURNS, futex::Flags::PRIVATE, 1);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod arch {
    use std::arch::global_asm;
    use std::ffi::c_void;

    // rdi = top, rsi = function, rdx = argument.
    global_asm!(
        ".hidden pinfold_call_on_stack",
        ".global pinfold_call_on_stack",
        ".p2align 4",
        "pinfold_call_on_stack:",
        ".cfi_startproc",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp",
        ".cfi_def_cfa_register rbp",
        "mov rsp, rdi",
        "mov rdi, rdx",
        "call rsi",
        "mov rsp, rbp",
        "pop rbp",
        ".cfi_def_cfa rsp, 8",
        "ret",
        ".cfi_endproc",
    );

    unsafe extern "C" {
        fn pinfold_call_on_stack(top: *mut u8, function: super::Enter, argument: *mut c_void);
    }

    /// Calls `function` with the stack pointer at `top`.
    ///
    /// # Safety
    /// `top` ends, aligned to 16, a stack nobody is on; the function may be called with `argument`.
    pub(super) unsafe fn call_on(top: *mut u8, function: super::Enter, argument: *mut c_void) {
        // SAFETY: the caller's promise; the routine keeps every register a function has to keep.
        unsafe { pinfold_call_on_stack(top, function, argument) }
    }
}

#[cfg(target_arch = "aarch64")]
mod arch {
    use std::arch::global_asm;
    use std::ffi::c_void;

    // x0 = top, x1 = function, x2 = argument.
    global_asm!(
        ".hidden pinfold_call_on_stack",
        ".global pinfold_call_on_stack",
        ".p2align 4",
        "pinfold_call_on_stack:",
        ".cfi_startproc",
        "stp x29, x30, [sp, #-16]!",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset x29, -16",
        ".cfi_offset x30, -8",
        "mov x29, sp",
        ".cfi_def_cfa_register x29",
        "mov sp, x0",
        "mov x0, x2",
        "blr x1",
        "mov sp, x29",
        "ldp x29, x30, [sp], #16",
        ".cfi_def_cfa sp, 0",
        "ret",
        ".cfi_endproc",
    );

    unsafe extern "C" {
        fn pinfold_call_on_stack(top: *mut u8, function: super::Enter, argument: *mut c_void);
    }

    /// Calls `function` with the stack pointer at `top`.
    ///
    /// # Safety
    /// `top` ends, aligned to 16, a stack nobody is on; the function may be called with `argument`.
    pub(super) unsafe fn call_on(top: *mut u8, function: super::Enter, argument: *mut c_void) {
        // SAFETY: the caller's promise; the routine keeps every register a function has to keep.
        unsafe { pinfold_call_on_stack(top, function, argument) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn work_is_done_elsewhere_and_its_result_comes_back() {
        prepare().unwrap();
        let here = 0u8;
        let (there, sum) = run_apart(|| {
            let there = 0u8;
            let scratch = std::hint::black_box([1u8; 32 << 10]);
            let sum: usize = scratch.iter().map(|&byte| usize::from(byte)).sum();
            ((&raw const there).addr(), sum)
        });
        assert_eq!(sum, 32 << 10);
        let base = BASE.load(Ordering::Relaxed).addr();
        assert!((base..base + STACKS_MAX * (GUARD + STACK)).contains(&there));
        assert!(!(base..base + STACKS_MAX * (GUARD + STACK)).contains(&(&raw const here).addr()));
    }

    #[test]
    fn whoever_finds_every_stack_taken_waits_for_one() {
        prepare().unwrap();
        static AT_ONCE: AtomicU32 = AtomicU32::new(0);
        static MOST: AtomicU32 = AtomicU32::new(0);
        let threads: Vec<_> = (0..3 * STACKS_MAX)
            .map(|n| {
                std::thread::spawn(move || {
                    run_apart(|| {
                        let now = AT_ONCE.fetch_add(1, Ordering::SeqCst) + 1;
                        MOST.fetch_max(now, Ordering::SeqCst);
                        std::thread::sleep(Duration::from_millis(20));
                        AT_ONCE.fetch_sub(1, Ordering::SeqCst);
                        n
                    })
                })
            })
            .collect();
        for (n, thread) in threads.into_iter().enumerate() {
            assert_eq!(thread.join().unwrap(), n);
        }
        assert!(MOST.load(Ordering::SeqCst) <= STACKS_MAX as u32);
    }

    #[test]
    fn a_signal_in_the_work_leaves_the_frame_on_the_signal_stack_alone() {
        // A handler on the alternate stack goes apart and takes a fault there, whose handler must not start over at the top
        // of the alternate stack.
        extern "C" fn outer(_: libc::c_int) {
            let canary = std::hint::black_box([0x5au8; 512]);
            run_apart(|| {
                let half = crate::region_for_tests::Half::new();
                let mut sink = [0u8; 8];
                let bad = half.as_ptr().wrapping_add(4096);
                // SAFETY: the copy reports the fault.
                let copied = unsafe { crate::copy::copy_nofault(sink.as_mut_ptr(), bad, 8) };
                FAULTED.store(u32::from(copied.done == 0), Ordering::SeqCst);
            });
            if std::hint::black_box(&canary) != &[0x5a; 512] {
                FAULTED.store(2, Ordering::SeqCst);
            }
        }
        static FAULTED: AtomicU32 = AtomicU32::new(0);
        prepare().unwrap();
        crate::copy::install();
        // SAFETY: all-zero is SIG_DFL with an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = outer as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK;
        // SAFETY: a complete action; the signal is used by this test alone.
        unsafe { libc::sigaction(libc::SIGWINCH, &raw const action, std::ptr::null_mut()) };
        // SAFETY: runs `outer` on this thread, which has the alternate stack that std gives its threads.
        unsafe { libc::raise(libc::SIGWINCH) };
        assert_eq!(FAULTED.load(Ordering::SeqCst), 1);
    }
}
