//! The names of a directory store: everything below one directory, reached by what it is and not by its path.
//!
//! *Owns*: the volume's directory and the claim that no other Pinfold serves it, [`Handle`]s (one inode each), the
//! operations on names and attributes, reading directories.
//!
//! *Does not own*: one object per inode (that table is the volume's), file contents, cached sizes and times.
//!
//! *Locking*: leaves (class 6) around the list of held descriptors and a handle's own descriptor; no system call
//! that can block on a disk is made under one.
//!
//! A handle keeps an `O_PATH` descriptor while few are held. Where the process may open by file handle
//! (CAP_DAC_READ_SEARCH), the least used descriptors are closed beyond a limit and opened again when needed, so that
//! a hundred thousand inodes do not take a hundred thousand descriptors. Elsewhere the limit is the
//! process's, and `EMFILE` the answer.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pinfold_base::Errno;
use pinfold_mem::sys::FileHandle;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::process::{Resource, getrlimit};

mod claim;
mod entries;
mod handle;
mod stat;

pub use claim::Claim;
use claim::Sharing;
pub use entries::{DirEntry, Entries};
pub use handle::{Handle, RenameFlags, SetXattr};
pub use pinfold_mem::creds::Caller;
pub use stat::{Change, FileId, Kind, SpaceStat, Stat, TimeChange, Timestamp};

/// The most `O_PATH` descriptors kept where they can be opened again.
const DESCRIPTORS_MAX: usize = 8192;
/// The most mounts below the directory whose inodes can be opened by handle; inodes of others keep descriptors.
const MOUNTS_MAX: usize = 256;

/// Why a directory cannot be served.
#[derive(Debug)]
pub enum OpenError {
    /// It cannot be opened: missing, not a directory, no permission.
    Unusable {
        /// The directory as it was named.
        path: PathBuf,
        /// What the system says.
        errno: Errno,
    },
    /// It was removed while somebody still held it open.
    Removed {
        /// The directory as it was named.
        path: PathBuf,
    },
    /// Another Pinfold serves it, or a directory above or below it.
    Claimed {
        /// The directory as it was named.
        path: PathBuf,
        /// The directory whose claim is in the way.
        by: PathBuf,
        /// Who holds that, where the system tells: process number and name.
        holder: Option<(u32, String)>,
    },
    /// `/proc` is not mounted; inodes cannot be opened again by descriptor without it.
    NoProc {
        /// What opening it said.
        errno: Errno,
    },
}

impl OpenError {
    /// Returns the error number.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Unusable { errno, .. } | Self::NoProc { errno } => *errno,
            Self::Removed { .. } => Errno::ENOENT,
            Self::Claimed { .. } => Errno::EBUSY,
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unusable { path, errno } => write!(f, "{}: {errno}", path.display()),
            Self::Removed { path } => write!(f, "{}: the directory was removed", path.display()),
            Self::Claimed { path, by, holder } => {
                write!(f, "{}: another Pinfold serves it", path.display())?;
                if by != path {
                    write!(f, ", or a directory that contains it: {}", by.display())?;
                }
                match holder {
                    Some((pid, name)) => write!(f, " (process {pid}, {name})"),
                    None => Ok(()),
                }
            }
            Self::NoProc { errno } => write!(f, "/proc/self/fd: {errno}"),
        }
    }
}

impl std::error::Error for OpenError {}

/// Everything below one directory.
#[derive(Debug)]
pub struct Namespace {
    root: Arc<Handle>,
    path: PathBuf,
    claim: Claim,
}

impl Namespace {
    /// Opens `dir` and claims it: until this is dropped, no other Pinfold can open it, nor a directory above or below it
    /// on the same filesystem.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        Self::open_as(dir, Sharing::Alone)
    }

    /// As [`Namespace::open`], beside others that open it so: they see to it that they agree. It is claimed against those that
    /// want it alone.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_shared(dir: &Path) -> Result<Self, OpenError> {
        Self::open_as(dir, Sharing::Together)
    }

    fn open_as(dir: &Path, sharing: Sharing) -> Result<Self, OpenError> {
        let unusable = |errno: rustix::io::Errno| OpenError::Unusable {
            path: dir.to_owned(),
            errno: Errno::from_raw(errno.raw_os_error()),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, dir, flags, Mode::empty()).map_err(unusable)?;
        let search = rustix::fs::Access::READ_OK | rustix::fs::Access::EXEC_OK;
        rustix::fs::accessat(&fd, ".", search, AtFlags::EACCESS).map_err(unusable)?;
        let held = rustix::fs::fstat(&fd).map_err(unusable)?;
        if held.st_nlink == 0 {
            return Err(OpenError::Removed {
                path: dir.to_owned(),
            });
        }
        rustix::fs::openat(
            CWD,
            "/proc/self/fd",
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| OpenError::NoProc {
            errno: Errno::from_raw(errno.raw_os_error()),
        })?;
        let claim = Claim::take(dir, &fd, sharing)?;
        let path = rustix::fs::openat(&fd, ".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(unusable)?;
        let space = Arc::new(Space::new());
        let (root, _) = space.adopt(path).map_err(|errno| OpenError::Unusable {
            path: dir.to_owned(),
            errno,
        })?;
        Ok(Self {
            root,
            path: dir.to_owned(),
            claim,
        })
    }

    /// Returns the directory itself.
    #[must_use]
    pub fn root(&self) -> &Arc<Handle> {
        &self.root
    }

    /// Returns the directory as it was named when it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns how many inodes should be kept that nobody uses: no more than leave descriptors for others, where each keeps
    /// one. `None` where they need none.
    #[must_use]
    pub fn kept_max(&self) -> Option<usize> {
        let space = self.root.space_shared();
        let by_handle = space.by_handle.load(Ordering::Relaxed);
        (!by_handle).then_some(space.descriptors_max)
    }

    /// Closes every descriptor that can be opened again: when they have run out.
    pub fn close_all(&self) {
        self.root.space_shared().close_all();
    }

    /// Returns how many descriptors each user of them should be content with: a quarter of what this process may have,
    /// within reason.
    #[must_use]
    pub fn descriptors_max(&self) -> usize {
        self.root.space_shared().descriptors_max
    }

    /// Returns what keeps others from serving the directory.
    #[must_use]
    pub fn claim(&self) -> &Claim {
        &self.claim
    }
}

/// What all handles of a name space share: which of them hold descriptors, and how to open others.
#[derive(Debug)]
struct Space {
    /// Whether open_by_handle_at has not been refused yet.
    by_handle: AtomicBool,
    /// A descriptor per mount, to open handles against; `None` where none could be had.
    mounts: Mutex<HashMap<u64, Option<Arc<OwnedFd>>>>,
    /// Handles with a descriptor that could be closed, in the order of a clock's hand.
    holding: Mutex<VecDeque<Weak<Handle>>>,
    descriptors_max: usize,
}

impl Space {
    fn new() -> Self {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        // A quarter for names, the rest for open files and the program.
        let quarter = usize::try_from(limit / 4).unwrap_or(usize::MAX);
        Self {
            by_handle: AtomicBool::new(true),
            mounts: Mutex::new(HashMap::new()),
            holding: Mutex::new(VecDeque::new()),
            descriptors_max: quarter.clamp(16, DESCRIPTORS_MAX),
        }
    }

    /// Makes a handle of an `O_PATH` descriptor.
    fn adopt(self: &Arc<Self>, fd: OwnedFd) -> Result<(Arc<Handle>, Stat), Errno> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
        let raw = rustix::fs::statx(&fd, "", AtFlags::EMPTY_PATH, wanted)
            .map_err(|e| Errno::from_raw(e.raw_os_error()))?;
        let name = FileHandle::of(&fd).ok();
        let stat = Stat::new(&raw, name.as_ref());
        let mount = name
            .as_ref()
            .and_then(|name| self.mount_of(raw.stx_mnt_id, &fd, name, stat.kind));
        let again = name.zip(mount);
        let may_close = again.is_some();
        let handle = Arc::new(Handle::new(Arc::clone(self), fd, stat.id, stat.kind, again));
        if may_close {
            self.note_holding(&handle);
        }
        Ok((handle, stat))
    }

    /// Returns a descriptor against which handles of the mount can be opened, if that works at all.
    fn mount_of(
        &self,
        mount: u64,
        fd: &OwnedFd,
        name: &FileHandle,
        kind: Kind,
    ) -> Option<Arc<OwnedFd>> {
        if !self.by_handle.load(Ordering::Relaxed) {
            return None;
        }
        if let Some(known) = self.mounts.lock().get(&mount) {
            return known.clone();
        }
        // A mount is met at its root first. Where that is a single file (a bind mount), opening it could have
        // effects of its own: its inodes keep their descriptors.
        let anchor = (kind == Kind::Directory)
            .then(|| {
                rustix::fs::openat(
                    fd,
                    ".",
                    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                    Mode::empty(),
                )
                .ok()
            })
            .flatten()
            .map(Arc::new);
        let anchor = anchor.filter(|anchor| match name.open(anchor, OFlags::PATH) {
            Ok(_) => true,
            Err(errno) => {
                if errno == Errno::EPERM {
                    self.by_handle.store(false, Ordering::Relaxed);
                }
                false
            }
        });
        let mut mounts = self.mounts.lock();
        if mounts.len() < MOUNTS_MAX {
            mounts.insert(mount, anchor.clone());
        }
        anchor
    }

    fn close_all(&self) {
        let holding = std::mem::take(&mut *self.holding.lock());
        for handle in holding.iter().filter_map(Weak::upgrade) {
            handle.close();
        }
    }

    /// Notes that `handle` holds a descriptor that could be closed, and closes others' beyond the limit.
    fn note_holding(&self, handle: &Arc<Handle>) {
        let mut holding = self.holding.lock();
        holding.push_back(Arc::downgrade(handle));
        // Each round removes an entry or spends its second chance: at most two rounds an entry.
        let mut rounds = 2 * holding.len();
        while holding.len() > self.descriptors_max && rounds > 0 {
            rounds -= 1;
            let Some(oldest) = holding.pop_front() else {
                break;
            };
            let Some(candidate) = oldest.upgrade() else {
                continue;
            };
            if candidate.take_second_chance() {
                holding.push_back(oldest);
                continue;
            }
            // Closing may wait for a filesystem, and dropping the last reference comes back to no lock of ours.
            parking_lot::MutexGuard::unlocked(&mut holding, || {
                candidate.close();
                drop(candidate);
            });
        }
    }
}

#[cfg(test)]
mod tests;
