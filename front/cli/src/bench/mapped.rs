//! Mapped files: loads and stores through a mapping of ours, in both deliveries, beside the kernel's.
//!
//! Each side is a process of its own, the kernel's in a control group of the same budget. What a program gets from the
//! kernel depends on its advice and on the device's read-ahead, so both are shown: run it on a directory of a loop device
//! to see it with 128 KiB.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::group::Group;
use super::job::{self, Job};
use super::rounds::{Side, take_turns};
use super::row::{Row, Target, Unit};
use super::scratch::{PAGE, make_file};
use super::{OUT_OF_CORE, Plan};

pub(super) mod child;

const THREADS: [usize; 4] = [1, 2, 8, 16];
const WARM_MS: u64 = 400;
const RUN_MS: u64 = 800;
/// What the kernel's side gets beyond the budget, for the process itself.
const PROCESS: u64 = 8 << 20;
const ROUNDS_MAX: usize = 5;
/// Read-ahead of the device from which on the kernel's default advice makes random loads dear.
const LARGE_READ_AHEAD: u64 = 8 << 20;
/// Data that is sorted, over budget.
const SORTED: u64 = 4;
/// The budget of the sort: larger would take minutes.
const SORT_BUDGET: u64 = 16 << 20;

/// Who serves a mapping, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Served {
    /// mmap(2), with no advice.
    Kernel,
    /// mmap(2) and MADV_RANDOM.
    KernelRandom,
    /// This library, another thread serving faults.
    Handler,
    /// This library, the faulting thread serving its own.
    Inline,
}

impl Served {
    fn is_kernel(self) -> bool {
        matches!(self, Self::Kernel | Self::KernelRandom)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Kernel => "mmap",
            Self::KernelRandom => "mmap, MADV_RANDOM",
            Self::Handler => "handler",
            Self::Inline => "inline",
        }
    }
}

/// What is done with the mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Work {
    /// A load from a random page, by several threads, once memory is full.
    Loads {
        threads: usize,
        warm_ms: u64,
        run_ms: u64,
    },
    /// A store to a random page, so many times by one thread; then a flush of all, which is timed too.
    Updates { stores: u64 },
    /// A load from every page in order.
    Scan,
    /// A first load from every page of a mapping whose pages are all in memory, in order and at random.
    Minor { random: bool },
    /// A store to every page, all of them mapped, in memory and clean.
    CleanStores,
    /// Quick sort of eight-byte numbers, in place, and a flush.
    Sort,
}

/// A mapping and what to do with it, for a child.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MappedJob {
    pub(super) served: Served,
    pub(super) work: Work,
    pub(super) dir: PathBuf,
    pub(super) name: String,
    /// Bytes of the file.
    pub(super) size: u64,
    /// The budget, in bytes.
    pub(super) memory: u64,
    pub(super) group: Option<PathBuf>,
}

/// A place to measure at, and the memory to do it with.
struct Bed<'a> {
    plan: &'a Plan,
    dir: PathBuf,
    size: u64,
    memory: u64,
    group: Result<Group>,
}

impl<'a> Bed<'a> {
    fn new(plan: &'a Plan, name: &str, size: u64, memory: u64) -> Result<Self> {
        let dir = plan.scratch.dir(name)?;
        for side in ["kernel", "ours"] {
            let dir = plan.scratch.dir(&format!("{name}/{side}"))?;
            make_file(&dir.join("data"), size)?;
        }
        Ok(Self {
            plan,
            dir,
            size,
            memory,
            group: Group::new(memory + PROCESS),
        })
    }

    fn job(&self, served: Served, work: Work) -> MappedJob {
        let side = if served.is_kernel() { "kernel" } else { "ours" };
        let group = self.group.as_ref().ok().filter(|_| served.is_kernel());
        MappedJob {
            served,
            work,
            dir: self.dir.join(side),
            name: "data".into(),
            size: self.size,
            memory: self.memory,
            group: group.map(|group| group.path().to_owned()),
        }
    }

    /// Lets sides take turns; a row for each of ours against each of the kernel's, with what it is held to.
    fn compare(
        &self,
        about: &str,
        unit: Unit,
        work: Work,
        sides: &[Served],
        target: impl Fn(Served, Served) -> Option<Target>,
    ) -> Result<Vec<Row>> {
        if let Err(error) = &self.group {
            return Ok(vec![Row::skipped(about, format!("{error:#}"))]);
        }
        let turns: Vec<Side<'_, 1>> = sides
            .iter()
            .map(|&served| -> Side<'_, 1> {
                Box::new(move || {
                    let job = self.job(served, work);
                    if work == Work::Sort {
                        // The round before has left it sorted.
                        make_file(&job.dir.join(&job.name), job.size)?;
                    }
                    measured(job, unit)
                })
            })
            .collect();
        let rounds = self.plan.rounds.min(ROUNDS_MAX);
        let found = take_turns(&self.plan.screen, about, rounds, turns)?;
        let mut rows = Vec::new();
        for (&ours, [value]) in sides.iter().zip(&found) {
            if ours.is_kernel() {
                continue;
            }
            for (&theirs, [other]) in sides.iter().zip(&found) {
                if !theirs.is_kernel() {
                    continue;
                }
                let about = format!("{about}, {}", ours.name());
                let row = Row::new(about, unit, *value, theirs.name(), *other);
                rows.push(match target(ours, theirs) {
                    Some(target) => row.held_to(target),
                    None => row,
                });
            }
        }
        Ok(rows)
    }
}

fn measured(job: MappedJob, unit: Unit) -> Result<[f64; 1]> {
    let size = job.size as f64;
    let report = job::run(&Job::Mapped(job))?;
    Ok([match unit {
        Unit::MebibytesPerSecond => size / f64::from(1 << 20) / report.seconds,
        Unit::Nanoseconds => report.seconds * 1e9 / report.operations as f64,
        _ => report.operations as f64 / report.seconds,
    }])
}

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = larger_than_memory(plan)?;
    rows.extend(in_memory(plan)?);
    rows.extend(sorted(plan)?);
    Ok(rows)
}

fn larger_than_memory(plan: &Plan) -> Result<Vec<Row>> {
    use Served::{Handler, Inline, Kernel, KernelRandom};
    let bed = Bed::new(plan, "mapped", plan.memory * OUT_OF_CORE, plan.memory)?;
    let read_ahead = read_ahead(&bed.dir);
    let mut rows = Vec::new();
    let loads_target = |_, theirs| {
        Some(Target::TimesAsGood(match (theirs, read_ahead) {
            (KernelRandom, _) => 1.0,
            (_, Some(bytes)) if bytes >= LARGE_READ_AHEAD => 10.0,
            _ => 2.0,
        }))
    };
    for threads in THREADS {
        let work = Work::Loads {
            threads,
            warm_ms: WARM_MS,
            run_ms: RUN_MS,
        };
        let about = format!("random load, {OUT_OF_CORE}x memory, {threads} threads");
        let sides = [Handler, Inline, Kernel, KernelRandom];
        rows.extend(bed.compare(&about, Unit::PerSecond, work, &sides, loads_target)?);
    }
    if let (Some(row), Some(bytes)) = (rows.pop(), read_ahead) {
        rows.push(row.note(format!("the device reads {} KiB ahead", bytes >> 10)));
    }
    let even = |_, theirs| (theirs == Kernel).then_some(Target::TimesAsGood(1.0));
    // As many as there are pages in memory: enough to write back much, and not all.
    let work = Work::Updates {
        stores: plan.memory / PAGE as u64,
    };
    let about = format!("random stores, {OUT_OF_CORE}x memory, and flush");
    let sides = [Handler, Inline, Kernel, KernelRandom];
    rows.extend(bed.compare(&about, Unit::PerSecond, work, &sides, even)?);
    let sides = [Handler, Inline, Kernel];
    rows.extend(bed.compare(
        "cold sequential scan",
        Unit::MebibytesPerSecond,
        Work::Scan,
        &sides,
        even,
    )?);
    Ok(rows)
}

fn in_memory(plan: &Plan) -> Result<Vec<Row>> {
    use Served::{Handler, Inline, Kernel};
    let bed = Bed::new(plan, "mapped-resident", plan.memory / 4, plan.memory)?;
    let sides = [Handler, Inline, Kernel];
    let unit = Unit::Nanoseconds;
    let mut rows = bed.compare(
        "first load of a page in memory, in order",
        unit,
        Work::Minor { random: false },
        &sides,
        |_, _| Some(Target::AtMost(300.0)),
    )?;
    rows.extend(bed.compare(
        "first load of a page in memory, at random",
        unit,
        Work::Minor { random: true },
        &sides,
        |_, _| None,
    )?);
    rows.extend(bed.compare(
        "store to a clean page",
        unit,
        Work::CleanStores,
        &sides,
        |ours, _| (ours == Inline).then_some(Target::TimesAsGood(1.0)),
    )?);
    Ok(rows)
}

fn sorted(plan: &Plan) -> Result<Vec<Row>> {
    use Served::{Handler, Inline, Kernel};
    let bed = Bed::new(plan, "mapped-sort", SORT_BUDGET * SORTED, SORT_BUDGET)?;
    let about = format!("sort in place, {SORTED}x memory");
    let sides = [Handler, Inline, Kernel];
    bed.compare(
        &about,
        Unit::MebibytesPerSecond,
        Work::Sort,
        &sides,
        |ours, _| (ours == Inline).then_some(Target::TimesAsGood(1.5)),
    )
}

/// Returns the read-ahead of the device under a directory, in bytes.
fn read_ahead(dir: &Path) -> Option<u64> {
    let device = rustix::fs::stat(dir).ok()?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let file = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    let kib: u64 = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
    Some(kib << 10)
}
