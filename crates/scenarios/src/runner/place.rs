//! Directories to work in, which are gone afterwards however the runner ends.
//!
//! *Owns*: [`Place`], a directory of a runner's own; [`sweep`], the process that outlives a killed runner and removes its
//! place; the removal of what a killed machine or container left earlier.
//!
//! *Does not own*: what is done there.
//!
//! *Locking*: flock(2) on a file in each place says that its runner lives. Not on the directory itself: the library takes
//! those locks along the whole path of what it serves.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use super::ChildCommand;
use crate::child::Order;
use crate::fs::Kind;
use crate::fs::kernel::kind_of;
use crate::image::unmount_below;

/// How the names of places begin.
const PREFIX: &str = ".pinfold-torture-";
/// The file that is locked as long as the runner lives.
const LOCK: &str = "lock";
/// How long a sweeper tries: killed scenarios go first, and those in the middle of a call take their time.
const SWEEP_MAX: Duration = Duration::from_secs(10);
/// How often it tries.
const SWEEP_EVERY: Duration = Duration::from_millis(50);

/// A directory of our own below the one to be tortured. Removed when dropped, mounts and all.
pub(super) struct Place {
    pub(super) kind: Kind,
    path: PathBuf,
    // Dropped in this order: the sweeper ends once it finds nothing.
    dir: tempfile::TempDir,
    _lives: File,
    _sweeper: Sweeper,
}

impl Place {
    /// Makes one below `below`, and removes those whose runners are gone.
    pub(super) fn new(below: &Path, child: &ChildCommand) -> Result<Self, String> {
        let told = |error: &dyn std::fmt::Display| format!("{}: {error}", below.display());
        let kind = kind_of(below).map_err(|errno| told(&errno))?;
        remove_abandoned(below);
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(below)
            .map_err(|error| told(&error))?;
        // Mount tables name directories by their real path.
        let path = dir.path().canonicalize().map_err(|error| told(&error))?;
        let sweeper = Sweeper::start(&path, child)?;
        let lives = locked(&path).map_err(|error| told(&error))?;
        Ok(Self {
            kind,
            path,
            dir,
            _lives: lives,
            _sweeper: sweeper,
        })
    }

    /// Makes the directory of one scenario.
    pub(super) fn room(&self, name: &str) -> Result<Room, String> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Room { path })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        unmount_below(self.dir.path());
    }
}

/// The directory of one scenario. Emptied when dropped, so that the next one finds the room.
pub(super) struct Room {
    pub(super) path: PathBuf,
}

impl Drop for Room {
    fn drop(&mut self) {
        unmount_below(&self.path);
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// A process that waits for this one's end, in a process group that the terminal's signals do not reach.
struct Sweeper(Child);

impl Sweeper {
    fn start(dir: &Path, child: &ChildCommand) -> Result<Self, String> {
        let order = Order::Sweep {
            sweep: dir.to_path_buf(),
        };
        let json = serde_json::to_string(&order).map_err(|error| error.to_string())?;
        Command::new(&child.program)
            .args(&child.args)
            .arg(json)
            .stdin(Stdio::piped())
            // It must not keep open what somebody reads to its end.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map(Self)
            .map_err(|error| format!("{}: {error}", child.program.display()))
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Waits until standard input ends, which it does with the runner, and removes `dir`.
pub(crate) fn sweep(dir: &Path) -> ExitCode {
    let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
    let began = Instant::now();
    // Again and again: scenarios die with their runner, but not at once, and until then they make files.
    while dir.exists() {
        if began.elapsed() > SWEEP_MAX {
            return ExitCode::FAILURE;
        }
        remove(dir);
        std::thread::sleep(SWEEP_EVERY);
    }
    ExitCode::SUCCESS
}

fn remove(dir: &Path) {
    unmount_below(dir);
    let _ = fs::remove_dir_all(dir);
}

/// Makes the lock file. It appears under its name only when it is locked, so that nobody takes it for abandoned before.
fn locked(dir: &Path) -> io::Result<File> {
    let before = dir.join("unlocked");
    let file = File::create(&before)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    fs::rename(before, dir.join(LOCK))?;
    Ok(file)
}

/// Removes the places below `below` that nobody holds locked. What cannot be removed, being somebody else's, stays.
fn remove_abandoned(below: &Path) {
    for entry in fs::read_dir(below).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        let Ok(dir) = entry.path().canonicalize() else {
            continue;
        };
        let abandoned = ours
            && File::open(dir.join(LOCK))
                .is_ok_and(|lock| flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok());
        if abandoned {
            remove(&dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_without_a_living_runner_is_removed_and_others_stay() {
        let below = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let dir = below.path().join(name);
            fs::create_dir_all(dir.join("T01")).unwrap();
            (locked(&dir).unwrap(), dir)
        };
        let (gone, abandoned) = make(".pinfold-torture-1");
        let (_lives, in_use) = make(".pinfold-torture-2");
        let (other, stranger) = make("somebodys");
        drop((gone, other));
        remove_abandoned(below.path());
        assert!(!abandoned.exists());
        assert!(in_use.exists() && stranger.exists());
    }
}
