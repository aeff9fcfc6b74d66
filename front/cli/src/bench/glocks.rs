//! Glocks: what they cost a node that has them, whether a weak hold earns its keep, and what nodes take from each other.
//!
//! *Owns*: what needs no service between machines. *Does not own*: what does (`between`, feature `etcd`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use pinfold::glocks::service::local::Local;
use pinfold::glocks::{Duties, Glock, Guard, LockService, Mode, Name, Options, Request, Space};
use pinfold::{Errno, File, MapOptions, Mapping, OpenOptions, Volume};

use super::Plan;
use super::direct::{ours_writes, view};
use super::rounds::{Side, take_turns};
use super::row::{Row, Target, Unit};
use super::scratch::{self, Offsets, PAGE, thread_time_ns};

#[cfg(feature = "etcd")]
pub(super) mod between;
#[cfg(feature = "etcd")]
mod server;

/// Glocks taken and let go in a turn, and calls made.
const TAKEN: u32 = 1_000_000;
const CALLS: u32 = 20_000;
/// What a cached glock may cost, in nanoseconds.
const CACHED_MOST: f64 = 50.0;
/// Pages of a file that is read and written.
const PAGES: usize = 16;
/// Each node's budget.
const NODE_MEMORY: u64 = 16 << 20;
/// One write whose source is brought in, and the file it is of.
const COLD: usize = 64 << 10;
const SOURCE: u64 = 4 << 20;
const COLD_CALLS: usize = 50;
/// For how long nodes work at once in a turn.
const TURN: Duration = Duration::from_millis(500);
/// Short, so that a turn has many hand-overs.
const COLD_HOLD: Duration = Duration::from_millis(10);
const PLAIN: &str = "letting go meanwhile";

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = cached(plan)?;
    rows.extend(calls(plan)?);
    rows.extend(may_demote(plan)?);
    #[cfg(feature = "etcd")]
    rows.extend(between::run(plan)?);
    #[cfg(not(feature = "etcd"))]
    rows.push(Row::skipped("between nodes", crate::cluster::NOT_BUILT));
    Ok(rows)
}

/// A file of which nothing is cached.
struct Nothing;

impl Duties for Nothing {
    fn sync(&self, _to: Mode) -> std::result::Result<(), Errno> {
        Ok(())
    }

    fn invalidate(&self, _to: Mode) {}
}

fn glock_of(space: &Space, number: u64) -> Arc<Glock> {
    let name = Name {
        number,
        generation: 0,
    };
    space.glock(name, || Arc::new(Nothing))
}

fn take(glock: &Glock, mode: Mode) -> Result<Guard<'_>> {
    let taken = glock.lock(Request::new(mode));
    taken.map_err(|why| anyhow!("a glock was refused: {why:?}"))
}

fn options(hold: Duration) -> Options {
    Options {
        hold,
        ..Options::default()
    }
}

/// Takes a cached glock and lets it go, beside a mutex.
fn cached(plan: &Plan) -> Result<Vec<Row>> {
    let space = Space::join(&Local::new(), "one", Options::default())?;
    let glock = glock_of(&space, 1);
    let mutex = Mutex::new(0_u64);
    let each = |work: &dyn Fn() -> Result<()>| -> Result<[f64; 1]> {
        let start = thread_time_ns();
        for _ in 0..TAKEN {
            work()?;
        }
        Ok([(thread_time_ns() - start) / f64::from(TAKEN)])
    };
    let about = "take a cached glock and let it go";
    let sides: Vec<Side<'_, 1>> = vec![
        Box::new(|| each(&|| take(std::hint::black_box(&*glock), Mode::Exclusive).map(drop))),
        Box::new(|| {
            each(&|| {
                let mut locked = std::hint::black_box(&mutex)
                    .lock()
                    .map_err(|_| anyhow!("poisoned"))?;
                *locked += 1;
                Ok(())
            })
        }),
    ];
    let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
    let row = Row::new(
        about,
        Unit::Nanoseconds,
        found[0][0],
        "a mutex",
        found[1][0],
    );
    // The first one asked for it.
    let asked = glock.report().counts.asked - 1;
    Ok(vec![
        row.held_to(Target::AtMost(CACHED_MOST)),
        count("messages for that", asked as f64).held_to(Target::AtMost(0.0)),
    ])
}

fn count(about: impl Into<String>, value: f64) -> Row {
    Row::alone(about, Unit::Count, super::rounds::Sample::exactly(value))
}

/// A node's volume on one of the scratch directories.
fn node(
    plan: &Plan,
    dir: &str,
    service: &dyn LockService,
    name: &str,
    hold: Duration,
    weak: bool,
) -> Result<Volume> {
    let builder = Volume::builder().memory(NODE_MEMORY).may_demote(weak);
    let builder = builder.join(service, name, options(hold))?;
    Ok(builder.open_dir(plan.scratch.dir(dir)?)?)
}

fn file_of(volume: &Volume, name: &str) -> Result<File> {
    let options = OpenOptions::new().read(true).write(true).create(true);
    Ok(volume.open(name, &options)?)
}

/// Calls on cached pages of a node that is alone, beside the same without glocks.
fn calls(plan: &Plan) -> Result<Vec<Row>> {
    let local = Local::new();
    let with = node(plan, "with-glocks", &local, "alone", COLD_HOLD, false)?;
    let without = Volume::builder()
        .memory(NODE_MEMORY)
        .open_dir(plan.scratch.dir("without-glocks")?)?;
    let files = [file_of(&with, "f")?, file_of(&without, "f")?];
    for file in &files {
        file.write_at(&scratch::noise(PAGES * PAGE), 0)?;
    }
    type Call<'a> = &'a dyn Fn(&File) -> Result<()>;
    let kinds: [(&str, Call<'_>); 3] = [
        ("4 KiB read, cached, under glocks", &|file| {
            let mut buf = [0; PAGE];
            Ok(file
                .read_at(std::hint::black_box(&mut buf), PAGE as u64)
                .map(drop)?)
        }),
        ("4 KiB overwrite, cached, under glocks", &|file| {
            Ok(file
                .write_at(std::hint::black_box(&[2; PAGE]), PAGE as u64)
                .map(drop)?)
        }),
        ("size of a file, under glocks", &|file| {
            std::hint::black_box(file.len());
            Ok(())
        }),
    ];
    let mut rows = Vec::new();
    for (about, call) in kinds {
        let timed = |file: &File| -> Result<[f64; 1]> {
            let start = thread_time_ns();
            for _ in 0..CALLS {
                call(file)?;
            }
            Ok([(thread_time_ns() - start) / f64::from(CALLS)])
        };
        let sides: Vec<Side<'_, 1>> =
            vec![Box::new(|| timed(&files[0])), Box::new(|| timed(&files[1]))];
        let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
        let row = Row::new(
            about,
            Unit::Nanoseconds,
            found[0][0],
            "without glocks",
            found[1][0],
        );
        rows.push(row);
    }
    Ok(rows)
}

/// A node that writes a file from a mapping whose pages have to be brought in.
struct Cold {
    target: File,
    source: File,
    map: Mapping,
    volume: Volume,
}

impl Cold {
    fn new(volume: Volume, which: usize) -> Result<Self> {
        let source = file_of(&volume, &format!("source{which}"))?;
        source.write_at(&scratch::noise(SOURCE as usize), 0)?;
        let map = source.map(0..SOURCE, &MapOptions::new())?;
        Ok(Self {
            target: file_of(&volume, "target")?,
            source,
            map,
            volume,
        })
    }

    fn write(&self, offsets: &mut Offsets) -> Result<()> {
        self.source.drop_cache()?;
        let at = offsets.next() as usize;
        let from = view(&self.map)?;
        let moved = ours_writes(&self.target, &from.iov(at..at + COLD), 0)?;
        ensure!(moved == COLD, "{moved} bytes of {COLD} written");
        Ok(())
    }

    fn stripped(&self) -> u64 {
        let reports = self.volume.glocks().map(|space| space.report());
        let reports = reports.unwrap_or_default();
        reports.iter().map(|report| report.counts.stripped).sum()
    }
}

/// Buffered writes whose source faults: a weak hold of the glock kept meanwhile, beside letting go of it. On one node, and with
/// two that want the same file.
fn may_demote(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let about = "write of 64 KiB from cold mapped memory, MAY_DEMOTE";
    let local = Local::new();
    let alone = |weak: bool| -> Result<Cold> {
        let dir = format!("alone-{weak}");
        let name = format!("one-{weak}");
        Cold::new(node(plan, &dir, &local, &name, COLD_HOLD, weak)?, 0)
    };
    let beds = [alone(true)?, alone(false)?];
    let turn = |bed: &Cold| -> Result<[f64; 2]> {
        let mut offsets = Offsets::new(SOURCE - COLD as u64, 1);
        let (start, work) = (Instant::now(), thread_time_ns());
        for _ in 0..COLD_CALLS {
            bed.write(&mut offsets)?;
        }
        let work = (thread_time_ns() - work) / 1e3;
        Ok([start.elapsed().as_secs_f64() * 1e6, work].map(|all| all / COLD_CALLS as f64))
    };
    let sides: Vec<Side<'_, 2>> = vec![Box::new(|| turn(&beds[0])), Box::new(|| turn(&beds[1]))];
    let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
    for (which, what) in ["", ": processor"].into_iter().enumerate() {
        rows.push(Row::new(
            format!("{about}{what}"),
            Unit::Microseconds,
            found[0][which],
            PLAIN,
            found[1][which],
        ));
    }
    drop(beds);

    let about = "the same by two nodes to one file";
    let both = |weak: bool| -> Result<Vec<Cold>> {
        let service = Local::new();
        (0..2)
            .map(|which| {
                let (dir, name) = (format!("two-{weak}"), format!("node{which}"));
                Cold::new(node(plan, &dir, &service, &name, COLD_HOLD, weak)?, which)
            })
            .collect()
    };
    let pairs = [both(true)?, both(false)?];
    let sides: Vec<Side<'_, 1>> = vec![
        Box::new(|| Ok([at_once(&pairs[0], |cold, offsets| cold.write(offsets))?])),
        Box::new(|| Ok([at_once(&pairs[1], |cold, offsets| cold.write(offsets))?])),
    ];
    let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
    let stripped: u64 = pairs[0].iter().map(Cold::stripped).sum();
    let row = Row::new(about, Unit::PerSecond, found[0][0], PLAIN, found[1][0]);
    rows.push(row.note(format!(
        "minimum hold {COLD_HOLD:?}; {stripped} weak holds were taken away"
    )));
    Ok(rows)
}

/// Has every node work for a while, each in a thread; returns pieces of work a second, over all.
fn at_once<N: Sync>(
    nodes: &[N],
    work: impl Fn(&N, &mut Offsets) -> Result<()> + Sync,
) -> Result<f64> {
    let over = AtomicBool::new(false);
    let start = Instant::now();
    let done = std::thread::scope(|scope| {
        let threads: Vec<_> = nodes
            .iter()
            .zip(1..)
            .map(|(node, seed)| {
                let (over, work) = (&over, &work);
                scope.spawn(move || -> Result<u64> {
                    let mut offsets = Offsets::new(SOURCE - COLD as u64, seed);
                    let mut done = 0;
                    while !over.load(Ordering::Relaxed) {
                        work(node, &mut offsets)?;
                        done += 1;
                    }
                    Ok(done)
                })
            })
            .collect();
        std::thread::sleep(TURN);
        over.store(true, Ordering::Relaxed);
        let ended = threads.into_iter().map(|thread| {
            let ended = thread.join();
            ended.map_err(|_| anyhow!("a node's thread panicked"))?
        });
        ended.sum::<Result<u64>>()
    })?;
    Ok(done as f64 / start.elapsed().as_secs_f64())
}
