//! The order of the library's locks, checked while it works: T65.

use pinfold_base::rank::{self, Rank};
use pinfold_mem::region::view::Sharing;
use pinfold_mem::region::{At, Region};

use super::{P, PAGE, beside, pattern};
use crate::child;
use crate::fs::{Allocate, How, Kind, Open};
use crate::scenario::{Context, Scenario, Stop};

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    number: "T65",
    name: "lock_order",
    claim: "no path takes a lock out of order, or holds one where a fault may be taken; who does is told",
    known: &[],
    seconds_max: 60,
    run: lock_order,
}];

/// Pages of each file.
const PAGES: u64 = 16;
/// Where rule zero is asserted, whoever serves faults: what is brought in, plain and mapped, and copies that may wait.
const PLACES: &[&str] = &[
    "fault-in",
    "fault-in of mapped memory",
    "a copy that may wait",
];
/// The same where the thread that faults serves itself.
const INLINE_PLACE: &str = "a fault in mapped memory";

fn lock_order(cx: &Context<'_>) -> Result<(), Stop> {
    if cx.fs().kind() != Kind::Pinfold {
        return Err(Stop::Skip(
            "the kernel's locks are lockdep's to look after".into(),
        ));
    }
    if !rank::CHECKED {
        return Err(Stop::Skip(
            "this build does not check the order of locks (feature lock-order)".into(),
        ));
    }
    who_breaks_the_order_is_told(cx)?;
    let ranks = [Rank::Inode, Rank::Invalidate, Rank::Folio];
    let entered = ranks.map(rank::entered);
    let mut places = PLACES.to_vec();
    if cx.fs().faults_inline() {
        places.push(INLINE_PLACE);
    }
    let asserted: Vec<u64> = places.iter().map(|place| rank::asserted(place)).collect();
    every_path(cx)?;
    // A panic of any thread, the library's own among them, fails the scenario by itself.
    for (rank, before) in ranks.into_iter().zip(entered) {
        cx.check("locks were looked at", rank::entered(rank) > before, || {
            format!("none of class {rank:?}")
        });
    }
    for (place, before) in places.into_iter().zip(asserted) {
        let more = rank::asserted(place) - before;
        cx.check("rule zero was asserted", more > 0, || {
            format!("never at {place:?}")
        });
    }
    Ok(())
}

/// Breaks the order on purpose, with the library's own locks and without: a checker that is not there tells nothing.
fn who_breaks_the_order_is_told(cx: &Context<'_>) -> Result<(), Stop> {
    let file = cx.filled("told", b'o', P)?;
    let region = Region::pages(1)?;
    let read = || {
        let _ = file.read(&region.iov(0..PAGE), At::Offset(0), How::PLAIN);
    };
    let planted: [(&'static str, &str, &dyn Fn()); 4] = [
        ("a lock out of order is told", "lock order", &|| {
            let _folio = rank::enter(Rank::Folio);
            let _inode = rank::enter(Rank::Inode);
        }),
        ("a call under a lock is told", "lock order", &|| {
            let _leaf = rank::enter(Rank::Leaf);
            read();
        }),
        ("a fault under a lock is told", "rule zero", &|| {
            let _folio = rank::enter(Rank::Folio);
            let iov = region.iov(0..PAGE);
            let cursor = iov.cursor(pinfold_mem::Direction::Source);
            let _ = pinfold_mem::faultin::fault_in_cursor(&cursor, PAGE);
        }),
        ("a lock under pins is told", "pins are leaves", &|| {
            let _pins = rank::hold_pins();
            let _inode = rank::enter(Rank::Inode);
        }),
    ];
    for (check, expected, work) in planted {
        let said = child::panics(work);
        let told = said.as_ref().is_some_and(|said| said.contains(expected));
        cx.check(check, told, || format!("{said:?}"));
    }
    // And nothing of it stays behind.
    read();
    Ok(())
}

/// Goes every way that takes locks, with memory that is not there, beside others that do.
fn every_path(cx: &Context<'_>) -> Result<(), Stop> {
    let size = PAGES * P;
    let (one, two) = (
        pattern::file(cx, "one", 1, size)?,
        pattern::file(cx, "two", 2, size)?,
    );
    let (direct, log) = (
        cx.direct("two")?,
        cx.fs().open("log", Open::FRESH.appending())?,
    );
    let maps = [
        one.map(0..size, Sharing::Shared)?,
        two.map(0..size, Sharing::Shared)?,
    ];
    let heap = Region::pages(2)?;
    let disturb = |number: u64| {
        let at = number % (PAGES / 2) * P;
        match number % 4 {
            0 => one.sync()?,
            1 => two.drop_cache()?,
            2 => two.allocate(Allocate::Punch, at..at + P)?,
            _ => {
                two.truncate(size - P - 100)?;
                two.truncate(size)?;
            }
        }
        Ok(())
    };
    beside(&[&disturb], || {
        let mut round = 0;
        while cx.goes_on(round, 30..2_000) {
            let at = round % (PAGES / 2) * P;
            let page = at as usize;
            let [own, other] = [maps[0].view(), maps[1].view()];
            for map in &maps {
                map.forget(0..size as usize)?;
            }
            one.drop_cache()?;
            // Buffered, from and to mappings of the file itself and of another; plain memory that was never touched.
            one.write(&own.iov(page..page + 2 * PAGE), At::Offset(at), How::PLAIN)?;
            one.read(&other.iov(page..page + PAGE), At::Offset(at), How::PLAIN)?;
            log.write(&own.iov(page + 100..page + PAGE), At::Position, How::PLAIN)?;
            let fresh = Region::pages(1)?;
            two.write(&fresh.iov(0..PAGE), At::Offset(at), How::PLAIN)?;
            // Directly, also onto itself, which goes by way of a copy.
            direct.write(&own.iov(page..page + 2 * PAGE), At::Offset(at), How::PLAIN)?;
            direct.read(&own.iov(page..page + PAGE), At::Offset(at), How::PLAIN)?;
            direct.write(
                &other.iov(page..page + 2 * PAGE),
                At::Offset(at),
                How::PLAIN,
            )?;
            direct.write(&heap.iov(0..2 * PAGE), At::Offset(at), How::PLAIN)?;
            // Loads and first stores.
            own.byte(page + 9)?;
            own.store(page + 10, &[round as u8])?;
            one.allocate(Allocate::Zero, at..at + 50)?;
            log.truncate(0)?;
            round += 1;
        }
        Ok(())
    })?;
    cx.equal("the size at rest", one.size()?, size);
    Ok(())
}
