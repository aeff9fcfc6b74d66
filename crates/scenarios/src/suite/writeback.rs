//! Write-back: T42, T58 to T60.

use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pinfold_base::Errno;
use pinfold_mem::region::{At, Region};
use rand::Rng as _;

use super::{P, PAGE, joined, needs_room};
use crate::child;
use crate::fs::{Fs, Handle, How, Open, Troubled, Weather};
use crate::scenario::{Context, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        number: "T42",
        name: "dsync",
        claim: "after a crash every write is there that returned on an O_DSYNC descriptor, and the size with it",
        known: &[],
        seconds_max: 60,
        run: dsync,
    },
    Scenario {
        number: "T58",
        name: "sync_livelock",
        claim: "fsync ends within 5 s while another thread dirties the file at full speed",
        known: &[],
        seconds_max: 60,
        run: sync_livelock,
    },
    Scenario {
        number: "T59",
        name: "errseq",
        claim: "a failed write-back is reported once by each descriptor that was open then",
        known: &[],
        seconds_max: 120,
        run: errseq,
    },
    Scenario {
        number: "T60",
        name: "throttle",
        claim: "writers over the dirty limit of a slow store are slowed down, all of them, and hold nothing meanwhile",
        known: &[],
        seconds_max: 60,
        run: throttle,
    },
];

/// Bytes that T58 dirties all the time.
const DIRTIED: u64 = 64 << 20;
const FSYNCS: u32 = 4;
/// What each of them may take.
const FSYNC_MAX: Duration = Duration::from_secs(5);

fn sync_livelock(cx: &Context<'_>) -> Result<(), Stop> {
    needs_room(cx, 2 * DIRTIED)?;
    let file = cx.fresh("file")?;
    file.truncate(DIRTIED)?;
    let over = AtomicBool::new(false);
    let dirtied = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let dirtier = scope.spawn(|| dirty(cx, &*file, &over, &dirtied));
        let mut slowest = Duration::ZERO;
        for _ in 0..FSYNCS {
            let before = dirtied.load(Ordering::Relaxed);
            while dirtied.load(Ordering::Relaxed) < before + 1000 && !dirtier.is_finished() {
                std::thread::yield_now();
            }
            let began = Instant::now();
            cx.equal("fsync", file.sync(), Ok(()));
            slowest = slowest.max(began.elapsed());
        }
        over.store(true, Ordering::Relaxed);
        joined(dirtier.join())?;
        cx.check("fsync in time", slowest < cx.allows(FSYNC_MAX), || {
            format!("{slowest:?}")
        });
        cx.note(format!(
            "slowest fsync {slowest:?} beside {} writes",
            dirtied.load(Ordering::Relaxed)
        ));
        Ok(())
    })
}

fn dirty(
    cx: &Context<'_>,
    file: &dyn Handle,
    over: &AtomicBool,
    dirtied: &AtomicU64,
) -> Result<(), Stop> {
    let source = Region::pages(1)?;
    source.fill(0..PAGE, b'd')?;
    let mut rng = cx.rng(1);
    while !over.load(Ordering::Relaxed) {
        let offset = rng.random_range(0..DIRTIED / P) * P;
        let wrote = file.write(&source.iov(0..PAGE), At::Offset(offset), How::PLAIN);
        // No heart beat: it is the fsync beside it that must not fall silent.
        if wrote != Ok(PAGE) {
            cx.equal("write", wrote, Ok(PAGE));
            break;
        }
        dirtied.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn troubled(cx: &Context<'_>) -> Result<Troubled, Stop> {
    cx.fs().troubled().map_err(Stop::Skip)
}

fn turn(troubled: &Troubled, weather: Weather) -> Result<(), Stop> {
    (troubled.turn)(weather).map_err(Stop::Skip)
}

/// Bytes that T59 writes in vain.
const LOST: u64 = 8 * P;

fn errseq(cx: &Context<'_>) -> Result<(), Stop> {
    let troubled = troubled(cx)?;
    let fs = &*troubled.fs;
    let a = fs.open("file", Open::FRESH)?;
    cx.fill(&*a, b'o', 0..2 * LOST)?;
    cx.equal("fsync in fair weather", a.sync(), Ok(()));

    // Both descriptors were open when the write-back failed: each hears of it once.
    let b = fs.open("file", Open::EXISTING)?;
    turn(&troubled, Weather::WritesFail)?;
    lose(cx, &*a)?;
    is_error(cx, "the first descriptor's first fsync", a.sync());
    cx.equal("the first descriptor's second fsync", a.sync(), Ok(()));
    is_error(cx, "the second descriptor's first fsync", b.sync());
    cx.equal("the second descriptor's second fsync", b.sync(), Ok(()));
    let late = fs.open("file", Open::EXISTING)?;
    cx.equal(
        "fsync of one opened after the error was seen",
        late.sync(),
        Ok(()),
    );
    cx.contents(
        "what could not be stored is still read",
        &*a,
        LOST..2 * LOST,
        b'l',
    )?;

    unseen(cx, fs, &troubled)
}

/// An error that nobody has seen yet is reported to a descriptor opened after it happened.
fn unseen(cx: &Context<'_>, fs: &dyn Fs, troubled: &Troubled) -> Result<(), Stop> {
    turn(troubled, Weather::Fair)?;
    let a = fs.open("unseen", Open::FRESH)?;
    cx.fill(&*a, b'o', 0..2 * LOST)?;
    cx.equal("fsync in fair weather again", a.sync(), Ok(()));
    turn(troubled, Weather::WritesFail)?;
    lose(cx, &*a)?;
    (troubled.write_back)().map_err(Stop::Fail)?;
    let late = fs.open("unseen", Open::EXISTING)?;
    is_error(
        cx,
        "fsync of one opened before the error was seen",
        late.sync(),
    );
    cx.equal("its second fsync", late.sync(), Ok(()));
    is_error(cx, "fsync of the one that wrote", a.sync());
    let later = fs.open("unseen", Open::EXISTING)?;
    cx.equal(
        "fsync of one opened after both saw it",
        later.sync(),
        Ok(()),
    );
    turn(troubled, Weather::Fair)
}

fn lose(cx: &Context<'_>, file: &dyn Handle) -> Result<(), Stop> {
    cx.fill(file, b'l', LOST..2 * LOST)
}

fn is_error(cx: &Context<'_>, name: &'static str, synced: Result<(), Errno>) {
    let reported = matches!(synced, Err(Errno::EIO | Errno::ENOSPC));
    cx.check(name, reported, || {
        format!("{synced:?}, expected EIO or ENOSPC")
    });
}

/// T60: so long does every write of the store take, and so long do the writers write.
const STORE_TAKES: Duration = Duration::from_millis(5);
const WRITING: Duration = Duration::from_secs(3);
const WRITERS: usize = 4;
/// What a call that need not wait for the store may take.
const PROMPT: Duration = Duration::from_secs(1);
/// How much longer than usual is waited for a writer that seems not to get on.
const STANDSTILL_MAX: Duration = Duration::from_millis(500);
/// Bytes that each writer writes over and over.
const WRITER_WINDOW: u64 = 256 * P;

fn throttle(cx: &Context<'_>) -> Result<(), Stop> {
    let troubled = troubled(cx)?;
    let fs = &*troubled.fs;
    let files: Vec<_> = (0..WRITERS)
        .map(|number| fs.open(&format!("writer-{number}"), Open::FRESH))
        .collect::<Result<_, _>>()?;
    turn(&troubled, Weather::WritesTake(STORE_TAKES))?;
    let counts: Vec<AtomicU64> = (0..WRITERS).map(|_| AtomicU64::new(0)).collect();
    let over = AtomicBool::new(false);
    let (again, slowest) = std::thread::scope(|scope| {
        let writers: Vec<_> = files
            .iter()
            .zip(&counts)
            .map(|(file, count)| scope.spawn(|| keep_writing(cx, &**file, &over, count)))
            .collect();
        let watched = watch_writers(cx, fs, &*files[0], &counts);
        over.store(true, Ordering::Relaxed);
        for writer in writers {
            joined(writer.join())?;
        }
        watched
    })?;
    cx.check("NOWAIT over the limit is EAGAIN", again > 0, || {
        "never was".into()
    });
    cx.check("calls that need not wait", slowest < PROMPT, || {
        format!("{slowest:?}")
    });
    turn(&troubled, Weather::Fair)?;
    for file in &files {
        cx.equal("fsync in the end", file.sync(), Ok(()));
    }
    let kib: Vec<u64> = counts
        .iter()
        .map(|count| (count.load(Ordering::Relaxed) * P) >> 10)
        .collect();
    cx.note(format!(
        "KiB written: {kib:?}; EAGAIN {again} times; slowest other call {slowest:?}"
    ));
    Ok(())
}

fn keep_writing(
    cx: &Context<'_>,
    file: &dyn Handle,
    over: &AtomicBool,
    count: &AtomicU64,
) -> Result<(), Stop> {
    let source = Region::pages(1)?;
    source.fill(0..PAGE, b't')?;
    let mut offset = 0;
    while !over.load(Ordering::Relaxed) {
        let wrote = file.write(&source.iov(0..PAGE), At::Offset(offset), How::PLAIN);
        if !cx.equal("throttled write", wrote, Ok(PAGE)) {
            break;
        }
        count.fetch_add(1, Ordering::Relaxed);
        offset = (offset + P) % WRITER_WINDOW;
    }
    Ok(())
}

/// Time, and how much of it this thread spent ready to run while others ran: it tells waiting for somebody from a busy
/// machine.
struct Clock {
    at: Instant,
    queued: Duration,
}

impl Clock {
    fn now() -> Self {
        // "Time on the processor, time in its queue, turns", in nanoseconds; without them, a busy machine counts as waiting.
        let queued = std::fs::read_to_string("/proc/thread-self/schedstat")
            .ok()
            .and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
            .map_or(Duration::ZERO, Duration::from_nanos);
        Self {
            at: Instant::now(),
            queued,
        }
    }

    /// Returns the time since then that this thread was not kept from running.
    fn elapsed(&self) -> Duration {
        let now = Self::now();
        (now.at - self.at).saturating_sub(now.queued.saturating_sub(self.queued))
    }
}

/// While the writers write: checks in each third of the time that all get on, and times calls that must not wait.
/// Returns how many of them said EAGAIN, and the slowest.
fn watch_writers(
    cx: &Context<'_>,
    fs: &dyn Fs,
    written: &dyn Handle,
    counts: &[AtomicU64],
) -> Result<(u64, Duration), Stop> {
    let probe = fs.open("probe", Open::FRESH)?;
    let memory = Region::pages(1)?;
    memory.fill(0..PAGE, b'p')?;
    let (mut again, mut slowest) = (0, Duration::ZERO);
    let mut offset = 0;
    for _ in 0..3 {
        let before: Vec<u64> = counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .collect();
        let all_got_on = || {
            let mut both = counts.iter().zip(&before);
            both.all(|(count, &before)| count.load(Ordering::Relaxed) > before)
        };
        let until = Instant::now() + WRITING / 3;
        let last = until + cx.allows(STANDSTILL_MAX);
        while Instant::now() < if all_got_on() { until } else { last } {
            let began = Clock::now();
            match probe.write(&memory.iov(0..PAGE), At::Offset(offset), How::NOWAIT) {
                Ok(wrote) => offset += wrote as u64,
                Err(errno) => {
                    again += u64::from(errno == Errno::EAGAIN);
                    cx.equal("NOWAIT write", errno, Errno::EAGAIN);
                }
            }
            // A page that a sleeping writer kept locked would hold this up; whether it is cached does not matter.
            let read = written.read(&memory.iov(0..PAGE), At::Offset(0), How::NOWAIT);
            cx.check(
                "NOWAIT read",
                matches!(read, Ok(_) | Err(Errno::EAGAIN)),
                || format!("{read:?}"),
            );
            cx.equal("size beside a writer", written.size().map(drop), Ok(()));
            slowest = slowest.max(began.elapsed());
            std::thread::sleep(Duration::from_millis(5));
        }
        for (count, before) in counts.iter().zip(&before) {
            let now = count.load(Ordering::Relaxed);
            cx.check("every writer gets on", now > *before, || {
                format!("none after {before}")
            });
        }
    }
    Ok((again, slowest))
}

/// Crashes of T42, each after another number of writes.
const CRASHES: u32 = 4;
/// Most writes that a crash waits for.
const WRITES_MAX: u64 = 64;
/// Bytes of each write: no multiple of a block, so that sizes and tails matter.
const RECORD: u64 = 5000;
/// How long the victim is waited for.
const VICTIM_MAX: Duration = Duration::from_secs(30);

/// The byte of record `number`; never zero.
fn mark(number: u64) -> u8 {
    (number % 250) as u8 + 1
}

/// The victim, a process of its own, is killed and takes with it what its store was not told to sync. Its
/// acknowledgements go past that store, into a file of the kernel's.
fn dsync(cx: &Context<'_>) -> Result<(), Stop> {
    let acknowledged = cx.fs().dir().join("acknowledged");
    if cx.role() == Some("victim") {
        return write_durably(cx, &acknowledged);
    }
    // Asked first, and closed again: a directory is served once.
    drop(cx.fs().volatile().map_err(Stop::Skip)?);
    let mut rng = cx.rng(0);
    let count = || std::fs::metadata(&acknowledged).map_or(0, |file| file.len());
    for _ in 0..CRASHES {
        std::fs::write(&acknowledged, b"").map_err(Errno::from)?;
        let wanted = rng.random_range(1..=WRITES_MAX);
        let mut victim = child::respawn("victim")?;
        let began = Instant::now();
        while count() < wanted && began.elapsed() < cx.allows(VICTIM_MAX) {
            if victim.try_wait().map_err(Errno::from)?.is_some() {
                break;
            }
            std::thread::sleep(Duration::from_micros(rng.random_range(0..500)));
            cx.beat();
        }
        let _ = victim.kill();
        victim.wait().map_err(Errno::from)?;
        let survived = count();
        cx.check("the victim writes", survived >= wanted, || {
            format!("{survived} writes, expected {wanted} in {VICTIM_MAX:?}")
        });
        intact(cx, survived)?;
        cx.note(format!("killed after {survived} writes"));
    }
    Ok(())
}

/// Appends records until it is killed, and a byte to `acknowledged` after each.
fn write_durably(cx: &Context<'_>, acknowledged: &Path) -> Result<(), Stop> {
    let fs = cx.fs().volatile().map_err(Stop::Skip)?;
    let file = fs.open(
        "file",
        Open {
            dsync: true,
            ..Open::FRESH
        },
    )?;
    let mut told = std::fs::File::options()
        .append(true)
        .open(acknowledged)
        .map_err(Errno::from)?;
    let source = Region::pages(2)?;
    let len = RECORD as usize;
    for number in 0..u64::from(u16::MAX) {
        source.fill(0..len, mark(number))?;
        let wrote = file.write(&source.iov(0..len), At::Offset(number * RECORD), How::PLAIN)?;
        if wrote != len {
            return Err(Stop::Fail(format!("{wrote} bytes of {len}")));
        }
        told.write_all(b"+").map_err(Errno::from)?;
    }
    Ok(())
}

/// Checks that the first `count` records are in the file as the store has it after the crash.
fn intact(cx: &Context<'_>, count: u64) -> Result<(), Stop> {
    const CHECK: &str = "what was acknowledged is there";
    let fs = cx.fs().volatile().map_err(Stop::Skip)?;
    let file = fs.open("file", Open::EXISTING)?;
    let size = file.size()?;
    if !cx.check(CHECK, size >= count * RECORD, || {
        format!("{size} bytes, expected {count} records of {RECORD}")
    }) {
        return Ok(());
    }
    for number in 0..count {
        let start = number * RECORD;
        if !cx.contents(CHECK, &*file, start..start + RECORD, mark(number))? {
            break;
        }
    }
    Ok(())
}
