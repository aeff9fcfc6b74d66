//! Access to user memory: T01 to T09.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pinfold_base::Errno;
use pinfold_mem::region::transfer::{FIEMAP_HEAD, FIEMAP_RECORD};
use pinfold_mem::region::{At, Protection, Region, UserIov, signal};
use rand::Rng as _;

use super::{P, PAGE, joined, needs_room};
use crate::fs::{Handle, How, Kind, Refusal};
use crate::scenario::{Context, Known, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        number: "T01",
        name: "prefix_write",
        claim: "a write whose second page is bad writes the first",
        known: &[],
        seconds_max: 30,
        run: prefix_write,
    },
    Scenario {
        number: "T02",
        name: "prefix_unaligned",
        claim: "the same at offset 100 writes all 4096 good bytes, not only up to a page border",
        known: &[Known {
            kind: Kind::Btrfs,
            check: "count",
            why: "btrfs faults a whole chunk in beforehand and shrinks to the page border: 3996",
        }],
        seconds_max: 30,
        run: prefix_unaligned,
    },
    Scenario {
        number: "T03",
        name: "all_bad",
        claim: "a write of nothing but bad memory is EFAULT and changes neither position nor size",
        known: &[
            Known {
                kind: Kind::Ext4,
                check: "size unchanged",
                why: GROWS,
            },
            Known {
                kind: Kind::Tmpfs,
                check: "size unchanged",
                why: GROWS,
            },
        ],
        seconds_max: 30,
        run: all_bad,
    },
    Scenario {
        number: "T04",
        name: "zero_len_wild",
        claim: "reading or writing nothing at a wild pointer is 0, with no other effect",
        known: &[],
        seconds_max: 30,
        run: zero_len_wild,
    },
    Scenario {
        number: "T05",
        name: "iov_mixed",
        claim: "of good 100, bad, good 100 bytes the first 100 are moved; bad first is EFAULT",
        known: &[Known {
            kind: Kind::Btrfs,
            check: "write count",
            why: "btrfs faults the whole list in beforehand: EFAULT",
        }],
        seconds_max: 30,
        run: iov_mixed,
    },
    Scenario {
        number: "T06",
        name: "read_prefix",
        claim: "a read whose second page is bad reads the first; at the end of the file it is 0",
        known: &[],
        seconds_max: 30,
        run: read_prefix,
    },
    Scenario {
        number: "T07",
        name: "subpage_bail",
        claim: "memory that ends in the middle of a block is used to its last byte",
        known: &[Known {
            kind: Kind::Btrfs,
            check: "write count",
            why: "btrfs faults a whole chunk in beforehand and shrinks to a page border",
        }],
        seconds_max: 30,
        run: subpage_bail,
    },
    Scenario {
        number: "T08",
        name: "restart_record",
        claim: "a record that does not fit into good memory is EFAULT, at once",
        known: &[],
        seconds_max: 30,
        run: restart_record,
    },
    Scenario {
        number: "T09",
        name: "nested_nofault",
        claim: "a signal handler that copies memory never makes an interrupted write fail",
        known: &[],
        seconds_max: 120,
        run: nested_nofault,
    },
];

const GROWS: &str = "since the fault-in moved behind the copy, the end of a write that copied nothing still \
                     raises the size to its offset";

/// Makes two pages of 'q', the second inaccessible.
fn half_bad() -> Result<Region, Stop> {
    let region = Region::pages(2)?;
    region.fill(0..2 * PAGE, b'q')?;
    region.protect(PAGE..2 * PAGE, Protection::None)?;
    Ok(region)
}

fn prefix_write(cx: &Context<'_>) -> Result<(), Stop> {
    let source = half_bad()?;
    let file = cx.fresh("by-offset")?;
    let wrote = file.write(&source.iov(0..2 * PAGE), At::Offset(0), How::PLAIN);
    cx.equal("count", wrote, Ok(PAGE));
    cx.equal("size", file.size()?, P);
    cx.contents("contents", &*file, 0..P, b'q')?;
    let file = cx.fresh("by-position")?;
    let wrote = file.write(&source.iov(0..2 * PAGE), At::Position, How::PLAIN);
    cx.equal("count", wrote, Ok(PAGE));
    cx.equal("position", file.position()?, P);
    file.drop_cache()?;
    cx.contents("contents when stored", &*file, 0..P, b'q')?;
    Ok(())
}

fn prefix_unaligned(cx: &Context<'_>) -> Result<(), Stop> {
    let source = half_bad()?;
    let file = cx.fresh("file")?;
    let wrote = file.write(&source.iov(0..2 * PAGE), At::Offset(100), How::PLAIN);
    cx.equal("count", wrote, Ok(PAGE));
    let end = 100 + wrote? as u64;
    cx.equal("size is where the count ends", file.size()?, end);
    cx.contents("before it zeros", &*file, 0..100, 0)?;
    cx.contents("contents", &*file, 100..end, b'q')?;
    file.drop_cache()?;
    cx.contents("before it zeros when stored", &*file, 0..100, 0)?;
    cx.contents("contents when stored", &*file, 100..end, b'q')?;
    Ok(())
}

fn all_bad(cx: &Context<'_>) -> Result<(), Stop> {
    let source = half_bad()?;
    let bad = || source.iov(PAGE..2 * PAGE);
    for (old, name) in [(0u64, "empty"), (100, "short")] {
        for offset in [0u64, 1, 10_000, 1 << 20] {
            let file = cx.fresh(name)?;
            cx.fill(&*file, b'o', 0..old)?;
            file.seek(offset)?;
            let wrote = file.write(&bad(), At::Position, How::PLAIN);
            cx.equal("result", wrote, Err(Errno::EFAULT));
            cx.equal("position unchanged", file.position()?, offset);
            let wrote = file.write(&bad(), At::Offset(offset), How::PLAIN);
            cx.equal("result", wrote, Err(Errno::EFAULT));
            let size = file.size()?;
            cx.check("size unchanged", size == old, || {
                format!("{size} after a failed write at {offset} of a file of {old} bytes")
            });
            cx.contents("contents unchanged", &*file, 0..old, b'o')?;
            // The failure must not poison the file for the next write.
            let wrote = file.write(&source.iov(0..100), At::Offset(offset), How::PLAIN);
            cx.equal("the next write", wrote, Ok(100));
            cx.contents("its contents", &*file, offset..offset + 100, b'q')?;
        }
    }
    Ok(())
}

fn zero_len_wild(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.fresh("file")?;
    cx.fill(&*file, b'o', 0..100)?;
    let appender = cx
        .fs()
        .open("file", crate::fs::Open::EXISTING.appending())?;
    let region = half_bad()?;
    // The kernel refuses addresses of its own half before it looks at the length; a program's half is common ground.
    let mut wild = vec![1, region.iov(PAGE..PAGE).spans()[0].addr];
    if cx.fs().kind() == Kind::Pinfold {
        wild.extend([0, 0x8000_0000_0000_0000, usize::MAX]);
    }
    for addr in wild {
        for offset in [0u64, 50, 100, 10_000] {
            let nothing = || UserIov::new().and_empty_at(addr);
            file.seek(offset)?;
            for at in [At::Position, At::Offset(offset)] {
                cx.equal("read", file.read(&nothing(), at, How::PLAIN), Ok(0));
                cx.equal("write", file.write(&nothing(), at, How::PLAIN), Ok(0));
                cx.equal("append", appender.write(&nothing(), at, How::PLAIN), Ok(0));
                let twice = nothing().and_empty_at(addr);
                cx.equal("read of two", file.read(&twice, at, How::PLAIN), Ok(0));
                cx.equal("write of two", file.write(&twice, at, How::PLAIN), Ok(0));
            }
            cx.equal("position unchanged", file.position()?, offset);
            cx.equal("size unchanged", file.size()?, 100);
        }
    }
    cx.equal(
        "a list of none",
        file.write(&UserIov::new(), At::Offset(0), How::PLAIN),
        Ok(0),
    );
    cx.contents("contents unchanged", &*file, 0..100, b'o')?;
    Ok(())
}

fn iov_mixed(cx: &Context<'_>) -> Result<(), Stop> {
    let region = Region::pages(3)?;
    region.fill(0..3 * PAGE, b'q')?;
    region.protect(PAGE..2 * PAGE, Protection::None)?;
    let (good, bad) = (0..100, PAGE..PAGE + 100);
    let mixed = UserIov::new()
        .and(&region, good.clone())
        .and(&region, bad.clone())
        .and(&region, good.clone());
    let bad_first = UserIov::new().and(&region, bad).and(&region, good.clone());

    let file = cx.fresh("write")?;
    let wrote = file.write(&mixed, At::Offset(0), How::PLAIN);
    cx.equal("write count", wrote, Ok(100));
    cx.equal("size is the count", file.size()?, wrote.unwrap_or(0) as u64);
    cx.contents("contents", &*file, 0..wrote.unwrap_or(0) as u64, b'q')?;
    let wrote = file.write(&bad_first, At::Offset(0), How::PLAIN);
    cx.equal("write with bad first", wrote, Err(Errno::EFAULT));
    let with_empty = UserIov::new()
        .and_empty_at(1)
        .and(&region, good.clone())
        .and_empty_at(1)
        .and(&region, 0..50);
    let wrote = file.write(&with_empty, At::Offset(0), How::PLAIN);
    cx.equal("write with empty parts", wrote, Ok(150));

    let file = cx.filled("read", b'r', 300)?;
    for temperature in ["cold", "warm"] {
        region.fill(good.clone(), 0)?;
        let read = file.read(&mixed, At::Offset(0), How::PLAIN);
        cx.check("read count", read == Ok(100), || {
            format!("{read:?} ({temperature})")
        });
        cx.all("what was read", &region.to_vec(good.clone())?, 0, b'r');
        let read = file.read(&bad_first, At::Offset(0), How::PLAIN);
        cx.equal("read with bad first", read, Err(Errno::EFAULT));
    }
    Ok(())
}

fn read_prefix(cx: &Context<'_>) -> Result<(), Stop> {
    let target = half_bad()?;
    let file = cx.filled("file", b'r', 3 * P)?;
    for temperature in ["cold", "warm"] {
        target.fill(0..PAGE, 0)?;
        file.seek(0)?;
        let read = file.read(&target.iov(0..2 * PAGE), At::Position, How::PLAIN);
        cx.check("count", read == Ok(PAGE), || {
            format!("{read:?} ({temperature})")
        });
        cx.equal("position", file.position()?, P);
        cx.all("what was read", &target.to_vec(0..PAGE)?, 0, b'r');
        let read = file.read(&target.iov(PAGE..2 * PAGE), At::Position, How::PLAIN);
        cx.equal("nothing but bad", read, Err(Errno::EFAULT));
        cx.equal("position unchanged", file.position()?, P);
        // Unaligned on both sides: the good part ends in the middle of a page of the file.
        let read = file.read(&target.iov(96..2 * PAGE), At::Offset(1000), How::PLAIN);
        cx.equal("unaligned count", read, Ok(PAGE - 96));
    }
    for end in [3 * P, 3 * P + 1, 1 << 20] {
        file.seek(end)?;
        let read = file.read(&target.iov(PAGE..2 * PAGE), At::Position, How::PLAIN);
        cx.equal("at the end of the file", read, Ok(0));
        cx.equal("position at the end", file.position()?, end);
        let read = file.read(&target.iov(PAGE..2 * PAGE), At::Offset(end), How::PLAIN);
        cx.equal("at the end of the file", read, Ok(0));
    }
    Ok(())
}

/// Good bytes before bad memory: around the sizes of tag granules, vector registers and cache lines.
const GOOD: [usize; 11] = [1, 15, 16, 17, 31, 48, 63, 65, 100, 1_000, PAGE - 1];

fn subpage_bail(cx: &Context<'_>) -> Result<(), Stop> {
    let memory = half_bad()?;
    let stored = cx.filled("read", b'r', 4 * P)?;
    for good in GOOD {
        for offset in [0u64, 1, 16, 100, 4_090, 2 * P - 1] {
            let edge = || memory.iov(PAGE - good..2 * PAGE);
            let file = cx.filled("write", b'o', 3 * P)?;
            memory.fill(0..PAGE, b'q')?;
            let wrote = file.write(&edge(), At::Offset(offset), How::PLAIN);
            cx.check("write count", wrote == Ok(good), || {
                format!("{wrote:?} of {good} at {offset}")
            });
            let end = offset + wrote.unwrap_or(0) as u64;
            cx.contents("what was written", &*file, offset..end, b'q')?;
            cx.contents("behind what was written", &*file, end..3 * P, b'o')?;
            if offset % 2 == 0 {
                stored.drop_cache()?;
            }
            let read = stored.read(&edge(), At::Offset(offset), How::PLAIN);
            cx.check("read count", read == Ok(good), || {
                format!("{read:?} of {good} at {offset}")
            });
            let got = memory.to_vec(PAGE - good..PAGE)?;
            cx.all("what was read", &got, 0, b'r');
        }
    }
    Ok(())
}

fn restart_record(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.fresh("file")?;
    for page in (0..32).step_by(2) {
        cx.fill(&*file, b'x', page * P..(page + 1) * P)?;
    }
    file.sync()?;
    let memory = half_bad()?;
    let room = |bytes: usize| match file.extents(&memory.iov(PAGE - bytes..PAGE)) {
        Err(Refusal::Failed(Errno::EOPNOTSUPP)) => {
            Err(Stop::Skip("there is no query of extents here".into()))
        }
        Err(Refusal::Missing(reason)) => Err(Stop::Skip(reason.into())),
        Err(Refusal::Failed(errno)) => Ok(Err(errno)),
        Ok(found) => Ok(Ok(found)),
    };
    // Whole records only: as many as there is room for, of at least that many there are.
    cx.equal(
        "three records",
        room(FIEMAP_HEAD + 3 * FIEMAP_RECORD)?,
        Ok(3),
    );
    for granule in (1..4).map(|count| 16 * count) {
        for records in 0..4 {
            let good = FIEMAP_HEAD + records * FIEMAP_RECORD + granule;
            // The list goes on into bad memory, in the middle of a record.
            let into = memory.iov(PAGE - good..2 * PAGE);
            let found = match file.extents(&into) {
                Err(Refusal::Failed(errno)) => Err(errno),
                Err(missing) => return Err(missing.into()),
                Ok(found) => Ok(found),
            };
            cx.check(
                "a record in bad memory",
                found == Err(Errno::EFAULT),
                || format!("{found:?} behind {records} records and {granule} bytes"),
            );
        }
    }
    Ok(())
}

/// Bytes that the stream of T09 writes, round and round over [`WINDOW`] bytes of the file.
const STREAM: u64 = 1 << 30;
const WINDOW: u64 = 64 << 20;
const CHUNK: usize = 1 << 20;

fn nested_nofault(cx: &Context<'_>) -> Result<(), Stop> {
    needs_room(cx, WINDOW + (16 << 20))?;
    let handler = signal::Handler::copying(libc::SIGUSR2)?;
    let file = cx.fresh("stream")?;
    let stop = AtomicBool::new(false);
    let writer = rustix::thread::gettid().as_raw_nonzero().get();
    let streamed = std::thread::scope(|scope| {
        let sender = scope.spawn(|| -> Result<(), Stop> {
            while !stop.load(Ordering::Relaxed) {
                signal::send_to_thread(writer, libc::SIGUSR2)?;
                std::thread::sleep(Duration::from_micros(20));
            }
            Ok(())
        });
        let streamed = stream(cx, &*file);
        stop.store(true, Ordering::Relaxed);
        joined(sender.join())?;
        streamed
    });
    let streamed = streamed?;
    let received = handler.received();
    cx.check("signals came", received > 0, || "none was received".into());
    cx.equal("copies in the handler", signal::wrong_copies(), 0);
    cx.note(format!(
        "{} MiB written, {received} signals",
        streamed >> 20
    ));
    Ok(())
}

/// Writes [`STREAM`] bytes from memory that partly has to be faulted in, with a half bad buffer now and then.
fn stream(cx: &Context<'_>, file: &dyn Handle) -> Result<u64, Stop> {
    let source = Region::pages(CHUNK / PAGE + 1)?;
    source.fill(0..CHUNK, b's')?;
    source.protect(CHUNK..CHUNK + PAGE, Protection::None)?;
    let mut rng = cx.rng(1);
    let mut streamed = 0;
    while streamed < STREAM {
        let offset = streamed % WINDOW;
        if rng.random_ratio(1, 4) {
            let page = rng.random_range(0..CHUNK / PAGE) * PAGE;
            source.discard(page..page + PAGE)?;
            source.fill(page..page + PAGE, b's')?;
        }
        let wrote = file.write(&source.iov(0..CHUNK), At::Offset(offset), How::PLAIN);
        if !cx.equal("write under signals", wrote, Ok(CHUNK)) {
            break;
        }
        let good = rng.random_range(1..PAGE);
        let edge = source.iov(CHUNK - good..CHUNK + PAGE);
        if cx.fs().kind() != Kind::Btrfs {
            let wrote = file.write(&edge, At::Offset(offset), How::PLAIN);
            cx.equal("half bad write under signals", wrote, Ok(good));
        }
        let bad = source.iov(CHUNK..CHUNK + PAGE);
        let wrote = file.write(&bad, At::Offset(offset), How::PLAIN);
        cx.equal("bad write under signals", wrote, Err(Errno::EFAULT));
        streamed += CHUNK as u64;
    }
    cx.contents("contents", file, 0..WINDOW.min(streamed), b's')?;
    Ok(streamed)
}
