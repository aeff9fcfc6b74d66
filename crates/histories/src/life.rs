//! One life of a node: its process, and how it ended.
//!
//! *Owns*: the process that faults hit; on a mount also the process beside it that makes the calls, and the mount point.
//!
//! *Does not own*: when faults come, what a death means ([`crate::run`]).
//!
//! *Locking*: none; one thread.
//!
//! On a mount the daemon is the node. Calls come from another process: one that hangs in its own mount could not be killed.
//!
//! ```text
//!   daemon starts ──> mounted: the worker starts ──> the worker ends: SIGTERM ──> the daemon ends: unmounted, over
//!        └── ends, or is killed, at any time: the worker is killed, what is left of the mount is taken away, over
//! ```

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, kill_process};

/// How a process that makes calls says that one failed.
pub const WITHDRAWN: i32 = 3;

/// How it says that it could not begin.
pub const NOT_BEGUN: i32 = 4;

/// A daemon's status when it could not start, or was no member any more at its end.
const REFUSED: i32 = 1;

/// How a life ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// In good order.
    Well,
    /// A call failed.
    Withdrew,
    /// Before it could do anything.
    NotBegun,
    /// By a signal.
    Killed,
}

/// A process that makes calls, not started yet.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) command: Command,
    /// What it is to do.
    pub(crate) spec: Vec<u8>,
    /// Where its last words go.
    pub(crate) said: File,
}

#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) node: u32,
    pub(crate) begun: Instant,
    pub(crate) paused: bool,
    /// When it was let go on after it had stood still past its lease.
    pub(crate) resumed: Option<u64>,
    child: Child,
    mount: Option<Mount>,
}

#[derive(Debug)]
struct Mount {
    at: PathBuf,
    work: Work,
}

#[derive(Debug)]
enum Work {
    /// Until it is mounted.
    Waits(Box<Worker>),
    Runs(Child),
    Over(ExitStatus),
    /// Nobody came to work there.
    Never,
}

impl Worker {
    fn start(mut self) -> anyhow::Result<Child> {
        let mut child = self
            .command
            .stdin(Stdio::piped())
            .stderr(self.said)
            .spawn()
            .with_context(|| self.command.get_program().display().to_string())?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&self.spec)?;
        }
        Ok(child)
    }
}

impl Life {
    /// Starts a node that is one process.
    pub(crate) fn begin(node: u32, worker: Worker) -> anyhow::Result<Self> {
        Ok(Self::new(node, worker.start()?, None))
    }

    /// Starts a daemon that mounts at `at`, where `worker` works as soon as it has.
    pub(crate) fn mount(
        node: u32,
        mut daemon: Command,
        at: &Path,
        worker: Worker,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(at)?;
        let child = daemon
            .stdin(Stdio::null())
            .stderr(worker.said.try_clone()?)
            .spawn()
            .with_context(|| daemon.get_program().display().to_string())?;
        let mount = Mount {
            at: at.to_path_buf(),
            work: Work::Waits(Box::new(worker)),
        };
        Ok(Self::new(node, child, Some(mount)))
    }

    fn new(node: u32, child: Child, mount: Option<Mount>) -> Self {
        Self {
            node,
            begun: Instant::now(),
            paused: false,
            resumed: None,
            child,
            mount,
        }
    }

    /// Sends a signal to what faults hit; false if that has ended.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        pid.is_some_and(|pid| kill_process(pid, signal).is_ok())
    }

    /// Whether its calls have begun, as far as is known.
    pub(crate) const fn works(&self) -> bool {
        match &self.mount {
            Some(mount) => matches!(mount.work, Work::Runs(_)),
            None => true,
        }
    }

    /// Tells how it ended, if it did; goes on with what comes next if not.
    ///
    /// # Errors
    /// An end that none of these is, in words.
    pub(crate) fn ended(&mut self) -> anyhow::Result<Option<Ended>> {
        let Some(status) = self.child.try_wait()? else {
            if let Some(mount) = &mut self.mount
                && mount.tend()?
            {
                self.signal(Signal::TERM);
            }
            return Ok(None);
        };
        let ended = match &mut self.mount {
            None => match status.code() {
                Some(0) => Ended::Well,
                Some(WITHDRAWN) => Ended::Withdrew,
                Some(NOT_BEGUN) => Ended::NotBegun,
                None => Ended::Killed,
                Some(_) => bail!("node {} failed: {status}", self.node),
            },
            Some(mount) => {
                let work = mount.leave()?;
                match (status.code(), work.map(|work| work.code())) {
                    (None, _) => Ended::Killed,
                    (Some(0), Some(Some(0))) => Ended::Well,
                    (Some(REFUSED), None | Some(Some(NOT_BEGUN))) => Ended::NotBegun,
                    (Some(REFUSED), Some(None | Some(0 | WITHDRAWN))) => Ended::Withdrew,
                    // A call that failed on a mount that was sound to the end among them.
                    _ => bail!(
                        "node {} failed: the daemon's {status}, the worker's {work:?}",
                        self.node
                    ),
                }
            }
        };
        Ok(Some(ended))
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(mount) = &mut self.mount {
            // Only a run that fails leaves one.
            let _ = mount.leave();
        }
    }
}

impl Mount {
    /// Starts the worker once it is mounted; tells, once, that it has ended.
    fn tend(&mut self) -> anyhow::Result<bool> {
        match &mut self.work {
            Work::Waits(_) => {
                if pinfold_fuse::is_mount_point(&self.at)?
                    && let Work::Waits(worker) = std::mem::replace(&mut self.work, Work::Never)
                {
                    self.work = Work::Runs(worker.start()?);
                }
                Ok(false)
            }
            Work::Runs(child) => {
                let status = child.try_wait()?;
                if let Some(status) = status {
                    self.work = Work::Over(status);
                }
                Ok(status.is_some())
            }
            Work::Over(_) | Work::Never => Ok(false),
        }
    }

    /// After the daemon's end: ends the worker, whose calls fail by now, and takes away what is left.
    fn leave(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        let status = match std::mem::replace(&mut self.work, Work::Never) {
            Work::Runs(mut child) => {
                let ended = child.try_wait()?;
                if ended.is_none() {
                    child.kill()?;
                }
                Some(child.wait()?)
            }
            Work::Over(status) => Some(status),
            Work::Waits(_) | Work::Never => None,
        };
        if pinfold_fuse::is_mount_point(&self.at)? {
            rustix::mount::unmount(&self.at, UnmountFlags::DETACH)?;
        }
        // What is not empty is no mount point of ours.
        let _ = std::fs::remove_dir(&self.at);
        Ok(status)
    }
}
