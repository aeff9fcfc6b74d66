//! Through the mount: beside the directory itself, and beside a FUSE server that only passes requests on.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pinfold::{AlignedBuf, OpenOptions, Volume};
use pinfold_fuse::{MountOptions, Mounted};

use super::Plan;
use super::passthrough::{Passthrough, Serving};
use super::rounds::{Side, take_turns};
use super::row::{Row, Unit};
use super::scratch::{self, CHUNK, Offsets, PAGE, drop_cached, make_file, read_all};

const NAME: &str = "data";
/// Random operations of one turn.
const OPERATIONS: u64 = 5_000;
/// How long a busy mount is tried.
const PATIENCE: Duration = Duration::from_secs(5);
const MIB: f64 = 1048576.0;

/// The three ways to one kind of file.
struct Ways {
    volume: Volume,
    /// By the directory, by the passthrough mount, by ours.
    paths: [PathBuf; 3],
    /// The file behind the passthrough mount.
    behind: PathBuf,
    size: u64,
    // Dropped before the volume's last use and before the scratch directory goes.
    ours: Option<Mounted>,
    _theirs: Serving,
}

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    let mut ways = match Ways::open(plan) {
        Ok(ways) => ways,
        Err(error) => {
            return Ok(vec![Row::skipped(
                "through the mount",
                format!("{error:#}"),
            )]);
        }
    };
    let rows = ways.compare(plan);
    if let Some(mounted) = ways.ours.take() {
        mounted.unmount(PATIENCE).context("cannot unmount")?;
    }
    rows
}

/// What a turn does to the caches before it is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    /// Nothing: what the turn before left is there.
    Nothing,
    /// The kernel's cache of the mount forgets the file; the servers still have it.
    ForgetMount,
    /// Nobody has it.
    ForgetAll,
}

/// What a turn does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    ReadAll,
    WriteAllAndSync,
    ReadPages { direct: bool },
    WritePages { direct: bool },
}

const COMPARISONS: [(&str, Before, Work); 8] = [
    (
        "sequential read, nobody has it",
        Before::ForgetAll,
        Work::ReadAll,
    ),
    (
        "sequential read, the server has it",
        Before::ForgetMount,
        Work::ReadAll,
    ),
    (
        "sequential overwrite, then fsync",
        Before::Nothing,
        Work::WriteAllAndSync,
    ),
    (
        "random 4 KiB read, kernel has it",
        Before::Nothing,
        Work::ReadPages { direct: false },
    ),
    (
        "random 4 KiB read, the server has it",
        Before::ForgetMount,
        Work::ReadPages { direct: false },
    ),
    (
        "random 4 KiB read, O_DIRECT",
        Before::Nothing,
        Work::ReadPages { direct: true },
    ),
    (
        "random 4 KiB overwrite",
        Before::Nothing,
        Work::WritePages { direct: false },
    ),
    (
        "random 4 KiB overwrite, O_DIRECT",
        Before::Nothing,
        Work::WritePages { direct: true },
    ),
];

impl Ways {
    fn open(plan: &Plan) -> Result<Self> {
        let size = (plan.memory / 4).next_multiple_of(CHUNK as u64);
        let dir = |name: &str| -> Result<PathBuf> {
            let dir = plan.scratch.dir(name)?;
            make_file(&dir.join(NAME), size)?;
            Ok(dir)
        };
        let (plain, behind, ours) = (
            dir("mount-plain")?,
            dir("mount-behind")?,
            dir("mount-ours")?,
        );
        let (at_theirs, at_ours) = (plan.scratch.dir("at-theirs")?, plan.scratch.dir("at-ours")?);
        let theirs =
            Passthrough::mount(&behind, NAME, &at_theirs).context("the passthrough mount")?;
        let volume = Volume::builder()
            .memory(plan.memory)
            .file_size_limit(false)
            .open_dir(&ours)?;
        let mounted =
            pinfold_fuse::mount(volume.root(), &at_ours, &MountOptions::default(), || {})?;
        Ok(Self {
            volume,
            paths: [plain, at_theirs, at_ours].map(|dir| dir.join(NAME)),
            behind: behind.join(NAME),
            size,
            ours: Some(mounted),
            _theirs: theirs,
        })
    }

    fn compare(&self, plan: &Plan) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for (about, before, work) in COMPARISONS {
            let sides = self.paths.iter().map(|path| -> Result<Side<'_, 1>> {
                let file = open(path, work)?;
                let mut seed = 0;
                Ok(Box::new(move || {
                    seed += 1;
                    self.prepare(path, before)?;
                    self.time(&file, work, seed)
                }))
            });
            let sides = sides.collect::<Result<Vec<_>>>()?;
            let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
            let unit = match work {
                Work::ReadAll | Work::WriteAllAndSync => Unit::MebibytesPerSecond,
                Work::ReadPages { .. } | Work::WritePages { .. } => Unit::Nanoseconds,
            };
            rows.push(Row::new(
                about,
                unit,
                found[2][0],
                "the directory itself",
                found[0][0],
            ));
            let row = Row::new(about, unit, found[2][0], "passthrough server", found[1][0]);
            let direct = matches!(
                work,
                Work::ReadPages { direct: true } | Work::WritePages { direct: true }
            );
            rows.push(if direct {
                row.note("the passthrough server answers from the kernel's cache; the others go to the device")
            } else {
                row
            });
        }
        Ok(rows)
    }

    /// Brings the caches to the state a turn begins with.
    fn prepare(&self, path: &Path, before: Before) -> Result<()> {
        if before == Before::Nothing {
            return Ok(());
        }
        let front = scratch::open(path)?;
        let plain = path == self.paths[0];
        if before == Before::ForgetMount && plain {
            // The directory has no server: what corresponds is that the kernel has it.
            return Ok(read_all(&front, self.size)?);
        }
        drop_cached(&front)?;
        let back = scratch::open(&self.behind)?;
        let options = OpenOptions::new().read(true).write(true);
        let ours = self.volume.open(NAME, &options)?;
        if before == Before::ForgetAll {
            drop_cached(&back)?;
            ours.drop_cache()?;
        } else {
            read_all(&back, self.size)?;
            let mut buf = vec![0; CHUNK];
            for at in (0..self.size).step_by(CHUNK) {
                ours.read_at(&mut buf, at)?;
            }
        }
        Ok(())
    }

    fn time(&self, file: &File, work: Work, seed: u64) -> Result<[f64; 1]> {
        let mut buf = AlignedBuf::zeroed(CHUNK);
        buf.as_mut_slice().copy_from_slice(&scratch::noise(CHUNK));
        let buf = buf.as_mut_slice();
        let mut offsets = Offsets::new(self.size, seed);
        let start = Instant::now();
        match work {
            Work::ReadAll => {
                for at in (0..self.size).step_by(CHUNK) {
                    file.read_exact_at(buf, at)?;
                }
            }
            Work::WriteAllAndSync => {
                for at in (0..self.size).step_by(CHUNK) {
                    file.write_all_at(buf, at)?;
                }
                file.sync_all()?;
            }
            Work::ReadPages { .. } => {
                for _ in 0..OPERATIONS {
                    file.read_exact_at(&mut buf[..PAGE], offsets.next())?;
                }
            }
            Work::WritePages { .. } => {
                for _ in 0..OPERATIONS {
                    file.write_all_at(&buf[..PAGE], offsets.next())?;
                }
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        Ok([match work {
            Work::ReadAll | Work::WriteAllAndSync => self.size as f64 / MIB / seconds,
            Work::ReadPages { .. } | Work::WritePages { .. } => seconds * 1e9 / OPERATIONS as f64,
        }])
    }
}

fn open(path: &Path, work: Work) -> Result<File> {
    let direct = matches!(
        work,
        Work::ReadPages { direct: true } | Work::WritePages { direct: true }
    );
    let flags = if direct {
        rustix::fs::OFlags::DIRECT.bits() as i32
    } else {
        0
    };
    File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .with_context(|| path.display().to_string())
}
