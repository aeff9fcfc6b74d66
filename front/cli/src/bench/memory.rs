//! The budget kept: what a process uses while it reads and writes four times as much.

use std::path::Path;

use anyhow::{Context, Result};
use pinfold::{AlignedBuf, OpenOptions, Volume};

use super::job::{self, Job, Report};
use super::rounds::Sample;
use super::row::{Row, Target, Unit};
use super::scratch::{self, CHUNK, Offsets, PAGE};
use super::{OUT_OF_CORE, Plan};

/// What the process itself may use beyond the budget and a tenth of it: program, stacks, buffers of this measurement.
pub(super) const PROCESS: u64 = 16 << 20;
/// Random reads and writes of each kind.
const RANDOM: u64 = 20_000;

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for budget in [plan.memory / 8, plan.memory] {
        plan.screen
            .begin("reading and writing four times the budget", 1);
        let dir = plan.scratch.dir("memory")?;
        let report = job::run(&Job::Memory {
            dir,
            size: budget * OUT_OF_CORE,
            budget,
        })?;
        let of = |name: &str| {
            let found = report.memory.iter().find(|(known, _)| known == name);
            found.map_or(f64::NAN, |&(_, bytes)| bytes as f64)
        };
        let allowed = budget + budget / 10 + PROCESS;
        let about = format!("peak memory, budget {} MiB", budget >> 20);
        let parts: Vec<String> = report
            .memory
            .iter()
            .map(|(name, bytes)| format!("{name} {:.1} MiB", *bytes as f64 / 1048576.0))
            .collect();
        rows.push(
            Row::alone(about, Unit::Bytes, Sample::exactly(of("VmHWM")))
                .held_to(Target::AtMost(allowed as f64))
                .note(format!(
                    "allowed: budget + 10 % + {} MiB; {}",
                    PROCESS >> 20,
                    parts.join(", ")
                )),
        );
    }
    Ok(rows)
}

/// The child's part.
pub(super) fn child(dir: &Path, size: u64, budget: u64) -> Result<Report> {
    let volume = Volume::builder().memory(budget).open_dir(dir)?;
    let options = OpenOptions::new().read(true).write(true).create(true);
    let mut buf = scratch::noise(CHUNK);
    let file = volume.open("memory", &options)?;
    // New data, overwritten data, cold data; large transfers, small ones; cached and direct.
    for _ in 0..2 {
        for at in (0..size).step_by(CHUNK) {
            file.write_at(&buf, at)?;
        }
    }
    for at in (0..size).step_by(CHUNK) {
        file.read_at(&mut buf, at)?;
    }
    let mut offsets = Offsets::new(size, 11);
    for _ in 0..RANDOM {
        file.read_at(&mut buf[..PAGE], offsets.next())?;
        file.write_at(&buf[..PAGE], offsets.next())?;
    }
    file.sync_all()?;
    let direct = volume.open("memory", &options.direct(true))?;
    let mut aligned = AlignedBuf::zeroed(CHUNK);
    for at in (0..size).step_by(CHUNK) {
        direct.read_at(aligned.as_mut_slice(), at)?;
        direct.write_at(aligned.as_mut_slice(), at)?;
    }
    let memory = status()?;
    drop((file, direct));
    volume.remove_file("memory")?;
    volume.close()?;
    Ok(Report {
        memory,
        ..Report::default()
    })
}

fn status() -> Result<Vec<(String, u64)>> {
    let text = std::fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let wanted = ["VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem"];
    Ok(text
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            let kib: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
            wanted.contains(&name).then(|| (name.to_owned(), kib << 10))
        })
        .collect())
}
