//! Descriptors: small numbers for open files and directories of any volume.
//!
//! They begin at [`PF_DESCRIPTOR_FIRST`], far above what the kernel hands out, so that one look at a number tells whose it is
//! and a program may hold both kinds. As in POSIX the lowest free number is given, and duplicates share one description: its
//! position and its flags.
//!
//! *Locking*: one lock over the table, held for look-ups and changes alone. A description that is in use by a call outlives
//! its closing.

use std::collections::BTreeSet;
use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use parking_lot::RwLock;
use pinfold::{Errno, File, Node};

use crate::call::answer;
use crate::errors::{Outcome, refuse};
use crate::user;
use crate::volume::Served;
use crate::walk::Place;

/// The lowest descriptor number. The kernel's own begin at 0 and cannot reach it while fewer than a billion are open.
pub const PF_DESCRIPTOR_FIRST: c_int = 1 << 30;
/// The number of descriptors that may be open at once.
pub const PF_DESCRIPTORS_MAX: c_int = 1 << 20;

/// Flags that fcntl may change, as in Linux; others are fixed when the file is opened.
const FLAGS_CHANGEABLE: c_int = libc::O_APPEND | libc::O_NONBLOCK | libc::O_NOATIME | libc::O_ASYNC;

/// What an open file or directory is to its descriptors.
#[derive(Debug)]
pub(crate) struct Description {
    pub served: Arc<Served>,
    pub opened: Opened,
    /// O_ flags as F_GETFL tells them. O_APPEND is obeyed from here: fcntl may change it.
    flags: AtomicI32,
}

/// What was opened.
#[derive(Debug)]
pub(crate) enum Opened {
    /// A regular file.
    File(File),
    /// A directory, for calls that start from it, fsync and fdopendir.
    Directory(Place),
}

impl Description {
    pub(crate) fn new(served: Arc<Served>, opened: Opened, flags: c_int) -> Self {
        // Those that act on opening alone are forgotten, as in Linux.
        let once = libc::O_CREAT | libc::O_EXCL | libc::O_NOCTTY | libc::O_TRUNC | libc::O_CLOEXEC;
        Self {
            served,
            opened,
            flags: AtomicI32::new(flags & !once),
        }
    }

    /// Returns the file to read from or write to.
    ///
    /// # Errors
    /// `EISDIR` for a directory.
    pub(crate) fn file(&self) -> Outcome<&File> {
        match &self.opened {
            Opened::File(file) => Ok(file),
            Opened::Directory(_) => refuse(Errno::EISDIR, "the descriptor is a directory's"),
        }
    }

    /// Returns the file, for calls that directories do not have.
    ///
    /// # Errors
    /// `errno` for a directory.
    pub(crate) fn file_or(&self, errno: Errno) -> Outcome<&File> {
        match &self.opened {
            Opened::File(file) => Ok(file),
            Opened::Directory(_) => refuse(errno, "the descriptor is a directory's"),
        }
    }

    pub(crate) fn node(&self) -> &Node {
        match &self.opened {
            Opened::File(file) => file.node(),
            Opened::Directory(place) => place.node(),
        }
    }

    pub(crate) fn appends(&self) -> bool {
        self.flags() & libc::O_APPEND != 0
    }

    pub(crate) fn flags(&self) -> c_int {
        self.flags.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Table {
    slots: Vec<Option<Slot>>,
    /// The free slots below `slots.len()`.
    free: BTreeSet<usize>,
}

#[derive(Debug, Clone)]
struct Slot {
    description: Arc<Description>,
    /// FD_CLOEXEC as the program set it; nothing survives an exec either way.
    close_on_exec: bool,
}

static TABLE: RwLock<Table> = RwLock::new(Table {
    slots: Vec::new(),
    free: BTreeSet::new(),
});

impl Table {
    /// Returns the lowest free slot from `least` on, if there may be one more.
    fn lowest(&self, least: usize) -> Option<usize> {
        let index = match self.free.range(least..).next() {
            Some(&index) => index,
            None => self.slots.len().max(least),
        };
        (index < PF_DESCRIPTORS_MAX as usize).then_some(index)
    }

    /// Puts a description into a slot below the limit; returns what was there.
    fn put(&mut self, index: usize, slot: Slot) -> Option<Slot> {
        while self.slots.len() <= index {
            self.free.insert(self.slots.len());
            self.slots.push(None);
        }
        self.free.remove(&index);
        self.slots[index].replace(slot)
    }

    fn take(&mut self, index: usize) -> Option<Slot> {
        let slot = self.slots.get_mut(index)?.take()?;
        self.free.insert(index);
        Some(slot)
    }
}

fn index_of(fd: c_int) -> Option<usize> {
    usize::try_from(fd.checked_sub(PF_DESCRIPTOR_FIRST)?).ok()
}

fn number_of(index: usize) -> c_int {
    // Below PF_DESCRIPTORS_MAX, which the table keeps.
    PF_DESCRIPTOR_FIRST + index as c_int
}

fn bad<T>() -> Outcome<T> {
    refuse(Errno::EBADF, "not an open descriptor")
}

fn slot_of(fd: c_int) -> Outcome<Slot> {
    let table = TABLE.read();
    let slot = index_of(fd).and_then(|index| table.slots.get(index)?.clone());
    slot.map_or_else(bad, Ok)
}

/// Looks a descriptor up.
pub(crate) fn of(fd: c_int) -> Outcome<Arc<Description>> {
    let table = TABLE.read();
    let found = index_of(fd).and_then(|index| table.slots.get(index)?.as_ref());
    match found {
        Some(slot) => Ok(Arc::clone(&slot.description)),
        None => bad(),
    }
}

/// Gives a description the lowest free number.
pub(crate) fn install(description: Description, flags: c_int) -> Outcome<c_int> {
    let slot = Slot {
        description: Arc::new(description),
        close_on_exec: flags & libc::O_CLOEXEC != 0,
    };
    place(slot, 0)
}

/// Puts a slot where the lowest number from `least` on is free.
fn place(slot: Slot, least: usize) -> Outcome<c_int> {
    let mut table = TABLE.write();
    let Some(index) = table.lowest(least) else {
        // Before the slot goes: its file may have to be written back.
        drop(table);
        return refuse(Errno::EMFILE, "one more descriptor");
    };
    table.put(index, slot);
    Ok(number_of(index))
}

/// Tells whether a number is in the range of this library's descriptors: 1 or 0.
#[unsafe(no_mangle)]
pub extern "C" fn pf_is_descriptor(fd: c_int) -> c_int {
    c_int::from(fd >= PF_DESCRIPTOR_FIRST)
}

/// Closes a descriptor, as close(2). With the last one of a description, what is dirty is written back and an error
/// not yet reported is returned; the descriptor is closed all the same.
#[unsafe(no_mangle)]
pub extern "C" fn pf_close(fd: c_int) -> c_int {
    answer(|| {
        let taken = index_of(fd).and_then(|index| TABLE.write().take(index));
        match taken {
            Some(slot) => end(slot).map(|()| 0),
            None => bad(),
        }
    })
}

/// Closes a descriptor that belongs to something else, whose end has nobody to tell errors to.
pub(crate) fn discard(fd: c_int) {
    let taken = index_of(fd).and_then(|index| TABLE.write().take(index));
    if let Some(slot) = taken {
        let _ = end(slot);
    }
}

/// Lets go of a description with one descriptor; with the last one, ends it.
fn end(slot: Slot) -> Outcome<()> {
    if let Some(description) = Arc::into_inner(slot.description)
        && let Opened::File(file) = description.opened
    {
        file.close()?;
    }
    Ok(())
}

/// Gives an open description one more descriptor, the lowest free one, as dup(2).
#[unsafe(no_mangle)]
pub extern "C" fn pf_dup(fd: c_int) -> c_int {
    answer(|| duplicate(fd, PF_DESCRIPTOR_FIRST, false))
}

/// Makes `new_fd` one more descriptor of what `fd` names, closing it first if it is open, as dup2(2). Both have to be this
/// library's: ENOTSUP for a number of the kernel's.
#[unsafe(no_mangle)]
pub extern "C" fn pf_dup2(fd: c_int, new_fd: c_int) -> c_int {
    answer(|| {
        let mut slot = slot_of(fd)?;
        slot.close_on_exec = false;
        let Some(index) = index_of(new_fd) else {
            let errno = if new_fd < 0 {
                Errno::EBADF
            } else {
                Errno::EOPNOTSUPP
            };
            return refuse(errno, "the new number is not one of this library's");
        };
        if fd == new_fd {
            return Ok(fd);
        }
        if index >= PF_DESCRIPTORS_MAX as usize {
            return bad();
        }
        let replaced = TABLE.write().put(index, slot);
        if let Some(replaced) = replaced {
            // As dup2: its error is nobody's.
            let _ = end(replaced);
        }
        Ok(new_fd)
    })
}

fn duplicate(fd: c_int, least: c_int, close_on_exec: bool) -> Outcome<c_int> {
    let mut slot = slot_of(fd)?;
    slot.close_on_exec = close_on_exec;
    // As F_DUPFD takes 0 for "any", a number below ours means the first of ours.
    let least = index_of(least).unwrap_or(0);
    if least >= PF_DESCRIPTORS_MAX as usize {
        return refuse(Errno::EINVAL, "the least number");
    }
    place(slot, least)
}

/// F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL (O_APPEND, O_NONBLOCK, O_NOATIME, O_ASYNC),
/// F_GETLK, F_SETLK, F_SETLKW, as fcntl(2); `argument` is a number or an address. Record locks are always granted: one
/// process serves a volume, and its own locks never conflict.
///
/// # Safety
/// If `argument` is an address, the structure there is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_fcntl(fd: c_int, command: c_int, argument: libc::intptr_t) -> c_int {
    answer(|| match command {
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => {
            // An int that came through C's `...`: the upper half is anything.
            let least = argument as c_int;
            if least < 0 {
                return refuse(Errno::EINVAL, "the least number");
            }
            duplicate(fd, least, command == libc::F_DUPFD_CLOEXEC)
        }
        libc::F_GETFD => {
            let set = slot_of(fd)?.close_on_exec;
            Ok(if set { libc::FD_CLOEXEC } else { 0 })
        }
        libc::F_SETFD => {
            let mut table = TABLE.write();
            let slot = index_of(fd).and_then(|index| table.slots.get_mut(index)?.as_mut());
            let Some(slot) = slot else {
                return bad();
            };
            slot.close_on_exec = argument & libc::FD_CLOEXEC as libc::intptr_t != 0;
            Ok(0)
        }
        libc::F_GETFL => Ok(of(fd)?.flags()),
        libc::F_SETFL => {
            let description = of(fd)?;
            // As above.
            let wanted = argument as c_int;
            let old = description.flags();
            if (wanted ^ old) & libc::O_DIRECT != 0 {
                return refuse(Errno::EINVAL, "O_DIRECT is fixed when a file is opened");
            }
            let new = (old & !FLAGS_CHANGEABLE) | (wanted & FLAGS_CHANGEABLE);
            description.flags.store(new, Ordering::Relaxed);
            Ok(0)
        }
        libc::F_GETLK | libc::F_SETLK | libc::F_SETLKW => {
            let description = of(fd)?;
            // SAFETY: passed on to the caller.
            unsafe { lock(&description, command, argument as usize) }
        }
        _ => {
            of(fd)?;
            refuse(Errno::EINVAL, "the command")
        }
    })
}

/// Grants a record lock.
///
/// # Safety
/// As for [`user::buffer`].
unsafe fn lock(description: &Description, command: c_int, at: usize) -> Outcome<c_int> {
    let place = std::ptr::with_exposed_provenance_mut::<libc::flock>(at);
    // SAFETY: passed on to the caller.
    let mut lock = unsafe { user::get(place) }?;
    let access = description.file_or(Errno::EBADF)?.access();
    let kind = c_int::from(lock.l_type);
    let allowed = match kind {
        libc::F_RDLCK => command == libc::F_GETLK || access.read,
        libc::F_WRLCK => command == libc::F_GETLK || access.write,
        libc::F_UNLCK => command != libc::F_GETLK,
        _ => return refuse(Errno::EINVAL, "the kind of lock"),
    };
    if !allowed && kind == libc::F_UNLCK {
        return refuse(Errno::EINVAL, "the kind of lock");
    }
    if !allowed {
        return refuse(
            Errno::EBADF,
            "the descriptor is not open for that kind of lock",
        );
    }
    let whence = c_int::from(lock.l_whence);
    if ![libc::SEEK_SET, libc::SEEK_CUR, libc::SEEK_END].contains(&whence) {
        return refuse(Errno::EINVAL, "whence");
    }
    if command == libc::F_GETLK {
        lock.l_type = libc::F_UNLCK as libc::c_short;
        // SAFETY: passed on to the caller.
        unsafe { user::put(place, lock) }?;
    }
    Ok(0)
}
