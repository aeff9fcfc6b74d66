//! Which process a node is, and whether a node that should be dead still runs on this machine.
//!
//! *Owns*: what tells one process from all others, reboots and reused numbers included; the kill of a stopped one.
//!
//! *Does not own*: when that is asked, and what follows ([`super::fence`]).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// What stands for a fact that could not be had.
const UNKNOWN: &str = "-";

/// A process as a member describes itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Process {
    pub host: String,
    /// Which run of which machine: another after each boot.
    boot: String,
    /// In which namespaces the numbers below count.
    namespaces: String,
    pub pid: u32,
    /// When it started, in ticks since the boot: with the number, no other process of this boot has it.
    start: u64,
    /// When it became a member, in seconds since 1970 by its host's clock; for people.
    pub since: u64,
}

/// What became of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It ended by itself.
    Gone,
    /// It was stopped, and was killed.
    Killed,
    /// It runs, or nobody here can tell.
    Unknown,
}

impl Process {
    pub fn own() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).ok();
        let boot = read("/proc/sys/kernel/random/boot_id");
        let namespace = |kind: &str| {
            std::fs::read_link(format!("/proc/self/ns/{kind}"))
                .ok()
                .and_then(|link| link.into_os_string().into_string().ok())
        };
        let namespaces = namespace("pid").zip(namespace("time"));
        let name = rustix::system::uname();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            host: word(&name.nodename().to_string_lossy()),
            boot: boot.map_or_else(|| UNKNOWN.to_owned(), |boot| word(boot.trim())),
            namespaces: namespaces.map_or_else(
                || UNKNOWN.to_owned(),
                |(pid, time)| word(&format!("{pid}{time}")),
            ),
            pid: std::process::id(),
            start: stat_of(std::process::id()).map_or(0, |stat| stat.start),
            since: since.map_or(0, |since| since.as_secs()),
        }
    }

    pub fn text(&self) -> String {
        let Self {
            host,
            boot,
            namespaces,
            pid,
            start,
            since,
        } = self;
        format!("{host} {boot} {namespaces} {pid} {start} {since}")
    }

    pub fn parse(value: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(value).ok()?.split(' ');
        let process = Self {
            host: words.next()?.to_owned(),
            boot: words.next()?.to_owned(),
            namespaces: words.next()?.to_owned(),
            pid: words.next()?.parse().ok()?,
            start: words.next()?.parse().ok()?,
            since: words.next()?.parse().ok()?,
        };
        words.next().is_none().then_some(process)
    }

    /// Tells whether its number means here what it means to itself.
    fn is_of_the_machine_of(&self, other: &Self) -> bool {
        let same = |a: &str, b: &str| a == b && a != UNKNOWN;
        same(&self.boot, &other.boot) && same(&self.namespaces, &other.namespaces)
    }

    /// Kills the process if it is one of this machine's and stopped, and waits up to `limit` for its end. One that
    /// runs is left alone: its own clock has told it to stop its I/O.
    ///
    /// When a process has ended, so has its I/O: its end waits for transfers under way.
    pub fn end_if_stopped(&self, limit: Duration) -> Fate {
        let own = Self::own();
        if !self.is_of_the_machine_of(&own) || self.start == 0 || self.pid == own.pid {
            return Fate::Unknown;
        }
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let Some(pid) = pid else {
            return Fate::Unknown;
        };
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(process) => process,
            Err(rustix::io::Errno::SRCH) => return Fate::Gone,
            Err(_) => return Fate::Unknown,
        };
        // Looked at after it was opened: if the process we mean is there now, it was there then, under this number.
        match stat_of(self.pid) {
            Some(stat) if stat.start != self.start => return Fate::Gone,
            Some(stat) if stat.stopped => {}
            _ if has_ended(process.as_fd(), Duration::ZERO) => return Fate::Gone,
            _ => return Fate::Unknown,
        }
        if pidfd_send_signal(&process, Signal::KILL).is_ok() && has_ended(process.as_fd(), limit) {
            Fate::Killed
        } else {
            Fate::Unknown
        }
    }
}

/// Waits until the process, all its threads included, has ended.
pub(super) fn has_ended(process: BorrowedFd<'_>, limit: Duration) -> bool {
    let limit = Timespec::try_from(limit).ok();
    let mut polled = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    poll(&mut polled, limit.as_ref()).is_ok_and(|ready| ready > 0)
}

struct Stat {
    stopped: bool,
    start: u64,
}

/// Reads `/proc/PID/stat` (proc(5)): the third field, and the twenty-second.
fn stat_of(pid: u32) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, with any character in it.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some(Stat {
        stopped: matches!(state, "T" | "t"),
        start,
    })
}

/// One word of a value: what separates words is not in it.
fn word(text: &str) -> String {
    if text.is_empty() {
        return UNKNOWN.to_owned();
    }
    text.replace(|c: char| c.is_whitespace() || c.is_control(), "_")
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            let child = Command::new("sleep")
                .arg("600")
                .stdin(Stdio::null())
                .spawn()
                .unwrap();
            Self(child)
        }

        fn process(&self) -> Process {
            Process {
                pid: self.0.id(),
                start: stat_of(self.0.id()).unwrap().start,
                ..Process::own()
            }
        }

        fn stop(&self) {
            let pid = Pid::from_child(&self.0);
            rustix::process::kill_process(pid, Signal::STOP).unwrap();
            while !stat_of(self.0.id()).unwrap().stopped {
                std::thread::yield_now();
            }
        }

        fn runs(&mut self) -> bool {
            self.0.try_wait().unwrap().is_none()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn what_is_written_is_read() {
        let own = Process::own();
        assert!(own.start > 0 && own.boot != UNKNOWN && own.namespaces != UNKNOWN);
        assert_eq!(Process::parse(own.text().as_bytes()), Some(own));
        for text in ["", "a b c 1 2", "a b c 1 2 3 4", "a b c x 2 3", "\u{ff}"] {
            assert_eq!(Process::parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn a_stopped_process_is_killed_and_a_running_one_is_not() {
        let mut sleeper = Sleeper::start();
        let process = sleeper.process();
        assert_eq!(process.end_if_stopped(LIMIT), Fate::Unknown);
        assert!(sleeper.runs());
        sleeper.stop();
        assert_eq!(process.end_if_stopped(LIMIT), Fate::Killed);
        // Not waited for by its parent yet, and ended all the same.
        assert_eq!(process.end_if_stopped(LIMIT), Fate::Gone);
        assert!(!sleeper.runs());
        assert_eq!(process.end_if_stopped(LIMIT), Fate::Gone);
    }

    #[test]
    fn no_other_process_is_killed() {
        let mut sleeper = Sleeper::start();
        sleeper.stop();
        let process = sleeper.process();
        for (other, fate) in [
            // The number is another process's by now.
            (
                Process {
                    start: process.start - 1,
                    ..process.clone()
                },
                Fate::Gone,
            ),
            (
                Process {
                    start: 0,
                    ..process.clone()
                },
                Fate::Unknown,
            ),
            (
                Process {
                    boot: "another".to_owned(),
                    ..process.clone()
                },
                Fate::Unknown,
            ),
            (
                Process {
                    namespaces: "another".to_owned(),
                    ..process.clone()
                },
                Fate::Unknown,
            ),
            (Process::own(), Fate::Unknown),
        ] {
            assert_eq!(other.end_if_stopped(LIMIT), fate, "{other:?}");
            assert!(sleeper.runs(), "{other:?}");
        }
    }
}
