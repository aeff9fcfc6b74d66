//! Making sure that a dead node's writes are over, so that nobody has to wait for the grace.
//!
//! *Owns*: the operator's fence command and its time limit; what was done, counted.
//!
//! *Does not own*: whose turn it is to run it ([`super::wire`]); the grace ([`super::actor`]).

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fd::AsFd;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::process::{Process, has_ended};
use crate::service::FenceCounts;

/// How often a running command is asked whether this node is about to end.
const LOOK: Duration = Duration::from_millis(100);

/// A command that keeps a node from ever writing to the store again, such as one that cuts its power.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// The program. Its argument is the node's name, which is also in `PINFOLD_NODE`; what the node said of itself is in
    /// `PINFOLD_NODE_HOST` and `PINFOLD_NODE_PID`. It succeeds with the exit status 0.
    pub command: OsString,
    /// For how long it may run. Then it is killed, with its process group, and has failed.
    pub limit: Duration,
}

impl Fence {
    /// A minute for `command`.
    #[must_use]
    pub fn new(command: impl Into<OsString>) -> Self {
        Self {
            command: command.into(),
            limit: Duration::from_secs(60),
        }
    }

    /// Runs the command for the node called `name` and waits for it, but not when `stop` is set.
    ///
    /// # Errors
    /// Why it does not count as done, for people.
    pub(super) fn run(
        &self,
        name: &str,
        process: Option<&Process>,
        stop: &AtomicBool,
    ) -> Result<(), String> {
        let mut command = Command::new(&self.command);
        command.arg(name).env("PINFOLD_NODE", name);
        if let Some(process) = process {
            command
                .env("PINFOLD_NODE_HOST", &process.host)
                .env("PINFOLD_NODE_PID", process.pid.to_string());
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // A group of its own: what it started is killed with it.
            .process_group(0)
            .spawn()
            .map_err(|error| format!("{}: {error}", self.command.display()))?;
        let pid = Pid::from_child(&child);
        let end = Instant::now() + self.limit;
        let in_time = pidfd_open(pid, PidfdFlags::empty()).is_ok_and(|running| {
            loop {
                let left = end.saturating_duration_since(Instant::now());
                if has_ended(running.as_fd(), left.min(LOOK)) {
                    break true;
                }
                if left.is_zero() || stop.load(Ordering::Relaxed) {
                    break false;
                }
            }
        });
        if !in_time {
            // It has not been waited for, so that the number is still its own.
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let status = child.wait().map_err(|error| error.to_string())?;
        match (in_time, status.success()) {
            (true, true) => Ok(()),
            (true, false) => Err(format!("{}: {status}", self.command.display())),
            (false, _) => Err(format!(
                "{}: killed after {:?} without an end",
                self.command.display(),
                self.limit
            )),
        }
    }
}

/// What [`FenceCounts`] counts, while it is counted.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub gone: AtomicU64,
    pub killed: AtomicU64,
    pub fenced: AtomicU64,
    pub failed: AtomicU64,
    pub waited: AtomicU64,
}

impl Tally {
    pub fn counts(&self) -> FenceCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FenceCounts {
            gone: read(&self.gone),
            killed: read(&self.killed),
            fenced: read(&self.fenced),
            failed: read(&self.failed),
            waited: read(&self.waited),
        }
    }
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::Path;

    use super::*;

    fn script(directory: &Path, text: &str) -> Fence {
        let path = directory.join("fence");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o700)
            .open(&path)
            .unwrap();
        writeln!(file, "#!/bin/sh\n{text}").unwrap();
        Fence::new(path)
    }

    #[test]
    fn the_command_is_told_the_name_and_its_status_counts() {
        let directory = tempfile::tempdir().unwrap();
        let said = directory.path().join("said");
        let text = format!(
            "echo $# $1 $PINFOLD_NODE $PINFOLD_NODE_PID > {}",
            said.display()
        );
        let own = Process::own();
        let stop = AtomicBool::new(false);
        // A program that was just written cannot be run while another thread's child has it open still.
        let run = |fence: &Fence| loop {
            match fence.run("n-1", Some(&own), &stop) {
                Err(why) if why.contains("os error 26") => std::thread::yield_now(),
                outcome => break outcome,
            }
        };
        assert_eq!(run(&script(directory.path(), &text)), Ok(()));
        let said = std::fs::read_to_string(said).unwrap();
        assert_eq!(said.trim(), format!("1 n-1 n-1 {}", own.pid));
        assert!(
            run(&script(directory.path(), "exit 3"))
                .unwrap_err()
                .contains("3")
        );
        assert!(Fence::new("/nowhere").run("n-1", None, &stop).is_err());
    }

    #[test]
    fn a_command_without_an_end_is_killed_with_what_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let sleeps = script(
            directory.path(),
            &format!("sleep 600 & echo $! > {}; wait", pid.display()),
        );
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let running = scope.spawn(|| {
                loop {
                    match sleeps.run("n-1", None, &stop) {
                        Err(why) if why.contains("os error 26") => std::thread::yield_now(),
                        outcome => break outcome,
                    }
                }
            });
            let started = loop {
                match std::fs::read_to_string(&pid) {
                    Ok(text) if text.ends_with('\n') => break text,
                    _ => std::thread::yield_now(),
                }
            };
            stop.store(true, Ordering::Relaxed);
            assert!(running.join().unwrap().is_err());
            let started = started.trim().parse().ok().and_then(Pid::from_raw).unwrap();
            // Nobody of ours waits for it: it is gone, or about to be.
            if let Ok(process) = pidfd_open(started, PidfdFlags::empty()) {
                assert!(has_ended(process.as_fd(), Duration::from_secs(60)));
            }
        });
        let late = Fence {
            limit: Duration::ZERO,
            ..sleeps
        };
        let outcome = late.run("n-1", None, &AtomicBool::new(false));
        assert!(outcome.is_err(), "{outcome:?}");
    }
}
