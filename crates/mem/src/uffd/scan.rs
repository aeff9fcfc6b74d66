//! What the page tables say about a range: present pages, and pages stored to since they were protected.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use linux_raw_sys::general as raw;
use pinfold_base::Errno;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::ioctl::{Opcode, ioctl, opcode};

use super::errno;
use crate::descriptor::high;

/// `PAGEMAP_SCAN`.
const SCAN: Opcode = opcode::read_write::<raw::pm_scan_arg>(b'f', 16);
// Of linux/fs.h.
const PAGE_IS_WRITTEN: u32 = 1 << 1;
const PAGE_IS_PRESENT: u32 = 1 << 3;
const PM_SCAN_WP_MATCHING: u32 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u32 = 1 << 1;
/// Runs of pages asked for with one system call.
const RUNS_MAX: usize = 64;

/// Which pages a [`scan`] looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScanFor {
    /// Pages that this mapping shows: an access needs no fault to begin with.
    Present,
    /// Pages stored to since they were protected, and pages never mapped (which carry no mark). Needs a registration with
    /// asynchronous write protection.
    Written,
    /// The same; protects them again in the same step.
    WrittenAndProtect,
}

/// Tells `found` the runs of pages in an address range (whole pages) that `what` says, in ascending order.
///
/// # Errors
/// `ENOENT` or `EACCES` without /proc, `ENOTTY` before Linux 6.7, `EPERM` for [`ScanFor::Written`] where protection is not
/// asynchronous.
pub fn scan(
    range: Range<usize>,
    what: ScanFor,
    mut found: impl FnMut(Range<usize>),
) -> Result<(), Errno> {
    let pagemap = pagemap()?;
    let mut runs = [NO_RUN; RUNS_MAX];
    let category = u64::from(match what {
        ScanFor::Present => PAGE_IS_PRESENT,
        ScanFor::Written | ScanFor::WrittenAndProtect => PAGE_IS_WRITTEN,
    });
    let flags = u64::from(match what {
        ScanFor::Present => 0,
        ScanFor::Written => PM_SCAN_CHECK_WPASYNC,
        ScanFor::WrittenAndProtect => PM_SCAN_CHECK_WPASYNC | PM_SCAN_WP_MATCHING,
    });
    let (mut at, end) = (range.start as u64, range.end as u64);
    while at < end {
        let mut request = raw::pm_scan_arg {
            size: size_of::<raw::pm_scan_arg>() as u64,
            flags,
            start: at,
            end,
            walk_end: 0,
            vec: runs.as_mut_ptr().expose_provenance() as u64,
            vec_len: RUNS_MAX as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: category,
            category_anyof_mask: 0,
            return_mask: category,
        };
        // SAFETY: the request names `runs`, which is exclusively ours, with its length.
        let count = unsafe { ioctl(pagemap, Counting(&mut request)) }.map_err(errno)?;
        for run in runs.iter().take(count) {
            // Addresses of this process: they fit.
            found(run.start as usize..run.end as usize);
        }
        if request.walk_end <= at {
            return Err(Errno::EIO);
        }
        at = request.walk_end;
    }
    Ok(())
}

const NO_RUN: raw::page_region = raw::page_region {
    start: 0,
    end: 0,
    categories: 0,
};

/// The scan's request, whose result is a count.
struct Counting<'a>(&'a mut raw::pm_scan_arg);

// SAFETY: the opcode takes a pm_scan_arg, reads and writes it, and returns how many runs it filled.
unsafe impl rustix::ioctl::Ioctl for Counting<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        SCAN
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(
        out: rustix::ioctl::IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> rustix::io::Result<usize> {
        Ok(usize::try_from(out).unwrap_or(0))
    }
}

/// Returns this process's page tables, opened once: the descriptor stays with the address space it was opened for.
fn pagemap() -> Result<&'static OwnedFd, Errno> {
    static PAGEMAP: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(fd) = PAGEMAP.get() {
        return Ok(fd);
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let fd = openat(CWD, c"/proc/self/pagemap", flags, Mode::empty()).map_err(errno)?;
    Ok(PAGEMAP.get_or_init(|| high(fd)))
}
