//! `pinfold bench`: this library beside the kernel, on the same directory, in the same run.
//!
//! *Owns*: the command line, the list of comparisons, progress, the table and the JSON file.
//!
//! *Does not own*: how a comparison measures (one module each), what is measured.
//!
//! *Locking*: none.
//!
//! Machines are noisy, so the sides of a comparison take turns within one run, every other round in reverse order,
//! and the table shows medians of the rounds with their quartiles. What a side needs to itself (a control group, a peak of
//! memory, processor time) it gets by running in a process of its own: this program with the hidden `--child`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;

use crate::mount::Size;

mod direct;
mod fio;
mod glocks;
mod group;
mod instructions;
mod job;
mod machine;
mod mapped;
mod memory;
mod mounted;
mod out_of_core;
mod passthrough;
mod rounds;
mod row;
mod scratch;
mod stream;
mod touch;

use rounds::Screen;
use row::{Outcome, Row};
use scratch::Scratch;

/// The least budget that the comparisons make sense with.
const MEMORY_MIN: u64 = 16 << 20;
/// Data over budget where data is to be larger than memory.
const OUT_OF_CORE: u64 = 4;
/// Exit status when a target was missed.
const MISSED: u8 = 1;

/// Measure this library beside the kernel on a directory
///
/// Each line of the table is a comparison: medians of both sides, taken in turns, their ratio, and where there is one the
/// target that the ratio is held to. Everything it writes is in a subdirectory that it removes. Run it
/// on an otherwise idle machine, as root where the out-of-core and mount comparisons are wanted. Exit status 0: no target
/// was missed (skipped ones included); 1: one was, or it could not be run.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The directory to measure on; its filesystem is the one compared with
    #[arg(value_name = "DIR", required_unless_present_any = ["child", "list"])]
    dir: Option<PathBuf>,

    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Run only the comparisons whose group has one of these names
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,

    /// Bytes of the files read and written [default: four times the budget]
    #[arg(long, value_name = "BYTES")]
    size: Option<Size>,

    /// The budget for cached pages
    #[arg(long, value_name = "BYTES", default_value = "128M")]
    memory: Size,

    /// Rounds of each comparison
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,

    /// Also count instructions, under valgrind (slow; needs valgrind)
    #[arg(long)]
    callgrind: bool,

    /// List the groups of comparisons
    #[arg(long)]
    list: bool,

    /// Run one side of a comparison, described as JSON
    #[arg(long, hide = true, value_name = "JOB")]
    child: Option<String>,
}

/// What every comparison is told.
#[derive(Debug)]
struct Plan {
    scratch: Scratch,
    /// Bytes of the large files.
    size: u64,
    /// The budget, in bytes.
    memory: u64,
    rounds: usize,
    screen: Screen,
}

type Run = fn(&Plan) -> Result<Vec<Row>>;

/// The groups, in the order they run.
const GROUPS: [(&str, &str, Run); 9] = [
    (
        "resident",
        "4 KiB reads and overwrites of cached pages",
        touch::run,
    ),
    (
        "sequential",
        "cold sequential reads; new data, then fsync",
        stream::run,
    ),
    (
        "out-of-core",
        "random reads of four times the memory",
        out_of_core::run,
    ),
    (
        "mapped",
        "loads and stores through mappings, beside the kernel's",
        mapped::run,
    ),
    (
        "direct",
        "direct I/O, pins, the two-state lock, when faults are taken",
        direct::run,
    ),
    (
        "glocks",
        "locks between nodes: cached, handed over, after a death; MAY_DEMOTE",
        glocks::run,
    ),
    (
        "memory",
        "memory used while four times the budget is read and written",
        memory::run,
    ),
    (
        "mount",
        "through the mount, beside the directory and a passthrough server",
        mounted::run,
    ),
    (
        "instructions",
        "instructions of a resident write (with --callgrind)",
        instructions::run,
    ),
];
const INSTRUCTIONS: &str = "instructions";

#[derive(Serialize)]
struct Report<'a> {
    machine: machine::Machine,
    directory: String,
    memory: u64,
    size: u64,
    rounds: usize,
    rows: &'a [Row],
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(job) = &arguments.child {
        job::run_child(job)?;
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.list {
        for (name, about, _) in GROUPS {
            println!("{name:<14} {about}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let groups = chosen(arguments)?;
    let plan = plan(arguments)?;
    let machine = machine::Machine::here(plan.scratch.path());
    println!("{machine}");
    println!(
        "budget {}, files of {}, {} rounds, medians (quartiles); a ratio above 1 is in pinfold's favour\n",
        arguments.memory,
        Size(plan.size),
        plan.rounds
    );
    let mut rows = Vec::new();
    for (name, _, run) in groups {
        plan.screen.heading(name);
        let found = run(&plan).with_context(|| format!("comparison {name:?}"))?;
        plan.screen.print(&row::table(name, &found));
        rows.extend(found);
    }
    plan.screen.end();
    let report = Report {
        machine,
        directory: plan.scratch.given().display().to_string(),
        memory: plan.memory,
        size: plan.size,
        rounds: plan.rounds,
        rows: &rows,
    };
    if let Some(file) = &arguments.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(file, text + "\n").with_context(|| file.display().to_string())?;
    }
    let missed = rows
        .iter()
        .filter(|row| row.outcome() == Outcome::Missed)
        .count();
    let held = rows
        .iter()
        .filter(|row| row.outcome() == Outcome::Met)
        .count();
    println!("{held} targets met, {missed} missed");
    Ok(if missed > 0 {
        ExitCode::from(MISSED)
    } else {
        ExitCode::SUCCESS
    })
}

fn chosen(arguments: &Arguments) -> Result<Vec<(&'static str, &'static str, Run)>> {
    for name in &arguments.only {
        if !GROUPS.iter().any(|(group, ..)| group == name) {
            bail!("no comparison is called {name:?}; see --list");
        }
    }
    let wanted = |name: &str| {
        let asked = arguments.only.iter().any(|only| only == name);
        if name == INSTRUCTIONS {
            return asked || arguments.callgrind;
        }
        asked || arguments.only.is_empty() && !arguments.callgrind
    };
    Ok(GROUPS
        .into_iter()
        .filter(|(name, ..)| wanted(name))
        .collect())
}

fn plan(arguments: &Arguments) -> Result<Plan> {
    let memory = arguments.memory.0;
    if memory < MEMORY_MIN {
        bail!(
            "--memory {} is too little to measure with: at least {}",
            arguments.memory,
            Size(MEMORY_MIN)
        );
    }
    let size = arguments
        .size
        .map_or(memory.saturating_mul(OUT_OF_CORE), |size| size.0);
    if size < memory.saturating_mul(2) {
        bail!("--size must be at least twice --memory, or nothing is ever missed");
    }
    let dir = arguments.dir.as_deref().context("a directory is needed")?;
    Ok(Plan {
        scratch: Scratch::new(dir)?,
        // Whole mebibytes: no comparison is about tails.
        size: size.next_multiple_of(1 << 20),
        memory,
        rounds: arguments.rounds as usize,
        screen: Screen::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn names(line: &[&str]) -> Result<Vec<&'static str>> {
        let line = Line::parse_from(["bench"].iter().chain(line));
        Ok(chosen(&line.arguments)?
            .into_iter()
            .map(|(name, ..)| name)
            .collect())
    }

    #[test]
    fn comparisons_are_chosen_by_name_and_instructions_only_when_asked() {
        let all = names(&["/tmp"]).unwrap();
        assert!(all.contains(&"resident") && !all.contains(&INSTRUCTIONS));
        assert_eq!(
            names(&["--only", "memory,mount", "/tmp"]).unwrap(),
            ["memory", "mount"]
        );
        assert_eq!(names(&["--callgrind", "/tmp"]).unwrap(), [INSTRUCTIONS]);
        assert!(
            names(&["--only", "speed", "/tmp"])
                .unwrap_err()
                .to_string()
                .contains("--list")
        );
    }

    #[test]
    fn sizes_that_measure_nothing_are_refused() {
        for line in [["--memory", "1M"], ["--size", "64M"]] {
            let line = Line::parse_from(["bench", "/tmp"].iter().chain(&line));
            assert!(plan(&line.arguments).is_err());
        }
    }
}
