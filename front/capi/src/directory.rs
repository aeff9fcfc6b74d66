//! Reading directories.
//!
//! *Locking*: one lock over the table of handles, and one per handle, held while it reads on.

use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_long};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use pinfold::{DirEntry, Directory, Errno, Kind};

use crate::call::answer;
use crate::descriptor::{self, Description, Opened};
use crate::errors::{Outcome, refuse};
use crate::fork;
use crate::names::Named;
use crate::volume::VolumeHandle;
use crate::walk::Place;

/// A directory being read.
#[derive(Debug)]
pub struct DirHandle {
    _opaque: [u8; 0],
}

/// Directories that may be read at once.
const STREAMS_MAX: usize = 1 << 16;

struct Stream {
    reading: Mutex<Reading>,
    /// The descriptor dirfd tells; closed with the stream.
    fd: c_int,
    /// Where readdir puts what it returns: written under `reading`, read by C until the next call on this stream.
    entry: Entry,
}

struct Reading {
    directory: Directory,
    /// Behind the last entry taken.
    position: u64,
}

struct Entry(UnsafeCell<libc::dirent>);

// SAFETY: Rust writes it through `Stream::fill` alone, which holds the stream's lock; C may read it while no other call on the
// stream runs, which POSIX makes the program's duty.
unsafe impl Sync for Entry {}
// SAFETY: bytes.
unsafe impl Send for Entry {}

/// By the address that C knows; never followed, so that a stale one does no harm.
static STREAMS: RwLock<BTreeMap<usize, Arc<Stream>>> = RwLock::new(BTreeMap::new());

fn of(handle: *mut DirHandle) -> Outcome<Arc<Stream>> {
    match STREAMS.read().get(&handle.addr()) {
        Some(stream) => Ok(Arc::clone(stream)),
        None => refuse(Errno::EBADF, "not an open directory"),
    }
}

/// Makes a stream over a descriptor, which it owns from then on.
fn begin(fd: c_int) -> Outcome<*mut DirHandle> {
    let directory = match &descriptor::of(fd)?.opened {
        Opened::Directory(place) => place.node().open_dir()?,
        Opened::File(_) => return refuse(Errno::ENOTDIR, "the descriptor"),
    };
    // SAFETY: integers and bytes: zeros are a value.
    let entry = unsafe { std::mem::zeroed() };
    let stream = Arc::new(Stream {
        reading: Mutex::new(Reading {
            directory,
            position: 0,
        }),
        fd,
        entry: Entry(UnsafeCell::new(entry)),
    });
    let handle = Arc::as_ptr(&stream).cast::<DirHandle>().cast_mut();
    let mut streams = STREAMS.write();
    if streams.len() == STREAMS_MAX {
        return refuse(Errno::EMFILE, "one more directory");
    }
    streams.insert(handle.addr(), stream);
    Ok(handle)
}

impl Stream {
    /// Takes the next entry; returns where it is, NULL at the end.
    fn next(&self) -> Outcome<*mut libc::dirent> {
        let mut reading = self.reading.lock();
        reading.directory.peek()?;
        match reading.directory.advance() {
            Some(entry) => {
                reading.position = entry.next;
                self.fill(&entry);
                Ok(self.entry.0.get())
            }
            None => Ok(std::ptr::null_mut()),
        }
    }

    /// Puts an entry where C reads it; the caller holds `reading`.
    fn fill(&self, entry: &DirEntry) {
        // SAFETY: integers and bytes: zeros are a value.
        let mut filled: libc::dirent = unsafe { std::mem::zeroed() };
        filled.d_ino = entry.inode;
        filled.d_off = entry.next as i64;
        filled.d_reclen = size_of::<libc::dirent>() as u16;
        filled.d_type = entry.kind.map_or(libc::DT_UNKNOWN, kind_of);
        // Names have at most 255 bytes; the last byte ends them in any case.
        let room = filled.d_name.len() - 1;
        let name = entry.name.as_bytes();
        for (to, byte) in filled.d_name[..room].iter_mut().zip(name) {
            *to = *byte as c_char;
        }
        // SAFETY: the stream's own memory, whose lock the caller holds.
        unsafe { self.entry.0.get().write(filled) };
    }
}

fn kind_of(kind: Kind) -> u8 {
    match kind {
        Kind::File => libc::DT_REG,
        Kind::Directory => libc::DT_DIR,
        Kind::Symlink => libc::DT_LNK,
        Kind::Fifo => libc::DT_FIFO,
        Kind::Socket => libc::DT_SOCK,
        Kind::CharDevice => libc::DT_CHR,
        Kind::BlockDevice => libc::DT_BLK,
    }
}

/// Begins to read the directory at `path`, as opendir(3).
///
/// # Safety
/// `path` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_opendir(
    volume: *mut VolumeHandle,
    path: *const c_char,
) -> *mut DirHandle {
    answer(|| {
        // SAFETY: passed on to the caller.
        let named = unsafe { Named::of(volume, path) }?;
        let walked = named.walk(true)?;
        let dir = walked.dir.clone();
        let own = walked.name.is_none();
        let node = walked.found()?;
        if node.kind() != Kind::Directory {
            return refuse(Errno::ENOTDIR, "the path");
        }
        let place: Place = if own { dir } else { dir.below(node) };
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let served = Arc::clone(named.served());
        let opened = Opened::Directory(place);
        let fd = descriptor::install(Description::new(served, opened, flags), flags)?;
        begin(fd).inspect_err(|_| descriptor::discard(fd))
    })
}

/// Begins to read the directory `fd` names and takes the descriptor over, as fdopendir(3).
#[unsafe(no_mangle)]
pub extern "C" fn pf_fdopendir(fd: c_int) -> *mut DirHandle {
    answer(|| begin(fd))
}

/// Tells whether a pointer is a directory this library is reading: 1 or 0. The pointer is not followed.
#[unsafe(no_mangle)]
pub extern "C" fn pf_is_dir(dir: *mut DirHandle) -> c_int {
    let streams = fork::read(&STREAMS);
    c_int::from(streams.is_ok_and(|streams| streams.contains_key(&dir.addr())))
}

/// Returns the next entry, `.` and `..` included, good until the next call on this directory; NULL at the end, and with
/// errno on failure, as readdir(3).
#[unsafe(no_mangle)]
pub extern "C" fn pf_readdir(dir: *mut DirHandle) -> *mut libc::dirent {
    answer(|| of(dir)?.next())
}

/// Ends reading, as closedir(3).
#[unsafe(no_mangle)]
pub extern "C" fn pf_closedir(dir: *mut DirHandle) -> c_int {
    answer(|| {
        let stream = of(dir)?;
        STREAMS.write().remove(&dir.addr());
        descriptor::discard(stream.fd);
        Ok(0)
    })
}

/// Returns the directory's descriptor, which stays the stream's, as dirfd(3).
#[unsafe(no_mangle)]
pub extern "C" fn pf_dirfd(dir: *mut DirHandle) -> c_int {
    answer(|| Ok(of(dir)?.fd))
}

/// Returns the current position, for pf_seekdir, as telldir(3).
#[unsafe(no_mangle)]
pub extern "C" fn pf_telldir(dir: *mut DirHandle) -> c_long {
    answer(|| {
        let stream = of(dir)?;
        let position = stream.reading.lock().position;
        // Cookies are 64 bits whose sign means nothing.
        Ok(position as c_long)
    })
}

/// Moves to a position that pf_telldir gave, as seekdir(3). An unknown one is ignored.
#[unsafe(no_mangle)]
pub extern "C" fn pf_seekdir(dir: *mut DirHandle, position: c_long) {
    answer::<c_int>(|| {
        let stream = of(dir)?;
        let mut reading = stream.reading.lock();
        // Cookies are 64 bits whose sign means nothing.
        reading.directory.seek(position as u64)?;
        reading.position = position as u64;
        Ok(0)
    });
}

/// Starts again at the first entry, as rewinddir(3).
#[unsafe(no_mangle)]
pub extern "C" fn pf_rewinddir(dir: *mut DirHandle) {
    pf_seekdir(dir, 0);
}
