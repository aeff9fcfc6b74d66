//! Direct I/O on memory that lies in mapped files: T29 to T34, T45, T46.

use std::sync::atomic::{AtomicU64, Ordering};

use pinfold_base::Errno;
use pinfold_mem::region::view::Sharing;
use pinfold_mem::region::{At, Region};
use rand::Rng as _;

use super::{P, PAGE, beside, pattern};
use crate::fs::{Handle, How, Kind, Mapped};
use crate::scenario::{Context, Known, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        number: "T29",
        name: "done_before",
        claim: "a direct write whose source is evicted all the time ends, and counts each byte once",
        known: &[],
        seconds_max: 120,
        run: done_before,
    },
    Scenario {
        number: "T30",
        name: "self_dio_same",
        claim: "pages can be written directly with what a mapping of those very pages holds",
        known: &[],
        seconds_max: 60,
        run: self_dio_same,
    },
    Scenario {
        number: "T31",
        name: "self_dio_other",
        claim: "pages can be written directly with what a mapping of other pages of the file holds",
        known: &[],
        seconds_max: 60,
        run: self_dio_other,
    },
    Scenario {
        number: "T32",
        name: "self_dio_read",
        claim: "pages can be read directly into a mapping of the same file, and are seen by buffered reads",
        known: &[],
        seconds_max: 60,
        run: self_dio_read,
    },
    Scenario {
        number: "T33",
        name: "cross_dio",
        claim: "two files are written directly from mappings of each other, and both get on",
        known: &[],
        seconds_max: 60,
        run: cross_dio,
    },
    Scenario {
        number: "T34",
        name: "ring_dio",
        claim: "five files are written directly from mappings of the next one while all are truncated and synced",
        known: &[
            Known {
                kind: Kind::Ext4,
                check: NO_ERROR,
                why: COLLIDES,
            },
            Known {
                kind: Kind::Xfs,
                check: NO_ERROR,
                why: COLLIDES,
            },
        ],
        seconds_max: 60,
        run: ring_dio,
    },
    Scenario {
        number: "T45",
        name: "recursive_add",
        claim: "a buffered write that faults on its own file ends beside direct writes and truncation of it",
        known: &[],
        seconds_max: 60,
        run: recursive_add,
    },
    Scenario {
        number: "T46",
        name: "dropped_locks",
        claim: "after a direct write from a mapping that its own target's reader evicts, nobody reads older bytes",
        known: &[],
        seconds_max: 60,
        run: dropped_locks,
    },
];

/// A check that only an I/O error fails.
pub(super) const NO_ERROR: &str = "no I/O error";
pub(super) const COLLIDES: &str = "a direct write that cannot drop a cached page which is used meanwhile leaves EIO for the next \
     call that looks for errors (dio_warn_stale_pagecache)";

fn done_before(cx: &Context<'_>) -> Result<(), Stop> {
    let source = pattern::file(cx, "source", 29, 8 * P)?;
    let target = cx.fresh("target")?;
    let direct = cx.direct("target")?;
    let map = cx.cold_map(&*source, 0..8 * P)?;
    let evict = |_| {
        map.forget(0..8 * PAGE)?;
        source.drop_cache()?;
        Ok(())
    };
    beside(&[&evict], || {
        let mut round = 0;
        while cx.goes_on(round, 50..5_000) {
            let start = round % 16 * 8 * P;
            direct.seek(start)?;
            let wrote = direct.write(&map.view().iov(0..8 * PAGE), At::Position, How::PLAIN);
            cx.equal("count", wrote, Ok(8 * PAGE));
            cx.equal("position", direct.position()?, start + 8 * P);
            let got = pattern::read(&*target, start..start + 8 * P)?;
            pattern::same(cx, "contents", &got, start, &pattern::bytes(29, 0..8 * P));
            round += 1;
        }
        Ok(())
    })
}

/// Checks that a mapping, buffered reads and direct reads of a file agree, and are `want`.
fn agree(
    cx: &Context<'_>,
    map: &dyn Mapped,
    [file, direct]: [&dyn Handle; 2],
    want: &[u8],
) -> Result<(), Stop> {
    let size = want.len() as u64;
    let mapped = map.view().to_vec(0..want.len())?;
    pattern::same(cx, "as mapped", &mapped, 0, want);
    pattern::same(cx, "as read", &pattern::read(file, 0..size)?, 0, want);
    pattern::same(
        cx,
        "as read directly",
        &pattern::read(direct, 0..size)?,
        0,
        want,
    );
    Ok(())
}

const SELF_PAGES: u64 = 16;

fn self_dio_same(cx: &Context<'_>) -> Result<(), Stop> {
    let size = SELF_PAGES * P;
    let file = pattern::file(cx, "file", 30, size)?;
    let direct = cx.direct("file")?;
    let want = pattern::bytes(30, 0..size);
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, 50..2_000) {
        let map = cx.cold_map(&*file, 0..size)?;
        let (page, count) = match round {
            0 => (0, 4),
            1 => (0, SELF_PAGES),
            _ => {
                let page = rng.random_range(0..SELF_PAGES);
                (page, rng.random_range(1..=SELF_PAGES - page))
            }
        };
        let bytes = (page * P) as usize..((page + count) * P) as usize;
        if round % 3 == 2 {
            // Dirty in the mapping: it is the mapping's bytes that are to be written, and they are the same.
            map.view()
                .store(bytes.start, &want[bytes.start..][..PAGE])?;
        }
        let from = map.view().iov(bytes.clone());
        let wrote = direct.write(&from, At::Offset(page * P), How::PLAIN);
        cx.equal("count", wrote, Ok(bytes.len()));
        agree(cx, &*map, [&*file, &*direct], &want)?;
        round += 1;
    }
    Ok(())
}

fn self_dio_other(cx: &Context<'_>) -> Result<(), Stop> {
    let size = SELF_PAGES * P;
    let mut round = 0;
    let file = cx.fresh("file")?;
    let direct = cx.direct("file")?;
    let mut rng = cx.rng(0);
    while cx.goes_on(round, 50..2_000) {
        pattern::write(cx, &*file, round, 0..size)?;
        let mut want = pattern::bytes(round, 0..size);
        let map = cx.cold_map(&*file, 0..size)?;
        let (to, from, count) = match round {
            0 => (0, 4, 4),
            _ => {
                let count = rng.random_range(1..=SELF_PAGES / 2);
                let to = rng.random_range(0..=SELF_PAGES - 2 * count);
                (to, rng.random_range(to + count..=SELF_PAGES - count), count)
            }
        };
        // In either order.
        let (to, from) = if round % 2 == 0 {
            (to, from)
        } else {
            (from, to)
        };
        let [to, from, len] = [to, from, count].map(|pages| (pages * P) as usize);
        let source = map.view().iov(from..from + len);
        let wrote = direct.write(&source, At::Offset(to as u64), How::PLAIN);
        cx.equal("count", wrote, Ok(len));
        want.copy_within(from..from + len, to);
        agree(cx, &*map, [&*file, &*direct], &want)?;
        round += 1;
    }
    Ok(())
}

fn self_dio_read(cx: &Context<'_>) -> Result<(), Stop> {
    let size = SELF_PAGES * P;
    let mut round = 0;
    let file = cx.fresh("file")?;
    let direct = cx.direct("file")?;
    let mut rng = cx.rng(0);
    while cx.goes_on(round, 50..2_000) {
        pattern::write(cx, &*file, round, 0..size)?;
        let mut want = pattern::bytes(round, 0..size);
        let map = cx.cold_map(&*file, 0..size)?;
        let count = rng.random_range(1..=SELF_PAGES / 2);
        let from = rng.random_range(0..=SELF_PAGES - 2 * count);
        let to = match round % 2 {
            0 => from,
            _ => rng.random_range(from + count..=SELF_PAGES - count),
        };
        let [to, from, len] = [to, from, count].map(|pages| (pages * P) as usize);
        let target = map.view().iov(to..to + len);
        let read = direct.read(&target, At::Offset(from as u64), How::PLAIN);
        cx.equal("count", read, Ok(len));
        want.copy_within(from..from + len, to);
        agree(cx, &*map, [&*file, &*direct], &want)?;
        drop(map);
        file.drop_cache()?;
        let stored = pattern::read(&*file, 0..size)?;
        pattern::same(cx, "when stored", &stored, 0, &want);
        round += 1;
    }
    Ok(())
}

/// Pages of the files of T33 and T34.
const RING_PAGES: u64 = 32;
/// Writes by which either of two writers has got on.
const WRITES_MIN: u64 = 5;

/// Writes a few pages of `to` directly from the same pages of a mapping of another file, evicted now and then.
fn write_across(
    cx: &Context<'_>,
    turn: u64,
    thread: u64,
    to: &dyn Handle,
    from: (&dyn Handle, &dyn Mapped),
) -> Result<Result<usize, Errno>, Stop> {
    let mut rng = cx.rng(turn << 8 | thread);
    let count = rng.random_range(1..=8);
    let page = rng.random_range(0..=RING_PAGES - count);
    let bytes = (page * P) as usize..((page + count) * P) as usize;
    if turn.is_multiple_of(4) {
        from.1.forget(0..(RING_PAGES * P) as usize)?;
        // Others write there: whatever this says of it is said elsewhere.
        let _ = from.0.drop_cache();
    }
    cx.beat();
    Ok(to.write(&from.1.view().iov(bytes), At::Offset(page * P), How::PLAIN))
}

fn cross_dio(cx: &Context<'_>) -> Result<(), Stop> {
    let size = RING_PAGES * P;
    let a = cx.filled("a", b'a', size)?;
    let b = cx.filled("b", b'b', size)?;
    let (direct_a, direct_b) = (cx.direct("a")?, cx.direct("b")?);
    let (map_a, map_b) = (
        a.map(0..size, Sharing::Shared)?,
        b.map(0..size, Sharing::Shared)?,
    );
    let wrote = [AtomicU64::new(0), AtomicU64::new(0)];
    let judge = |which: usize, moved: Result<usize, Errno>| {
        let whole = moved.is_ok_and(|moved| moved > 0 && moved % PAGE == 0);
        cx.check("a write from the other file", whole, || {
            format!("{moved:?}")
        });
        wrote[which].fetch_add(1, Ordering::Relaxed);
    };
    let one = |turn| {
        judge(0, write_across(cx, turn, 1, &*direct_a, (&*b, &*map_b))?);
        Ok(())
    };
    let two = |turn| {
        judge(1, write_across(cx, turn, 2, &*direct_b, (&*a, &*map_a))?);
        Ok(())
    };
    let lead = || {
        let mut round = 0;
        let both = || {
            let mut each = wrote.iter();
            each.all(|count| count.load(Ordering::Relaxed) >= WRITES_MIN)
        };
        while cx.goes_on_until(round, 100..1_000_000, both) {
            std::thread::sleep(std::time::Duration::from_millis(5));
            round += 1;
        }
        Ok(())
    };
    beside(&[&one, &two], lead)?;
    let [one, two] = wrote.map(AtomicU64::into_inner);
    cx.check("both get on", one.min(two) >= WRITES_MIN, || {
        format!("{one} and {two} writes")
    });
    for (file, name) in [(&a, "a"), (&b, "b")] {
        let strange = pattern::read(&**file, 0..size)?
            .iter()
            .position(|byte| !b"ab".contains(byte));
        cx.check("contents", strange.is_none(), || {
            format!("byte {strange:?} of {name}")
        });
    }
    cx.note(format!("{one} and {two} writes"));
    Ok(())
}

/// Files of T34.
const RING: usize = 5;

fn ring_dio(cx: &Context<'_>) -> Result<(), Stop> {
    let size = RING_PAGES * P;
    let names = ["f0", "f1", "f2", "f3", "f4"];
    let (mut files, mut directs, mut maps) = (Vec::new(), Vec::new(), Vec::new());
    for name in names {
        let file = cx.filled(name, b'r', size)?;
        directs.push(cx.direct(name)?);
        maps.push(file.map(0..size, Sharing::Shared)?);
        files.push(file);
    }
    let turns: [AtomicU64; RING + 2] = Default::default();
    let (files, directs, maps, turns_of) = (&files, &directs, &maps, &turns);
    let writer = |own: usize| {
        let next = (own + 1) % RING;
        move |turn| {
            let from = (&*files[next], &*maps[next]);
            let moved = write_across(cx, turn, own as u64, &*directs[own], from)?;
            // A source that is cut off meanwhile is a bad buffer.
            let fine = matches!(moved, Ok(1..) | Err(Errno::EFAULT));
            if cx.check(NO_ERROR, moved != Err(Errno::EIO), || {
                format!("write to {own}")
            }) {
                cx.check("a write from the next file", fine, || format!("{moved:?}"));
            }
            turns_of[own].fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    };
    let truncate = |turn: u64| {
        let mut rng = cx.rng(turn << 8 | 100);
        let file = &files[rng.random_range(0..RING)];
        file.truncate(rng.random_range(0..size))?;
        file.truncate(size)?;
        turns_of[RING].fetch_add(1, Ordering::Relaxed);
        cx.beat();
        Ok(())
    };
    let sync = |turn: u64| {
        let synced = files[turn as usize % RING].sync();
        if cx.check(NO_ERROR, synced != Err(Errno::EIO), || "fsync".into()) {
            cx.equal("fsync", synced, Ok(()));
        }
        turns_of[RING + 1].fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    let writers = [writer(0), writer(1), writer(2), writer(3), writer(4)];
    let [w0, w1, w2, w3, w4] = &writers;
    beside(&[w0, w1, w2, w3, w4, &truncate, &sync], || {
        let mut round = 0;
        while cx.goes_on(round, 100..1_000_000) {
            std::thread::sleep(std::time::Duration::from_millis(5));
            round += 1;
        }
        Ok(())
    })?;
    let turns = turns.map(AtomicU64::into_inner);
    cx.check("all get on", turns.iter().all(|&turns| turns > 0), || {
        format!("{turns:?}")
    });
    cx.note(format!(
        "turns of the writers, truncations, syncs: {turns:?}"
    ));
    Ok(())
}

fn recursive_add(cx: &Context<'_>) -> Result<(), Stop> {
    let size = SELF_PAGES * P;
    let file = cx.filled("file", b'o', 2 * size)?;
    let direct = cx.direct("file")?;
    let map = file.map(0..size, Sharing::Shared)?;
    let memory = Region::pages(4)?;
    memory.fill(0..4 * PAGE, b'o')?;
    let block = |turn: u64| {
        let mut rng = cx.rng(turn << 8 | 1);
        let at = rng.random_range(0..SELF_PAGES - 4) * P;
        let wrote = direct.write(&memory.iov(0..4 * PAGE), At::Offset(at), How::PLAIN);
        cx.equal("direct write", wrote, Ok(4 * PAGE));
        Ok(())
    };
    let truncate = |_| {
        // Behind what is mapped: only the locks are the same.
        file.truncate(size + P)?;
        file.truncate(2 * size)?;
        Ok(())
    };
    beside(&[&block, &truncate], || {
        let mut rng = cx.rng(0);
        let mut round = 0;
        while cx.goes_on(round, 100..10_000) {
            map.forget(0..size as usize)?;
            let _ = file.drop_cache();
            let len = rng.random_range(1..=4 * PAGE);
            let start = rng.random_range(0..size as usize - len);
            let to = rng.random_range(0..size - len as u64);
            let from = map.view().iov(start..start + len);
            let wrote = file.write(&from, At::Offset(to), How::PLAIN);
            cx.equal("buffered write", wrote, Ok(len));
            round += 1;
        }
        Ok(())
    })?;
    cx.contents("contents", &*file, 0..size, b'o')?;
    Ok(())
}

fn dropped_locks(cx: &Context<'_>) -> Result<(), Stop> {
    let size = SELF_PAGES * P;
    let target = cx.filled("target", b'o', size)?;
    let source = cx.filled("source", b'o', size)?;
    let direct = cx.direct("target")?;
    let map = source.map(0..size, Sharing::Shared)?;
    // Repopulates the target's cache all the time, so that whatever is dropped only once comes back.
    let read = |_| {
        pattern::read(&*target, 0..size)?;
        cx.beat();
        Ok(())
    };
    beside(&[&read, &read], || {
        let mut round = 0;
        while cx.goes_on(round, 50..5_000) {
            let letter = b'a' + (round % 26) as u8;
            map.view().fill(0..size as usize, letter)?;
            source.drop_cache()?;
            map.forget(0..size as usize)?;
            source.drop_cache()?;
            let wrote = direct.write(&map.view().iov(0..size as usize), At::Offset(0), How::PLAIN);
            cx.equal("count", wrote, Ok(size as usize));
            cx.contents("read after the write", &*target, 0..size, letter)?;
            round += 1;
        }
        Ok(())
    })
}
