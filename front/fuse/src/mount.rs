//! Mounting a volume, and taking the mount away again.
//!
//! A privileged process mounts by itself and hands the protocol library a connected descriptor: so that it unmounts exactly
//! its own mount, by number. Others go through the set-user-id program `fusermount3`, as the library does it.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, MountOption, Session, SessionACL, SessionUnmounter};
use pinfold::Node;
use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::growth::{self, Settler};
use crate::inodes::Inodes;
use crate::invalidator::Invalidator;
use crate::locks::Locks;
use crate::paging::{Linux, Paging};
use crate::reply::Device;
use crate::revoker::Revoker;
use crate::server::{Lanes, Server};

mod table;

pub use table::is_mount_point;
use table::{Mount, mount_at};

/// The most threads that serve one mount.
pub const THREADS_MAX: usize = 64;
/// What the mount table calls the source of our mounts.
const SOURCE: &str = "pinfold";
/// What the mount table calls their type.
const FILESYSTEM: &str = "fuse.pinfold";
/// How often a busy mount is tried again.
const BUSY_STEP: Duration = Duration::from_millis(20);

/// How a volume is mounted.
#[derive(Debug, Clone, Default)]
pub struct MountOptions {
    /// Threads that serve requests; default: two for each processor, 4 to 16. At most [`THREADS_MAX`].
    pub threads: Option<NonZeroUsize>,
    /// Whether users other than this process's may use it. `None`: yes for root, who else could not serve them as they
    /// are; no for others.
    pub allow_other: Option<bool>,
    /// How long a question for the size of a file waits for the call that makes it grow; then it is answered with a size that
    /// cannot be read up to until that call ends. Default: a second.
    pub size_wait: Option<Duration>,
    /// For a volume with glocks, whose files other nodes change too: whom it tells of demotions. Then the kernel caches neither names nor
    /// attributes, and of contents only what is mapped, until another node wants it.
    pub shared: Option<Revoker>,
}

/// Why a volume could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// `/dev/fuse` cannot be opened.
    #[error("/dev/fuse: {0}; is the fuse module loaded, and may this process use it?")]
    NoDevice(io::Error),
    /// mount(2) or `fusermount3` refused.
    #[error("cannot mount at {} through /dev/fuse: {error}", at.display())]
    Refused {
        /// The mount point.
        at: PathBuf,
        /// What was said.
        error: io::Error,
    },
    /// The helper program for unprivileged mounts is not installed.
    #[error(
        "mounting without root needs fusermount3, which is not installed (Debian package fuse3)"
    )]
    NoHelper,
    /// The kernel and the library could not agree on the protocol.
    #[error("the kernel's FUSE does not accept the session: {0}")]
    Handshake(io::Error),
    /// No thread to serve requests could be started.
    #[error("cannot start a thread: {0}")]
    NoThread(io::Error),
}

/// A mounted volume. Dropping it detaches the mount and does not wait.
#[derive(Debug)]
pub struct Mounted {
    at: PathBuf,
    by: By,
    serving: Option<JoinHandle<io::Result<()>>>,
}

/// Who mounted it, who therefore has to unmount it.
#[derive(Debug)]
enum By {
    /// This process; the number is the mount's.
    Us { mount: u64 },
    /// The helper program.
    Helper(SessionUnmounter),
}

/// What became of a mount that was taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// Nobody uses it any more.
    Cleanly,
    /// Somebody still does: it has no name left, and ends with its last user, or with this process.
    Lazily,
}

/// Mounts the tree below `root` at the directory `at` and serves it on threads of its own.
///
/// `on_end` is called when serving has ended, by [`Mounted::unmount`] or because somebody else unmounted.
///
/// # Errors
/// See [`MountError`].
pub fn mount(
    root: Node,
    at: &Path,
    options: &MountOptions,
    on_end: impl FnOnce() + Send + 'static,
) -> Result<Mounted, MountError> {
    let privileged = rustix::process::geteuid().is_root();
    let device = Arc::new(Device::default());
    let invalidator = Arc::new(Invalidator::default());
    let settler = Arc::new(Settler::new(options.size_wait.unwrap_or(growth::WAIT)));
    let locks = options.shared.is_some().then(Arc::<Locks>::default);
    let inodes = Arc::new(Inodes::new(root));
    let server = Arc::new(Server::new(
        Arc::clone(&inodes),
        Arc::clone(&device),
        Arc::clone(&invalidator),
        Arc::clone(&settler),
        locks.clone(),
    ));
    let allow_other = options.allow_other.unwrap_or(privileged);
    let mut config = Config::default();
    config.acl = if allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    let threads = options
        .threads
        .map_or_else(threads, |n| n.get().min(THREADS_MAX));
    config.n_threads = Some(threads);
    let lanes = Lanes::new(Arc::clone(&server), threads, options.shared.is_some())
        .map_err(MountError::NoThread)?;
    let (session, by) = if privileged {
        mount_ourselves(lanes, at, config)?
    } else {
        mount_by_helper(lanes, at, config)?
    };
    let reply_fd = session.as_fd().try_clone_to_owned();
    device.set(reply_fd.map_err(MountError::Handshake)?);
    invalidator
        .start(session.notifier())
        .and_then(|()| settler.start(&session.notifier()))
        .and_then(|()| locks.as_ref().map_or(Ok(()), Locks::start))
        .and_then(|()| match &options.shared {
            Some(revoker) => {
                let device = session.as_fd().try_clone_to_owned()?;
                let notifier = session.notifier();
                let paging = Paging::start(Arc::new(Linux { notifier, device }))?;
                revoker.attach(&inodes, &paging);
                server.set_paging(paging);
                Ok(())
            }
            None => Ok(()),
        })
        .map_err(MountError::NoThread)?;
    // The server's are the only ones left: their threads end with it.
    drop((server, invalidator, settler, locks, inodes));
    let serving = std::thread::Builder::new()
        .name("pinfold-fuse".into())
        .spawn(move || {
            let outcome = session.run();
            on_end();
            outcome
        })
        .map_err(MountError::NoThread)?;
    tracing::info!(at = %at.display(), "mounted");
    Ok(Mounted {
        at: at.to_owned(),
        by,
        serving: Some(serving),
    })
}

/// A request holds its thread while it waits for the store, so there are more threads than processors.
fn threads() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    (2 * processors).clamp(4, 16)
}

fn mount_ourselves(
    server: Lanes,
    at: &Path,
    config: Config,
) -> Result<(Session<Lanes>, By), MountError> {
    let refused = |errno: rustix::io::Errno| MountError::Refused {
        at: at.to_owned(),
        error: errno.into(),
    };
    let device: File = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(MountError::NoDevice)?;
    let (uid, gid) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let fd = device.as_raw_fd();
    let other = match config.acl {
        SessionACL::Owner => "",
        SessionACL::All | SessionACL::RootAndOwner => ",allow_other",
    };
    let data = format!(
        "fd={fd},rootmode=40000,user_id={uid},group_id={gid},default_permissions,subtype=pinfold{other}"
    );
    let data = std::ffi::CString::new(data).map_err(|_| refused(rustix::io::Errno::INVAL))?;
    rustix::mount::mount(SOURCE, at, "fuse", MountFlags::empty(), data.as_c_str())
        .map_err(refused)?;
    let acl = config.acl;
    let session = Session::from_fd(server, OwnedFd::from(device), acl, config)
        .map_err(MountError::Handshake)
        .and_then(|session| {
            // Answered without the server: its attributes came with the mount.
            let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
            let stat = rustix::fs::statx(CWD, at, flags, StatxFlags::MNT_ID).map_err(refused)?;
            Ok((
                session,
                By::Us {
                    mount: stat.stx_mnt_id,
                },
            ))
        });
    if session.is_err() {
        let _ = rustix::mount::unmount(at, UnmountFlags::DETACH);
    }
    session
}

fn mount_by_helper(
    server: Lanes,
    at: &Path,
    mut config: Config,
) -> Result<(Session<Lanes>, By), MountError> {
    // The library opens it too, before it asks the helper.
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(MountError::NoDevice)?;
    if !helper_installed() {
        return Err(MountError::NoHelper);
    }
    config.mount_options = vec![
        MountOption::FSName(SOURCE.into()),
        MountOption::Subtype("pinfold".into()),
        MountOption::DefaultPermissions,
    ];
    let mut session = Session::new(server, at, &config).map_err(|error| MountError::Refused {
        at: at.to_owned(),
        error,
    })?;
    let unmounter = session.unmount_callable();
    Ok((session, By::Helper(unmounter)))
}

/// Looks for the helper where the library does. What running a missing program says depends on which directories of the
/// path can be searched.
fn helper_installed() -> bool {
    let in_path = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .chain([PathBuf::from("/bin"), PathBuf::from("/sbin")])
            .any(|dir| dir.join(name).is_file())
    };
    std::env::var_os("FUSERMOUNT_PATH").is_some() || in_path("fusermount3") || in_path("fusermount")
}

impl Mounted {
    /// Returns where it is mounted.
    #[must_use]
    pub fn at(&self) -> &Path {
        &self.at
    }

    /// Tells whether requests are still served: not after somebody unmounted it.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.serving
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    /// Takes the mount away. While somebody uses it, tries for `patience`, then detaches it and waits as long
    /// again for its users to end.
    ///
    /// Call it once what is dirty is written back, or before closing the volume, which does that too.
    ///
    /// # Errors
    /// What umount(2) says, other than that it is busy or gone already.
    pub fn unmount(mut self, patience: Duration) -> io::Result<Unmounted> {
        let mut outcome = Unmounted::Cleanly;
        if self.is_serving() {
            outcome = self.detach(patience)?;
        }
        let deadline = Instant::now() + patience;
        while outcome == Unmounted::Lazily && self.is_serving() {
            if Instant::now() >= deadline {
                return Ok(outcome);
            }
            std::thread::sleep(BUSY_STEP);
        }
        match self.serving.take().map(JoinHandle::join) {
            None | Some(Ok(Ok(()))) => Ok(Unmounted::Cleanly),
            failed => {
                // Serving ended although nobody unmounted it: what is left answers nobody.
                let _ = self.detach(Duration::ZERO);
                Err(match failed {
                    Some(Ok(Err(error))) => error,
                    _ => io::Error::other("a thread that served requests panicked"),
                })
            }
        }
    }

    fn detach(&mut self, patience: Duration) -> io::Result<Unmounted> {
        let deadline = Instant::now() + patience;
        match &mut self.by {
            // The helper always unmounts lazily; what is not used ends at once.
            By::Helper(unmounter) => unmounter.unmount().map(|()| Unmounted::Lazily),
            By::Us { mount } => loop {
                if !is_ours(&self.at, *mount) {
                    return Ok(Unmounted::Lazily);
                }
                match rustix::mount::unmount(&self.at, UnmountFlags::NOFOLLOW) {
                    Ok(()) => return Ok(Unmounted::Cleanly),
                    Err(rustix::io::Errno::BUSY) if Instant::now() < deadline => {
                        std::thread::sleep(BUSY_STEP);
                    }
                    Err(rustix::io::Errno::BUSY) => {
                        let lazily = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
                        rustix::mount::unmount(&self.at, lazily)?;
                        return Ok(Unmounted::Lazily);
                    }
                    Err(errno) => return Err(errno.into()),
                }
            },
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.is_serving()
            && let Err(error) = self.detach(Duration::ZERO)
        {
            tracing::warn!(%error, at = %self.at.display(), "cannot unmount");
        }
    }
}

/// Tells whether the topmost mount at `at` is the one numbered `mount`: another may cover it, or have come after it.
fn is_ours(at: &Path, mount: u64) -> bool {
    mount_at(at).is_ok_and(|found| found.is_some_and(|found| found.id == mount))
}

/// Takes away a mount of ours at `at` whose server is dead; tells whether there was one.
///
/// # Errors
/// What umount(2) or `fusermount3` says; the mount table cannot be read.
pub fn detach_stale(at: &Path) -> io::Result<bool> {
    // Not stat(2): the kernel answers that from its cache of attributes long after the server died.
    let Err(rustix::io::Errno::NOTCONN) = rustix::fs::statfs(at) else {
        return Ok(false);
    };
    let ours = |found: &Mount| found.filesystem == FILESYSTEM && found.source == SOURCE;
    if !mount_at(at)?.as_ref().is_some_and(ours) {
        return Ok(false);
    }
    if rustix::process::geteuid().is_root() {
        rustix::mount::unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
        return Ok(true);
    }
    let status = std::process::Command::new("fusermount3")
        .args(["-u", "-z", "--"])
        .arg(at)
        .status()?;
    if status.success() {
        return Ok(true);
    }
    Err(io::Error::other(format!("fusermount3 -u: {status}")))
}
