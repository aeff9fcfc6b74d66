//! Creating files as somebody else: one thread's filesystem uid, gid, and umask.
//!
//! A server that creates on behalf of a caller wants the kernel's own rules for the new inode's owner, for
//! setgid directories, for default ACLs (which override the umask), so it becomes the caller for the length of
//! one system call. `setfsuid` and `setfsgid` concern the calling thread alone; the umask is shared with the
//! other threads until the thread leaves the shared `fs_struct`, which [`assume`] does once per thread.
//!
//! The capabilities that becoming another user drops are raised again where the caller's own rights have been
//! checked already: the right to search and write the directory, and to make device nodes.

use std::cell::Cell;
use std::marker::PhantomData;

use pinfold_base::Errno;
use rustix::fs::Mode;
use rustix::process::umask;
use rustix::thread::{CapabilitySet, UnshareFlags, capabilities, set_capabilities, unshare_unsafe};

/// On whose behalf a file is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The user who will own it.
    pub uid: u32,
    /// The group, where the directory does not prescribe another.
    pub gid: u32,
    /// Permission bits to withhold, where no default ACL overrides that.
    pub umask: u32,
}

thread_local! {
    /// Whether this thread has an `fs_struct` of its own.
    static PRIVATE: Cell<bool> = const { Cell::new(false) };
}

/// What [`assume`] changed on this thread; changes it back when dropped.
#[derive(Debug)]
#[must_use = "the thread is itself again as soon as this is dropped"]
pub struct Assumed {
    umask: Mode,
    /// The capabilities to come back to, when the thread became another user.
    became: Option<Before>,
    /// The change is the thread's: the undoing must happen there too.
    _here: PhantomData<*const ()>,
}

#[derive(Debug)]
struct Before {
    uid: u32,
    gid: u32,
}

/// Tells whether this process can create files as other users.
#[must_use]
pub fn can_assume() -> bool {
    capabilities(None).is_ok_and(|sets| {
        sets.effective
            .contains(CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::DAC_OVERRIDE)
    })
}

/// Makes this thread create files as `caller` until the result is dropped.
///
/// Without the capabilities for that (see [`can_assume`]) only the umask changes and files belong to this process.
/// The first call gives the thread a working directory of its own, which it keeps.
///
/// # Errors
/// `ENOMEM`; what capset(2) says.
pub fn assume(caller: &Caller) -> Result<Assumed, Errno> {
    let errno = |e: rustix::io::Errno| Errno::from_raw(e.raw_os_error());
    if !PRIVATE.get() {
        // SAFETY: CLONE_FS makes root, working directory and umask the thread's own; no memory or descriptor of
        // another thread is concerned.
        unsafe { unshare_unsafe(UnshareFlags::FS) }.map_err(errno)?;
        PRIVATE.set(true);
    }
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    let mut assumed = Assumed {
        umask: umask(Mode::from_raw_mode(caller.umask & 0o777)),
        became: None,
        _here: PhantomData,
    };
    if (caller.uid == uid && caller.gid == gid) || !can_assume() {
        return Ok(assumed);
    }
    assumed.became = Some(Before { uid, gid });
    let before = capabilities(None).map_err(errno)?;
    set_fs_ids(caller.uid, caller.gid);
    let mut during = capabilities(None).map_err(errno)?;
    let kept = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH | CapabilitySet::MKNOD;
    during.effective |= kept & before.effective;
    set_capabilities(None, during).map_err(errno)?;
    Ok(assumed)
}

impl Drop for Assumed {
    fn drop(&mut self) {
        umask(self.umask);
        if let Some(before) = &self.became {
            // Back to user 0 the kernel raises the file capabilities again that are permitted.
            set_fs_ids(before.uid, before.gid);
        }
    }
}

/// Sets this thread's filesystem ids; the calls return the old ids and cannot report failure.
fn set_fs_ids(uid: u32, gid: u32) {
    // SAFETY: concerns this thread's credentials alone.
    unsafe { libc::setfsgid(gid) };
    // SAFETY: concerns this thread's credentials alone.
    unsafe { libc::setfsuid(uid) };
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};

    use super::*;

    fn fresh(name: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("pinfold-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        dir
    }

    fn create(path: &std::path::Path) -> std::io::Result<std::fs::File> {
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o666)
            .open(path)
    }

    #[test]
    fn a_file_made_under_a_caller_is_the_callers_and_the_thread_recovers() {
        let dir = fresh("creds");
        let caller = Caller {
            uid: 12345,
            gid: 23456,
            umask: 0o027,
        };
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700)).unwrap();
        let path = dir.clone();
        std::thread::spawn(move || {
            let own = rustix::process::geteuid().as_raw();
            {
                let _as_caller = assume(&caller).unwrap();
                create(&path.join("theirs")).unwrap();
            }
            create(&path.join("ours")).unwrap();
            let theirs = std::fs::metadata(path.join("theirs")).unwrap();
            assert_eq!(theirs.mode() & 0o777, 0o640);
            if can_assume() {
                assert_eq!((theirs.uid(), theirs.gid()), (12345, 23456));
            } else {
                assert_eq!(theirs.uid(), own);
            }
            assert_eq!(std::fs::metadata(path.join("ours")).unwrap().uid(), own);
        })
        .join()
        .unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn the_umask_of_other_threads_stays() {
        let dir = fresh("umask");
        let (inside, ready) = std::sync::mpsc::channel();
        let (leave, left) = std::sync::mpsc::channel::<()>();
        let worker = std::thread::spawn(move || {
            let caller = Caller {
                uid: rustix::process::geteuid().as_raw(),
                gid: rustix::process::getegid().as_raw(),
                umask: 0o777,
            };
            let _as_caller = assume(&caller).unwrap();
            inside.send(()).unwrap();
            let _ = left.recv();
        });
        ready.recv().unwrap();
        let file = create(&dir.join("mine")).unwrap();
        assert_ne!(file.metadata().unwrap().mode() & 0o777, 0);
        leave.send(()).unwrap();
        worker.join().unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
