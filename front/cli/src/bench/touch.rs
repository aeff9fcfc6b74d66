//! Cached pages: what one read or overwrite of 4 KiB costs, in processor time of the calling thread.
//!
//! Nothing waits here, so that time is the latency too, less what other programs take from the processor.

use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::Result;
use pinfold::{File, OpenOptions, Volume};

use super::Plan;
use super::rounds::{Sample, Side, take_turns};
use super::row::{Row, Target, Unit};
use super::scratch::{self, Offsets, PAGE, drop_cached, make_file, read_all, thread_time_ns};

/// Operations of one turn.
const OPERATIONS: u64 = 100_000;
/// Operations of one turn on a kernel file whose pages are in large folios: there an overwrite is slow.
const FEW_OPERATIONS: u64 = 10_000;

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    // Larger than the processor's caches, well within the budget and below the dirty limit's brake.
    let size = plan.memory / 8;
    let ours_dir = plan.scratch.dir("resident")?;
    make_file(&ours_dir.join("ours"), size)?;
    let volume = Volume::builder().memory(plan.memory).open_dir(&ours_dir)?;
    let ours = volume.open("ours", &OpenOptions::new().read(true).write(true))?;
    read_pages(&ours, size)?;

    // The kernel's pages come in two shapes: those a program wrote, and those read-ahead brought in.
    let written = ours_dir.with_file_name("resident-written");
    scratch::make_file(&written, size)?;
    let written = rewrite(&written, size)?;
    let read = ours_dir.with_file_name("resident-read");
    make_file(&read, size)?;
    let read = scratch::open(&read)?;
    read_all(&read, size)?;

    let faults = volume.statistics().fault_in_calls;
    let mut rows = Vec::new();
    let found = take_turns(
        &plan.screen,
        "reads",
        plan.rounds,
        vec![
            ours_reads(&ours, size),
            kernel_reads(&written, size),
            kernel_reads(&read, size),
        ],
    )?;
    let about = "random 4 KiB read";
    rows.push(
        Row::new(
            about,
            Unit::Nanoseconds,
            found[0][0],
            "pread, file written",
            found[1][0],
        )
        .held_to(Target::TimesAsGood(6.0)),
    );
    rows.push(Row::new(
        about,
        Unit::Nanoseconds,
        found[0][0],
        "pread, file read ahead",
        found[2][0],
    ));

    let found = take_turns(
        &plan.screen,
        "overwrites",
        plan.rounds,
        vec![
            ours_writes(&ours, size),
            kernel_writes(&written, size, OPERATIONS),
            kernel_writes(&read, size, FEW_OPERATIONS),
            copies(size),
        ],
    )?;
    let about = "random 4 KiB overwrite";
    rows.push(
        Row::new(
            about,
            Unit::Nanoseconds,
            found[0][0],
            "pwrite, file written",
            found[1][0],
        )
        .held_to(Target::TimesAsGood(8.0)),
    );
    rows.push(Row::new(
        about,
        Unit::Nanoseconds,
        found[0][0],
        "pwrite, file read ahead",
        found[2][0],
    ));
    rows.push(
        Row::new(
            about,
            Unit::Nanoseconds,
            found[0][0],
            "memcpy to such memory",
            found[3][0],
        )
        .note("memcpy is the floor: a write cannot be cheaper"),
    );
    let faults = volume.statistics().fault_in_calls - faults;
    rows.push(
        Row::alone(
            "fault-in calls meanwhile",
            Unit::Count,
            Sample::exactly(faults as f64),
        )
        .held_to(Target::AtMost(0.0)),
    );
    drop(ours);
    volume.close()?;
    Ok(rows)
}

/// Opens a file whose cached pages were all written, in large writes as programs do, and are clean.
fn rewrite(path: &Path, size: u64) -> Result<std::fs::File> {
    let file = scratch::open(path)?;
    drop_cached(&file)?;
    let chunk = scratch::noise(scratch::CHUNK);
    let mut at = 0;
    while at < size {
        file.write_all_at(&chunk, at)?;
        at += chunk.len() as u64;
    }
    file.sync_all()?;
    Ok(file)
}

fn read_pages(file: &File, size: u64) -> Result<()> {
    let mut buf = vec![0; scratch::CHUNK];
    let mut at = 0;
    while at < size {
        at += file.read_at(&mut buf, at)? as u64;
    }
    Ok(())
}

/// Times `operations` calls at random offsets; returns nanoseconds a call.
fn timed(
    size: u64,
    seed: u64,
    operations: u64,
    mut call: impl FnMut(u64) -> Result<()>,
) -> Result<[f64; 1]> {
    let mut offsets = Offsets::new(size, seed);
    let start = thread_time_ns();
    for _ in 0..operations {
        call(offsets.next())?;
    }
    Ok([(thread_time_ns() - start) / operations as f64])
}

fn ours_reads(file: &File, size: u64) -> Side<'_, 1> {
    let mut buf = vec![0; PAGE];
    let mut seed = 0;
    Box::new(move || {
        seed += 1;
        timed(size, seed, OPERATIONS, |at| {
            Ok(file.read_at(&mut buf, at).map(drop)?)
        })
    })
}

fn kernel_reads(file: &std::fs::File, size: u64) -> Side<'_, 1> {
    let mut buf = vec![0; PAGE];
    let mut seed = 0;
    Box::new(move || {
        seed += 1;
        timed(size, seed, OPERATIONS, |at| {
            Ok(file.read_at(&mut buf, at).map(drop)?)
        })
    })
}

fn ours_writes(file: &File, size: u64) -> Side<'_, 1> {
    let buf = scratch::noise(PAGE);
    let mut seed = 0;
    Box::new(move || {
        seed += 1;
        timed(size, seed, OPERATIONS, |at| {
            Ok(file.write_at(&buf, at).map(drop)?)
        })
    })
}

fn kernel_writes(file: &std::fs::File, size: u64, operations: u64) -> Side<'_, 1> {
    let buf = scratch::noise(PAGE);
    let mut seed = 0;
    Box::new(move || {
        seed += 1;
        timed(size, seed, operations, |at| {
            Ok(file.write_at(&buf, at).map(drop)?)
        })
    })
}

fn copies<'a>(size: u64) -> Side<'a, 1> {
    let buf = scratch::noise(PAGE);
    let mut memory = scratch::noise(size as usize);
    let mut seed = 0;
    Box::new(move || {
        seed += 1;
        timed(size, seed, OPERATIONS, |at| {
            let at = at as usize;
            std::hint::black_box(&mut memory[at..at + PAGE]).copy_from_slice(&buf);
            Ok(())
        })
    })
}
