//! Data larger than memory: random reads beside the kernel with the same memory, and beside no cache at all.

use anyhow::Result;

use super::group::Group;
use super::job::{self, Job, Via};
use super::rounds::{Side, take_turns};
use super::row::{Row, Target, Unit};
use super::scratch::{PAGE, make_file};
use super::{OUT_OF_CORE, Plan, fio};

const THREADS: [usize; 4] = [1, 2, 8, 16];
/// The thread count that is set beside fio at the same depth.
const DEEP: usize = 16;
const WARM_MS: u64 = 400;
const RUN_MS: u64 = 800;
/// What the kernel's side gets beyond the budget, for the process itself.
const PROCESS: u64 = 8 << 20;
/// Each turn is a process that fills its memory first, so fewer rounds than elsewhere.
const ROUNDS_MAX: usize = 5;

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    let size = plan.memory * OUT_OF_CORE;
    let dir = plan.scratch.dir("out-of-core")?;
    make_file(&dir.join("data"), size)?;
    let group = Group::new(plan.memory + PROCESS);
    let fio = fio::is_installed();
    let rounds = plan.rounds.min(ROUNDS_MAX);
    let mut rows = Vec::new();
    for threads in THREADS {
        let about = format!("random 4 KiB read, {OUT_OF_CORE}x memory, {threads} threads");
        let job = |via, group: Option<&Group>| Job::RandomReads {
            via,
            dir: dir.clone(),
            name: "data".into(),
            size,
            memory: plan.memory,
            threads,
            warm_ms: WARM_MS,
            run_ms: RUN_MS,
            group: group.map(|group| group.path().to_owned()),
        };
        let ours: Side<'_, 3> = Box::new(|| measured(&job(Via::Pinfold, None)));
        let floor: Side<'_, 3> = Box::new(|| measured(&job(Via::Direct, None)));
        let mut sides = vec![ours, floor];
        if let Ok(group) = &group {
            sides.push(Box::new(|| measured(&job(Via::Kernel, Some(group)))));
        }
        if threads == DEEP && fio {
            sides.push(Box::new(|| {
                let reads = fio::random(
                    fio::Way::Read,
                    &dir.join("data"),
                    size,
                    DEEP,
                    WARM_MS,
                    RUN_MS,
                )?;
                Ok([reads, reads, f64::NAN])
            }));
        }
        let found = take_turns(&plan.screen, &about, rounds, sides)?;
        let [reads, misses, cpu] = found[0];
        let floor_cpu = found[1][2];
        match &group {
            Ok(_) => {
                let name = "pread, same memory";
                rows.push(
                    Row::new(&about, Unit::PerSecond, reads, name, found[2][0])
                        .held_to(Target::TimesAsGood(1.0)),
                );
                let about = format!("  processor time a miss, {threads} threads");
                rows.push(
                    Row::new(about, Unit::Microseconds, cpu, name, found[2][2])
                        .held_to(Target::TimesAsGood(2.0)),
                );
            }
            Err(error) => rows.push(Row::skipped(&about, format!("{error:#}"))),
        }
        let about = format!("  processor time a miss, {threads} threads");
        rows.push(
            Row::new(about, Unit::Microseconds, cpu, "pread, O_DIRECT", floor_cpu)
                .note("a direct read alone is the floor of a miss that a thread waits for"),
        );
        if threads == DEEP {
            let about = format!("  reads from the device, {DEEP} threads");
            rows.push(match found.last() {
                Some([_, device, _]) if fio => {
                    let name = format!("fio io_uring, depth {DEEP}");
                    Row::new(about, Unit::PerSecond, misses, name, *device)
                        .held_to(Target::TimesAsGood(0.9))
                        .note("hits are not counted on our side: the device's reads alone")
                }
                _ => Row::skipped(about, "fio is not installed"),
            });
        }
    }
    Ok(rows)
}

/// Reads a second, reads from the device a second, microseconds of processor time for each of those.
fn measured(job: &Job) -> Result<[f64; 3]> {
    let report = job::run(job)?;
    let misses = report.device_bytes as f64 / PAGE as f64;
    Ok([
        report.operations as f64 / report.seconds,
        misses / report.seconds,
        report.cpu_seconds * 1e6 / misses,
    ])
}
