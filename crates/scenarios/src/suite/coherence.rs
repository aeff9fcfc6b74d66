//! The cache beside direct writes: T35 to T38, T40.

use std::sync::atomic::{AtomicU64, Ordering};

use pinfold_base::Errno;
use pinfold_mem::Direction;
use pinfold_mem::region::view::Sharing;
use pinfold_mem::region::{At, Region};
use rand::Rng as _;

use super::{P, PAGE, beside, pattern};
use crate::fs::{Allocate, Handle, How, Kind};
use crate::scenario::{Context, Known, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        number: "T35",
        name: "dio_vs_bufread",
        claim: "once a direct write returned, no buffered read sees what was there before",
        known: &[],
        seconds_max: 60,
        run: dio_vs_bufread,
    },
    Scenario {
        number: "T36",
        name: "dio_vs_fault",
        claim: "once a direct write ended, no load through a mapping sees what was there before",
        known: &[],
        seconds_max: 60,
        run: dio_vs_fault,
    },
    Scenario {
        number: "T37",
        name: "unwritten_race",
        claim: "once a direct write to allocated space returned, no read sees zeros there",
        known: &[],
        seconds_max: 60,
        run: unwritten_race,
    },
    Scenario {
        number: "T38",
        name: "extend_order",
        claim: "when a direct write makes the file longer, the bytes are there before the size says so",
        known: &[],
        seconds_max: 60,
        run: extend_order,
    },
    Scenario {
        number: "T40",
        name: "enotblk",
        claim: "a direct write to pages that a mapping dirties all the time succeeds and is there afterwards",
        known: &[
            Known {
                kind: Kind::Ext4,
                check: "what was written",
                why: OVERWRITES,
            },
            Known {
                kind: Kind::Xfs,
                check: "what was written",
                why: OVERWRITES,
            },
            Known {
                kind: Kind::Btrfs,
                check: "what was written",
                why: OVERWRITES,
            },
            Known {
                kind: Kind::Fuse,
                check: "what was written",
                why: OVERWRITES,
            },
        ],
        seconds_max: 60,
        run: enotblk,
    },
];

const OVERWRITES: &str = "a page that a mapping dirties while the write runs stays cached with its older bytes, and is \
                          written back over the newer ones";

/// Pages that are written over and over.
const PAGES: usize = 8;

/// Fills a buffer with a generation, word by word.
fn stamp(memory: &Region, generation: u64) -> Result<(), Errno> {
    memory.put(0, &generation.to_ne_bytes().repeat(PAGES * PAGE / 8))
}

/// Returns the oldest generation in what was read.
fn oldest(bytes: &[u8]) -> u64 {
    let words = bytes.as_chunks::<8>().0;
    words
        .iter()
        .map(|word| u64::from_ne_bytes(*word))
        .min()
        .unwrap_or(0)
}

/// Writes generation after generation, directly, in one call or as a transfer that runs by itself.
fn generations(
    cx: &Context<'_>,
    direct: &dyn Handle,
    returned: &AtomicU64,
    asynchronous: bool,
) -> Result<u64, Stop> {
    let memory = Region::pages(PAGES)?;
    let mut generation = 0;
    while cx.goes_on(generation, 200..100_000) {
        generation += 1;
        stamp(&memory, generation)?;
        let from = memory.iov(0..PAGES * PAGE);
        let wrote = if asynchronous {
            direct.transfer(Direction::Source, &from, 0, &mut || {})?
        } else {
            direct.write(&from, At::Offset(0), How::PLAIN)?
        };
        cx.equal("direct write", wrote, PAGES * PAGE);
        returned.store(generation, Ordering::SeqCst);
    }
    Ok(generation)
}

fn dio_vs_bufread(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.filled("file", 0, PAGES as u64 * P)?;
    let direct = cx.direct("file")?;
    let (returned, reads) = (AtomicU64::new(0), AtomicU64::new(0));
    let read = |_| {
        let before = returned.load(Ordering::SeqCst);
        let got = pattern::read(&*file, 0..PAGES as u64 * P)?;
        let seen = oldest(&got);
        cx.check("no older generation", seen >= before, || {
            format!("{seen} was read after {before} was written")
        });
        reads.fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    let written = beside(&[&read, &read], || {
        generations(cx, &*direct, &returned, false)
    })?;
    let reads = reads.into_inner();
    cx.check("the readers read", reads > 0, || "not once".into());
    cx.note(format!(
        "{written} direct writes, {reads} buffered reads beside them"
    ));
    Ok(())
}

fn dio_vs_fault(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.filled("file", 0, PAGES as u64 * P)?;
    let direct = cx.direct("file")?;
    let map = file.map(0..PAGES as u64 * P, Sharing::Shared)?;
    for asynchronous in [false, true] {
        let returned = AtomicU64::new(0);
        let (loads, stale) = (AtomicU64::new(0), AtomicU64::new(0));
        cx.fill(&*file, 0, 0..PAGES as u64 * P)?;
        let load = |turn: u64| {
            let mut rng = cx.rng(turn << 8 | 1);
            for _ in 0..200 {
                let before = returned.load(Ordering::SeqCst);
                let at = rng.random_range(0..PAGES * PAGE / 8) * 8;
                let seen = map.view().load_u64(at)?;
                loads.fetch_add(1, Ordering::Relaxed);
                if seen >= before {
                    continue;
                }
                stale.fetch_add(1, Ordering::Relaxed);
                // The kernel promises nothing here; what it does is worth a line.
                let promised = cx.fs().kind() == Kind::Pinfold;
                cx.check("no older generation", !promised, || {
                    format!("{seen} was loaded after {before} was written")
                });
            }
            Ok(())
        };
        let cool = |_| {
            map.forget(0..PAGES * PAGE)?;
            let _ = file.drop_cache();
            Ok(())
        };
        let lead = || generations(cx, &*direct, &returned, asynchronous);
        let written = beside(&[&load, &load, &cool], lead)?;
        let (loads, stale) = (loads.into_inner(), stale.into_inner());
        cx.check("the loaders loaded", loads > 0, || "not once".into());
        let sort = if asynchronous {
            "asynchronous"
        } else {
            "plain"
        };
        cx.note(format!(
            "{written} {sort} direct writes, {loads} loads, {stale} of them stale"
        ));
    }
    Ok(())
}

fn unwritten_race(cx: &Context<'_>) -> Result<(), Stop> {
    let len = PAGES * PAGE;
    let memory = Region::pages(PAGES)?;
    memory.fill(0..len, b'n')?;
    let mut round = 0;
    let reads = AtomicU64::new(0);
    while cx.goes_on(round, 50..5_000) {
        let file = cx.fresh("file")?;
        if file.allocate(Allocate::Grow, 0..len as u64) == Err(Errno::EOPNOTSUPP) {
            return Err(Stop::Skip("space cannot be allocated here".into()));
        }
        let direct = cx.direct("file")?;
        let written = AtomicU64::new(0);
        let read = |_| {
            let before = written.load(Ordering::SeqCst);
            let got = pattern::read(&*file, 0..len as u64)?;
            let zero = got[..before as usize].contains(&0);
            cx.check("no zeros", !zero, || format!("below {before}"));
            reads.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        beside(&[&read, &read], || {
            for page in 0..PAGES {
                let at = page * PAGE;
                let from = memory.iov(at..at + PAGE);
                let wrote = if round % 2 == 0 {
                    direct.write(&from, At::Offset(at as u64), How::PLAIN)?
                } else {
                    direct.transfer(Direction::Source, &from, at as u64, &mut || {})?
                };
                cx.equal("direct write", wrote, PAGE);
                written.store((at + PAGE) as u64, Ordering::SeqCst);
            }
            Ok(())
        })?;
        cx.contents("in the end", &*file, 0..len as u64, b'n')?;
        round += 1;
    }
    cx.note(format!("{round} files, {} reads", reads.into_inner()));
    Ok(())
}

/// Direct appends to one file of T38.
const APPENDS: u64 = 64;

fn extend_order(cx: &Context<'_>) -> Result<(), Stop> {
    let memory = Region::pages(4)?;
    memory.fill(0..4 * PAGE, b'n')?;
    let reads = AtomicU64::new(0);
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, 10..1_000) {
        // Blocks that are used again hold older bytes.
        let old = cx.filled("file", b'x', 4 * APPENDS * P)?;
        drop(old);
        let file = cx.fresh("file")?;
        let direct = cx.direct("file")?;
        let poll = |_| {
            let size = file.size()?;
            let got = pattern::read(&*file, size.saturating_sub(2 * P)..size)?;
            cx.all(
                "bytes below the size",
                &got,
                size.saturating_sub(2 * P),
                b'n',
            );
            reads.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        let poll_direct = |_| {
            let size = direct.size()? / P * P;
            let got = pattern::read(&*direct, size.saturating_sub(2 * P)..size)?;
            cx.all(
                "bytes below the size, read directly",
                &got,
                size.saturating_sub(2 * P),
                b'n',
            );
            Ok(())
        };
        let size = beside(&[&poll, &poll_direct], || {
            let mut size = 0;
            for turn in 0..APPENDS {
                let len = rng.random_range(1..=4) * PAGE;
                let from = memory.iov(0..len);
                let wrote = if turn % 2 == 0 {
                    direct.transfer(Direction::Source, &from, size, &mut || {})?
                } else {
                    direct.write(&from, At::Offset(size), How::PLAIN)?
                };
                cx.equal("append", wrote, len);
                size += len as u64;
                let seen = file.size()?;
                cx.check("the size never falls back", seen == size, || {
                    format!("{seen} after {size} bytes")
                });
            }
            Ok(size)
        })?;
        cx.contents("in the end", &*file, 0..size, b'n')?;
        round += 1;
    }
    cx.note(format!(
        "{round} files, {} reads of the tail",
        reads.into_inner()
    ));
    Ok(())
}

fn enotblk(cx: &Context<'_>) -> Result<(), Stop> {
    let size = PAGES as u64 * P;
    let file = cx.filled("file", b'o', size)?;
    let direct = cx.direct("file")?;
    let map = file.map(0..size, Sharing::Shared)?;
    let memory = Region::pages(PAGES)?;
    let stores = AtomicU64::new(0);
    let store = |turn: u64| {
        // The first word of each page is the storer's own; the rest is the writer's.
        for page in 0..PAGES {
            map.view().store_u64(page * PAGE, turn)?;
        }
        stores.fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    let rounds = beside(&[&store, &store], || {
        let mut round = 0;
        while cx.goes_on(round, 100..10_000) {
            let letter = b'a' + (round % 26) as u8;
            memory.fill(0..PAGES * PAGE, letter)?;
            let wrote = direct.write(&memory.iov(0..PAGES * PAGE), At::Offset(0), How::PLAIN);
            cx.equal("count", wrote, Ok(PAGES * PAGE));
            for handle in [&file, &direct] {
                let got = pattern::read(&**handle, 0..size)?;
                let lost = (0..PAGES).find(|page| {
                    got[page * PAGE + 8..(page + 1) * PAGE]
                        .iter()
                        .any(|&byte| byte != letter)
                });
                cx.check("what was written", lost.is_none(), || {
                    format!("page {lost:?} holds older bytes in round {round}")
                });
            }
            round += 1;
        }
        Ok(round)
    })?;
    cx.note(format!(
        "{rounds} direct writes beside {} rounds of stores",
        stores.into_inner()
    ));
    Ok(())
}
