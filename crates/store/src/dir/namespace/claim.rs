//! One Pinfold per directory: a claim that leaves nothing behind.
//!
//! The directory is locked exclusively with flock(2), its ancestors on the same filesystem shared: so a second Pinfold
//! meets the lock on the same directory, on one above (it asks for shared there) and on one below (its exclusive lock
//! meets the shared one). The locks vanish with their descriptors, also when the process is killed.
//! A forked child inherits descriptors of the same locks; so they are taken off when the claim ends, however long it lives.
//! Nodes of a cluster lock the directory shared: each other they let pass, others not. One that serves a directory below it
//! alone goes unnoticed then.
//! Ancestors that cannot be opened, that others use for temporary files (sticky ones, where cleaning programs take
//! locks of their own) and the root directory are left out: nobody serves those.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use pinfold_base::Errno;
use pinfold_mem::forked::Process;
use rustix::fs::{FlockOperation, Mode, OFlags, Stat};

use super::OpenError;

/// The most ancestors looked at: a path cannot have more components.
const ANCESTORS_MAX: usize = 2048;

/// The locks that keep others from serving a directory.
#[derive(Debug)]
pub struct Claim {
    /// The locked directories, the served one first; empty where the filesystem cannot lock directories.
    locks: Vec<OwnedFd>,
    process: Process,
}

/// Beside whom a directory is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// Nobody.
    Alone,
    /// Others that say so too.
    Together,
}

impl Claim {
    pub(super) fn take(path: &Path, dir: &OwnedFd, sharing: Sharing) -> Result<Self, OpenError> {
        let unusable = |errno: rustix::io::Errno| OpenError::Unusable {
            path: path.to_owned(),
            errno: Errno::from_raw(errno.raw_os_error()),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // A description of its own: dropping the claim must not depend on who else holds `dir`.
        let own = rustix::fs::openat(dir, ".", flags, Mode::empty()).map_err(unusable)?;
        let stat = rustix::fs::fstat(&own).map_err(unusable)?;
        let lock = match sharing {
            Sharing::Alone => FlockOperation::NonBlockingLockExclusive,
            Sharing::Together => FlockOperation::NonBlockingLockShared,
        };
        match rustix::fs::flock(&own, lock) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(claimed(path, &own, &stat)),
            // Some network filesystems cannot lock a directory; two servers there are the user's to avoid.
            Err(_) => return Ok(Self::over(Vec::new())),
        }
        let mut locks = vec![own];
        let top = rustix::fs::stat("/").map(|top| (top.st_dev, top.st_ino));
        for _ in 0..ANCESTORS_MAX {
            let Some(child) = locks.last() else { break };
            let Ok(parent) = rustix::fs::openat(child, "..", flags, Mode::empty()) else {
                break;
            };
            let Ok(parent_stat) = rustix::fs::fstat(&parent) else {
                break;
            };
            let is_top = top == Ok((parent_stat.st_dev, parent_stat.st_ino));
            if is_top
                || parent_stat.st_dev != stat.st_dev
                || parent_stat.st_mode & libc::S_ISVTX != 0
            {
                break;
            }
            if rustix::fs::flock(&parent, FlockOperation::NonBlockingLockShared)
                == Err(rustix::io::Errno::WOULDBLOCK)
            {
                return Err(claimed(path, &parent, &parent_stat));
            }
            locks.push(parent);
        }
        Ok(Self::over(locks))
    }

    fn over(locks: Vec<OwnedFd>) -> Self {
        Self {
            locks,
            process: Process::current(),
        }
    }

    /// Tells whether the filesystem could lock the directory: otherwise a second server goes unnoticed.
    #[must_use]
    pub fn is_exclusive(&self) -> bool {
        !self.locks.is_empty()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.process.is_current() {
            return;
        }
        for lock in &self.locks {
            // A failure leaves what closing the descriptor does.
            let _ = rustix::fs::flock(lock, FlockOperation::Unlock);
        }
    }
}

fn claimed(path: &Path, by: &OwnedFd, stat: &Stat) -> OpenError {
    let link = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&by.as_fd())
    );
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let named = rustix::fs::readlink(&link, Vec::new())
        .map(|target| PathBuf::from(OsStr::from_bytes(target.as_bytes())));
    let by = named.unwrap_or_else(|_| path.to_owned());
    OpenError::Claimed {
        path: path.to_owned(),
        by: if by == real(path) {
            path.to_owned()
        } else {
            by
        },
        holder: holder(stat),
    }
}

/// Finds out who holds a lock on the inode, from the kernel's list of locks.
fn holder(stat: &Stat) -> Option<(u32, String)> {
    let (major, minor) = (
        rustix::fs::major(stat.st_dev),
        rustix::fs::minor(stat.st_dev),
    );
    let inode = format!("{major:02x}:{minor:02x}:{}", stat.st_ino);
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    // Such as: 1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF
    locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, pid, place, ..] = fields[..] else {
            return None;
        };
        if place != inode {
            return None;
        }
        let pid = pid.parse().ok()?;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        Some((pid, name.trim_end().to_owned()))
    })
}
