//! One side of a comparison in a process of its own, so that its memory, processor time and control group are its own.
//!
//! The parent passes a [`Job`] as JSON on the command line; the child answers with a [`Report`] on standard output.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pinfold::{AlignedBuf, File, OpenOptions, Volume};
use serde::{Deserialize, Serialize};

#[cfg(feature = "etcd")]
use super::glocks::{self, between::HoldJob};
use super::group;
use super::mapped::{self, MappedJob};
use super::scratch::{self, CHUNK, Offsets, PAGE, drop_cached};
use super::{instructions, memory, stream};

/// Who serves the reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Via {
    /// This library.
    Pinfold,
    /// pread(2), in the control group of the job.
    Kernel,
    /// pread(2) with O_DIRECT: no cache at all.
    Direct,
}

/// What a child does.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Job {
    /// Random reads of one page each from several threads, once memory is full.
    RandomReads {
        via: Via,
        dir: PathBuf,
        name: String,
        /// Bytes of the file.
        size: u64,
        /// The budget, in bytes.
        memory: u64,
        threads: usize,
        /// Milliseconds until measuring begins, with the same reads.
        warm_ms: u64,
        run_ms: u64,
        /// The control group to enter first.
        group: Option<PathBuf>,
    },
    /// Reads and writes `size` bytes in every way, and tells what memory that took.
    Memory {
        dir: PathBuf,
        size: u64,
        budget: u64,
    },
    /// Works through a mapping.
    Mapped(MappedJob),
    /// Takes a lock and keeps it until it is killed.
    #[cfg(feature = "etcd")]
    HoldGlock(HoldJob),
    /// Writes cached pages, to be counted by valgrind.
    Instructions(instructions::Work),
}

/// What a child answers.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) operations: u64,
    pub(super) seconds: f64,
    /// Processor time, user and system, of the whole process.
    pub(super) cpu_seconds: f64,
    /// Bytes that this process made the device read.
    pub(super) device_bytes: u64,
    /// Peaks and parts of memory by name, in bytes.
    pub(super) memory: Vec<(String, u64)>,
}

/// Runs a job in a child and returns its report.
pub(super) fn run(job: &Job) -> Result<Report> {
    let program = std::env::current_exe().context("this program")?;
    let output = Command::new(program)
        .args(["bench", "--child", &serde_json::to_string(job)?])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run this program again")?;
    if !output.status.success() {
        bail!("a child ended with {}", output.status);
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Runs the job a child was given.
pub(super) fn run_child(job: &str) -> Result<()> {
    let report = match serde_json::from_str(job)? {
        Job::RandomReads {
            via,
            dir,
            name,
            size,
            memory,
            threads,
            warm_ms,
            run_ms,
            group,
        } => {
            if let Some(group) = group {
                group::enter(&group)?;
            }
            let pace = Pace {
                size,
                threads,
                warm: Duration::from_millis(warm_ms),
                run: Duration::from_millis(run_ms),
            };
            match via {
                Via::Kernel => kernel_reads(&dir.join(name), memory, &pace)?,
                Via::Direct => direct_reads(&dir.join(name), &pace)?,
                Via::Pinfold => pinfold_reads(&dir, &name, memory, &pace)?,
            }
        }
        Job::Memory { dir, size, budget } => memory::child(&dir, size, budget)?,
        Job::Mapped(job) => mapped::child::run(&job)?,
        #[cfg(feature = "etcd")]
        Job::HoldGlock(job) => glocks::between::hold(&job)?,
        Job::Instructions(work) => instructions::child(&work)?,
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

struct Pace {
    size: u64,
    threads: usize,
    warm: Duration,
    run: Duration,
}

fn kernel_reads(path: &Path, memory: u64, pace: &Pace) -> Result<Report> {
    let file = scratch::open(path)?;
    // What others were charged for would be had for nothing here.
    drop_cached(&file)?;
    scratch::read_all(&file, memory.min(pace.size))?;
    measure(pace, |buf, at| Ok(file.read_at(buf, at).map(drop)?))
}

fn direct_reads(path: &Path, pace: &Pace) -> Result<Report> {
    let file = stream::direct(path, false)?;
    measure(pace, |buf, at| Ok(file.read_at(buf, at).map(drop)?))
}

fn pinfold_reads(dir: &Path, name: &str, memory: u64, pace: &Pace) -> Result<Report> {
    let volume = Volume::builder().memory(memory).open_dir(dir)?;
    let file = volume.open(name, &OpenOptions::new().read(true))?;
    fill(&file, memory.min(pace.size))?;
    measure(pace, |buf, at| Ok(file.read_at(buf, at).map(drop)?))
}

/// Reads the first bytes of a file in order.
pub(super) fn fill(file: &File, bytes: u64) -> Result<()> {
    let mut buf = vec![0; CHUNK];
    let mut at = 0;
    while at < bytes {
        at += file.read_at(&mut buf, at)? as u64;
    }
    Ok(())
}

fn measure(pace: &Pace, read: impl Fn(&mut [u8], u64) -> Result<()> + Sync) -> Result<Report> {
    let (stop, total) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..pace.threads)
            .map(|number| {
                let (stop, total, read) = (&stop, &total, &read);
                scope.spawn(move || -> Result<()> {
                    let mut offsets = Offsets::new(pace.size, number as u64 + 1);
                    // Aligned, because direct reads want it.
                    let mut memory = AlignedBuf::zeroed(PAGE);
                    let buf = memory.as_mut_slice();
                    while !stop.load(Ordering::Relaxed) {
                        for _ in 0..16 {
                            read(buf, offsets.next())?;
                        }
                        total.fetch_add(16, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        std::thread::sleep(pace.warm);
        let (start, before) = (Instant::now(), Usage::now());
        let reads_before = total.load(Ordering::Relaxed);
        std::thread::sleep(pace.run);
        let (reads, after) = (total.load(Ordering::Relaxed), Usage::now());
        let seconds = start.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread
                .join()
                .unwrap_or_else(|_| bail!("a reader panicked"))?;
        }
        let (before, after) = (before?, after?);
        Ok(Report {
            operations: reads - reads_before,
            seconds,
            cpu_seconds: after.cpu_seconds - before.cpu_seconds,
            device_bytes: after.device_bytes - before.device_bytes,
            memory: Vec::new(),
        })
    })
}

/// What this process used so far.
struct Usage {
    cpu_seconds: f64,
    device_bytes: u64,
}

impl Usage {
    fn now() -> Result<Self> {
        let io = std::fs::read_to_string("/proc/self/io").context("/proc/self/io")?;
        let device_bytes = io
            .lines()
            .find_map(|line| line.strip_prefix("read_bytes: "))
            .and_then(|bytes| bytes.parse().ok())
            .context("/proc/self/io has no read_bytes")?;
        // Of the whole process, in nanoseconds, user and system together.
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Ok(Self {
            cpu_seconds: cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9,
            device_bytes,
        })
    }
}
