//! Instructions of one resident write, counted by valgrind: no machine's noise reaches them.
//!
//! What is compared is what a write adds to its copy: memcpy's count stands for that. Valgrind counts each byte of a
//! `rep movsb` as an instruction, so on a processor without AVX2 it is some 3,700 too large.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use pinfold::{OpenOptions, Volume};
use serde::{Deserialize, Serialize};

use super::Plan;
use super::job::{Job, Report};
use super::rounds::Sample;
use super::row::{Row, Unit};
use super::scratch::{self, PAGE};

/// Operations of the two runs whose difference is counted: what both do besides cancels out.
const FEW: u64 = 1_000;
const MANY: u64 = 11_000;
/// Pages that are written, all resident.
const PAGES: u64 = 64;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum What {
    Write,
    Read,
    Memcpy,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Work {
    what: What,
    dir: PathBuf,
    operations: u64,
}

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    let valgrind = Command::new("valgrind")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if !valgrind.is_ok_and(|status| status.success()) {
        return Ok(vec![Row::skipped(
            "instructions a resident 4 KiB write",
            "valgrind is not installed",
        )]);
    }
    let dir = plan.scratch.dir("instructions")?;
    let mut rows = Vec::new();
    let memcpy = count(plan, What::Memcpy, &dir)?;
    for (what, about) in [
        (What::Write, "instructions a resident 4 KiB write"),
        (What::Read, "instructions a resident 4 KiB read"),
    ] {
        let ours = count(plan, what, &dir)?;
        rows.push(
            Row::new(
                about,
                Unit::Instructions,
                Sample::exactly(ours),
                "memcpy of 4 KiB",
                Sample::exactly(memcpy),
            )
            .note(format!("{:.0} besides the copy", ours - memcpy)),
        );
    }
    Ok(rows)
}

/// Returns instructions an operation.
fn count(plan: &Plan, what: What, dir: &Path) -> Result<f64> {
    plan.screen.begin("under valgrind", 2);
    let few = total(what, dir, FEW)?;
    plan.screen.step();
    let many = total(what, dir, MANY)?;
    plan.screen.step();
    Ok((many as f64 - few as f64) / (MANY - FEW) as f64)
}

fn total(what: What, dir: &Path, operations: u64) -> Result<u64> {
    let job = Job::Instructions(Work {
        what,
        dir: dir.to_owned(),
        operations,
    });
    let out = dir.with_file_name("callgrind.out");
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--error-exitcode=99"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(std::env::current_exe().context("this program")?)
        .args(["bench", "--child", &serde_json::to_string(&job)?])
        .stdin(Stdio::null())
        .output()
        .context("valgrind")?;
    if !output.status.success() {
        bail!(
            "valgrind: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let text = std::fs::read_to_string(&out).with_context(|| out.display().to_string())?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix("summary: ")
                .or_else(|| line.strip_prefix("totals: "))
        })
        .and_then(|count| count.trim().parse().ok())
        .context("callgrind's file has no total")
}

/// The child's part.
pub(super) fn child(work: &Work) -> Result<Report> {
    let mut page = scratch::noise(PAGE);
    let size = PAGES * PAGE as u64;
    let pages = (0..work.operations).map(|i| i % PAGES * PAGE as u64);
    if work.what == What::Memcpy {
        let mut memory = scratch::noise(size as usize);
        for at in pages {
            let at = at as usize;
            std::hint::black_box(&mut memory[at..at + PAGE]).copy_from_slice(&page);
        }
        return Ok(Report::default());
    }
    // Valgrind runs one thread at a time and lets none go on while another waits for a ring.
    let volume = Volume::builder()
        .memory(16 << 20)
        .io_uring(false)
        .open_dir(&work.dir)?;
    let options = OpenOptions::new().read(true).write(true).create(true);
    let file = volume.open("pages", &options)?;
    for at in (0..size).step_by(PAGE) {
        file.write_at(&page, at)?;
    }
    for at in pages {
        match work.what {
            What::Write => file.write_at(&page, at)?,
            What::Read | What::Memcpy => file.read_at(&mut page, at)?,
        };
    }
    drop(file);
    volume.close()?;
    Ok(Report::default())
}
