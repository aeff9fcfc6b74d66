//! System calls that `rustix` does not wrap: file handles, a gathered write straight from frames, advice on many ranges.
//!
//! *Owns*: the calls' memory layouts. *Does not own*: descriptors, or when any of this is wise.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use pinfold_base::{Errno, PAGE_SIZE};
use rustix::mm::{Advice, madvise};
use smallvec::SmallVec;

use crate::span::{IoSpan, RawSpan};

/// The largest handle any filesystem makes, in bytes (`MAX_HANDLE_SZ`).
const HANDLE_BYTES_MAX: usize = 128;
/// The most pieces one gathered write takes (`IOV_MAX`).
pub const PIECES_MAX: usize = 1024;

/// What `struct file_handle` looks like with room for the largest handle.
#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    data: [u8; HANDLE_BYTES_MAX],
}

/// A name for an inode that outlives descriptors and renames, made by the inode's filesystem.
///
/// It holds the inode's generation, so that a number that was used again is told from its first owner.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct FileHandle {
    kind: i32,
    data: SmallVec<[u8; 24]>,
}

impl fmt::Debug for FileHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileHandle({}, {:02x?})", self.kind, self.data)
    }
}

impl FileHandle {
    /// Asks for the handle of the inode behind `fd`, which may be an `O_PATH` descriptor.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the filesystem makes none.
    pub fn of(fd: impl AsFd) -> Result<Self, Errno> {
        let mut raw = RawHandle {
            bytes: HANDLE_BYTES_MAX as u32,
            kind: 0,
            data: [0; HANDLE_BYTES_MAX],
        };
        let mut mount = 0;
        let at = fd.as_fd().as_raw_fd();
        let handle = (&raw mut raw).cast::<libc::file_handle>();
        // SAFETY: `raw` has the layout of struct file_handle followed by as much room as `bytes` says.
        let status = unsafe {
            libc::name_to_handle_at(at, c"".as_ptr(), handle, &mut mount, libc::AT_EMPTY_PATH)
        };
        if status != 0 {
            return Err(Errno::from(io::Error::last_os_error()));
        }
        let len = (raw.bytes as usize).min(HANDLE_BYTES_MAX);
        Ok(Self {
            kind: raw.kind,
            data: SmallVec::from_slice(&raw.data[..len]),
        })
    }

    /// Opens the inode; `mount` is a descriptor, not `O_PATH`, of anything on the same mount.
    ///
    /// # Errors
    /// `EPERM` without CAP_DAC_READ_SEARCH, `ESTALE` when the inode is gone, and what open(2) says.
    pub fn open(&self, mount: impl AsFd, flags: rustix::fs::OFlags) -> Result<OwnedFd, Errno> {
        let mut raw = RawHandle {
            bytes: self.data.len() as u32,
            kind: self.kind,
            data: [0; HANDLE_BYTES_MAX],
        };
        raw.data[..self.data.len()].copy_from_slice(&self.data);
        let flags = i32::try_from(flags.bits()).map_err(|_| Errno::EINVAL)?;
        let at = mount.as_fd().as_raw_fd();
        let handle = (&raw mut raw).cast::<libc::file_handle>();
        // SAFETY: `raw` has the layout of struct file_handle, `bytes` of it filled.
        let fd = unsafe { libc::open_by_handle_at(at, handle, flags | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(Errno::from(io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Condenses the handle to a number (FNV-1a): inodes that share a number differ here unless by chance.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let start = 0xcbf2_9ce4_8422_2325 ^ self.kind as u64;
        self.data.iter().fold(start, |sum, &byte| {
            (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        })
    }
}

/// Writes `head` and then the spans with one call, as devices need that take a message a call.
///
/// # Errors
/// `EINVAL` for more than [`PIECES_MAX`] pieces, else what writev(2) says.
pub fn writev_spans(fd: BorrowedFd<'_>, head: &[u8], spans: &[IoSpan]) -> Result<usize, Errno> {
    if spans.len() >= PIECES_MAX {
        return Err(Errno::EINVAL);
    }
    let head = libc::iovec {
        iov_base: head.as_ptr().cast_mut().cast(),
        iov_len: head.len(),
    };
    let pieces: SmallVec<[libc::iovec; 36]> = std::iter::once(head)
        .chain(spans.iter().map(|span| libc::iovec {
            iov_base: span.as_ptr().cast(),
            iov_len: span.len(),
        }))
        .collect();
    let count = pieces.len() as libc::c_int;
    // SAFETY: writev only reads; `head` is borrowed and the spans' Segments keep their memory mapped.
    let written = unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), count) };
    usize::try_from(written).map_err(|_| Errno::from(io::Error::last_os_error()))
}

/// Writes `head` and behind it `missing` bytes that cannot be read, with one call: for a device that acts upon a message's head
/// before it looks at the rest. What the device says to that is `EFAULT`.
///
/// # Errors
/// What writev(2) says; `ENOMEM` where there is no address to be had.
pub fn write_unreadable(fd: BorrowedFd<'_>, head: &[u8], missing: usize) -> Result<usize, Errno> {
    static NOWHERE: OnceLock<usize> = OnceLock::new();
    let nowhere = *NOWHERE.get_or_init(|| {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE as usize,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        // Never unmapped: nothing else is ever mapped there.
        if at == libc::MAP_FAILED {
            0
        } else {
            at.expose_provenance()
        }
    });
    if nowhere == 0 {
        return Err(Errno::ENOMEM);
    }
    let pieces = [
        libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        },
        libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(nowhere),
            iov_len: missing.min(PAGE_SIZE as usize),
        },
    ];
    // SAFETY: writev only reads; `head` is borrowed, and the kernel reports what cannot be read.
    let written = unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), 2) };
    usize::try_from(written).map_err(|_| Errno::from(io::Error::last_os_error()))
}

/// Ranges advised on with one system call.
pub(crate) const ADVISED_MAX: usize = 64;
/// `PIDFD_SELF`: no descriptor, which a child would inherit and mean its parent by.
const PIDFD_SELF: libc::c_int = -10_000;

/// Drops the page-table entries of up to [`ADVISED_MAX`] ranges, also where the program has locked its memory. With one call
/// the kernel tells the other processors once (Linux 6.16), which costs more than the entries do.
///
/// # Safety
/// The ranges are whole pages of live mappings whose contents come again by a fault, as those of shared mappings do.
///
/// # Errors
/// What madvise(2) says of the first range that it refuses.
pub(crate) unsafe fn drop_entries(
    spans: impl ExactSizeIterator<Item = RawSpan> + Clone,
) -> Result<(), Errno> {
    static REFUSED: AtomicBool = AtomicBool::new(false);
    let count = spans.len().min(ADVISED_MAX);
    if count > 1 && !REFUSED.load(Ordering::Relaxed) {
        let mut ranges = [NO_RANGE; ADVISED_MAX];
        let mut bytes = 0;
        for (range, span) in ranges.iter_mut().zip(spans.clone()) {
            range.iov_base = std::ptr::with_exposed_provenance_mut(span.addr);
            range.iov_len = span.len;
            bytes += span.len;
        }
        // SAFETY: the kernel reads `count` entries of `ranges`; the caller vouches for what they name.
        let advised = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                PIDFD_SELF,
                ranges.as_ptr(),
                count,
                libc::MADV_DONTNEED_LOCKED,
                0,
            )
        };
        if usize::try_from(advised) == Ok(bytes) {
            return Ok(());
        }
        // Before Linux 6.15 for this advice or for the caller's own process: not asked again.
        REFUSED.store(advised < 0, Ordering::Relaxed);
    }
    spans.take(ADVISED_MAX).try_for_each(|span| {
        let addr = std::ptr::with_exposed_provenance_mut(span.addr);
        // SAFETY: as the caller vouches.
        unsafe { madvise(addr, span.len, Advice::LinuxDontneedLocked) }
            .map_err(|errno| Errno::from_raw(errno.raw_os_error()))
    })
}

const NO_RANGE: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Arc;

    use rustix::fs::{CWD, Mode, OFlags};

    use super::*;
    use crate::span::{AlignedBuf, Segments};

    #[test]
    fn a_gathered_write_arrives_as_one_message() {
        let (mut from, to) = std::io::pipe().unwrap();
        let buf = Arc::new(AlignedBuf::zeroed(4096));
        let segments = Segments::of_buf(&buf, 6);
        segments.copy_from(0, b"frames");
        let written = writev_spans(to.as_fd(), b"head ", segments.spans()).unwrap();
        assert_eq!(written, 11);
        let mut got = [0; 11];
        from.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"head frames");
    }

    #[test]
    fn a_handle_names_its_inode_after_a_rename() {
        let dir = std::env::temp_dir().join(format!("pinfold-handle-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (a, b) = (dir.join("a"), dir.join("b"));
        std::fs::write(&a, b"x").unwrap();
        let open = |path: &std::path::Path| {
            rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
        };
        let first = FileHandle::of(open(&a)).unwrap();
        std::fs::rename(&a, &b).unwrap();
        assert_eq!(first, FileHandle::of(open(&b)).unwrap());
        std::fs::write(&a, b"y").unwrap();
        let other = FileHandle::of(open(&a)).unwrap();
        assert_ne!(first, other);
        assert_ne!(first.fingerprint(), other.fingerprint());
        match first.open(std::fs::File::open(&dir).unwrap(), OFlags::RDONLY) {
            Ok(fd) => {
                let mut text = String::new();
                std::fs::File::from(fd).read_to_string(&mut text).unwrap();
                assert_eq!(text, "x");
            }
            Err(errno) => assert_eq!(errno, Errno::EPERM, "only for want of the capability"),
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
