//! Loads and stores as a program makes them: one instruction, faults and all.
//!
//! Unlike [`copy_nofault`](crate::copy::copy_nofault), which must not have a fault served, an access here takes every
//! fault that somebody can resolve, be it the kernel or this library's own handler, and what nobody can resolve is
//! reported as a [`Hit`] where a program would die.
//!
//! *Owns*: the access routines, and a SIGSEGV and SIGBUS handler that knows no other instruction.
//!
//! *Does not own*: the addresses; the handler of [`crate::copy`], which chains here when it was installed later.
//!
//! *Locking*: none; the handler touches registers only.

use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

/// What an access met that nobody resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hit {
    /// SIGBUS or SIGSEGV.
    pub signal: i32,
    /// The address it was reported for.
    pub addr: usize,
}

impl Hit {
    /// Tells whether it was SIGBUS: nothing behind the address, though it is mapped.
    #[must_use]
    pub const fn is_bus(self) -> bool {
        self.signal == libc::SIGBUS
    }
}

#[cfg(target_arch = "x86_64")]
mod arch {
    use std::arch::global_asm;

    // Arguments in rdi, rsi, rdx. Return rax = bytes left, or the value, and rdx = the fault, 0 when there was none.
    // No routine moves rsp, so that the handler may send any of them to the common end.
    global_asm!(
        ".hidden pinfold_touch_copy",
        ".hidden pinfold_touch_load",
        ".hidden pinfold_touch_store",
        ".hidden pinfold_touch_add",
        ".hidden pinfold_touch_end",
        ".global pinfold_touch_copy",
        ".global pinfold_touch_load",
        ".global pinfold_touch_store",
        ".global pinfold_touch_add",
        ".global pinfold_touch_end",
        ".p2align 5",
        "pinfold_touch_copy:",
        "mov rcx, rdx",
        "xor edx, edx",
        "rep movsb",
        "mov rax, rcx",
        "ret",
        "pinfold_touch_load:",
        "xor edx, edx",
        "mov rax, [rdi]",
        "ret",
        "pinfold_touch_store:",
        "xor edx, edx",
        "mov [rdi], rsi",
        "xor eax, eax",
        "ret",
        "pinfold_touch_add:",
        "xor edx, edx",
        "lock xadd [rdi], rsi",
        "mov rax, rsi",
        "ret",
        "pinfold_touch_end:",
        "mov rax, rcx",
        "ret",
    );

    pub(super) fn divert(context: &mut libc::ucontext_t, fault: usize) -> bool {
        let registers = &mut context.uc_mcontext.gregs;
        if !super::is_routine(registers[libc::REG_RIP as usize] as usize) {
            return false;
        }
        registers[libc::REG_RDX as usize] = fault as i64;
        registers[libc::REG_RIP as usize] = super::end() as i64;
        true
    }
}

#[cfg(target_arch = "aarch64")]
mod arch {
    use std::arch::global_asm;

    // Arguments in x0, x1, x2. Return x0 = bytes left, or the value, and x1 = the fault, 0 when there was none.
    global_asm!(
        ".hidden pinfold_touch_copy",
        ".hidden pinfold_touch_load",
        ".hidden pinfold_touch_store",
        ".hidden pinfold_touch_add",
        ".hidden pinfold_touch_end",
        ".global pinfold_touch_copy",
        ".global pinfold_touch_load",
        ".global pinfold_touch_store",
        ".global pinfold_touch_add",
        ".global pinfold_touch_end",
        ".p2align 4",
        "pinfold_touch_copy:",
        "mov x9, x1",
        "mov x1, xzr",
        "1:",
        "cbz x2, pinfold_touch_end",
        "ldrb w10, [x9]",
        "strb w10, [x0]",
        "add x9, x9, #1",
        "add x0, x0, #1",
        "sub x2, x2, #1",
        "b 1b",
        "pinfold_touch_load:",
        "mov x1, xzr",
        "ldr x2, [x0]",
        "b pinfold_touch_end",
        "pinfold_touch_store:",
        "mov x2, x1",
        "mov x1, xzr",
        "str x2, [x0]",
        "b pinfold_touch_end",
        "pinfold_touch_add:",
        "mov x9, x1",
        "mov x1, xzr",
        "2:",
        "ldaxr x2, [x0]",
        "add x10, x2, x9",
        "stlxr w11, x10, [x0]",
        "cbnz w11, 2b",
        "pinfold_touch_end:",
        "mov x0, x2",
        "ret",
    );

    pub(super) fn divert(context: &mut libc::ucontext_t, fault: usize) -> bool {
        if !super::is_routine(context.uc_mcontext.pc as usize) {
            return false;
        }
        context.uc_mcontext.regs[1] = fault as u64;
        context.uc_mcontext.pc = super::end() as u64;
        true
    }
}

/// What a routine returns, in two registers.
#[repr(C)]
struct Returned {
    value: usize,
    fault: usize,
}

unsafe extern "C" {
    fn pinfold_touch_copy(to: *mut u8, from: *const u8, n: usize) -> Returned;
    fn pinfold_touch_load(addr: *const u64) -> Returned;
    fn pinfold_touch_store(addr: *mut u64, value: u64) -> Returned;
    fn pinfold_touch_add(addr: *mut u64, value: u64) -> Returned;
    fn pinfold_touch_end();
}

/// Set in a fault that was SIGBUS; user addresses are smaller.
const BUS: usize = 1 << 62;
/// Set in every fault: its address may be zero.
const FAULT: usize = 1 << 63;

impl Returned {
    fn told(self) -> Result<usize, Hit> {
        if self.fault == 0 {
            return Ok(self.value);
        }
        let bus = self.fault & BUS != 0;
        Err(Hit {
            signal: if bus { libc::SIGBUS } else { libc::SIGSEGV },
            addr: self.fault & !(BUS | FAULT),
        })
    }
}

fn end() -> usize {
    pinfold_touch_end as *const () as usize
}

fn is_routine(pc: usize) -> bool {
    (pinfold_touch_copy as *const () as usize..end()).contains(&pc)
}

/// Moves `n` bytes from `from` to `to`, lowest first.
///
/// # Errors
/// What ended it early.
///
/// # Safety
/// As [`crate::copy::copy_nofault`]: no Rust reference exists that the access would break. Addresses need not be mapped.
pub(super) unsafe fn copy(to: *mut u8, from: *const u8, n: usize) -> Result<(), Hit> {
    install();
    // SAFETY: touches what the caller allows; faults that nobody resolves are diverted by the handler.
    let returned = unsafe { pinfold_touch_copy(to, from, n) };
    returned.told().map(drop)
}

/// Loads eight bytes at an address that is a multiple of eight, at once.
///
/// # Errors
/// What prevented it.
///
/// # Safety
/// As [`copy`].
pub(super) unsafe fn load(addr: *const u64) -> Result<u64, Hit> {
    install();
    // SAFETY: as in `copy`.
    let returned = unsafe { pinfold_touch_load(addr) };
    returned.told().map(|value| value as u64)
}

/// Stores eight bytes at an address that is a multiple of eight, at once.
///
/// # Errors
/// What prevented it.
///
/// # Safety
/// As [`copy`].
pub(super) unsafe fn store(addr: *mut u64, value: u64) -> Result<(), Hit> {
    install();
    // SAFETY: as in `copy`.
    let returned = unsafe { pinfold_touch_store(addr, value) };
    returned.told().map(drop)
}

/// Adds to the eight bytes at an address that is a multiple of eight, atomically; returns what was there before.
///
/// # Errors
/// What prevented it.
///
/// # Safety
/// As [`copy`].
pub(super) unsafe fn add(addr: *mut u64, value: u64) -> Result<u64, Hit> {
    install();
    // SAFETY: as in `copy`.
    let returned = unsafe { pinfold_touch_add(addr, value) };
    returned.told().map(|value| value as u64)
}

/// The actions in force before ours: [0] SIGSEGV, [1] SIGBUS. Leaked: a handler may be reading one at any time.
static PREVIOUS: [AtomicPtr<libc::sigaction>; 2] = [
    AtomicPtr::new(std::ptr::null_mut()),
    AtomicPtr::new(std::ptr::null_mut()),
];

/// Installs the handler, once; runs by itself before the first access.
///
/// A program that maps through this library calls it before anything else: the library's own handler has to come
/// first when a fault happens, and only what it does not serve is ours.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (signal, previous) in [libc::SIGSEGV, libc::SIGBUS].into_iter().zip(&PREVIOUS) {
            install_one(signal, previous);
        }
    });
}

fn install_one(signal: libc::c_int, previous: &AtomicPtr<libc::sigaction>) {
    // SAFETY: all-zero bytes are a valid sigaction (SIG_DFL, empty mask).
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only queries; `old` is a live sigaction.
    unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut old) };
    previous.store(Box::into_raw(Box::new(old)), Ordering::Release);
    // SAFETY: as above.
    let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
    new.sa_sigaction = on_fault as *const () as usize;
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    // SAFETY: `new` is complete; its handler is async-signal-safe.
    unsafe { libc::sigaction(signal, &raw const new, std::ptr::null_mut()) };
}

extern "C" fn on_fault(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel, or whoever chains to us, passes a valid siginfo.
    let told = unsafe { &*info };
    // SAFETY: SIGSEGV and SIGBUS carry an address.
    let addr = unsafe { told.si_addr() } as usize;
    let bus = if signal == libc::SIGBUS { BUS } else { 0 };
    // SAFETY: the interrupted context, ours until we return.
    let interrupted = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    if arch::divert(interrupted, (addr & !(BUS | FAULT)) | bus | FAULT) {
        return;
    }
    let previous = PREVIOUS[usize::from(signal == libc::SIGBUS)].load(Ordering::Acquire);
    // SAFETY: null, or a leaked Box that is never freed or changed (`install_one`).
    match unsafe { previous.as_ref() } {
        Some(action)
            if action.sa_flags & libc::SA_SIGINFO != 0 && action.sa_sigaction != libc::SIG_DFL =>
        {
            // SAFETY: an SA_SIGINFO action holds a function of this type.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(action.sa_sigaction) };
            handler(signal, info, context);
        }
        _ => {
            // SAFETY: all-zero is SIG_DFL with an empty mask.
            let default: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: returning then repeats the access, which ends the process with the right signal.
            unsafe { libc::sigaction(signal, &raw const default, std::ptr::null_mut()) };
        }
    }
}
