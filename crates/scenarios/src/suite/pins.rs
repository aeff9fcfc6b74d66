//! Memory that is mapped and in use by a transfer: T48 to T50, T52.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pinfold_base::Errno;
use pinfold_mem::Direction;
use pinfold_mem::region::view::Sharing;
use pinfold_mem::region::{At, Region};
use rand::Rng as _;

use super::{P, PAGE, beside, pattern};
use crate::fs::{Allocate, Fs, How, Open, Pins, Troubled, Weather};
use crate::scenario::{Context, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        number: "T48",
        name: "pin_vs_clean",
        claim: "what was read directly into a mapping is not lost beside fsync and stores",
        known: &[],
        seconds_max: 120,
        run: pin_vs_clean,
    },
    Scenario {
        number: "T49",
        name: "pin_vs_punch",
        claim: "a page punched while a direct read fills it is whole afterwards, and the same in the file",
        known: &[],
        seconds_max: 60,
        run: pin_vs_punch,
    },
    Scenario {
        number: "T50",
        name: "fsync_wpin",
        claim: "fsync does not wait for a transfer into a page; what it brings is stored by the next one",
        known: &[],
        seconds_max: 60,
        run: fsync_wpin,
    },
    Scenario {
        number: "T52",
        name: "counters",
        claim: "every pin that direct I/O took is given back",
        known: &[],
        seconds_max: 60,
        run: counters,
    },
];

/// Pages of the mapping that is read into.
const PAGES: u64 = 8;

fn pin_vs_clean(cx: &Context<'_>) -> Result<(), Stop> {
    let size = PAGES * P;
    let file = cx.filled("file", b'o', size)?;
    pattern::file(cx, "source", 48, 16 * size)?;
    let source = cx.direct("source")?;
    let map = file.map(0..size, Sharing::Shared)?;
    let syncs = AtomicU64::new(0);
    let sync = |_| {
        cx.equal("fsync", file.sync(), Ok(()));
        syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    // The last page is the storer's, the others the device's.
    let store = |turn: u64| {
        map.view().store_u64((PAGES - 1) as usize * PAGE, turn)?;
        Ok(())
    };
    let mut rng = cx.rng(0);
    let (mut round, mut last) = (0, 0);
    while cx.goes_on(round, 10..500) {
        beside(&[&sync, &store], || {
            for _ in 0..50 {
                last = rng.random_range(0..16 * PAGES - PAGES) * P;
                let into = map.view().iov(0..(size - P) as usize);
                let read = source.read(&into, At::Offset(last), How::PLAIN);
                cx.equal("direct read", read, Ok((size - P) as usize));
            }
            Ok(())
        })?;
        let want = pattern::bytes(48, last..last + size - P);
        let mapped = map.view().to_vec(0..size as usize)?;
        pattern::same(cx, "as mapped", &mapped[..want.len()], 0, &want);
        file.sync()?;
        map.forget(0..size as usize)?;
        file.drop_cache()?;
        let stored = pattern::read(&*file, 0..size)?;
        pattern::same(cx, "when stored", &stored, 0, &mapped);
        round += 1;
    }
    cx.note(format!("{round} rounds, {} syncs", syncs.into_inner()));
    Ok(())
}

fn pin_vs_punch(cx: &Context<'_>) -> Result<(), Stop> {
    let size = PAGES * P;
    let file = cx.filled("file", b'o', size)?;
    if file.allocate(Allocate::Punch, 0..P) == Err(Errno::EOPNOTSUPP) {
        return Err(Stop::Skip("there is no FALLOC_FL_PUNCH_HOLE here".into()));
    }
    pattern::file(cx, "source", 49, size)?;
    let source = cx.direct("source")?;
    let map = file.map(0..size, Sharing::Shared)?;
    let want = pattern::bytes(49, 0..size);
    let mut round = 0;
    while cx.goes_on(round, 50..5_000) {
        map.view().fill(0..size as usize, b'o')?;
        let into = map.view().iov(0..size as usize);
        let mut punched = Ok(());
        let read = source.transfer(Direction::Target, &into, 0, &mut || {
            punched = file.allocate(Allocate::Punch, P..3 * P);
        })?;
        cx.equal("direct read", read, size as usize);
        cx.equal("punch", punched, Ok(()));
        let mapped = map.view().to_vec(0..size as usize)?;
        let read = pattern::read(&*file, 0..size)?;
        pattern::same(cx, "map and file agree", &mapped, 0, &read);
        for page in 0..PAGES as usize {
            let bytes = page * PAGE..(page + 1) * PAGE;
            let (got, want) = (&mapped[bytes.clone()], &want[bytes]);
            // Punched before the bytes came, after it, or never; by whole pages or by what the device moves at once.
            let hole = (1..3).contains(&page);
            let fits = |(got, want): (&u8, &u8)| got == want || hole && *got == 0;
            cx.check("contents", got.iter().zip(want).all(fits), || {
                format!("page {page} in round {round}")
            });
        }
        cx.equal("size", file.size()?, size);
        file.sync()?;
        map.forget(0..size as usize)?;
        file.drop_cache()?;
        let stored = pattern::read(&*file, 0..size)?;
        pattern::same(cx, "when stored", &stored, 0, &mapped);
        round += 1;
    }
    Ok(())
}

/// How long a read takes in T50 unless it is told to go on.
const SLOW: Duration = Duration::from_secs(10);
/// Enough for it to begin; if it has not, less is tested.
const MOMENT: Duration = Duration::from_millis(150);

fn fsync_wpin(cx: &Context<'_>) -> Result<(), Stop> {
    let Troubled { fs, turn, .. } = cx.fs().troubled().map_err(Stop::Skip)?;
    turn(Weather::ReadsTake(SLOW)).map_err(Stop::Skip)?;
    turn(Weather::Fair).map_err(Stop::Skip)?;
    let open = |name: &str, how: Open| -> Result<_, Stop> { Ok(Fs::open(&*fs, name, how)?) };
    let (file, source) = (open("file", Open::FRESH)?, open("source", Open::FRESH)?);
    cx.fill(&*file, b'o', 0..4 * P)?;
    cx.fill(&*source, b'n', 0..4 * P)?;
    source.drop_cache()?;
    let direct = open("source", Open::EXISTING.direct())?;
    let map = file.map(0..4 * P, Sharing::Shared)?;
    map.view().fill(0..4 * PAGE, b'o')?;
    turn(Weather::ReadsTake(SLOW)).map_err(Stop::Skip)?;
    let mut took = Duration::MAX;
    let (mut synced, mut turned) = (Ok(()), Ok(()));
    let into = map.view().iov(0..4 * PAGE);
    let read = direct.transfer(Direction::Target, &into, 0, &mut || {
        std::thread::sleep(MOMENT);
        let began = Instant::now();
        synced = file.sync();
        took = began.elapsed();
        turned = turn(Weather::Fair);
    })?;
    turned.map_err(Stop::Skip)?;
    cx.equal("direct read", read, 4 * PAGE);
    cx.equal("fsync meanwhile", synced, Ok(()));
    cx.check("fsync does not wait for it", took < SLOW / 2, || {
        format!("{took:?}")
    });
    cx.equal("fsync afterwards", file.sync(), Ok(()));
    drop(map);
    file.drop_cache()?;
    cx.contents("when stored", &*file, 0..4 * P, b'n')?;
    Ok(())
}

/// How long others' transfers may take to end.
const REST: Duration = Duration::from_secs(5);

fn counters(cx: &Context<'_>) -> Result<(), Stop> {
    let held = |pins: Pins| pins.acquired.saturating_sub(pins.released);
    let Some(before) = cx.fs().pins() else {
        return Err(Stop::Skip("nobody counts pins here".into()));
    };
    let size = 64 * P;
    let file = cx.filled("file", b'o', size)?;
    let direct = cx.direct("file")?;
    let memory = Region::pages(64)?;
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, 100..5_000) {
        let len = rng.random_range(1..=64) * PAGE;
        let at = At::Offset(rng.random_range(0..=64 - (len / PAGE) as u64) * P);
        let moved = match round % 3 {
            0 => direct.write(&memory.iov(0..len), at, How::PLAIN),
            1 => direct.read(&memory.iov(0..len), at, How::PLAIN),
            _ => {
                let map = file.map(0..size, Sharing::Shared)?;
                direct.read(&map.view().iov(0..len), at, How::PLAIN)
            }
        };
        cx.equal("direct I/O", moved, Ok(len));
        round += 1;
    }
    let after = cx.fs().pins().unwrap_or(before);
    if after.acquired == before.acquired {
        return Err(Stop::Skip("direct I/O pins nothing here".into()));
    }
    let until = Instant::now() + cx.allows(REST);
    let mut least = held(after);
    while least > 0 && Instant::now() < until {
        cx.beat();
        std::thread::sleep(Duration::from_millis(1));
        least = cx.fs().pins().map_or(least, |pins| least.min(held(pins)));
    }
    cx.check("all are given back", least <= held(before), || {
        format!("{least} are held, before it were {}", held(before))
    });
    cx.note(format!("{} pins taken", after.acquired - before.acquired));
    Ok(())
}
