//! SIGBUS for a thread that waits in the kernel for a page which will not come.

use pinfold_base::Errno;

/// Sends a thread of this process the signal that the kernel would send it for an access to `addr` beyond the end of a
/// file: SIGBUS, `BUS_ADRERR`, with the address.
///
/// Unlike the kernel's own it waits while the thread blocks SIGBUS, and does not interrupt a system call that copies.
///
/// # Errors
/// `ESRCH` when there is no such thread any more.
pub fn signal_bus(thread: u32, addr: usize) -> Result<(), Errno> {
    /// The head of siginfo_t for faults, as the kernel's ABI has it on 64-bit machines.
    #[repr(C)]
    struct BusInfo {
        signal: libc::c_int,
        errno: libc::c_int,
        code: libc::c_int,
        pad: libc::c_int,
        addr: usize,
        rest: [u8; 128 - 24],
    }
    let info = BusInfo {
        signal: libc::SIGBUS,
        errno: 0,
        code: libc::BUS_ADRERR,
        pad: 0,
        addr,
        rest: [0; 128 - 24],
    };
    // SAFETY: takes nothing, returns a number.
    let process = unsafe { libc::getpid() };
    // SAFETY: the kernel reads a siginfo_t of 128 bytes, which `info` is; any code may be sent within one's own process.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            process,
            thread,
            libc::SIGBUS,
            &raw const info,
        )
    };
    if sent == 0 {
        return Ok(());
    }
    Err(Errno::from(std::io::Error::last_os_error()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_thread_sees_the_address_it_is_told() {
        static SEEN: AtomicUsize = AtomicUsize::new(0);
        extern "C" fn note(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
            // SAFETY: the kernel passes a siginfo to a handler installed with SA_SIGINFO.
            let info = unsafe { &*info };
            // SAFETY: SIGBUS carries an address.
            SEEN.store(unsafe { info.si_addr() } as usize, Ordering::SeqCst);
        }
        // In a child: the handler is the process's, and other tests have theirs.
        // SAFETY: the child calls async-signal-safe functions only.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: all-zero bytes are a valid sigaction.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = note as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            // SAFETY: a complete action with a handler of the right type.
            unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
            // SAFETY: takes nothing, returns a number.
            let thread = unsafe { libc::gettid() };
            let sent = signal_bus(thread.unsigned_abs(), 0x1234_5678);
            let right = sent.is_ok() && SEEN.load(Ordering::SeqCst) == 0x1234_5678;
            // SAFETY: ends the child without unwinding.
            unsafe { libc::_exit(if right { 7 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: waits for our child.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(libc::WEXITSTATUS(status), 7, "status {status:#x}");
    }
}
