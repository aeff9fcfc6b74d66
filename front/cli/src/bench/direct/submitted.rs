//! Many direct transfers under way at once: submitted by one thread, beside fio with io_uring at the same depth, and beside as many
//! calls as the pool for submitted calls has threads.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use pinfold::{AlignedBuf, File, Volume};

use super::options;
use crate::bench::Plan;
use crate::bench::fio::{self, Way};
use crate::bench::rounds::{Side, take_turns};
use crate::bench::row::{Row, Target, Unit};
use crate::bench::scratch::{self, Offsets, PAGE};

/// Transfers under way at once.
const DEPTH: usize = 32;
/// Threads that each make a call at a time, as submitted calls have them that do not go straight.
const THREADS: u64 = 16;
const SIZE: u64 = 512 << 20;
const WARM: Duration = Duration::from_millis(100);
const RUN: Duration = Duration::from_millis(500);
/// What is to be had of the device, less the hand-over of each buffer.
const AS_FIO: Target = Target::TimesAsGood(0.9);

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    let about = format!("direct transfers of 4 KiB submitted, {DEPTH} under way");
    if !fio::is_installed() {
        return Ok(vec![Row::skipped(about, "fio is not installed")]);
    }
    let dir = plan.scratch.dir("submitted")?;
    scratch::make_file(&dir.join("device"), SIZE)?;
    let volume = Volume::builder().memory(plan.memory).open_dir(&dir)?;
    let file = Arc::new(volume.open("device", &options().direct(true))?);
    let mut rows = Vec::new();
    for (way, what) in [(Way::Read, "reads"), (Way::Write, "writes")] {
        let about = format!("direct {what} of 4 KiB submitted, {DEPTH} under way");
        rows.extend(beside_fio(plan, way, &about, &file, &dir.join("device"))?);
    }
    Ok(rows)
}

fn beside_fio(
    plan: &Plan,
    way: Way,
    about: &str,
    file: &Arc<File>,
    stored: &Path,
) -> Result<Vec<Row>> {
    let sides: Vec<Side<'_, 1>> = vec![
        Box::new(|| Ok([submitted(way, file)?])),
        Box::new(|| {
            let (warm, run) = (WARM.as_millis() as u64, RUN.as_millis() as u64);
            Ok([fio::random(way, stored, SIZE, DEPTH, warm, run)?])
        }),
        Box::new(|| Ok([called(way, file)?])),
    ];
    let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
    let row = |name: String, which: usize| {
        Row::new(about, Unit::PerSecond, found[0][0], name, found[which][0])
    };
    Ok(vec![
        row(format!("fio io_uring, depth {DEPTH}"), 1).held_to(AS_FIO),
        row(format!("{THREADS} threads, a call each"), 2),
    ])
}

/// Keeps [`DEPTH`] transfers under way; returns transfers a second.
fn submitted(way: Way, file: &Arc<File>) -> Result<f64> {
    let submit = |buf: AlignedBuf, offset| match way {
        Way::Read => file.submit_read(buf, offset),
        Way::Write => file.submit_write(buf, offset),
    };
    let mut offsets = Offsets::new(SIZE - PAGE as u64, 1);
    let mut under_way = VecDeque::new();
    for _ in 0..DEPTH {
        under_way.push_back(submit(AlignedBuf::zeroed(PAGE), offsets.next())?);
    }
    let begun = Instant::now();
    let (mut counted, mut from) = (0u64, None);
    while begun.elapsed() < WARM + RUN {
        let oldest = under_way.pop_front().context("none is under way")?;
        let ended = oldest.wait();
        ended.progress.posix()?;
        under_way.push_back(submit(ended.buf, offsets.next())?);
        if begun.elapsed() >= WARM {
            from.get_or_insert_with(Instant::now);
            counted += 1;
        }
    }
    let spent = from.map_or(RUN, |from| from.elapsed());
    for transfer in under_way {
        transfer.wait().progress.posix()?;
    }
    Ok(counted as f64 / spent.as_secs_f64())
}

/// The same by threads that wait for each of their transfers.
fn called(way: Way, file: &Arc<File>) -> Result<f64> {
    let (counted, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|number| {
                let (counted, over) = (&counted, &over);
                scope.spawn(move || -> Result<()> {
                    let mut offsets = Offsets::new(SIZE - PAGE as u64, number + 1);
                    let mut buf = AlignedBuf::zeroed(PAGE);
                    while !over.load(Ordering::Relaxed) {
                        match way {
                            Way::Read => file.read_at(buf.as_mut_slice(), offsets.next())?,
                            Way::Write => file.write_at(buf.as_mut_slice(), offsets.next())?,
                        };
                        counted.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        std::thread::sleep(WARM);
        let (before, begun) = (counted.load(Ordering::Relaxed), Instant::now());
        std::thread::sleep(RUN);
        let (after, spent) = (counted.load(Ordering::Relaxed), begun.elapsed());
        over.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().expect("a caller does not panic")?;
        }
        Ok((after - before) as f64 / spent.as_secs_f64())
    })
}
