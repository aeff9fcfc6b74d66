//! Mappings against size changes, write-back and signals: T21, T22, T53 to T57, T67.

use std::ops::Range;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pinfold_base::Errno;
use pinfold_mem::region::touch::Hit;
use pinfold_mem::region::view::{Sharing, View};
use pinfold_mem::region::{At, Region, signal};
use rand::Rng as _;
use rand::rngs::SmallRng;

use super::{P, PAGE, beside, pattern};
use crate::fs::{Allocate, Handle, How, Kind, Mapped, Refusal};
use crate::scenario::{Context, Known, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        number: "T21",
        name: "gap_zero",
        claim: "what was stored past the end through a mapping is zeros when a write goes beyond it",
        known: &[
            Known {
                kind: Kind::Tmpfs,
                check: "the gap",
                why: SHOWS,
            },
            Known {
                kind: Kind::Fuse,
                check: "the gap",
                why: TAIL,
            },
            Known {
                kind: Kind::Tmpfs,
                check: "the gap as mapped",
                why: SHOWS,
            },
            Known {
                kind: Kind::Fuse,
                check: "the gap as mapped",
                why: TAIL,
            },
            Known {
                kind: Kind::Tmpfs,
                check: "the gap when stored",
                why: SHOWS,
            },
            Known {
                kind: Kind::Fuse,
                check: "the gap when stored",
                why: TAIL,
            },
        ],
        seconds_max: 60,
        run: gap_zero,
    },
    Scenario {
        number: "T22",
        name: "shrink_grow_zero",
        claim: "a file that grows, or shrinks and grows, grows by zeros whatever a mapping stored there",
        known: &[
            Known {
                kind: Kind::Tmpfs,
                check: "grown over a store",
                why: SHOWS,
            },
            Known {
                kind: Kind::Fuse,
                check: "grown over a store",
                why: TAIL,
            },
            Known {
                kind: Kind::Tmpfs,
                check: "grown over a store, as mapped",
                why: SHOWS,
            },
            Known {
                kind: Kind::Fuse,
                check: "grown over a store, as mapped",
                why: TAIL,
            },
        ],
        seconds_max: 60,
        run: shrink_grow_zero,
    },
    Scenario {
        number: "T53",
        name: "store_vs_clean",
        claim: "no store through a mapping is lost beside fsync: after the last one the store has them all",
        known: &[],
        seconds_max: 120,
        run: store_vs_clean,
    },
    Scenario {
        number: "T54",
        name: "trunc_vs_fault",
        claim: "beside truncation an access is served or SIGBUS; past the end it is SIGBUS, and regrown bytes are zeros",
        known: &[
            Known {
                kind: Kind::Tmpfs,
                check: "regrown bytes",
                why: SHOWS,
            },
            Known {
                kind: Kind::Fuse,
                check: "regrown bytes",
                why: TAIL,
            },
        ],
        seconds_max: 120,
        run: trunc_vs_fault,
    },
    Scenario {
        number: "T55",
        name: "punch_vs_fault",
        claim: "once a hole is punched, loads see zeros until something is stored",
        known: &[],
        seconds_max: 120,
        run: punch_vs_fault,
    },
    Scenario {
        number: "T56",
        name: "eof_tail_writeback",
        claim: "what was stored past the end through a mapping never reaches the store",
        known: &[Known {
            kind: Kind::Tmpfs,
            check: "read directly after it grew",
            why: SHOWS,
        }],
        seconds_max: 60,
        run: eof_tail_writeback,
    },
    Scenario {
        number: "T57",
        name: "msync_codes",
        claim: "msync: SYNC stores, ASYNC may, both and bad starts are EINVAL, over a hole it does the rest and says ENOMEM",
        known: &[],
        seconds_max: 60,
        run: msync_codes,
    },
    Scenario {
        number: "T67",
        name: "signal_reentry",
        claim: "a signal handler may load from a cold mapping whatever call of the file system it interrupts",
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
            Known {
                kind: Kind::Btrfs,
                check: NO_ERROR,
                why: COLLIDES,
            },
        ],
        seconds_max: 120,
        run: signal_reentry,
    },
];

const TAIL: &str = "the kernel's FUSE tells of the new size first and then writes the page, with what a mapping stored behind \
                    the old end";
const SHOWS: &str = "tmpfs has no store but its pages: what a mapping put behind the end is still there when the end moves";

/// The check of T67 that a collision spoils.
const NO_ERROR: &str = "no I/O error under signals";
const COLLIDES: &str = "a direct write that cannot drop a page which a mapping dirtied meanwhile leaves EIO for the \
                        next call that looks for errors (dio_warn_stale_pagecache)";

fn gap_zero(cx: &Context<'_>) -> Result<(), Stop> {
    let letter = Region::pages(1)?;
    letter.fill(0..PAGE, b'w')?;
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, 50..2_000) {
        let (size, at, to) = match round {
            0 => (100, 200, 300),
            _ => {
                let size = rng.random_range(1..P - 2);
                let at = rng.random_range(size..P - 1);
                (size, at, rng.random_range(at + 1..2 * P))
            }
        };
        let file = cx.fresh("file")?;
        cx.fill(&*file, b'o', 0..size)?;
        if round % 2 == 1 {
            file.drop_cache()?;
        }
        let map = file.map(0..2 * P, Sharing::Shared)?;
        map.view().store(at as usize, b"G")?;
        if round % 4 >= 2 {
            map.sync(0..PAGE, libc::MS_SYNC)?;
        }
        let wrote = file.write(&letter.iov(0..1), At::Offset(to), How::PLAIN);
        cx.equal("write behind the gap", wrote, Ok(1));
        cx.contents("before the gap", &*file, 0..size, b'o')?;
        cx.contents("the gap", &*file, size..to, 0)?;
        let mapped = map.view().to_vec(size as usize..to as usize)?;
        cx.all("the gap as mapped", &mapped, size, 0);
        cx.contents("behind the gap", &*file, to..to + 1, b'w')?;
        drop(map);
        file.drop_cache()?;
        cx.contents("the gap when stored", &*file, size..to, 0)?;
        round += 1;
    }
    Ok(())
}

fn shrink_grow_zero(cx: &Context<'_>) -> Result<(), Stop> {
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, 50..2_000) {
        let (size, at, large) = match round {
            0 => (100, 400, 1000),
            _ => {
                let size = rng.random_range(1..P - 1);
                (
                    size,
                    rng.random_range(size..P),
                    rng.random_range(size + 1..4 * P),
                )
            }
        };
        let file = cx.fresh("file")?;
        cx.fill(&*file, b'o', 0..size)?;
        file.drop_cache()?;
        let map = file.map(0..4 * P, Sharing::Shared)?;
        let view = map.view();
        view.store(at as usize, b"G")?;
        file.truncate(large)?;
        cx.contents("grown over a store", &*file, size..large, 0)?;
        let mapped = view.to_vec(size as usize..large as usize)?;
        cx.all("grown over a store, as mapped", &mapped, size, 0);
        // Inside the file now: what is cut off must be gone when the file grows again.
        view.fill(0..large as usize, b's')?;
        if round % 2 == 1 {
            map.sync(0..4 * PAGE, libc::MS_SYNC)?;
        }
        file.truncate(size)?;
        file.truncate(large)?;
        cx.contents("cut off and grown", &*file, size..large, 0)?;
        let mapped = view.to_vec(size as usize..large as usize)?;
        cx.all("cut off and grown, as mapped", &mapped, size, 0);
        cx.contents("before the cut", &*file, 0..size, b's')?;
        round += 1;
    }
    Ok(())
}

/// How long a round of stores goes on at most.
const STORING: Duration = Duration::from_millis(20);
const STORED_PAGES: u64 = 64;
/// Threads that store, each to a word of its own in every page.
const STORERS: u64 = 2;

fn store_vs_clean(cx: &Context<'_>) -> Result<(), Stop> {
    let size = STORED_PAGES * P;
    let file = cx.filled("file", b'o', size)?;
    let direct = cx.direct("file")?;
    let (mut round, mut fsyncs) = (0, 0u64);
    // Kept from round to round: what one storer put last to each page.
    let mut last = vec![vec![0u64; STORED_PAGES as usize]; STORERS as usize];
    while cx.goes_on(round, 20..2_000) {
        if round % 4 == 0 {
            file.drop_cache()?;
        }
        let map = file.map(0..size, Sharing::Shared)?;
        let view = map.view();
        std::thread::scope(|scope| {
            let storers: Vec<_> = last
                .iter_mut()
                .zip(0..)
                .map(|(last, storer)| scope.spawn(move || store(cx, view, storer, round, last)))
                .collect();
            while storers.iter().any(|storer| !storer.is_finished()) {
                match (round + fsyncs) % 3 {
                    0 => cx.equal("fdatasync", file.sync_data(), Ok(())),
                    1 => cx.equal("fsync", file.sync(), Ok(())),
                    _ => {
                        map.sync(0..size as usize, libc::MS_SYNC)?;
                        true
                    }
                };
                fsyncs += 1;
            }
            storers
                .into_iter()
                .try_for_each(|storer| super::joined(storer.join()))
        })?;
        cx.equal("the last fsync", file.sync(), Ok(()));
        let stored = pattern::read(&*direct, 0..size)?;
        for (storer, last) in last.iter().enumerate() {
            for (page, &want) in last.iter().enumerate().filter(|(_, value)| **value != 0) {
                let at = page * PAGE + storer * 8;
                let word = stored.get(at..at + 8).and_then(|word| word.try_into().ok());
                let got = word.map(u64::from_ne_bytes);
                cx.check("what is stored", got == Some(want), || {
                    format!("word {storer} of page {page} is {got:x?}, {want:#x} was stored")
                });
            }
        }
        round += 1;
    }
    cx.note(format!("{round} rounds, {fsyncs} syncs beside the stores"));
    Ok(())
}

/// Stores numbers that grow to random pages; leaves in `last` what each page got last.
fn store(
    cx: &Context<'_>,
    view: View<'_>,
    storer: u64,
    round: u64,
    last: &mut [u64],
) -> Result<(), Stop> {
    let mut rng = cx.rng(round << 8 | storer);
    let began = Instant::now();
    for turn in 1..20_000 {
        // Where every store faults, fewer will do.
        if turn > 200 && began.elapsed() > STORING {
            break;
        }
        let page = rng.random_range(0..last.len());
        let value = round << 32 | turn;
        view.store_u64(page * PAGE + storer as usize * 8, value)?;
        last[page] = value;
    }
    cx.beat();
    Ok(())
}

/// Largest size of the file that is truncated, in pages.
const CUT_PAGES: u64 = 16;

fn trunc_vs_fault(cx: &Context<'_>) -> Result<(), Stop> {
    let full = CUT_PAGES * P;
    let file = cx.filled("file", b'o', full)?;
    let map = file.map(0..full, Sharing::Shared)?;
    let view = map.view();
    // Held shared for each store, exclusively while the file grows and is looked at.
    let gate = RwLock::new(());
    let (served, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let judge = |access: Result<(), Hit>| {
        match access {
            Ok(()) => served.fetch_add(1, Ordering::Relaxed),
            Err(_) => refused.fetch_add(1, Ordering::Relaxed),
        };
        let fine = access.map_or_else(Hit::is_bus, |()| true);
        cx.check("an access is served or SIGBUS", fine, || {
            format!("{access:?}")
        });
    };
    let load = |turn: u64| {
        let mut rng = cx.rng(turn << 8 | 1);
        for _ in 0..100 {
            let at = rng.random_range(0..full as usize);
            let mut byte = [0];
            let access = view.load(at, &mut byte);
            judge(access);
            let known = access.is_err() || [0, b'o', b's'].contains(&byte[0]);
            cx.check("what is loaded", known, || format!("{byte:?} at {at}"));
        }
        Ok(())
    };
    let store = |turn: u64| {
        let mut rng = cx.rng(turn << 8 | 2);
        for _ in 0..100 {
            let _open = gate.read().expect("no panic under this lock");
            judge(view.store(rng.random_range(0..full as usize), b"s"));
        }
        Ok(())
    };
    let rounds = beside(&[&load, &load, &store, &store], || {
        let mut rng = cx.rng(0);
        let mut round = 0;
        let both = || served.load(Ordering::Relaxed) > 0 && refused.load(Ordering::Relaxed) > 0;
        while cx.goes_on_until(round, 200..20_000, both) {
            let small = match round % 3 {
                0 => rng.random_range(0..CUT_PAGES) * P,
                _ => rng.random_range(0..full),
            };
            file.truncate(small)?;
            // Nobody makes it grow: what is past the end now stays so.
            past_the_end(cx, view, small, full, &mut rng);
            let closed = gate.write().expect("no panic under this lock");
            file.truncate(full)?;
            let got = pattern::read(&*file, small..full)?;
            cx.all("regrown bytes", &got, small, 0);
            drop(closed);
            if round % 8 == 0 {
                file.sync()?;
            }
            if round % 16 == 0 {
                file.drop_cache()?;
                map.forget(0..full as usize)?;
            }
            round += 1;
        }
        Ok(round)
    })?;
    let (served, refused) = (served.into_inner(), refused.into_inner());
    cx.check("both happened", served > 0 && refused > 0, || {
        format!("{served} accesses served, {refused} refused")
    });
    cx.note(format!(
        "{rounds} cuts, {served} accesses served, {refused} refused"
    ));
    Ok(())
}

/// Checks that pages wholly past the end cannot be accessed.
fn past_the_end(cx: &Context<'_>, view: View<'_>, size: u64, full: u64, rng: &mut SmallRng) {
    let first = size.next_multiple_of(P);
    if first >= full {
        return;
    }
    for at in [first, rng.random_range(first..full)] {
        let loaded = view.byte(at as usize);
        let refused = loaded.is_err_and(Hit::is_bus);
        cx.check("past the end SIGBUS", refused, || {
            format!("{loaded:?} at {at} of {size} bytes")
        });
    }
}

fn punch_vs_fault(cx: &Context<'_>) -> Result<(), Stop> {
    let size = CUT_PAGES * P;
    let file = cx.filled("file", b'o', size)?;
    if file.allocate(Allocate::Punch, 0..P) == Err(Errno::EOPNOTSUPP) {
        return Err(Stop::Skip("there is no FALLOC_FL_PUNCH_HOLE here".into()));
    }
    let map = file.map(0..size, Sharing::Shared)?;
    let view = map.view();
    // Odd while the hole is punched and nothing is stored.
    let stage = AtomicU64::new(0);
    let hole = RwLock::new(0..0);
    let loads = AtomicU64::new(0);
    let load = |turn: u64| {
        let mut rng = cx.rng(turn << 8 | 1);
        for _ in 0..100 {
            let before = stage.load(Ordering::SeqCst);
            let punched: Range<u64> = hole.read().expect("no panic under this lock").clone();
            let at = rng.random_range(0..size);
            let byte = view.byte(at as usize)?;
            let still = stage.load(Ordering::SeqCst) == before && before % 2 == 1;
            let inside = still && punched.contains(&at);
            cx.check("a hole is zeros", !inside || byte == 0, || {
                format!("{byte:#04x} at {at} in {punched:?}")
            });
            loads.fetch_add(u64::from(inside), Ordering::Relaxed);
        }
        Ok(())
    };
    let cool = |_| {
        map.forget(0..size as usize)?;
        std::thread::sleep(Duration::from_micros(50));
        Ok(())
    };
    let rounds = beside(&[&load, &load, &cool], || {
        let mut rng = cx.rng(0);
        let mut round = 0;
        while cx.goes_on(round, 200..20_000) {
            let start = rng.random_range(0..size - 1);
            let end = rng.random_range(start + 1..=size);
            view.fill(0..size as usize, b'p')?;
            if round % 8 == 0 {
                file.sync()?;
            }
            file.allocate(Allocate::Punch, start..end)?;
            *hole.write().expect("no panic under this lock") = start..end;
            stage.fetch_add(1, Ordering::SeqCst);
            let mapped = view.to_vec(start as usize..end as usize)?;
            cx.all("the hole as mapped", &mapped, start, 0);
            cx.contents("the hole", &*file, start..end, 0)?;
            cx.contents("before the hole", &*file, 0..start, b'p')?;
            cx.contents("behind the hole", &*file, end..size, b'p')?;
            cx.equal("size", file.size()?, size);
            stage.fetch_add(1, Ordering::SeqCst);
            round += 1;
        }
        Ok(round)
    })?;
    cx.note(format!(
        "{rounds} holes, {} loads in them",
        loads.into_inner()
    ));
    Ok(())
}

fn eof_tail_writeback(cx: &Context<'_>) -> Result<(), Stop> {
    let mut rng = cx.rng(0);
    let mut round = 0;
    while cx.goes_on(round, 50..2_000) {
        let size = if round == 0 {
            100
        } else {
            rng.random_range(1..P)
        };
        let file = cx.fresh("file")?;
        cx.fill(&*file, b'o', 0..size)?;
        let direct = cx.direct("file")?;
        if round % 2 == 1 {
            file.drop_cache()?;
        }
        let map = file.map(0..P, Sharing::Shared)?;
        map.view().fill(size as usize..PAGE, b'G')?;
        match round % 3 {
            0 => map.sync(0..PAGE, libc::MS_SYNC)?,
            1 => file.sync()?,
            // The page is dirty inside the file, too.
            _ => {
                map.view().store(0, b"o")?;
                file.sync_data()?;
            }
        }
        cx.equal("size", file.size()?, size);
        file.truncate(P)?;
        let got = pattern::read(&*direct, 0..P)?;
        cx.equal("read directly", got.len(), PAGE);
        let (before, behind) = got.split_at(size as usize);
        cx.all("before the end", before, 0, b'o');
        cx.all("read directly after it grew", behind, size, 0);
        round += 1;
    }
    Ok(())
}

fn msync_codes(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.filled("file", b'o', 4 * P)?;
    let direct = cx.direct("file")?;
    let map = file.map(0..4 * P, Sharing::Shared)?;
    let check = |name: &'static str, map: &dyn Mapped, range, flags, want: Result<(), Errno>| {
        match map.sync(range, flags) {
            Ok(()) => drop(cx.equal(name, Ok(()), want)),
            Err(Refusal::Failed(errno)) => drop(cx.equal(name, Err(errno), want)),
            // Part of the system call, not of what it does.
            Err(Refusal::Missing(reason)) => cx.note(format!("{name}: {reason}")),
        }
    };
    let stored = |name: &'static str, page: usize, want: u8| -> Result<(), Stop> {
        let start = page as u64 * P;
        cx.all(
            name,
            &pattern::read(&*direct, start..start + P)?,
            start,
            want,
        );
        Ok(())
    };
    let everything = 0..4 * PAGE;
    map.view().fill(everything.clone(), b'1')?;
    check("SYNC", &*map, everything.clone(), libc::MS_SYNC, Ok(()));
    for page in 0..4 {
        stored("stored by SYNC", page, b'1')?;
    }
    map.view().fill(0..PAGE, b'2')?;
    check("ASYNC", &*map, everything.clone(), libc::MS_ASYNC, Ok(()));
    let invalid = Err(Errno::EINVAL);
    let both = libc::MS_SYNC | libc::MS_ASYNC;
    check("SYNC and ASYNC", &*map, everything.clone(), both, invalid);
    check(
        "an unknown flag",
        &*map,
        everything.clone(),
        1 << 20,
        invalid,
    );
    check("an unaligned start", &*map, 1..PAGE, libc::MS_SYNC, invalid);
    check("nothing", &*map, 0..0, libc::MS_SYNC, Ok(()));
    check("an odd length", &*map, 0..PAGE + 1, libc::MS_SYNC, Ok(()));
    stored("stored by SYNC of an odd length", 0, b'2')?;
    map.view().fill(everything.clone(), b'3')?;
    let mut map = map;
    map.unmap(PAGE..2 * PAGE)?;
    let over = Err(Errno::ENOMEM);
    check("over a hole", &*map, everything, libc::MS_SYNC, over);
    for page in [0, 2, 3] {
        stored("stored around the hole", page, b'3')?;
    }
    Ok(())
}

/// Pages of the file that the handler of T67 loads from.
const COLD_PAGES: u64 = 512;
const WORKED: u64 = 64 * P;

fn signal_reentry(cx: &Context<'_>) -> Result<(), Stop> {
    let cold = pattern::file(cx, "cold", 9, COLD_PAGES * P)?;
    let map: &'static dyn Mapped = Box::leak(cold.map(0..COLD_PAGES * P, Sharing::Shared)?);
    let work = cx.filled("work", b'o', WORKED)?;
    let direct = cx.direct("work")?;
    let shared = work.map(0..WORKED, Sharing::Shared)?;
    let handler = signal::Handler::loading(libc::SIGPROF, map.view())?;
    let workers: [AtomicU64; 2] = Default::default();
    let done = AtomicU64::new(0);
    let worker = |number: usize| {
        let (workers, done, handles) = (&workers, &done, [&*work, &*direct]);
        let (shared, cold) = (&*shared, map);
        move |turn: u64| {
            let me = rustix::thread::gettid().as_raw_nonzero().get();
            workers[number].store(me as u64, Ordering::SeqCst);
            let mut rng = cx.rng(turn << 8 | number as u64);
            toil(cx, turn, handles, [shared, cold], &mut rng)?;
            done.fetch_add(1, Ordering::Relaxed);
            cx.beat();
            Ok(())
        }
    };
    let cool = |_| {
        map.forget(0..(COLD_PAGES * P) as usize)?;
        cold.drop_cache()?;
        Ok(())
    };
    beside(&[&worker(0), &worker(1), &cool], || {
        let mut round = 0;
        while cx.goes_on(round / 100, 200..100_000) {
            for worker in &workers {
                let thread = worker.load(Ordering::SeqCst) as i32;
                if thread != 0 {
                    signal::send_to_thread(thread, libc::SIGPROF)?;
                }
            }
            std::thread::sleep(Duration::from_micros(50));
            round += 1;
        }
        Ok(())
    })?;
    let (received, done) = (handler.received(), done.into_inner());
    cx.equal("loads that nobody served", signal::failed_loads(), 0);
    cx.check("signals came", received > 20, || format!("{received}"));
    cx.check("the workers work", done > 4, || format!("{done} turns"));
    cx.note(format!("{done} calls, {received} signals"));
    Ok(())
}

/// Makes one call of some kind on the file that is worked on.
fn toil(
    cx: &Context<'_>,
    turn: u64,
    [file, direct]: [&dyn Handle; 2],
    [shared, cold]: [&dyn Mapped; 2],
    rng: &mut SmallRng,
) -> Result<(), Stop> {
    let len = rng.random_range(1..=8) * PAGE;
    let at = rng.random_range(0..=WORKED as usize - len) / PAGE * PAGE;
    let offset = At::Offset(at as u64);
    let from_cold = cold.view().iov(at..at + len);
    let moved = match turn % 8 {
        0 => file.write(&from_cold, offset, How::PLAIN),
        1 => file.read(&shared.view().iov(at..at + len), offset, How::PLAIN),
        2 => direct.write(&from_cold, offset, How::PLAIN),
        3 => direct.read(&shared.view().iov(at..at + len), offset, How::PLAIN),
        4 => {
            shared.view().fill(at..at + len, b's')?;
            match shared.sync(at..at + len, libc::MS_SYNC) {
                Err(Refusal::Failed(errno)) => Err(errno),
                done => Ok(done.map(|()| len)?),
            }
        }
        5 => file.sync().map(|()| len),
        6 => file.drop_cache().map(|()| len),
        _ => file
            .allocate(Allocate::Punch, at as u64..(at + len) as u64)
            .map(|()| len),
    };
    if cx.check(NO_ERROR, moved != Err(Errno::EIO), || {
        format!("call {}", turn % 8)
    }) {
        cx.equal("a call under signals", moved, Ok(len));
    }
    Ok(())
}
