//! Buffered writers and readers that race: T13 to T15.

use std::ops::Range;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pinfold_base::Errno;
use pinfold_mem::region::{At, Protection, Region};
use rand::Rng as _;
use rand::rngs::SmallRng;

use super::{P, PAGE, joined};
use crate::fs::{Handle, How, Kind, Open};
use crate::scenario::{Context, Known, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        number: "T13",
        name: "short_copy_hidden",
        claim: "no reader sees a byte behind the part of a short write that was committed",
        known: &[Known {
            kind: Kind::Btrfs,
            check: "count",
            why: "btrfs faults a whole chunk in beforehand and shrinks to a page border",
        }],
        seconds_max: 120,
        run: short_copy_hidden,
    },
    Scenario {
        number: "T14",
        name: "size_after_data",
        claim: "below the size of a growing file no reader sees a byte that was not written",
        known: &[],
        seconds_max: 120,
        run: size_after_data,
    },
    Scenario {
        number: "T15",
        name: "append_race",
        claim: "records that eight threads append are all there, whole, and in each thread's order",
        known: &[],
        seconds_max: 120,
        run: append_race,
    },
];

/// Rounds of a race: at least, and at most if the time allows.
const ROUNDS: Range<u64> = 1_000..100_000;

/// One short write: `good` bytes of 'n' at `offset`, then nothing but inaccessible memory.
#[derive(Debug, Clone, Copy)]
struct ShortWrite {
    /// The file's size before.
    size: u64,
    offset: u64,
    good: u64,
}

impl ShortWrite {
    /// Bytes the write asks for: two pages, as far as the bad part goes.
    const LEN: u64 = 2 * P;

    /// Says whether a reader may see `byte` at file offset `at`, while the write runs or after it.
    fn allows(self, at: u64, byte: u8) -> bool {
        let written = (self.offset..self.offset + self.good).contains(&at);
        let before = if at < self.size { b'o' } else { 0 };
        if written && at >= self.size {
            // Beyond the old end there was nothing: data is there before the size says so.
            byte == b'n'
        } else {
            byte == before || (written && byte == b'n')
        }
    }
}

/// Size of the file that is overwritten, in bytes.
const OLD: u64 = 4 * P;

fn short_copy_hidden(cx: &Context<'_>) -> Result<(), Stop> {
    let source = Region::pages(4)?;
    source.fill(0..2 * PAGE, b'n')?;
    source.protect(2 * PAGE..4 * PAGE, Protection::None)?;
    let file = cx.filled("file", b'o', OLD)?;
    let stage = RwLock::new(None);
    let over = AtomicBool::new(false);
    let seen = AtomicU64::new(0);
    let rounds = std::thread::scope(|scope| {
        let watchers: Vec<_> = (0..2)
            .map(|number| {
                let (file, stage, over, seen) = (&*file, &stage, &over, &seen);
                scope.spawn(move || watch(cx, number, file, stage, over, seen))
            })
            .collect();
        let rounds = write_short(cx, &*file, &source, &stage, &seen);
        over.store(true, Ordering::Relaxed);
        for watcher in watchers {
            joined(watcher.join())?;
        }
        rounds
    })?;
    let seen = seen.into_inner();
    cx.check("the readers read", seen > 0, || "not once".into());
    cx.note(format!("{rounds} short writes, {seen} reads beside them"));
    Ok(())
}

/// Makes the short writes. `stage` holds the one that is going on while readers may look; `seen` counts when they did.
fn write_short(
    cx: &Context<'_>,
    file: &dyn Handle,
    source: &Region,
    stage: &RwLock<Option<ShortWrite>>,
    seen: &AtomicU64,
) -> Result<u64, Stop> {
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on_until(round, ROUNDS, || seen.load(Ordering::Relaxed) > 0) {
        let write = short_write(round, &mut rng);
        if write.size < OLD {
            // Storage keeps a full page of old bytes behind the end: zeros there are the file system's doing.
            file.truncate(write.size)?;
        }
        file.drop_cache()?;
        *stage.write().expect("no panic under this lock") = Some(write);
        let edge = 2 * PAGE;
        let good = usize::try_from(write.good).unwrap_or(0);
        let from = source.iov(edge - good..edge - good + 2 * PAGE);
        let wrote = file.write(&from, At::Offset(write.offset), How::PLAIN);
        let count = judge_count(cx, write, wrote);
        *stage.write().expect("no panic under this lock") = None;
        judge_contents(cx, file, write, count)?;
        file.truncate(OLD)?;
        cx.fill(file, b'o', 0..OLD)?;
        round += 1;
    }
    Ok(round)
}

fn judge_count(cx: &Context<'_>, write: ShortWrite, wrote: Result<usize, Errno>) -> u64 {
    if write.good == 0 {
        cx.equal("nothing good", wrote, Err(Errno::EFAULT));
        return 0;
    }
    cx.check("count", wrote == Ok(write.good as usize), || {
        format!("{wrote:?} of {write:?}")
    });
    wrote.unwrap_or(0) as u64
}

/// Chooses a write: the plain one of section J first, then inside the file and past its end in turn.
fn short_write(round: u64, rng: &mut SmallRng) -> ShortWrite {
    match round {
        0 => ShortWrite {
            size: OLD,
            offset: 0,
            good: P,
        },
        1 => ShortWrite {
            size: P,
            offset: P,
            good: P,
        },
        _ if round.is_multiple_of(2) => ShortWrite {
            size: OLD,
            offset: rng.random_range(0..2 * P),
            good: rng.random_range(0..=P),
        },
        _ => {
            let size = rng.random_range(0..P + P / 2);
            ShortWrite {
                size,
                offset: size + rng.random_range(0..P),
                good: rng.random_range(1..=P),
            }
        }
    }
}

/// Checks what the file holds after the write, and after it grew over the part that was not written.
fn judge_contents(
    cx: &Context<'_>,
    file: &dyn Handle,
    write: ShortWrite,
    count: u64,
) -> Result<(), Stop> {
    let ShortWrite { size, offset, .. } = write;
    let end = offset + count;
    if count > 0 || size == OLD {
        cx.equal("size", file.size()?, size.max(end));
    }
    if size < OLD {
        file.truncate(offset + ShortWrite::LEN)?;
        cx.contents("the gap is zeros", file, size..offset, 0)?;
        cx.contents(
            "behind the prefix zeros",
            file,
            end..offset + ShortWrite::LEN,
            0,
        )?;
    } else {
        cx.contents("before it the old bytes", file, 0..offset, b'o')?;
        cx.contents("behind the prefix the old bytes", file, end..OLD, b'o')?;
    }
    cx.contents("the prefix", file, offset..end, b'n')?;
    Ok(())
}

/// Reads around the write that is going on and checks every byte.
fn watch(
    cx: &Context<'_>,
    number: u64,
    file: &dyn Handle,
    stage: &RwLock<Option<ShortWrite>>,
    over: &AtomicBool,
    seen: &AtomicU64,
) -> Result<(), Stop> {
    let target = Region::pages(4)?;
    let mut rng = cx.rng(100 + number);
    while !over.load(Ordering::Relaxed) {
        // Held shared while reading: the writer moves on to another stage only between reads.
        let stage = stage.read().expect("no panic under this lock");
        let Some(write) = *stage else {
            drop(stage);
            std::thread::yield_now();
            continue;
        };
        let start = rng.random_range(0..3 * P);
        let len = rng.random_range(1..4 * PAGE);
        let got = file.read(&target.iov(0..len), At::Offset(start), How::PLAIN)?;
        let bytes = target.to_vec(0..got)?;
        let wrong = (start..)
            .zip(bytes)
            .find(|&(at, byte)| !write.allows(at, byte));
        cx.check("what readers see", wrong.is_none(), || {
            format!("(offset, byte) {wrong:?} beside {write:?}")
        });
        seen.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Longest append of T14, in bytes, and how many there are.
const APPEND_MAX: usize = 9_000;
const APPENDS: Range<u64> = 2_000..10_000;

fn size_after_data(cx: &Context<'_>) -> Result<(), Stop> {
    super::needs_room(cx, APPENDS.end * APPEND_MAX as u64)?;
    let file = cx.fresh("file")?;
    let over = AtomicBool::new(false);
    let seen = AtomicU64::new(0);
    let size = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|number| {
                let (file, over, seen) = (&*file, &over, &seen);
                scope.spawn(move || read_tail(cx, number, file, over, seen))
            })
            .collect();
        let size = append(cx, &seen);
        over.store(true, Ordering::Relaxed);
        for reader in readers {
            joined(reader.join())?;
        }
        size
    })?;
    let seen = seen.into_inner();
    cx.equal("size in the end", file.size()?, size);
    cx.contents("contents in the end", &*file, 0..size, b'x')?;
    cx.check("the readers read", seen > 0, || "not once".into());
    cx.note(format!(
        "{} KiB appended, {seen} reads of the tail",
        size >> 10
    ));
    Ok(())
}

fn append(cx: &Context<'_>, seen: &AtomicU64) -> Result<u64, Stop> {
    let appender = cx.fs().open("file", Open::EXISTING.appending())?;
    let source = Region::pages(APPEND_MAX.div_ceil(PAGE))?;
    source.fill(0..source.len(), b'x')?;
    let mut rng = cx.rng(0);
    let (mut size, mut round) = (0, 0);
    while cx.goes_on_until(round, APPENDS, || seen.load(Ordering::Relaxed) > 0) {
        let len = rng.random_range(1..APPEND_MAX);
        // The offset is ignored: the file is open for appending.
        let wrote = appender.write(&source.iov(0..len), At::Position, How::PLAIN);
        cx.equal("append", wrote, Ok(len));
        size += wrote? as u64;
        round += 1;
    }
    Ok(size)
}

fn read_tail(
    cx: &Context<'_>,
    number: u64,
    file: &dyn Handle,
    over: &AtomicBool,
    seen: &AtomicU64,
) -> Result<(), Stop> {
    let target = Region::pages(4)?;
    let mut rng = cx.rng(100 + number);
    while !over.load(Ordering::Relaxed) {
        let size = file.size()?;
        let offset = size.saturating_sub(rng.random_range(0..2 * P));
        let got = file.read(&target.iov(0..4 * PAGE), At::Offset(offset), How::PLAIN)?;
        let enough = (size - offset).min(4 * P);
        cx.check("reads reach the size", got as u64 >= enough, || {
            format!("{got} at {offset} of {size}")
        });
        cx.all(
            "bytes below the size",
            &target.to_vec(0..got)?,
            offset,
            b'x',
        );
        seen.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Threads of T15, and bytes of one record: a letter for the thread, the number of the record, the letter again.
const APPENDERS: u64 = 8;
const RECORD: usize = 100;

fn append_race(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.fresh("file")?;
    let counts = std::thread::scope(|scope| {
        let appenders: Vec<_> = (0..APPENDERS)
            .map(|number| scope.spawn(move || append_records(cx, number)))
            .collect();
        appenders
            .into_iter()
            .map(|appender| joined(appender.join()))
            .collect::<Result<Vec<u64>, Stop>>()
    })?;
    let all: u64 = counts.iter().sum();
    cx.equal("size", file.size()?, all * RECORD as u64);
    file.drop_cache()?;
    let bytes = super::pattern::read(&*file, 0..all * RECORD as u64)?;
    let mut next = [0; APPENDERS as usize];
    for (at, got) in bytes.chunks(RECORD).enumerate() {
        let number = u64::from(got[0].wrapping_sub(b'a'));
        let expected = next.get_mut(number as usize).map(|next| {
            *next += 1;
            record(number, *next - 1)
        });
        let whole = expected.is_some_and(|expected| expected == got);
        if !cx.check("records", whole, || {
            format!("record {at} of thread {number}")
        }) {
            break;
        }
    }
    cx.equal("records of each", next.to_vec(), counts);
    cx.note(format!("{all} appends"));
    Ok(())
}

fn record(number: u64, count: u64) -> Vec<u8> {
    let mut record = vec![b'a' + number as u8; RECORD];
    record[1..9].copy_from_slice(&count.to_ne_bytes());
    record
}

fn append_records(cx: &Context<'_>, number: u64) -> Result<u64, Stop> {
    let appender = cx.fs().open("file", Open::EXISTING.appending())?;
    let source = Region::pages(1)?;
    let mut count = 0;
    while cx.goes_on(count, 1_000..10_000) {
        source.put(0, &record(number, count))?;
        let wrote = appender.write(&source.iov(0..RECORD), At::Position, How::PLAIN);
        cx.equal("append", wrote, Ok(RECORD));
        count += 1;
    }
    Ok(count)
}
