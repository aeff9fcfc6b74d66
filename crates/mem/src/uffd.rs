//! userfaultfd: who is told of a fault, and how its page gets there.
//!
//! *Owns*: the descriptor and what it may do ([`Privilege`], [`Uffd::features`]), its ioctls, the reading of events, the
//! page-table scan ([`scan`]).
//!
//! *Does not own*: the mapped memory ([`crate::window`]); what page belongs where, and when.
//!
//! *Locking*: none. The calls that install or protect pages are raw system calls: they allocate nothing and leave `errno`
//! alone, so a signal handler may make them.
//!
//! Everything here was measured before it was relied on; the tests beside this file hold the facts by the numbers of
//! SEMANTICS.md section 0.

mod scan;
#[cfg(test)]
mod tests;
mod tracking;

use std::fmt;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as raw;
use pinfold_base::{Errno, PAGE_SIZE};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

pub use scan::{ScanFor, scan};
pub use tracking::tracks_stores;

use crate::copy::Access;
use crate::descriptor::high;
use crate::span::RawSpan;
use crate::window::UserMap;

/// `UFFDIO`, the letter of the ioctls.
const GROUP: u8 = 0xaa;
/// `USERFAULTFD_IOC_NEW`, of `/dev/userfaultfd`.
const NEW: Opcode = opcode::none(GROUP, 0);
/// `UFFD_USER_MODE_ONLY`: faults of the kernel on the program's behalf are not for us.
const USER_MODE_ONLY: u32 = 1;
/// Events read with one system call.
const EVENTS_MAX: usize = 32;
/// Size of an event record.
const MESSAGE: usize = 32;

/// How a userfaultfd was had, from least to most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Privilege {
    /// Faults in user mode only: a system call that meets a page which is not resident fails with `EFAULT`.
    UserModeOnly,
    /// Everything, by the device node.
    Device,
    /// Everything, by the system call: as root, or with vm.unprivileged_userfaultfd = 1.
    Full,
}

impl Privilege {
    /// Whatever can be had.
    pub const ANY: RangeInclusive<Self> = Self::UserModeOnly..=Self::Full;

    /// Tells whether system calls of the program wait for their pages as its own instructions do.
    #[must_use]
    pub fn serves_kernel(self) -> bool {
        self != Self::UserModeOnly
    }
}

/// How a thread that faults is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// It sleeps while another thread reads the event and resolves it.
    Handler,
    /// It gets SIGBUS and resolves the fault itself; system calls on pages that are not there fail.
    Inline,
}

/// Why there is no userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UffdError {
    /// None of the ways that were allowed led to one.
    Refused {
        /// What the last way said.
        errno: Errno,
    },
    /// The program has closed the library's descriptors.
    Closed,
    /// The kernel is too old.
    Missing {
        /// The features it lacks, as in `struct uffdio_api`.
        features: u64,
    },
    /// A system call failed.
    System {
        /// Which one.
        call: &'static str,
        /// With what.
        errno: Errno,
    },
}

impl UffdError {
    /// Returns the error number.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Refused { errno } | Self::System { errno, .. } => *errno,
            Self::Missing { .. } => Errno::EOPNOTSUPP,
            Self::Closed => Errno::EBADF,
        }
    }
}

impl fmt::Display for UffdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { errno } => write!(f, "userfaultfd is refused: {errno}"),
            Self::Missing { features } => {
                write!(
                    f,
                    "the kernel's userfaultfd lacks the features {features:#x}"
                )
            }
            Self::Closed => write!(f, "the program has closed descriptors of the library"),
            Self::System { call, errno } => write!(f, "{call}: {errno}"),
        }
    }
}

impl std::error::Error for UffdError {}

/// Why an installation came no further than it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstallStop {
    /// The next page is there already: mapped, or (copying) present in the window.
    Exists,
    /// The window has no such page (resuming).
    Hole,
    /// The range is not registered any more, or crosses out of its mapping, or the process is ending.
    Gone,
    /// The system has no memory for the page.
    NoMemory,
    /// Anything else.
    Other(Errno),
}

/// How far an installation came; the pages before the stop are mapped and their waiters awake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "the pages after `pages` are not mapped"]
pub struct Installed {
    /// Pages mapped by this call, from the first.
    pub pages: usize,
    /// What stopped it; `None` when it came to the end.
    pub stop: Option<InstallStop>,
}

/// What is wrong with the page that was touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The window has no such page.
    Missing,
    /// The window has the page; this mapping does not show it.
    Minor,
    /// The page is mapped, for reading only.
    WriteProtected,
}

/// A fault that somebody waits on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The byte that was touched.
    pub addr: usize,
    /// What for.
    pub access: Access,
    /// What was wrong.
    pub kind: FaultKind,
    /// The thread that waits (as gettid(2) names it).
    pub thread: u32,
}

impl Event {
    /// Fills an array to read events into.
    pub const NONE: Self = Self {
        addr: 0,
        access: Access::Read,
        kind: FaultKind::Missing,
        thread: 0,
    };

    /// Reads one record; `None` for events we do not ask for.
    fn parse(message: &[u8; MESSAGE]) -> Option<Self> {
        let word = |at: usize| {
            let bytes = message[at..at + 8].try_into();
            bytes.map_or(0, u64::from_ne_bytes)
        };
        if u32::from(message[0]) != raw::UFFD_EVENT_PAGEFAULT {
            return None;
        }
        let flags = word(8);
        let has = |flag: u32| flags & u64::from(flag) != 0;
        let kind = if has(raw::UFFD_PAGEFAULT_FLAG_WP) {
            FaultKind::WriteProtected
        } else if has(raw::UFFD_PAGEFAULT_FLAG_MINOR) {
            FaultKind::Minor
        } else {
            FaultKind::Missing
        };
        let stores = has(raw::UFFD_PAGEFAULT_FLAG_WRITE) || kind == FaultKind::WriteProtected;
        Some(Self {
            addr: usize::try_from(word(16)).ok()?,
            access: if stores { Access::Write } else { Access::Read },
            kind,
            // The upper half of the word is padding.
            thread: word(24) as u32,
        })
    }
}

/// A userfaultfd: the registration of any number of mappings lasts as long as it does.
pub struct Uffd {
    fd: OwnedFd,
    /// Readable once readers shall leave.
    stop: OwnedFd,
    /// Waits for both, where there are events to read. Not poll(2): under a limit of no descriptors, which sandboxes set,
    /// it takes none, and threads that have faulted would wait for ever.
    ready: Option<OwnedFd>,
    delivery: Delivery,
    privilege: Privilege,
    features: u64,
}

impl fmt::Debug for Uffd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uffd")
            .field("delivery", &self.delivery)
            .field("privilege", &self.privilege)
            .field("features", &format_args!("{:#x}", self.features))
            .finish_non_exhaustive()
    }
}

impl AsFd for Uffd {
    /// Readable when an event waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Uffd {
    /// Opens one with the most that can be had within `privileges`.
    ///
    /// With `wp_async` the kernel resolves write-protect faults by itself and [`scan`] tells which pages were stored
    /// to.
    ///
    /// # Errors
    /// See [`UffdError`].
    pub fn open(
        delivery: Delivery,
        privileges: RangeInclusive<Privilege>,
        wp_async: bool,
    ) -> Result<Self, UffdError> {
        let (probe, privilege) = obtain(privileges)?;
        // Features can be named once per descriptor: one to ask what there is, another to ask for it.
        let offered = handshake(&probe, 0)?;
        let wanted = features_wanted(delivery, wp_async);
        if wanted & !offered != 0 {
            return Err(UffdError::Missing {
                features: wanted & !offered,
            });
        }
        let (fd, privilege) = obtain(privilege..=privilege)?;
        let optional = u64::from(raw::UFFD_FEATURE_POISON);
        let features = wanted | (optional & offered);
        handshake(&fd, features)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(system("eventfd"))?;
        let (fd, stop) = (high(fd), high(stop));
        let ready = match delivery {
            Delivery::Handler => Some(wait_set(&fd, &stop)?),
            Delivery::Inline => None,
        };
        Ok(Self {
            fd,
            stop,
            ready,
            delivery,
            privilege,
            features,
        })
    }

    /// Returns how it was had.
    #[must_use]
    pub fn privilege(&self) -> Privilege {
        self.privilege
    }

    /// Returns how faults are told.
    #[must_use]
    pub fn delivery(&self) -> Delivery {
        self.delivery
    }

    /// Returns the features in force, as in `struct uffdio_api`.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Tells whether [`Uffd::poison`] works.
    #[must_use]
    pub fn can_poison(&self) -> bool {
        self.features & u64::from(raw::UFFD_FEATURE_POISON) != 0
    }

    /// Tells whether the kernel resolves write-protect faults by itself, so that stores are found with [`scan`].
    #[must_use]
    pub fn wp_async(&self) -> bool {
        self.features & u64::from(raw::UFFD_FEATURE_WP_ASYNC) != 0
    }

    /// Tells whether the descriptor is still there. Once the program has closed it, as by close_range(2) for all that there
    /// are, faults are nobody's, and what is not resident reads as the window has it (SEMANTICS.md section 0, fact 8).
    #[must_use]
    pub fn is_open(&self) -> bool {
        rustix::io::fcntl_getfd(&self.fd).is_ok()
    }

    /// Takes charge of every fault in a mapping: missing, minor and write-protected pages.
    ///
    /// # Errors
    /// `EBUSY` when another userfaultfd has it; `ENOMEM`.
    pub fn register(&self, map: &UserMap) -> Result<(), Errno> {
        self.register_range(map.addr(), map.len())
    }

    /// The same for a part that is mapped throughout.
    pub(crate) fn register_range(&self, addr: usize, len: usize) -> Result<(), Errno> {
        let faults = raw::UFFDIO_REGISTER_MODE_MISSING
            | raw::UFFDIO_REGISTER_MODE_MINOR
            | raw::UFFDIO_REGISTER_MODE_WP;
        self.register_for(addr, len, faults)
    }

    /// Takes charge of missing pages alone, which any memory has.
    pub(crate) fn register_missing(&self, addr: usize, len: usize) -> Result<(), Errno> {
        self.register_for(addr, len, raw::UFFDIO_REGISTER_MODE_MISSING)
    }

    fn register_for(&self, addr: usize, len: usize, faults: u32) -> Result<(), Errno> {
        let mut register = raw::uffdio_register {
            range: range_of(addr, len),
            mode: u64::from(faults),
            ioctls: 0,
        };
        const REGISTER: Opcode = linux_raw_sys::ioctl::UFFDIO_REGISTER;
        // SAFETY: the opcode takes this structure.
        let request = unsafe { Updater::<REGISTER, _>::new(&mut register) };
        // SAFETY: changes who is told of faults; the range is a mapping that nobody holds references into (`UserMap`,
        // `Region`).
        unsafe { ioctl(&self.fd, request) }.map_err(errno)
    }

    /// Gives up charge of a mapping: what is not resident then reads as the window has it, zeros for holes.
    ///
    /// # Errors
    /// `EINVAL` when it was not registered here.
    pub fn unregister(&self, map: &UserMap) -> Result<(), Errno> {
        let mut range = range_of(map.addr(), map.len());
        const UNREGISTER: Opcode = linux_raw_sys::ioctl::UFFDIO_UNREGISTER;
        // SAFETY: the opcode takes this structure.
        let request = unsafe { Updater::<UNREGISTER, _>::new(&mut range) };
        // SAFETY: as for `register`.
        unsafe { ioctl(&self.fd, request) }.map_err(errno)
    }

    /// Allocates the window's pages at mapped address `dst`, fills them from `src`, and maps them; for reading only when
    /// `protect`.
    ///
    /// `dst` and the length are whole pages within one shared mapping (in a private one this would make private copies
    /// that hide the window's pages: fill the window and [`resume`](Self::resume) there). Existing pages are never
    /// overwritten: the kernel answers [`InstallStop::Exists`], after which `resume` maps what is there.
    pub fn copy(&self, dst: usize, src: RawSpan, protect: bool) -> Installed {
        self.install(dst, src.len, |done| {
            let mut copy = raw::uffdio_copy {
                dst: (dst + done) as u64,
                src: (src.addr + done) as u64,
                len: (src.len - done) as u64,
                mode: if protect {
                    u64::from(raw::UFFDIO_COPY_MODE_WP)
                } else {
                    0
                },
                copy: 0,
            };
            const COPY: Opcode = linux_raw_sys::ioctl::UFFDIO_COPY;
            // SAFETY: the opcode takes this structure.
            let request = unsafe { Updater::<COPY, _>::new(&mut copy) };
            // SAFETY: the kernel reads `src` as any system call would (`EFAULT` where nothing is mapped) and writes fresh
            // pages of a registered mapping alone, into which no references exist.
            let outcome = unsafe { ioctl(&self.fd, request) };
            (outcome.map_err(errno), copy.copy, Errno::EFAULT)
        })
    }

    /// Maps `len` bytes of pages that the window has at mapped address `addr`; for reading only when `protect`.
    ///
    /// Whole pages within one mapping. Without `protect` an earlier protection of the page does not survive.
    pub fn resume(&self, addr: usize, len: usize, protect: bool) -> Installed {
        /// `UFFDIO_CONTINUE_MODE_WP`.
        const MODE_WP: u64 = 1 << 1;
        self.install(addr, len, |done| {
            let mut resume = raw::uffdio_continue {
                range: range_of(addr + done, len - done),
                mode: if protect { MODE_WP } else { 0 },
                mapped: 0,
            };
            const CONTINUE: Opcode = linux_raw_sys::ioctl::UFFDIO_CONTINUE;
            // SAFETY: the opcode takes this structure.
            let request = unsafe { Updater::<CONTINUE, _>::new(&mut resume) };
            // SAFETY: maps pages where none were mapped, in a registered mapping alone.
            let outcome = unsafe { ioctl(&self.fd, request) };
            (outcome.map_err(errno), resume.mapped, Errno::EEXIST)
        })
    }

    /// Repeats `step` until everything is installed or a first page fails, which is when the kernel gives the reason.
    ///
    /// `step` gets the bytes done and returns the outcome, the kernel's own count, and what `EFAULT` is not.
    fn install(
        &self,
        addr: usize,
        len: usize,
        mut step: impl FnMut(usize) -> (Result<(), Errno>, i64, Errno),
    ) -> Installed {
        let mut done = 0;
        let stop = loop {
            if done >= len {
                break None;
            }
            let (outcome, counted, plain_fault) = step(done);
            // A count below zero repeats the error number.
            let moved = usize::try_from(counted).unwrap_or(0).min(len - done);
            match outcome {
                Ok(()) => {
                    done = len;
                }
                Err(_) if moved > 0 => done += moved,
                Err(Errno::EINTR) => {}
                Err(errno) => break Some(self.stop_of(addr + done, errno, plain_fault)),
            }
        };
        Installed {
            pages: done / PAGE,
            stop,
        }
    }

    fn stop_of(&self, addr: usize, errno: Errno, plain_fault: Errno) -> InstallStop {
        match errno {
            Errno::EEXIST => {
                // Whoever waits for this page was told when it came; once more costs little and hangs nobody.
                if self.delivery == Delivery::Handler {
                    let _ = self.wake(addr, PAGE);
                }
                InstallStop::Exists
            }
            Errno::EFAULT if plain_fault != Errno::EFAULT => InstallStop::Hole,
            Errno::ENOENT | ESRCH => InstallStop::Gone,
            Errno::ENOMEM | Errno::ENOSPC => InstallStop::NoMemory,
            other => InstallStop::Other(other),
        }
    }

    /// Makes the pages of a mapped range read-only, those not resident included; when it returns no store is under way.
    ///
    /// The range may span several mappings of this descriptor and the gaps between them.
    ///
    /// # Errors
    /// `ENOENT` when nothing is registered there.
    pub fn protect(&self, addr: usize, len: usize) -> Result<(), Errno> {
        /// `UFFDIO_WRITEPROTECT_MODE_WP`.
        const MODE_WP: u64 = 1 << 0;
        self.write_protect(addr, len, MODE_WP)
    }

    /// Makes the pages of a mapped range writable again and wakes who waits for that.
    ///
    /// # Errors
    /// `ENOENT` when nothing is registered there.
    pub fn unprotect(&self, addr: usize, len: usize) -> Result<(), Errno> {
        self.write_protect(addr, len, 0)
    }

    fn write_protect(&self, addr: usize, len: usize, mode: u64) -> Result<(), Errno> {
        const WRITEPROTECT: Opcode = linux_raw_sys::ioctl::UFFDIO_WRITEPROTECT;
        loop {
            let mut protect = raw::uffdio_writeprotect {
                range: range_of(addr, len),
                mode,
            };
            // SAFETY: the opcode takes this structure.
            let request = unsafe { Updater::<WRITEPROTECT, _>::new(&mut protect) };
            // SAFETY: changes the protection of pages of a registered mapping, into which no references exist.
            match unsafe { ioctl(&self.fd, request) }.map_err(errno) {
                Err(Errno::EINTR) => {}
                outcome => return outcome,
            }
        }
    }

    /// Wakes threads that wait for pages of a range, to fault again.
    ///
    /// # Errors
    /// `EINVAL` for a range that is none.
    pub fn wake(&self, addr: usize, len: usize) -> Result<(), Errno> {
        let mut range = range_of(addr, len);
        const WAKE: Opcode = linux_raw_sys::ioctl::UFFDIO_WAKE;
        // SAFETY: the opcode takes this structure.
        let request = unsafe { Updater::<WAKE, _>::new(&mut range) };
        // SAFETY: touches no memory.
        unsafe { ioctl(&self.fd, request) }.map_err(errno)
    }

    /// Makes pages that are not mapped answer SIGBUS, waiters included, until they are installed or their entries dropped.
    ///
    /// # Errors
    /// `EEXIST` for a page that is mapped, `EOPNOTSUPP` where [`Uffd::can_poison`] says no.
    pub fn poison(&self, addr: usize, len: usize) -> Result<(), Errno> {
        if !self.can_poison() {
            return Err(Errno::EOPNOTSUPP);
        }
        let mut poison = raw::uffdio_poison {
            range: range_of(addr, len),
            mode: 0,
            updated: 0,
        };
        const POISON: Opcode = opcode::read_write::<raw::uffdio_poison>(GROUP, 8);
        // SAFETY: the opcode takes this structure.
        let request = unsafe { Updater::<POISON, _>::new(&mut poison) };
        // SAFETY: concerns pages of a registered mapping that are not there, into which no references exist.
        unsafe { ioctl(&self.fd, request) }.map_err(errno)
    }

    /// Waits for events and reads some; 0 once [`Uffd::stop`] was called.
    ///
    /// # Errors
    /// `EINVAL` with [`Delivery::Inline`], which has no events; what epoll_wait(2) and read(2) say.
    pub fn read_events(&self, events: &mut [Event]) -> Result<usize, Errno> {
        let Some(set) = self.ready.as_ref().filter(|_| !events.is_empty()) else {
            return Err(Errno::EINVAL);
        };
        loop {
            let nothing = epoll::Event {
                flags: epoll::EventFlags::empty(),
                data: epoll::EventData::new_u64(FAULTS),
            };
            let mut ready = [nothing; 2];
            let count = match epoll::wait(set, &mut ready, None) {
                Ok(count) => count,
                Err(rustix::io::Errno::INTR) => continue,
                Err(other) => return Err(errno(other)),
            };
            let ready = &ready[..count];
            if ready
                .iter()
                .any(|&epoll::Event { data, .. }| data.u64() == STOP)
            {
                return Ok(0);
            }
            if ready
                .iter()
                .any(|&epoll::Event { flags, .. }| flags.contains(epoll::EventFlags::ERR))
            {
                return Err(Errno::EIO);
            }
            let count = self.read_ready(events)?;
            if count > 0 {
                return Ok(count);
            }
        }
    }

    /// Reads what there is; 0 when another reader was faster.
    fn read_ready(&self, events: &mut [Event]) -> Result<usize, Errno> {
        let mut messages = [[0u8; MESSAGE]; EVENTS_MAX];
        let most = events.len().min(EVENTS_MAX);
        let bytes = match rustix::io::read(&self.fd, messages[..most].as_flattened_mut()) {
            Ok(bytes) => bytes,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(0),
            Err(other) => return Err(errno(other)),
        };
        let told = messages[..bytes / MESSAGE]
            .iter()
            .filter_map(Event::parse)
            .zip(events)
            .map(|(event, slot)| *slot = event);
        Ok(told.count())
    }

    /// Sends every present and future reader of events home.
    pub fn stop(&self) {
        // The counter can only be full when it was told to stop before.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }
}

const PAGE: usize = PAGE_SIZE as usize;
const ESRCH: Errno = Errno::from_raw(libc::ESRCH);

fn errno(raw: rustix::io::Errno) -> Errno {
    Errno::from_raw(raw.raw_os_error())
}

fn system(call: &'static str) -> impl Fn(rustix::io::Errno) -> UffdError {
    move |raw| UffdError::System {
        call,
        errno: errno(raw),
    }
}

fn range_of(addr: usize, len: usize) -> raw::uffdio_range {
    raw::uffdio_range {
        start: addr as u64,
        len: len as u64,
    }
}

fn features_wanted(delivery: Delivery, wp_async: bool) -> u64 {
    let mut features = raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP
        | raw::UFFD_FEATURE_MISSING_SHMEM
        | raw::UFFD_FEATURE_MINOR_SHMEM
        | raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        | raw::UFFD_FEATURE_EXACT_ADDRESS;
    features |= match delivery {
        Delivery::Handler => raw::UFFD_FEATURE_THREAD_ID,
        Delivery::Inline => raw::UFFD_FEATURE_SIGBUS,
    };
    if wp_async {
        features |= raw::UFFD_FEATURE_WP_ASYNC;
    }
    u64::from(features)
}

/// What `wait_set` calls its members.
const FAULTS: u64 = 0;
const STOP: u64 = 1;

/// Makes one descriptor that waits for events and for the end of their readers.
fn wait_set(faults: &OwnedFd, stop: &OwnedFd) -> Result<OwnedFd, UffdError> {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(system("epoll_create1"))?;
    for (member, name) in [(faults, FAULTS), (stop, STOP)] {
        let name = epoll::EventData::new_u64(name);
        epoll::add(&set, member, name, epoll::EventFlags::IN).map_err(system("epoll_ctl"))?;
    }
    Ok(high(set))
}

/// Gets a bare descriptor in the best way allowed.
fn obtain(privileges: RangeInclusive<Privilege>) -> Result<(OwnedFd, Privilege), UffdError> {
    let ways = [Privilege::Full, Privilege::Device, Privilege::UserModeOnly];
    let mut refused = Errno::EPERM;
    for privilege in ways.into_iter().filter(|way| privileges.contains(way)) {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        let outcome = match privilege {
            // SAFETY: a descriptor without registrations does nothing; what it is used for is the ioctls' matter.
            Privilege::Full => unsafe { userfaultfd(flags) }.map_err(errno),
            Privilege::Device => from_device(),
            Privilege::UserModeOnly => {
                let flags = flags | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
                // SAFETY: as above.
                unsafe { userfaultfd(flags) }.map_err(errno)
            }
        };
        match outcome {
            Ok(fd) => return Ok((fd, privilege)),
            // A device node that is not there says less than the refusal before it.
            Err(Errno::ENOENT) => {}
            Err(errno) => refused = errno,
        }
    }
    Err(UffdError::Refused { errno: refused })
}

fn from_device() -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let device = openat(CWD, c"/dev/userfaultfd", flags, Mode::empty()).map_err(errno)?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: this request takes flags by value and makes a descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW.into(), flags) };
    if fd < 0 {
        return Err(Errno::from(std::io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Agrees on the protocol and on `features`; returns all that the kernel has.
fn handshake(fd: &OwnedFd, features: u64) -> Result<u64, UffdError> {
    let mut api = raw::uffdio_api {
        api: GROUP.into(),
        features,
        ioctls: 0,
    };
    const API: Opcode = linux_raw_sys::ioctl::UFFDIO_API;
    // SAFETY: the opcode takes this structure.
    let request = unsafe { Updater::<API, _>::new(&mut api) };
    // SAFETY: concerns the new descriptor alone.
    unsafe { ioctl(fd, request) }.map_err(system("ioctl(UFFDIO_API)"))?;
    Ok(api.features)
}
