//! The copy that waits: faults in mappings are served in the middle of it.
//!
//! For the bounce copies, made with nothing held, of memory that its mapping does not lend: a private mapping's pages may be
//! the program's own, at an address that only the program has. With a handler thread a fault there sleeps like any
//! other access; inline it is this instruction's SIGBUS that is served. What cannot be served ends the copy, as in
//! [`super::copy_nofault`].

use pinfold_base::Progress;
use pinfold_base::rank::rule_zero;

use super::{CopyStop, Remainder, install, stopped};

#[cfg(target_arch = "x86_64")]
mod arch {
    use std::arch::global_asm;

    // As the bytewise `pinfold_copy_nofault`; a routine of its own, so that the handler knows which one faults.
    global_asm!(
        ".hidden pinfold_copy_touching",
        ".hidden pinfold_copy_touching_insn",
        ".hidden pinfold_copy_touching_fixup",
        ".global pinfold_copy_touching",
        ".global pinfold_copy_touching_insn",
        ".global pinfold_copy_touching_fixup",
        ".p2align 5",
        "pinfold_copy_touching:",
        "mov rcx, rdx",
        "xor edx, edx",
        "pinfold_copy_touching_insn:",
        "rep movsb",
        "pinfold_copy_touching_fixup:",
        "mov rax, rcx",
        "ret",
    );

    pub(super) fn pc(context: &libc::ucontext_t) -> usize {
        context.uc_mcontext.gregs[libc::REG_RIP as usize] as usize
    }

    pub(super) fn give_up(context: &mut libc::ucontext_t, addr: usize) {
        let registers = &mut context.uc_mcontext.gregs;
        registers[libc::REG_RDX as usize] = addr as i64;
        registers[libc::REG_RIP as usize] = super::fixup() as i64;
    }
}

#[cfg(target_arch = "aarch64")]
mod arch {
    use std::arch::global_asm;

    // As the bytewise part of `pinfold_copy_nofault`; a routine of its own, so that the handler knows which one faults.
    global_asm!(
        ".hidden pinfold_copy_touching",
        ".hidden pinfold_copy_touching_insn",
        ".hidden pinfold_copy_touching_fixup",
        ".global pinfold_copy_touching",
        ".global pinfold_copy_touching_insn",
        ".global pinfold_copy_touching_fixup",
        ".p2align 4",
        "pinfold_copy_touching:",
        "mov x9, x1",
        "mov x1, xzr",
        "cbz x2, pinfold_copy_touching_fixup",
        "pinfold_copy_touching_insn:",
        "ldrb w10, [x9]",
        "strb w10, [x0]",
        "add x9, x9, #1",
        "add x0, x0, #1",
        "sub x2, x2, #1",
        "cbnz x2, pinfold_copy_touching_insn",
        "pinfold_copy_touching_fixup:",
        "mov x0, x2",
        "ret",
    );

    pub(super) fn pc(context: &libc::ucontext_t) -> usize {
        context.uc_mcontext.pc as usize
    }

    pub(super) fn give_up(context: &mut libc::ucontext_t, addr: usize) {
        context.uc_mcontext.regs[1] = addr as u64;
        context.uc_mcontext.pc = super::fixup() as u64;
    }
}

unsafe extern "C" {
    fn pinfold_copy_touching(to: *mut u8, from: *const u8, n: usize) -> Remainder;
    fn pinfold_copy_touching_insn();
    fn pinfold_copy_touching_fixup();
}

fn fixup() -> usize {
    pinfold_copy_touching_fixup as *const () as usize
}

/// Tells whether the interrupted instruction is this copy's.
pub(super) fn is_interrupted(context: &libc::ucontext_t) -> bool {
    let insn = pinfold_copy_touching_insn as *const () as usize;
    (insn..fixup()).contains(&arch::pc(context))
}

/// Makes the interrupted copy return, stopped at `addr`.
pub(super) fn give_up(context: &mut libc::ucontext_t, addr: usize) {
    arch::give_up(context, addr);
}

/// Moves bytes like [`super::copy_nofault`], and waits for pages of mappings that are not there. Nothing may be held.
///
/// # Safety
/// As [`super::copy_nofault`].
pub(crate) unsafe fn copy_touching(to: *mut u8, from: *const u8, n: usize) -> Progress<CopyStop> {
    rule_zero("a copy that may wait");
    install();
    // SAFETY: the caller's promise is this routine's contract; faults are served or end it.
    let remainder = unsafe { pinfold_copy_touching(to, from, n) };
    if remainder.left == 0 {
        return Progress::complete(n as u64);
    }
    stopped(to, from, n, &remainder)
}
