//! One side of a comparison of mappings: maps the file and does the work.

use std::fs::File as KernelFile;
use std::hint::black_box;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use pinfold::{Delivery, File, MapAccess, MapOptions, Mapping, OpenOptions, Volume};
use pinfold_scenarios::region::touch::{self, Hit};
use pinfold_scenarios::region::view::{FileMap, Sharing, View};

use super::super::group;
use super::super::job::{self, Report};
use super::super::scratch::{self, Offsets, PAGE, drop_cached};
use super::{MappedJob, Served, Work};

/// Loads or stores between two looks at the clock.
const BATCH: u64 = 16;
/// Flush and wait, as in `<sys/mman.h>`.
const MS_SYNC: i32 = 4;
/// Numbers that a range has at least to be parted by quick sort.
const SMALL_MAX: usize = 24;

/// A mapping, by whomever.
enum Map {
    Kernel(FileMap),
    Ours(Box<Mapping>),
}

impl Map {
    fn view(&self) -> Result<View<'_>> {
        match self {
            Self::Kernel(map) => Ok(map.view()),
            Self::Ours(map) => {
                let addr = map.as_ptr().expose_provenance();
                View::of_user_mapping(map, addr, map.len())
                    .map_err(|errno| anyhow!("a mapping that is not in the table: {errno}"))
            }
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Kernel(map) => map.view().len(),
            Self::Ours(map) => map.len(),
        }
    }

    /// Makes what was stored durable.
    fn flush(&self) -> Result<()> {
        match self {
            Self::Kernel(map) => map
                .sync(0..self.len(), MS_SYNC)
                .map_err(|errno| anyhow!("msync: {errno}")),
            Self::Ours(map) => Ok(map.flush(0..self.len())?),
        }
    }
}

/// The file, and how it is mapped again and again.
enum Source {
    Kernel(KernelFile, bool),
    Ours {
        file: File,
        delivery: Delivery,
        _volume: Volume,
    },
}

impl Source {
    fn open(job: &MappedJob) -> Result<Self> {
        if job.served.is_kernel() {
            let file = scratch::open(&job.dir.join(&job.name))?;
            // What others were charged for would be had for nothing here.
            drop_cached(&file)?;
            return Ok(Self::Kernel(file, job.served == Served::KernelRandom));
        }
        let volume = Volume::builder().memory(job.memory).open_dir(&job.dir)?;
        let file = volume.open(&job.name, &OpenOptions::new().read(true).write(true))?;
        let delivery = if job.served == Served::Inline {
            Delivery::Inline
        } else {
            Delivery::Handler
        };
        Ok(Self::Ours {
            file,
            delivery,
            _volume: volume,
        })
    }

    /// Reads so many bytes, so that memory is in use when the work begins.
    fn fill(&self, bytes: u64) -> Result<()> {
        match self {
            Self::Kernel(file, _) => Ok(scratch::read_all(file, bytes)?),
            Self::Ours { file, .. } => job::fill(file, bytes),
        }
    }

    fn map(&self, size: u64) -> Result<Map> {
        match self {
            Self::Kernel(file, random) => {
                let map = FileMap::new(file.as_fd(), 0, size as usize, Sharing::Shared)
                    .map_err(|errno| anyhow!("mmap: {errno}"))?;
                if *random {
                    map.random().map_err(|errno| anyhow!("madvise: {errno}"))?;
                }
                Ok(Map::Kernel(map))
            }
            Self::Ours { file, delivery, .. } => {
                let options = MapOptions::new()
                    .access(MapAccess::Write)
                    .delivery(*delivery);
                let map = file.map(0..size, &options)?;
                Ok(Map::Ours(Box::new(map)))
            }
        }
    }
}

/// Does the work of a job in this process.
pub(in super::super) fn run(job: &MappedJob) -> Result<Report> {
    if let Some(group) = &job.group {
        group::enter(group)?;
    }
    // Before the library's own handler, which has to come first when a page faults.
    touch::install();
    let source = Source::open(job)?;
    let map = source.map(job.size)?;
    let view = map.view()?;
    match job.work {
        Work::Loads {
            threads,
            warm_ms,
            run_ms,
        } => {
            source.fill(job.memory.min(job.size))?;
            loads(
                &view,
                threads,
                Duration::from_millis(warm_ms),
                Duration::from_millis(run_ms),
            )
        }
        Work::Updates { stores } => {
            let mut offsets = Offsets::new(job.size, 5);
            timed(stores, || {
                for number in 0..stores {
                    hit(view.store_u64(offsets.next() as usize, number))?;
                }
                map.flush()
            })
        }
        Work::Scan => timed(pages(&view), || load_all(&view)),
        Work::Minor { random } => {
            load_all(&view)?;
            let second = source.map(job.size)?;
            minor(&second.view()?, random)
        }
        Work::CleanStores => {
            store_all(&view)?;
            map.flush()?;
            timed(pages(&view), || store_all(&view))
        }
        Work::Sort => timed(view.len() as u64 / 8, || {
            sort(&view, 0, view.len() / 8)?;
            map.flush()
        }),
    }
}

fn hit<T>(outcome: Result<T, Hit>) -> Result<T> {
    outcome.map_err(|hit| anyhow!("an access to mapped memory failed: {hit:?}"))
}

fn pages(view: &View<'_>) -> u64 {
    (view.len() / PAGE) as u64
}

fn timed(operations: u64, work: impl FnOnce() -> Result<()>) -> Result<Report> {
    let start = Instant::now();
    work()?;
    Ok(Report {
        operations,
        seconds: start.elapsed().as_secs_f64(),
        ..Report::default()
    })
}

fn load_all(view: &View<'_>) -> Result<()> {
    for at in (0..view.len()).step_by(PAGE) {
        black_box(hit(view.load_u64(at))?);
    }
    Ok(())
}

fn store_all(view: &View<'_>) -> Result<()> {
    for at in (0..view.len()).step_by(PAGE) {
        hit(view.store_u64(at, at as u64))?;
    }
    Ok(())
}

fn minor(view: &View<'_>, random: bool) -> Result<Report> {
    if !random {
        return timed(pages(view), || load_all(view));
    }
    // Far apart and each once: no neighbour that was mapped along is counted as a fault of its own.
    let apart = 64 * PAGE;
    let places: Vec<usize> = (0..view.len()).step_by(apart).rev().collect();
    timed(places.len() as u64, || {
        for &at in &places {
            black_box(hit(view.load_u64(at))?);
        }
        Ok(())
    })
}

fn loads(view: &View<'_>, threads: usize, warm: Duration, run: Duration) -> Result<Report> {
    let (stop, total) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|number| {
                let (stop, total) = (&stop, &total);
                scope.spawn(move || -> Result<()> {
                    let mut offsets = Offsets::new(view.len() as u64, number as u64 + 1);
                    while !stop.load(Ordering::Relaxed) {
                        for _ in 0..BATCH {
                            black_box(hit(view.load_u64(offsets.next() as usize))?);
                        }
                        total.fetch_add(BATCH, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        std::thread::sleep(warm);
        let (start, before) = (Instant::now(), total.load(Ordering::Relaxed));
        std::thread::sleep(run);
        let (seconds, after) = (start.elapsed().as_secs_f64(), total.load(Ordering::Relaxed));
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            worker
                .join()
                .map_err(|_| anyhow!("a thread panicked"))
                .context("loads")??;
        }
        Ok(Report {
            operations: after - before,
            seconds,
            ..Report::default()
        })
    })
}

/// Quick sort of numbers `from .. to`, Hoare's partition around a median of three, small ranges by insertion: in place, so
/// that every pass goes through the mapping.
fn sort(view: &View<'_>, from: usize, to: usize) -> Result<()> {
    let at = |i: usize| hit(view.load_u64(i * 8));
    let put = |i: usize, value| hit(view.store_u64(i * 8, value));
    let (mut from, mut to) = (from, to);
    while to - from > SMALL_MAX {
        let mut three = [at(from)?, at(from + (to - from) / 2)?, at(to - 1)?];
        three.sort_unstable();
        let pivot = three[1];
        let (mut low, mut high) = (from, to - 1);
        loop {
            let mut left = at(low)?;
            while left < pivot {
                low += 1;
                left = at(low)?;
            }
            let mut right = at(high)?;
            while right > pivot {
                high -= 1;
                right = at(high)?;
            }
            if low >= high {
                break;
            }
            put(low, right)?;
            put(high, left)?;
            low += 1;
            high -= 1;
        }
        // The shorter part first: the depth of calls stays logarithmic.
        let middle = high + 1;
        if middle - from < to - middle {
            sort(view, from, middle)?;
            from = middle;
        } else {
            sort(view, middle, to)?;
            to = middle;
        }
    }
    for i in from + 1..to {
        let value = at(i)?;
        let mut j = i;
        while j > from {
            let before = at(j - 1)?;
            if before <= value {
                break;
            }
            put(j, before)?;
            j -= 1;
        }
        put(j, value)?;
    }
    Ok(())
}
