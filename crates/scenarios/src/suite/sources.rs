//! Buffers that lie in mapped files: T10 to T12, T20, T23, T24, T66.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use pinfold_base::Errno;
use pinfold_mem::region::transfer::FIEMAP_HEAD;
use pinfold_mem::region::view::Sharing;
use pinfold_mem::region::{At, Protection, Region, UserIov};
use rand::Rng as _;
use rand::seq::SliceRandom as _;

use super::{P, PAGE, beside, pattern};
use crate::fs::{How, Kind, Refusal};
use crate::scenario::{Context, Known, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        number: "T10",
        name: "evict_race",
        claim: "a write ends, whole, although its source is evicted all the time",
        known: &[],
        seconds_max: 120,
        run: evict_race,
    },
    Scenario {
        number: "T11",
        name: "self_same_page",
        claim: "a page can be written with what a mapping of that very page holds",
        known: &[],
        seconds_max: 60,
        run: self_same_page,
    },
    Scenario {
        number: "T12",
        name: "self_shifted",
        claim: "a file can be written with itself, 100 bytes further on",
        known: &[],
        seconds_max: 60,
        run: self_shifted,
    },
    Scenario {
        number: "T20",
        name: "window_sequence",
        claim: "a source that is not resident is written whole in one call, and as far as it is good",
        known: &[Known {
            kind: Kind::Btrfs,
            check: "prefix before a bad page",
            why: "btrfs faults the whole list in beforehand: EFAULT",
        }],
        seconds_max: 120,
        run: window_sequence,
    },
    Scenario {
        number: "T23",
        name: "multi_seg_source",
        claim: "a list of many buffers in pages that are not resident is written whole",
        known: &[],
        seconds_max: 60,
        run: multi_seg_source,
    },
    Scenario {
        number: "T24",
        name: "fiemap_self",
        claim: "the extents of a file can be written into a mapping of that file",
        known: &[],
        seconds_max: 60,
        run: fiemap_self,
    },
    Scenario {
        number: "T66",
        name: "faultin_nondestructive",
        claim: "reads into the bytes beside a counter in mapped memory lose no increment of it",
        known: &[],
        seconds_max: 120,
        run: faultin_nondestructive,
    },
];

/// Bytes of the source that is evicted.
const EVICTED: u64 = 1 << 20;

fn evict_race(cx: &Context<'_>) -> Result<(), Stop> {
    let source = pattern::file(cx, "source", 1, EVICTED)?;
    let target = cx.fresh("target")?;
    let map = cx.cold_map(&*source, 0..EVICTED)?;
    let evictions = AtomicU64::new(0);
    let evict = |_| {
        map.forget(0..EVICTED as usize)?;
        source.drop_cache()?;
        evictions.fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    let rounds = beside(&[&evict], || {
        let mut rng = cx.rng(0);
        let mut round = 0;
        while cx.goes_on(round, 20..2_000) {
            let start = match round {
                0 => 0,
                _ => rng.random_range(0..EVICTED / 2),
            };
            let from = map.view().iov(start as usize..EVICTED as usize);
            let len = from.bytes();
            let wrote = target.write(&from, At::Offset(start), How::PLAIN);
            cx.equal("count", wrote, Ok(len));
            pattern::check(cx, "contents", &*target, 1, start..EVICTED)?;
            if round % 16 == 0 {
                target.truncate(0)?;
            }
            if round % 16 == 0 {
                pattern::write(cx, &*target, 2, 0..EVICTED)?;
            }
            round += 1;
        }
        Ok(round)
    })?;
    let evictions = evictions.into_inner();
    cx.check("the evictor evicted", evictions > 0, || "not once".into());
    cx.note(format!(
        "{rounds} writes, {evictions} evictions beside them"
    ));
    Ok(())
}

const SELF_PAGES: u64 = 16;

fn self_same_page(cx: &Context<'_>) -> Result<(), Stop> {
    let size = SELF_PAGES * P;
    let file = pattern::file(cx, "file", 3, size)?;
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, 50..2_000) {
        let map = cx.cold_map(&*file, 0..size)?;
        let (page, count) = match round {
            0 => (0, 1),
            1 => (0, SELF_PAGES),
            _ => {
                let page = rng.random_range(0..SELF_PAGES);
                (page, rng.random_range(1..=SELF_PAGES - page))
            }
        };
        let bytes = page * P..(page + count) * P;
        let from = map.view().iov(bytes.start as usize..bytes.end as usize);
        let wrote = file.write(&from, At::Offset(bytes.start), How::PLAIN);
        cx.equal("count", wrote, Ok(from.bytes()));
        let mapped = map.view().to_vec(0..size as usize)?;
        pattern::same(
            cx,
            "contents as mapped",
            &mapped,
            0,
            &pattern::bytes(3, 0..size),
        );
        drop(map);
        pattern::check(cx, "contents", &*file, 3, 0..size)?;
        cx.equal("size", file.size()?, size);
        round += 1;
    }
    file.drop_cache()?;
    pattern::check(cx, "contents when stored", &*file, 3, 0..size)?;
    Ok(())
}

/// By how many bytes T12 shifts.
const SHIFT: u64 = 100;

fn self_shifted(cx: &Context<'_>) -> Result<(), Stop> {
    let size = SELF_PAGES * P;
    let file = cx.fresh("file")?;
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, 50..2_000) {
        pattern::write(cx, &*file, round, 0..size)?;
        let map = cx.cold_map(&*file, 0..size)?;
        let (to, len) = match round {
            0 => (0, 2 * P),
            1 => (0, size - SHIFT),
            _ => {
                let to = rng.random_range(0..size - SHIFT - 1);
                (to, rng.random_range(1..size - SHIFT - to))
            }
        };
        let start = (to + SHIFT) as usize;
        let from = map.view().iov(start..start + len as usize);
        let wrote = file.write(&from, At::Offset(to), How::PLAIN);
        cx.equal("count", wrote, Ok(len as usize));
        let mapped = map.view().to_vec(0..size as usize)?;
        drop(map);
        let got = pattern::read(&*file, 0..size)?;
        pattern::same(cx, "map and file agree", &mapped, 0, &got);
        let wrong = (0..size).find(|&at| {
            let old = pattern::byte(round, at);
            let moved = pattern::byte(round, at + SHIFT);
            // Of the part that is source and target, a chunk may have been copied before its source changed or after.
            let twice = pattern::byte(round, at + 2 * SHIFT);
            let overlaps = at + SHIFT < to + len;
            let byte = got[at as usize];
            if (to..to + len).contains(&at) {
                byte != moved && !(overlaps && byte == twice)
            } else {
                byte != old
            }
        });
        cx.check("contents", wrong.is_none(), || {
            format!("byte {wrong:?} after {len} bytes to {to}")
        });
        round += 1;
    }
    Ok(())
}

/// Bytes of the source of T20: more than any window of fault-in.
const LARGE: u64 = 2 << 20;

fn window_sequence(cx: &Context<'_>) -> Result<(), Stop> {
    let source = pattern::file(cx, "source", 4, LARGE)?;
    let target = cx.fresh("target")?;
    let bad = Region::pages(1)?;
    bad.protect(0..PAGE, Protection::None)?;
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, 4..200) {
        let map = cx.cold_map(&*source, 0..LARGE)?;
        let view = map.view();
        target.truncate(0)?;
        let from = view.iov(0..LARGE as usize);
        let wrote = target.write(&from, At::Offset(0), How::PLAIN);
        cx.equal("count", wrote, Ok(LARGE as usize));
        pattern::check(cx, "contents", &*target, 4, 0..LARGE)?;
        target.truncate(0)?;
        map.forget(0..LARGE as usize)?;
        source.drop_cache()?;
        let good = match round {
            0 => PAGE,
            1 => (1 << 20) - PAGE,
            _ => rng.random_range(1..LARGE as usize),
        };
        let from = view
            .iov(0..good)
            .and(&bad, 0..PAGE)
            .and_view(&view, 0..PAGE);
        let wrote = target.write(&from, At::Offset(0), How::PLAIN);
        cx.check("prefix before a bad page", wrote == Ok(good), || {
            format!("{wrote:?} of {good}")
        });
        let done = wrote.unwrap_or(0) as u64;
        cx.equal("size", target.size()?, done);
        pattern::check(cx, "contents of the prefix", &*target, 4, 0..done)?;
        round += 1;
    }
    Ok(())
}

/// Pages that segments are taken from, and how many segments: the second as many as a call takes.
const SCATTERED: u64 = 2_048;
const SEGMENTS: [usize; 2] = [64, 1_024];

fn multi_seg_source(cx: &Context<'_>) -> Result<(), Stop> {
    let source = pattern::file(cx, "source", 5, SCATTERED * P)?;
    let target = cx.fresh("target")?;
    let mut pages: Vec<u64> = (0..SCATTERED).collect();
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, 6..200) {
        let map = cx.cold_map(&*source, 0..SCATTERED * P)?;
        let view = map.view();
        pages.shuffle(&mut rng);
        let (mut from, mut want) = (UserIov::new(), Vec::new());
        for &page in &pages[..SEGMENTS[round as usize % 2]] {
            // Some lie across a page border, so that one segment needs two pages.
            let start = (page * P + rng.random_range(0..P)).min(SCATTERED * P - 100);
            from = from.and_view(&view, start as usize..start as usize + 100);
            want.extend(pattern::bytes(5, start..start + 100));
        }
        target.truncate(0)?;
        let wrote = target.write(&from, At::Offset(round), How::PLAIN);
        cx.equal("count", wrote, Ok(want.len()));
        let got = pattern::read(&*target, round..round + want.len() as u64)?;
        pattern::same(cx, "contents", &got, round, &want);
        round += 1;
    }
    Ok(())
}

fn fiemap_self(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.fresh("file")?;
    for page in (0..32).step_by(2) {
        cx.fill(&*file, b'x', page * P..(page + 1) * P)?;
        file.sync()?;
    }
    let mut round = 0;
    while cx.goes_on(round, 20..500) {
        let map = cx.cold_map(&*file, 0..4 * P)?;
        // The request in a page that its storing brings in, the records in pages that only the call itself touches.
        let into = map.view().iov(PAGE - FIEMAP_HEAD..4 * PAGE);
        let extents = match file.extents(&into) {
            Err(Refusal::Failed(Errno::EOPNOTSUPP)) => {
                return Err(Stop::Skip("there is no query of extents here".into()));
            }
            Err(Refusal::Missing(reason)) => return Err(Stop::Skip(reason.into())),
            Err(Refusal::Failed(errno)) => Err(errno),
            Ok(extents) => Ok(extents),
        };
        cx.check("extents", extents.is_ok_and(|count| count > 0), || {
            format!("{extents:?}")
        });
        let mapped = map.view().to_vec(0..4 * PAGE)?;
        drop(map);
        let got = pattern::read(&*file, 0..4 * P)?;
        pattern::same(cx, "map and file agree", &mapped, 0, &got);
        round += 1;
    }
    Ok(())
}

/// Bytes of a page that T66 reads into: what direct I/O can address, apart from the counter's block.
const BESIDE: Range<usize> = 512..PAGE;

fn faultin_nondestructive(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.filled("file", b'o', 4 * P)?;
    let other = cx.filled("other", b'r', 4 * P)?;
    let direct = cx.direct("other")?;
    cx.fill(&*file, 0, 0..8)?;
    let map = file.map(0..4 * P, Sharing::Shared)?;
    let view = map.view();
    let (buffered, unbuffered) = (AtomicU64::new(0), AtomicU64::new(0));
    let read = |_| {
        let got = other.read(&view.iov(8..PAGE), At::Offset(0), How::PLAIN);
        cx.equal("buffered read", got, Ok(PAGE - 8));
        buffered.fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    let read_direct = |_| {
        match direct.read(&view.iov(BESIDE), At::Offset(0), How::PLAIN) {
            // Blocks are larger here: there is no way to read beside the counter.
            Err(Errno::EINVAL) => {}
            got => {
                cx.equal("direct read", got, Ok(BESIDE.len()));
                unbuffered.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    };
    let cool = |_| {
        file.drop_cache()?;
        map.forget(0..PAGE)?;
        Ok(())
    };
    let count = beside(&[&read, &read_direct, &cool], || {
        let mut count = 0;
        while cx.goes_on(count, 20_000..10_000_000) {
            let before = view.add_u64(0, 1)?;
            if !cx.equal("increments", before, count) {
                break;
            }
            count += 1;
        }
        Ok(count)
    })?;
    cx.equal("the count in the end", view.load_u64(0)?, count);
    drop(map);
    file.drop_cache()?;
    let stored = pattern::read(&*file, 0..8)?;
    cx.equal(
        "the count when stored",
        stored,
        count.to_ne_bytes().to_vec(),
    );
    cx.note(format!(
        "{count} increments beside {} buffered and {} direct reads",
        buffered.into_inner(),
        unbuffered.into_inner()
    ));
    Ok(())
}
