//! Sequential work: cold reads, and new data made durable.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use pinfold::{AlignedBuf, OpenOptions, Volume};

use super::Plan;
use super::rounds::{Side, take_turns};
use super::row::{Row, Target, Unit};
use super::scratch::{self, CHUNK, drop_cached, make_file};

/// Direct transfers in flight on the side that has no cache.
const DEPTH: usize = 8;
const MIB: f64 = 1048576.0;

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = reads(plan)?;
    rows.extend(writes(plan)?);
    Ok(rows)
}

fn reads(plan: &Plan) -> Result<Vec<Row>> {
    let dir = plan.scratch.dir("sequential")?;
    make_file(&dir.join("ours"), plan.size)?;
    let volume = Volume::builder().memory(plan.memory).open_dir(&dir)?;
    let options = OpenOptions::new().read(true);
    let theirs = dir.with_file_name("sequential-kernel");
    make_file(&theirs, plan.size)?;
    let kernel = scratch::open(&theirs)?;
    let direct = direct(&theirs, false)?;

    let mut rows = Vec::new();
    for (about, len) in [
        ("cold sequential read, 1 MiB a call", CHUNK),
        ("cold sequential read, 64 KiB a call", 64 << 10),
    ] {
        let ours: Side<'_, 1> = Box::new(|| {
            let file = volume.open("ours", &options)?;
            file.drop_cache()?;
            let mut buf = vec![0; len];
            rate(plan.size, || {
                let mut at = 0;
                while at < plan.size {
                    at += file.read_at(&mut buf, at)? as u64;
                }
                Ok(())
            })
        });
        let buffered: Side<'_, 1> = Box::new(|| {
            drop_cached(&kernel)?;
            let mut buf = vec![0; len];
            rate(plan.size, || {
                let mut at = 0;
                while at < plan.size {
                    at += kernel.read_at(&mut buf, at)? as u64;
                }
                Ok(())
            })
        });
        let deep: Side<'_, 1> = Box::new(|| {
            rate(plan.size, || {
                at_depth(plan.size, || {
                    let (direct, mut buf) = (&direct, AlignedBuf::zeroed(CHUNK));
                    move |offset| Ok(direct.read_at(buf.as_mut_slice(), offset).map(drop)?)
                })
            })
        });
        let found = take_turns(&plan.screen, about, plan.rounds, vec![ours, buffered, deep])?;
        let unit = Unit::MebibytesPerSecond;
        rows.push(
            Row::new(about, unit, found[0][0], "kernel, buffered", found[1][0])
                .held_to(Target::TimesAsGood(1.0)),
        );
        let other = format!("O_DIRECT, {DEPTH} x 1 MiB");
        rows.push(
            Row::new(about, unit, found[0][0], other, found[2][0])
                .held_to(Target::TimesAsGood(0.9)),
        );
    }
    volume.close()?;
    std::fs::remove_file(&theirs)?;
    Ok(rows)
}

fn writes(plan: &Plan) -> Result<Vec<Row>> {
    // Half of the large file: it is written three times a round.
    let size = (plan.size / 2).next_multiple_of(CHUNK as u64);
    let dir = plan.scratch.dir("write")?;
    let volume = Volume::builder().memory(plan.memory).open_dir(&dir)?;
    let theirs = dir.with_file_name("write-kernel");
    let chunk = scratch::noise(CHUNK);
    let new = OpenOptions::new()
        .write(true)
        .read(true)
        .create(true)
        .truncate(true);
    let ours: Side<'_, 1> = Box::new(|| {
        let measured = rate(size, || {
            let file = volume.open("ours", &new)?;
            let mut at = 0;
            while at < size {
                at += file.write_at(&chunk, at)? as u64;
            }
            Ok(file.sync_all()?)
        });
        volume.remove_file("ours")?;
        measured
    });
    let kernel: Side<'_, 1> = Box::new(|| {
        let measured = rate(size, || {
            let file = File::create(&theirs)?;
            let mut at = 0;
            while at < size {
                at += file.write_at(&chunk, at)? as u64;
            }
            Ok(file.sync_all()?)
        });
        std::fs::remove_file(&theirs)?;
        measured
    });
    let deep: Side<'_, 1> = Box::new(|| {
        let measured = rate(size, || {
            let file = direct(&theirs, true)?;
            at_depth(size, || {
                let mut buf = AlignedBuf::zeroed(CHUNK);
                buf.as_mut_slice().copy_from_slice(&chunk);
                let file = &file;
                move |offset| Ok(file.write_all_at(buf.as_mut_slice(), offset)?)
            })?;
            Ok(file.sync_all()?)
        });
        std::fs::remove_file(&theirs)?;
        measured
    });
    let about = "new data, 1 MiB a call, then fsync";
    let found = take_turns(&plan.screen, about, plan.rounds, vec![ours, kernel, deep])?;
    volume.close()?;
    let unit = Unit::MebibytesPerSecond;
    Ok(vec![
        Row::new(about, unit, found[0][0], "kernel, buffered", found[1][0])
            .held_to(Target::TimesAsGood(1.7)),
        Row::new(
            about,
            unit,
            found[0][0],
            format!("O_DIRECT, {DEPTH} x 1 MiB"),
            found[2][0],
        ),
    ])
}

/// Opens a file whose transfers by-pass the kernel's cache.
pub(super) fn direct(path: &Path, new: bool) -> Result<File> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(new)
        .truncate(new)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
        .open(path)
        .with_context(|| path.display().to_string())
}

/// Runs `work`, which moves `bytes`; returns mebibytes a second.
fn rate(bytes: u64, work: impl FnOnce() -> Result<()>) -> Result<[f64; 1]> {
    let start = Instant::now();
    work()?;
    Ok([bytes as f64 / MIB / start.elapsed().as_secs_f64()])
}

/// Moves all chunks of `size` bytes with [`DEPTH`] threads, each with a worker of its own.
fn at_depth<W>(size: u64, worker: impl Fn() -> W + Sync) -> Result<()>
where
    W: FnMut(u64) -> Result<()>,
{
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..DEPTH)
            .map(|_| {
                let (next, worker) = (&next, &worker);
                scope.spawn(move || {
                    let mut work = worker();
                    loop {
                        let at = next.fetch_add(CHUNK as u64, Ordering::Relaxed);
                        if at >= size {
                            return Ok(());
                        }
                        work(at)?;
                    }
                })
            })
            .collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| anyhow::bail!("a thread panicked"))
        })
    })
}
