//! `pinfold mount`: check, open, mount, run or wait, unmount.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use pinfold::Volume;
use pinfold::glocks::Space;
use pinfold_fuse::{MountOptions, Mounted, Revoker, Unmounted};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, setrlimit};

use crate::cluster::{self, Membership, Where};
use crate::glocks::status;

mod place;
mod signals;
mod size;

use signals::Arrived;
pub(crate) use size::Size;

/// How long a busy mount is tried before it is detached from under its users.
const PATIENCE: Duration = Duration::from_secs(1);
/// The shell's status for a command that cannot be found or run.
const CANNOT_RUN: u8 = 127;
/// What a shell adds to the number of the signal that ended a command.
const SIGNALLED: i32 = 128;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Memory for cached pages, such as 64M or 2GiB [default: a quarter of what this machine or container has]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,

    /// Print what the cache did, on standard error, at the end
    #[arg(long)]
    stats: bool,

    /// Give up what the store in DIR has not answered after so long, such as 30 or 1.5, with EIO [default: wait as long as it takes]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    store_timeout: Option<Duration>,

    /// Threads that serve requests [default: two for each processor, 4 to 16]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<NonZeroUsize>,

    /// Whether users other than you may use the mount [default: yes for root]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    allow_other: Option<bool>,

    /// Create DIR and MOUNTPOINT where they are missing; such a MOUNTPOINT is removed at the end
    #[arg(long)]
    mkdir: bool,

    #[command(
        flatten,
        next_help_heading = "Cluster: DIR is served by several nodes as if they were one"
    )]
    cluster: Where,

    #[command(
        flatten,
        next_help_heading = "Cluster: DIR is served by several nodes as if they were one"
    )]
    membership: Membership,

    /// The directory that holds the files
    dir: PathBuf,

    /// The empty directory where they are to be seen
    mountpoint: PathBuf,

    /// A command to run while it is mounted; its exit status becomes this program's
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

fn parse_threads(text: &str) -> Result<NonZeroUsize, String> {
    let max = pinfold_fuse::THREADS_MAX;
    text.parse()
        .ok()
        .filter(|n: &NonZeroUsize| n.get() <= max)
        .ok_or_else(|| format!("a number from 1 to {max} is needed"))
}

/// Reads a number of seconds; a day at most is what is taken for a limit.
fn parse_seconds(text: &str) -> Result<Duration, String> {
    const SECONDS_MAX: f64 = 86_400.0;
    let seconds = text.parse::<f64>().ok();
    seconds
        .filter(|seconds| (0.001..=SECONDS_MAX).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| format!("a number of seconds from 0.001 to {SECONDS_MAX} is needed"))
}

/// What the main thread waits for.
enum Event {
    Signal(Arrived),
    /// Somebody unmounted it.
    MountEnded,
    Exited(std::io::Result<ExitStatus>),
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let memory = size::budget(arguments.memory)?;
    let place = place::prepare(&arguments.dir, &arguments.mountpoint, arguments.mkdir)?;
    let limit = raise_descriptor_limit();
    let mut volume = Volume::builder().memory(memory).file_size_limit(false);
    if let Some(limit) = arguments.store_timeout {
        volume = volume.store_timeout(limit);
    }
    let node = cluster::join(&arguments.cluster, &arguments.membership, &place.dir)?;
    let revoker = node.as_ref().map(|_| Revoker::default());
    if let (Some((_, space)), Some(revoker)) = (&node, &revoker) {
        volume = volume.glocks(Arc::clone(space)).demoted(revoker.demoted());
    }
    let volume = volume.open_dir(&place.dir)?;
    let (tell, events) = channel();
    // Before the mount: a signal from now on must not leave one behind.
    signals::watch(&tell)?;
    let ended = tell.clone();
    let options = MountOptions {
        threads: arguments.threads,
        allow_other: arguments.allow_other,
        size_wait: None,
        shared: revoker,
    };
    let mounted = pinfold_fuse::mount(volume.root(), &place.mountpoint, &options, move || {
        // Nobody listens once the main thread is past its loop.
        let _ = ended.send(Event::MountEnded);
    })?;
    let _desk = node.as_ref().and_then(|(name, space)| {
        watch_node(Arc::downgrade(space));
        let desk = status::serve(&place.mountpoint, name, &Arc::downgrade(space));
        desk.inspect_err(|error| {
            eprintln!("pinfold: {error:#}: `pinfold glocks` has nobody to ask")
        })
        .ok()
    });
    // The volume has it from here on, and leaves when it closes.
    drop(node);
    let status = match arguments.command.split_first() {
        Some((program, rest)) => {
            let mut command = Command::new(program);
            command.args(rest);
            run_command(command, limit, tell, &events)
        }
        None => {
            wait_for_end(&events);
            ExitCode::SUCCESS
        }
    };
    let ended = finish(&volume, mounted);
    let withdrew = volume.glocks().and_then(|space| space.check().err());
    if arguments.stats {
        eprint!("{}", report(&volume));
    }
    volume
        .close()
        .context("not everything could be written back")?;
    ended?;
    if let Some(errno) = withdrew {
        bail!(
            "this node was no member of the cluster any more ({errno}): what it had not stored by then is lost"
        );
    }
    Ok(status)
}

/// Tells once that the node has withdrawn: until then everything works, and after it nothing does.
fn watch_node(space: Weak<Space>) {
    const LOOK: Duration = Duration::from_millis(500);
    std::thread::spawn(move || {
        loop {
            match space.upgrade().map(|space| space.check()) {
                None => return,
                Some(Ok(())) => std::thread::sleep(LOOK),
                Some(Err(errno)) => {
                    eprintln!(
                        "pinfold: this node is not a member of the cluster any more ({errno}): everything answers EIO. \
                         Unmount, and mount again"
                    );
                    return;
                }
            }
        }
    });
}

/// Raises the limit of open descriptors as far as it goes: the server holds some for every open file of every program.
/// Returns the limit that was in force, if it was changed.
fn raise_descriptor_limit() -> Option<Rlimit> {
    let before = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: before.maximum,
        maximum: before.maximum,
    };
    setrlimit(Resource::Nofile, raised).ok().map(|()| before)
}

/// Waits until the mount is gone or a signal asks to take it away.
fn wait_for_end(events: &Receiver<Event>) {
    for event in events {
        match event {
            Event::MountEnded => return,
            Event::Signal(arrived) if arrived.ends() => return,
            Event::Signal(_) | Event::Exited(_) => {}
        }
    }
}

/// Runs the command, passing signals on, and returns the status to end with.
fn run_command(
    mut command: Command,
    limit: Option<Rlimit>,
    tell: Sender<Event>,
    events: &Receiver<Event>,
) -> ExitCode {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!(
                "pinfold: cannot run {}: {error}",
                command.get_program().display()
            );
            return ExitCode::from(CANNOT_RUN);
        }
    };
    let pid = pid_of(&child);
    if let (Some(pid), Some(limit)) = (pid, limit) {
        // The raised limit of descriptors is for the server; a failure leaves the command with more than it had.
        let _ = rustix::process::prlimit(Some(pid), Resource::Nofile, limit);
    }
    std::thread::spawn(move || tell.send(Event::Exited(child.wait())));
    for event in events {
        match event {
            Event::Exited(Ok(status)) => return exit_code(status),
            Event::Exited(Err(error)) => {
                eprintln!("pinfold: cannot wait for the command: {error}");
                return ExitCode::FAILURE;
            }
            Event::Signal(arrived) => {
                if let (Some(pid), Some(signal)) = (pid, arrived.to_pass_on()) {
                    let _ = rustix::process::kill_process(pid, signal);
                }
            }
            Event::MountEnded => {
                eprintln!("pinfold: somebody unmounted it while the command runs");
            }
        }
    }
    ExitCode::FAILURE
}

fn pid_of(child: &Child) -> Option<Pid> {
    Pid::from_raw(i32::try_from(child.id()).ok()?)
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let number = status
        .code()
        .or_else(|| status.signal().map(|signal| SIGNALLED + signal));
    ExitCode::from(number.and_then(|n| u8::try_from(n).ok()).unwrap_or(1))
}

/// Writes back and takes the mount away.
fn finish(volume: &Volume, mounted: Mounted) -> Result<()> {
    // Before unmounting: who waits for the mount to vanish may look at the directory at once.
    if let Err(error) = volume.sync() {
        eprintln!("pinfold: {error}");
    }
    let at = mounted.at().to_owned();
    match mounted.unmount(PATIENCE) {
        Ok(Unmounted::Cleanly) => Ok(()),
        Ok(Unmounted::Lazily) => {
            eprintln!(
                "pinfold: {} is still in use: detached; its users get errors from now on",
                at.display()
            );
            Ok(())
        }
        Err(error) => Err(anyhow!("cannot unmount {}: {error}", at.display())),
    }
}

fn report(volume: &Volume) -> String {
    let rows = volume.statistics().rows();
    rows.iter()
        .map(|(name, value)| format!("{name:>18} {value}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_limit_is_a_number_of_seconds_and_not_zero() {
        assert_eq!(parse_seconds("30"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_seconds("1.5"), Ok(Duration::from_millis(1500)));
        for refused in ["0", "-1", "1e9", "NaN", "soon", ""] {
            assert!(parse_seconds(refused).is_err(), "{refused}");
        }
    }
}
