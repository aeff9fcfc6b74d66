//! Direct I/O from and to plain and mapped memory, beside O_DIRECT; when cold memory is brought in; what prefaulting costs.
//!
//! Both sides move the same file's bytes, one call at a time, so that what is compared is the way there: look-ups, pins, gates.

use std::ops::Range;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use pinfold::{
    Direction, File, IoOptions, MapAccess, MapOptions, Mapping, OpenOptions, Volume, faultin,
};
use pinfold_scenarios::region::view::{FileMap, Sharing, View};
use pinfold_scenarios::region::{self, At, Region, UserIov};
use rustix::io::ReadWriteFlags;

use super::Plan;
use super::rounds::{Side, take_turns};
use super::row::{Row, Target, Unit};
use super::scratch::{self, Offsets, PAGE, thread_time_ns};
use super::stream;

mod protocols;
mod submitted;

/// Bytes of the file that is moved to and from, and of the mapped file that serves as the buffer.
const SIZE: u64 = 64 << 20;
const BUFFER: usize = 4 << 20;
/// Bytes that a turn moves, and calls that it makes at most.
const TURN_BYTES: usize = 32 << 20;
const TURN_CALLS: usize = 500;
/// No worse than the kernel but for noise.
const AS_GOOD: Target = Target::TimesAsGood(0.95);
/// One call whose source is brought in.
const COLD: usize = 64 << 10;
const COLD_CALLS: usize = 100;
/// Pages of the files that are written from each other.
const CROSS_PAGES: u64 = 64;
const CROSS_TIME: Duration = Duration::from_millis(300);
const CACHED_CALLS: usize = 50_000;
/// The other sides' names.
const FDM: &str = "faults_disabled_mapping";
const PREFAULT: &str = "prefaulting first";

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = plain_transfers(plan)?;
    rows.extend(mapped_transfers(plan)?);
    rows.extend(when_faults_are_taken(plan)?);
    rows.extend(prefaulting(plan)?);
    rows.extend(protocols::run(plan)?);
    rows.extend(submitted::run(plan)?);
    Ok(rows)
}

fn options() -> OpenOptions {
    OpenOptions::new().read(true).write(true)
}

/// A volume with a file to move bytes to and from, and a mapping of another for the buffer.
struct Bed {
    volume: Volume,
    direct: File,
    source: File,
    map: Mapping,
}

impl Bed {
    fn new(plan: &Plan, name: &str, faults_disabled_mapping: bool) -> Result<Self> {
        let dir = plan.scratch.dir(name)?;
        scratch::make_file(&dir.join("device"), SIZE)?;
        scratch::make_file(&dir.join("buffer"), BUFFER as u64)?;
        let volume = Volume::builder()
            .memory(plan.memory)
            .faults_disabled_mapping(faults_disabled_mapping)
            .open_dir(&dir)?;
        let source = volume.open("buffer", &options())?;
        let access = MapOptions::new().access(MapAccess::Write);
        let map = source.map(0..BUFFER as u64, &access)?;
        Ok(Self {
            direct: volume.open("device", &options().direct(true))?,
            source,
            map,
            volume,
        })
    }

    fn view(&self) -> Result<View<'_>> {
        view(&self.map)
    }

    /// Makes every page of the mapping there, and dirty, as a buffer in use is.
    fn warm(&self) -> Result<()> {
        touch(&self.view()?)
    }
}

pub(super) fn view(map: &Mapping) -> Result<View<'_>> {
    View::of_user_mapping(map, map.as_ptr().expose_provenance(), map.len())
        .map_err(|errno| anyhow!("a mapping that is not in the table: {errno}"))
}

fn touch(view: &View<'_>) -> Result<()> {
    for at in (0..view.len()).step_by(PAGE) {
        view.store_u64(at, at as u64)
            .map_err(|hit| anyhow!("a store to a mapping: {hit:?}"))?;
    }
    Ok(())
}

/// Times calls of `len` bytes each at random offsets; returns microseconds a call, and those the thread was at work.
fn timed(len: usize, mut call: impl FnMut(u64, usize) -> Result<usize>) -> Result<[f64; 2]> {
    let calls = (TURN_BYTES / len).min(TURN_CALLS);
    let mut offsets = Offsets::new(SIZE - len as u64, calls as u64);
    let (start, work) = (Instant::now(), thread_time_ns());
    for number in 0..calls {
        let buffer = number * len % BUFFER;
        let moved = call(offsets.next(), buffer)?;
        anyhow::ensure!(moved == len, "{moved} bytes of {len} moved");
    }
    let work = thread_time_ns() - work;
    Ok([start.elapsed().as_secs_f64() * 1e6, work / 1e3].map(|all| all / calls as f64))
}

/// A buffer of [`BUFFER`] bytes.
enum Memory<'a> {
    Plain(Region),
    Mapped(View<'a>),
}

impl Memory<'_> {
    fn part(&self, range: Range<usize>) -> UserIov<'_> {
        match self {
            Self::Plain(region) => region.iov(range),
            Self::Mapped(view) => view.iov(range),
        }
    }
}

/// Times `call`, which moves bytes between the file and part of a buffer and returns how many.
fn side<'a>(
    memory: &'a Memory<'_>,
    len: usize,
    call: impl Fn(&UserIov<'_>, u64) -> Result<usize> + 'a,
) -> Side<'a, 2> {
    Box::new(move || timed(len, |offset, at| call(&memory.part(at..at + len), offset)))
}

fn ours_reads(file: &File, to: &UserIov<'_>, offset: u64) -> Result<usize> {
    let mut cursor = to.cursor(Direction::Target);
    let how = IoOptions::default();
    Ok(file.read_cursor(&mut cursor, offset, &how).posix()? as usize)
}

pub(super) fn ours_writes(file: &File, from: &UserIov<'_>, offset: u64) -> Result<usize> {
    let mut cursor = from.cursor(Direction::Source);
    let how = IoOptions::default();
    Ok(file.write_cursor(&mut cursor, offset, &how).posix()? as usize)
}

/// Before any file is mapped: such a process pays nothing for mappings.
fn plain_transfers(plan: &Plan) -> Result<Vec<Row>> {
    let dir = plan.scratch.dir("plain")?;
    scratch::make_file(&dir.join("device"), SIZE)?;
    let volume = Volume::builder().memory(plan.memory).open_dir(&dir)?;
    let ours = volume.open("device", &options().direct(true))?;
    let kernel = stream::direct(&dir.join("device"), false)?;
    // One for both sides: whether the kernel has it in large pages is a matter of its address.
    let region = Region::pages(BUFFER / PAGE).map_err(|errno| anyhow!("mmap: {errno}"))?;
    region
        .fill(0..BUFFER, b'p')
        .map_err(|errno| anyhow!("{errno}"))?;
    let memory = Memory::Plain(region);
    beside_the_kernel(plan, "plain", (&ours, &memory), (&kernel, &memory))
}

fn mapped_transfers(plan: &Plan) -> Result<Vec<Row>> {
    let bed = Bed::new(plan, "direct", false)?;
    let kernel = stream::direct(&plan.scratch.dir("direct")?.join("device"), false)?;
    // What the kernel's side maps is a file of its own.
    let buffer = plan.scratch.path().join("direct-buffer");
    scratch::make_file(&buffer, BUFFER as u64)?;
    let buffer = scratch::open(&buffer)?;
    let theirs = FileMap::new(buffer.as_fd(), 0, BUFFER, Sharing::Shared)
        .map_err(|errno| anyhow!("mmap: {errno}"))?;
    bed.warm()?;
    touch(&theirs.view())?;
    let (ours, theirs) = (Memory::Mapped(bed.view()?), Memory::Mapped(theirs.view()));
    beside_the_kernel(plan, "mapped", (&bed.direct, &ours), (&kernel, &theirs))
}

/// Both directions, in small and large calls.
fn beside_the_kernel(
    plan: &Plan,
    kind: &str,
    ours: (&File, &Memory<'_>),
    theirs: (&std::fs::File, &Memory<'_>),
) -> Result<Vec<Row>> {
    let (fd, none) = (theirs.0.as_fd(), ReadWriteFlags::empty());
    let mut rows = Vec::new();
    for (size, len) in [("4 KiB", PAGE), ("1 MiB", 1 << 20)] {
        let about = format!("direct read, {size}, {kind} memory");
        let sides = vec![
            side(ours.1, len, |to, offset| ours_reads(ours.0, to, offset)),
            side(theirs.1, len, |to, offset| {
                region::read(fd, to, At::Offset(offset), none).context("pread")
            }),
        ];
        rows.extend(beside_o_direct(plan, about, sides)?);
        let about = format!("direct write, {size}, {kind} memory");
        let sides = vec![
            side(ours.1, len, |from, offset| {
                ours_writes(ours.0, from, offset)
            }),
            side(theirs.1, len, |from, offset| {
                region::write(fd, from, At::Offset(offset), none).context("pwrite")
            }),
        ];
        rows.extend(beside_o_direct(plan, about, sides)?);
    }
    Ok(rows)
}

fn beside_o_direct(plan: &Plan, about: String, sides: Vec<Side<'_, 2>>) -> Result<[Row; 2]> {
    let found = take_turns(&plan.screen, &about, plan.rounds, sides)?;
    let row = |about: String, which: usize| {
        let (ours, theirs) = (found[0][which], found[1][which]);
        Row::new(about, Unit::Microseconds, ours, "O_DIRECT", theirs)
    };
    let work = row(format!("{about}: processor"), 1);
    Ok([row(about, 0).held_to(AS_GOOD), work])
}

/// When a source that is not there is brought in: with nothing held, or with the gate blocked.
fn when_faults_are_taken(plan: &Plan) -> Result<Vec<Row>> {
    let zero = Bed::new(plan, "rule-zero", false)?;
    let fdm = Bed::new(plan, "fdm", true)?;
    let mut rows = Vec::new();
    for (about, cold) in [
        ("direct write, 64 KiB, mapped memory, cold", true),
        ("the same, warm", false),
    ] {
        let turn = |bed: &Bed| -> Result<[f64; 2]> {
            bed.warm()?;
            let view = bed.view()?;
            let (mut spent, mut work) = (Duration::ZERO, 0.0);
            for call in 0..COLD_CALLS {
                if cold {
                    bed.source.drop_cache()?;
                }
                let at = call * COLD % BUFFER;
                let (start, before) = (Instant::now(), thread_time_ns());
                let moved = ours_writes(&bed.direct, &view.iov(at..at + COLD), at as u64)?;
                spent += start.elapsed();
                work += thread_time_ns() - before;
                anyhow::ensure!(moved == COLD, "{moved} bytes of {COLD} moved");
            }
            Ok([spent.as_secs_f64() * 1e6, work / 1e3].map(|all| all / COLD_CALLS as f64))
        };
        let sides: Vec<Side<'_, 2>> = vec![Box::new(|| turn(&zero)), Box::new(|| turn(&fdm))];
        let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
        let unit = Unit::Microseconds;
        rows.push(Row::new(about, unit, found[0][0], FDM, found[1][0]));
        let about = format!("{about}: processor");
        rows.push(Row::new(about, unit, found[0][1], FDM, found[1][1]));
    }
    let about = "two files from each other's mappings, cold";
    let sides: Vec<Side<'_, 1>> = vec![Box::new(|| cross(&zero)), Box::new(|| cross(&fdm))];
    let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
    let dropped = fdm.volume.statistics().cache.gates_dropped;
    let row = Row::new(about, Unit::PerSecond, found[0][0], FDM, found[1][0]);
    rows.push(row.note(format!(
        "{FDM} let its gate go {dropped} times, and did the work before again"
    )));
    Ok(rows)
}

/// Two threads write two files directly from mappings of each other, evicted now and then; returns calls a second.
fn cross(bed: &Bed) -> Result<[f64; 1]> {
    let size = CROSS_PAGES * PAGE as u64;
    let open = |name: &str| -> Result<_> {
        let new = options().create(true);
        let file = bed.volume.open(name, &new)?;
        if file.len() < size {
            file.write_at(&scratch::noise(size as usize), 0)?;
        }
        let map = file.map(0..size, &MapOptions::new())?;
        Ok((file, bed.volume.open(name, &new.direct(true))?, map))
    };
    let (one, two) = (open("one")?, open("two")?);
    let stop = AtomicBool::new(false);
    let write = |to: &File, from: &File, map: &Mapping| -> Result<u64> {
        let (view, len) = (view(map)?, 8 * PAGE);
        let mut offsets = Offsets::new(size - len as u64, to.len());
        let mut calls = 0;
        while !stop.load(Ordering::Relaxed) {
            if calls % 4 == 0 {
                from.drop_cache()?;
            }
            let at = offsets.next();
            ours_writes(to, &view.iov(at as usize..at as usize + len), at)?;
            calls += 1;
        }
        Ok(calls)
    };
    let start = Instant::now();
    let calls = std::thread::scope(|scope| {
        let other = scope.spawn(|| write(&two.1, &one.0, &one.2));
        let this = scope.spawn(|| write(&one.1, &two.0, &two.2));
        std::thread::sleep(CROSS_TIME);
        stop.store(true, Ordering::Relaxed);
        [other, this].map(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| anyhow::bail!("a writer panicked"))
        })
    });
    let [other, this] = calls;
    Ok([(other? + this?) as f64 / start.elapsed().as_secs_f64()])
}

/// What it would cost to look at every page of a buffer before each call, as the kernel's own buffered writes do.
fn prefaulting(plan: &Plan) -> Result<Vec<Row>> {
    let bed = Bed::new(plan, "prefault", false)?;
    bed.warm()?;
    let view = bed.view()?;
    let cached = bed.volume.open("device", &options())?;
    let memory = Region::pages(1).map_err(|errno| anyhow!("mmap: {errno}"))?;
    memory
        .fill(0..PAGE, b'p')
        .map_err(|errno| anyhow!("{errno}"))?;
    let cached_writes = |first: bool| -> Result<[f64; 1]> {
        let from = memory.iov(0..PAGE);
        let mut offsets = Offsets::new(BUFFER as u64, 3);
        let start = thread_time_ns();
        for _ in 0..CACHED_CALLS {
            prefault(first, &from);
            ours_writes(&cached, &from, offsets.next())?;
        }
        Ok([(thread_time_ns() - start) / CACHED_CALLS as f64])
    };
    let direct_writes = |first: bool| -> Result<[f64; 2]> {
        timed(COLD, |offset, at| {
            let from = view.iov(at..at + COLD);
            prefault(first, &from);
            ours_writes(&bed.direct, &from, offset)
        })
    };
    // The same pages again and again: there from the first turn on.
    cached_writes(false)?;
    let mut rows = Vec::new();
    let sides: Vec<Side<'_, 1>> = vec![
        Box::new(|| cached_writes(false)),
        Box::new(|| cached_writes(true)),
    ];
    let about = "cached write, 4 KiB, plain memory";
    let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
    let unit = Unit::Nanoseconds;
    rows.push(Row::new(about, unit, found[0][0], PREFAULT, found[1][0]));
    let sides: Vec<Side<'_, 2>> = vec![
        Box::new(|| direct_writes(false)),
        Box::new(|| direct_writes(true)),
    ];
    let about = "direct write, 64 KiB, mapped memory, warm: processor";
    let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
    let unit = Unit::Microseconds;
    rows.push(Row::new(about, unit, found[0][1], PREFAULT, found[1][1]));
    Ok(rows)
}

fn prefault(first: bool, from: &UserIov<'_>) {
    if first {
        let cursor = from.cursor(Direction::Source);
        let _all_of_it = faultin::fault_in_cursor(&cursor, cursor.count());
    }
}
