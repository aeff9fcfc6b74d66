//! Copies that report a fault instead of taking it.
//!
//! [`copy_nofault`] moves bytes between any two addresses. Faults that the kernel resolves by itself (a page of
//! anonymous memory touched for the first time) happen as always; one that would be a SIGSEGV or SIGBUS ends the
//! copy, and the count says exactly how many bytes were moved: byte exact, not chunk exact (SEMANTICS.md A-3).
//!
//! What makes the count exact is one instruction, `rep movsb`: its remaining count is architectural state, so a fault
//! leaves the exact remainder in `rcx`. Where the processor has AVX2, whole rounds of 32-byte moves go first, and a fault
//! in one repeats that round with `rep movsb`: on the processors we measured they are as fast where both sides are
//! aligned to pages, and nearly twice as fast where the target is not. The signal handler recognises
//! these instructions by their addresses, so nested copies (a signal handler that copies, A-5) need no per-thread flag; the
//! verdict travels in registers.
//!
//! The handler serves faults in mappings as well: SIGBUS at an address that [`crate::mapped`] knows goes to that mapping,
//! and what it does not resolve goes to the handler that was there before ours.
//!
//! A thread that blocks SIGSEGV or SIGBUS is killed by the kernel at its first bad copy; a handler installed
//! over ours must chain (call [`install`] again after installing one).

mod handler;
mod touching;

use std::sync::atomic::{AtomicU8, Ordering};

use pinfold_base::Progress;

pub(crate) use touching::copy_touching;

/// What an access wants to do with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Load from it.
    Read,
    /// Store to it.
    Write,
}

/// Why a copy came no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyStop {
    /// The byte at `addr` could not be accessed; bringing it in may help, and probing just that byte tells.
    NeedFault {
        /// The first byte that could not be moved.
        addr: usize,
        /// What the copy wanted to do with it.
        access: Access,
    },
    /// No fault-in can help: the address is not one (non-canonical, or the range wraps).
    Fatal {
        /// The first byte that could not be moved.
        addr: usize,
    },
}

#[cfg(target_arch = "x86_64")]
mod arch {
    use std::arch::global_asm;

    // rdi = to, rsi = from, rdx = n. Returns rax = bytes not moved, rdx = fault address (0: none).
    // In the wide part rdi, rsi and rcx move on only after a round's stores, so at each of its instructions they say
    // what is surely not moved yet: the handler sends a fault there to `..._again`, which goes on with `rep movsb`. At
    // `..._insn` it writes rdx and moves rip to `..._fixup`.
    // The last move of the wide part overlaps the one before rather than leave a few bytes to `rep movsb`, whose start
    // costs as much as many moves.
    global_asm!(
        ".hidden pinfold_copy_nofault",
        ".hidden pinfold_copy_nofault_wide",
        ".hidden pinfold_copy_nofault_again",
        ".hidden pinfold_copy_nofault_insn",
        ".hidden pinfold_copy_nofault_fixup",
        ".global pinfold_copy_nofault",
        ".global pinfold_copy_nofault_wide",
        ".global pinfold_copy_nofault_again",
        ".global pinfold_copy_nofault_insn",
        ".global pinfold_copy_nofault_fixup",
        ".p2align 6",
        "pinfold_copy_nofault_wide:",
        "mov rcx, rdx",
        "xor edx, edx",
        "cmp rcx, 32",
        "jb pinfold_copy_nofault_insn",
        "cmp rcx, 128",
        "jb 4f",
        ".p2align 5",
        "2:",
        "vmovdqu ymm0, [rsi]",
        "vmovdqu ymm1, [rsi + 32]",
        "vmovdqu ymm2, [rsi + 64]",
        "vmovdqu ymm3, [rsi + 96]",
        "vmovdqu [rdi], ymm0",
        "vmovdqu [rdi + 32], ymm1",
        "vmovdqu [rdi + 64], ymm2",
        "vmovdqu [rdi + 96], ymm3",
        "add rsi, 128",
        "add rdi, 128",
        "sub rcx, 128",
        "cmp rcx, 128",
        "jae 2b",
        "test rcx, rcx",
        "jz 5f",
        "4:",
        "cmp rcx, 32",
        "jbe 6f",
        "vmovdqu ymm0, [rsi]",
        "vmovdqu [rdi], ymm0",
        "add rsi, 32",
        "add rdi, 32",
        "sub rcx, 32",
        "jmp 4b",
        "6:",
        "vmovdqu ymm0, [rsi + rcx - 32]",
        "vmovdqu [rdi + rcx - 32], ymm0",
        "xor ecx, ecx",
        "5:",
        "vzeroupper",
        "mov rax, rcx",
        "ret",
        "pinfold_copy_nofault_again:",
        "vzeroupper",
        "jmp pinfold_copy_nofault_insn",
        ".p2align 5",
        "pinfold_copy_nofault:",
        "mov rcx, rdx",
        "xor edx, edx",
        "pinfold_copy_nofault_insn:",
        "rep movsb",
        "pinfold_copy_nofault_fixup:",
        "mov rax, rcx",
        "ret",
    );

    unsafe extern "C" {
        fn pinfold_copy_nofault_wide(to: *mut u8, from: *const u8, n: usize) -> super::Remainder;
        fn pinfold_copy_nofault_again();
    }

    /// Tells whether this processor can run the wide rounds.
    pub(super) fn has_wide() -> bool {
        std::arch::is_x86_feature_detected!("avx2")
    }

    /// Copies with wide rounds.
    ///
    /// # Safety
    /// As [`super::copy_nofault`], and the processor can ([`has_wide`]).
    #[inline]
    pub(super) unsafe fn copy_wide(to: *mut u8, from: *const u8, n: usize) -> super::Remainder {
        // SAFETY: the caller's promise is this routine's contract.
        unsafe { pinfold_copy_nofault_wide(to, from, n) }
    }

    /// Tells what the interrupted instruction wanted: the processor's error code for the fault says.
    pub(super) fn access(context: &libc::ucontext_t) -> super::Access {
        /// Set for stores.
        const WRITE: i64 = 1 << 1;
        if context.uc_mcontext.gregs[libc::REG_ERR as usize] & WRITE != 0 {
            super::Access::Write
        } else {
            super::Access::Read
        }
    }

    /// Looks whether the interrupted instruction is the copy; if so makes it go on bytewise or return with `addr`.
    pub(super) fn divert(context: &mut libc::ucontext_t, addr: usize) -> bool {
        let registers = &mut context.uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as usize;
        let wide = pinfold_copy_nofault_wide as *const () as usize;
        let again = pinfold_copy_nofault_again as *const () as usize;
        if rip == super::insn() {
            registers[libc::REG_RDX as usize] = addr as i64;
            registers[libc::REG_RIP as usize] = super::fixup() as i64;
            true
        } else if (wide..again).contains(&rip) {
            registers[libc::REG_RIP as usize] = again as i64;
            true
        } else {
            false
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod arch {
    use std::arch::global_asm;

    // x0 = to, x1 = from, x2 = n. Returns x0 = bytes not moved, x1 = fault address (0: none).
    // Sixteen bytes a round while both sides allow, then byte by byte: a fault in the wide loop retries from the
    // first byte of its round in the byte loop, which makes the remainder byte exact.
    global_asm!(
        ".hidden pinfold_copy_nofault",
        ".hidden pinfold_copy_nofault_insn",
        ".hidden pinfold_copy_nofault_fixup",
        ".global pinfold_copy_nofault",
        ".global pinfold_copy_nofault_insn",
        ".global pinfold_copy_nofault_fixup",
        ".p2align 4",
        "pinfold_copy_nofault:",
        "mov x9, x1",
        "mov x1, xzr",
        "pinfold_copy_nofault_wide:",
        "cmp x2, #16",
        "b.lo pinfold_copy_nofault_bytes",
        "ldp x10, x11, [x9]",
        "stp x10, x11, [x0]",
        "add x9, x9, #16",
        "add x0, x0, #16",
        "sub x2, x2, #16",
        "b pinfold_copy_nofault_wide",
        "pinfold_copy_nofault_bytes:",
        "cbz x2, pinfold_copy_nofault_fixup",
        "pinfold_copy_nofault_insn:",
        "ldrb w10, [x9]",
        "strb w10, [x0]",
        "add x9, x9, #1",
        "add x0, x0, #1",
        "sub x2, x2, #1",
        "cbnz x2, pinfold_copy_nofault_insn",
        "pinfold_copy_nofault_fixup:",
        "mov x0, x2",
        "ret",
    );

    unsafe extern "C" {
        fn pinfold_copy_nofault_wide();
    }

    /// The one routine here is wide already.
    pub(super) fn has_wide() -> bool {
        false
    }

    /// Never chosen here.
    ///
    /// # Safety
    /// As [`super::copy_nofault`].
    pub(super) unsafe fn copy_wide(to: *mut u8, from: *const u8, n: usize) -> super::Remainder {
        // SAFETY: the caller's promise is this routine's contract.
        unsafe { super::pinfold_copy_nofault(to, from, n) }
    }

    /// Tells what the interrupted instruction wanted: the syndrome record in the signal frame says.
    pub(super) fn access(context: &libc::ucontext_t) -> super::Access {
        /// Words of the records that end the machine context.
        const RECORDS: usize = 4096 / size_of::<u32>();
        let end = (&raw const context.uc_mcontext).wrapping_add(1);
        let records = end.cast::<[u32; RECORDS]>().wrapping_sub(1);
        // SAFETY: the machine context ends with 4096 bytes of records, aligned to 16.
        super::handler::syndrome_access(unsafe { &*records })
    }

    /// Looks whether the interrupted instruction is the copy; if so makes it go on bytewise or return with `addr`.
    pub(super) fn divert(context: &mut libc::ucontext_t, addr: usize) -> bool {
        let pc = context.uc_mcontext.pc as usize;
        let wide = pinfold_copy_nofault_wide as *const () as usize;
        if (super::insn()..super::fixup()).contains(&pc) {
            context.uc_mcontext.regs[1] = addr as u64;
            context.uc_mcontext.pc = super::fixup() as u64;
            true
        } else if (wide..super::insn()).contains(&pc) {
            context.uc_mcontext.pc = super::insn() as u64;
            true
        } else {
            false
        }
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!(
    "pinfold copies user memory with a few instructions per architecture: x86-64 or aarch64"
);

/// Bytes of a page that [`prefetch`] asks for: the processor's own prefetching carries on from there.
const PREFETCH_BYTES: usize = 512;

/// Has the processor fetch the bytes from `addr` on, which need not be mapped: only a hint.
#[inline]
pub(crate) fn prefetch(addr: *const u8) {
    for at in (0..PREFETCH_BYTES).step_by(64) {
        prefetch_line(addr.wrapping_add(at));
    }
}

/// Has the processor fetch the cache line at `addr`, which need not be mapped: only a hint.
#[inline]
pub fn prefetch_line<T>(addr: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch of any address faults on none.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(addr.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = addr;
}

/// What the assembly returns, in two registers.
#[repr(C)]
struct Remainder {
    left: usize,
    fault: usize,
}

unsafe extern "C" {
    fn pinfold_copy_nofault(to: *mut u8, from: *const u8, n: usize) -> Remainder;
    fn pinfold_copy_nofault_insn();
    fn pinfold_copy_nofault_fixup();
}

fn insn() -> usize {
    pinfold_copy_nofault_insn as *const () as usize
}

fn fixup() -> usize {
    pinfold_copy_nofault_fixup as *const () as usize
}

/// Moves `n` bytes from `from` to `to`, lowest first, and stops at the first byte that cannot be moved.
///
/// `n == 0` is complete even for a wild pointer. May be called with any lock held and from a signal handler.
///
/// # Safety
/// Whatever is mapped at `to .. to + n` may be overwritten, and whatever is mapped at `from .. from + n` may be
/// read: no Rust reference that such a write would break exists. The addresses need not be mapped.
#[inline]
pub unsafe fn copy_nofault(to: *mut u8, from: *const u8, n: usize) -> Progress<CopyStop> {
    let mut engine = ENGINE.load(Ordering::Relaxed);
    if engine == NOT_INSTALLED {
        install();
        engine = ENGINE.load(Ordering::Relaxed);
    }
    let remainder = if engine == WIDE {
        // SAFETY: as below, and `install` has asked the processor.
        unsafe { arch::copy_wide(to, from, n) }
    } else {
        // SAFETY: the routine touches `to` and `from` only, which the caller allows; faults are diverted by the handler.
        unsafe { pinfold_copy_nofault(to, from, n) }
    };
    if remainder.left == 0 {
        return Progress::complete(n as u64);
    }
    stopped(to, from, n, &remainder)
}

#[cold]
fn stopped(to: *mut u8, from: *const u8, n: usize, remainder: &Remainder) -> Progress<CopyStop> {
    let done = n - remainder.left;
    let (load, store) = (from.addr() + done, to.addr() + done);
    let stop = if remainder.fault == store {
        CopyStop::NeedFault {
            addr: store,
            access: Access::Write,
        }
    } else if remainder.fault == load {
        CopyStop::NeedFault {
            addr: load,
            access: Access::Read,
        }
    } else if is_canonical(load) && is_canonical(store) {
        // The kernel reports some faults by page; the load comes first.
        let same_page = remainder.fault / 4096 == store / 4096;
        CopyStop::NeedFault {
            addr: if same_page { store } else { load },
            access: if same_page {
                Access::Write
            } else {
                Access::Read
            },
        }
    } else {
        CopyStop::Fatal {
            addr: if is_canonical(load) { store } else { load },
        }
    };
    Progress::stopped(done as u64, stop)
}

fn is_canonical(addr: usize) -> bool {
    // User addresses end below 2^56 with five-level tables; everything above faults without an address.
    addr < 1 << 56
}

/// Which routine copies, once the handler is installed.
static ENGINE: AtomicU8 = AtomicU8::new(NOT_INSTALLED);
const NOT_INSTALLED: u8 = 0;
const BYTES: u8 = 1;
const WIDE: u8 = 2;

/// Installs the fault handler, or puts it on top again after somebody installed another.
///
/// Runs by itself before the first copy. Earlier handlers are chained to for every fault that is neither a copy's nor
/// one in a mapping. A program that installs a handler of its own later calls this again; it works a few times
/// (`handler::LEVELS_MAX`), after which the program's handler stays on top and has to hand down what is not its own.
pub fn install() {
    handler::install();
    let engine = if arch::has_wide() { WIDE } else { BYTES };
    ENGINE.store(engine, Ordering::Release);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region_for_tests::Half;

    /// not where a chunk of the copy began.
    #[test]
    fn the_remainder_is_byte_exact_at_every_offset() {
        let half = Half::new();
        let mut sink = vec![0u8; 8192];
        for good in [0usize, 1, 15, 16, 40, 63, 64, 100, 4095, 4096] {
            let addr = half.as_ptr().wrapping_add(4096 - good);
            // SAFETY: reads test memory, writes our own vector.
            let read = unsafe { copy_nofault(sink.as_mut_ptr(), addr, 5000) };
            assert_eq!(read.done, good as u64);
            let bad = half.addr() + 4096;
            assert_eq!(
                read.stop,
                Some(CopyStop::NeedFault {
                    addr: bad,
                    access: Access::Read
                })
            );
            // SAFETY: writes test memory, reads our own vector.
            let write = unsafe { copy_nofault(addr, sink.as_ptr(), 5000) };
            assert_eq!(write.done, good as u64);
            assert_eq!(
                write.stop,
                Some(CopyStop::NeedFault {
                    addr: bad,
                    access: Access::Write
                })
            );
        }
    }

    type Routine = unsafe fn(*mut u8, *const u8, usize) -> Remainder;

    /// Every routine this processor can run.
    fn routines() -> Vec<Routine> {
        install();
        let mut routines: Vec<Routine> = vec![|to, from, n| {
            // SAFETY: passed on from the caller.
            unsafe { pinfold_copy_nofault(to, from, n) }
        }];
        if arch::has_wide() {
            routines.push(arch::copy_wide);
        }
        routines
    }

    #[test]
    fn every_routine_moves_all_bytes_and_no_others() {
        let from: Vec<u8> = (0..1024).map(|i| (i * 7 + i / 256) as u8).collect();
        for copy in routines() {
            for n in (0..=400).chain([511, 512, 513, 640]) {
                for (at, skew) in [(64, 0), (64, 1), (65, 0), (79, 31)] {
                    let mut to = vec![0xaau8; 1024];
                    let source = from[skew..].as_ptr();
                    // SAFETY: both sides are live vectors with room for n bytes from there.
                    let remainder = unsafe { copy(to[at..].as_mut_ptr(), source, n) };
                    assert_eq!((remainder.left, remainder.fault), (0, 0));
                    assert_eq!(to[at..at + n], from[skew..skew + n]);
                    let outside = to[..at].iter().chain(&to[at + n..]);
                    assert!(outside.copied().all(|byte| byte == 0xaa));
                }
            }
        }
    }

    ///
    #[test]
    fn every_routine_stops_at_the_very_byte() {
        let half = Half::new();
        let bad = half.addr() + 4096;
        let ours: Vec<u8> = (0..1024).map(|i| i as u8).collect();
        let mut sink = vec![0u8; 1024];
        for copy in routines() {
            for good in 0..=400 {
                let edge = half.as_ptr().wrapping_add(4096 - good);
                for n in [good + 1, good + 31, good + 300] {
                    // SAFETY: writes test memory, reads our own vector, which has 1024 bytes.
                    let write = unsafe { copy(edge, ours.as_ptr(), n) };
                    assert_eq!((n - write.left, write.fault), (good, bad));
                    sink.fill(0xaa);
                    // SAFETY: reads test memory, writes our own vector, which has 1024 bytes.
                    let read = unsafe { copy(sink.as_mut_ptr(), edge, n) };
                    assert_eq!((n - read.left, read.fault), (good, bad));
                    assert_eq!(sink[..good], ours[..good]);
                    assert!(sink[good..].iter().all(|&byte| byte == 0xaa));
                }
            }
        }
    }

    #[test]
    fn nothing_to_copy_is_complete_even_from_a_wild_pointer() {
        let wild = std::ptr::without_provenance_mut::<u8>(usize::MAX - 5);
        // SAFETY: zero bytes.
        let outcome = unsafe { copy_nofault(wild, wild, 0) };
        assert_eq!(outcome, Progress::complete(0));
    }

    #[test]
    fn an_address_that_is_none_is_fatal() {
        let mut sink = [0u8; 8];
        let wild = std::ptr::without_provenance::<u8>(0x8000_0000_0000_0000);
        // SAFETY: never mapped; the sink is ours.
        let outcome = unsafe { copy_nofault(sink.as_mut_ptr(), wild, 8) };
        assert_eq!(
            outcome,
            Progress::stopped(0, CopyStop::Fatal { addr: wild.addr() })
        );
    }
}
