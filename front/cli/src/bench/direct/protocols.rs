//! What pins and the two-state lock cost by themselves, the three schemes of 2019 beside each other.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Barrier, RwLock};

use anyhow::Result;
use pinfold::Direction;
use pinfold::protocols::schemes::{OneWord, PageLock, Scheme, TwoWords};
use pinfold::protocols::{Gate, Limits, Segments};

use super::super::Plan;
use super::super::rounds::{Side, take_turns};
use super::super::row::{Row, Unit};
use super::super::scratch::{PAGE, thread_time_ns};
use super::{BUFFER, Bed};

/// Operations of one turn.
const OPERATIONS: u64 = 500_000;
/// Pages of one turn of those that look pages up.
const PINS: u64 = 50_000;
/// Pages that one transfer pins.
const PINNED: usize = 16;

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = pins(plan)?;
    rows.extend(schemes(plan)?);
    rows.extend(gates(plan)?);
    Ok(rows)
}

/// Times `operations` runs of `work`; returns nanoseconds of processor time each.
fn timed(operations: u64, mut work: impl FnMut()) -> [f64; 1] {
    let start = thread_time_ns();
    for _ in 0..operations {
        work();
    }
    [(thread_time_ns() - start) / operations as f64]
}

fn alone<'a>(work: impl Fn() + 'a) -> Side<'a, 1> {
    Box::new(move || Ok(timed(OPERATIONS, &work)))
}

/// The same while another thread does `beside` all the time.
fn disturbed<'a>(work: impl Fn() + Sync + 'a, beside: impl Fn() + Sync + 'a) -> Side<'a, 1> {
    Box::new(move || {
        let (stop, ready) = (AtomicBool::new(false), Barrier::new(2));
        Ok(std::thread::scope(|scope| {
            scope.spawn(|| {
                ready.wait();
                while !stop.load(Ordering::Relaxed) {
                    beside();
                }
            });
            ready.wait();
            let took = timed(OPERATIONS, &work);
            stop.store(true, Ordering::Relaxed);
            took
        }))
    })
}

/// What a direct transfer does about mapped memory: look pages up, pin them, note who holds them, and give them back.
fn pins(plan: &Plan) -> Result<Vec<Row>> {
    let bed = Bed::new(plan, "pins", false)?;
    bed.warm()?;
    let view = bed.view()?;
    let limits = Limits {
        mapped_max: BUFFER,
        granule: PAGE,
    };
    let pin = |pages: usize| -> Result<[f64; 1]> {
        let buffer = view.iov(0..pages * PAGE);
        let cursor = buffer.cursor(Direction::Source);
        let calls = PINS / pages as u64;
        let mut pinned = 0;
        let took = timed(calls, || {
            pinned += Segments::lend_user(&cursor, &limits, Segments::bytes).bytes;
        });
        anyhow::ensure!(pinned == calls as usize * pages * PAGE, "pages were cold");
        Ok(took.map(|each| each / pages as f64))
    };
    let about = "pin and unpin a mapped page for a transfer";
    let sides: Vec<Side<'_, 1>> = vec![Box::new(|| pin(1)), Box::new(|| pin(PINNED))];
    let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
    let other = format!("{PINNED} a call, each");
    let (one, many) = (found[0][0], found[1][0]);
    Ok(vec![Row::new(about, Unit::Nanoseconds, one, other, many)])
}

fn pin_and_unpin(page: &impl Scheme) {
    if black_box(page.pin()) {
        page.unpin();
    }
}

fn write_back(page: &impl Scheme) {
    black_box(page.begin());
    page.end();
}

fn schemes(plan: &Plan) -> Result<Vec<Row>> {
    let (one, lock) = (OneWord::default(), PageLock::default());
    let (full, weak) = (TwoWords::<true>::default(), TwoWords::<false>::default());
    let mut rows = Vec::new();
    let mut compare = |about: &str, sides: Vec<Side<'_, 1>>| -> Result<()> {
        let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
        let names = ["page lock", "two words, full fences", "two words, too weak"];
        for (name, other) in names.into_iter().zip(&found[1..]) {
            rows.push(Row::new(
                about,
                Unit::Nanoseconds,
                found[0][0],
                name,
                other[0],
            ));
        }
        Ok(())
    };
    compare(
        "scheme: pin and unpin",
        vec![
            alone(|| pin_and_unpin(&one)),
            alone(|| pin_and_unpin(&lock)),
            alone(|| pin_and_unpin(&full)),
            alone(|| pin_and_unpin(&weak)),
        ],
    )?;
    compare(
        "scheme: the same, another thread beside",
        vec![
            disturbed(|| pin_and_unpin(&one), || pin_and_unpin(&one)),
            disturbed(|| pin_and_unpin(&lock), || pin_and_unpin(&lock)),
            disturbed(|| pin_and_unpin(&full), || pin_and_unpin(&full)),
            disturbed(|| pin_and_unpin(&weak), || pin_and_unpin(&weak)),
        ],
    )?;
    compare(
        "scheme: begin and end write-back",
        vec![
            alone(|| write_back(&one)),
            alone(|| write_back(&lock)),
            alone(|| write_back(&full)),
            alone(|| write_back(&weak)),
        ],
    )?;
    Ok(rows)
}

fn gates(plan: &Plan) -> Result<Vec<Row>> {
    let (gate, lock) = (Gate::default(), RwLock::new(()));
    let add = || drop(black_box(gate.add()));
    let block = || drop(black_box(gate.block()));
    let read = || drop(black_box(lock.read()));
    let write = || drop(black_box(lock.write()));
    let mut rows = Vec::new();
    let mut compare = |about: &str, other: &str, sides: Vec<Side<'_, 1>>| -> Result<()> {
        let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
        rows.push(Row::new(
            about,
            Unit::Nanoseconds,
            found[0][0],
            other,
            found[1][0],
        ));
        Ok(())
    };
    compare(
        "two-state lock: add and leave",
        "RwLock, read",
        vec![alone(add), alone(read)],
    )?;
    compare(
        "two-state lock: block and leave",
        "RwLock, write",
        vec![alone(block), alone(write)],
    )?;
    compare(
        "the same, another thread blocks as well",
        "RwLock, write",
        vec![disturbed(block, block), disturbed(write, write)],
    )?;
    compare(
        "two-state lock: add, another thread blocks",
        "RwLock, read and write",
        vec![disturbed(add, block), disturbed(read, write)],
    )?;
    Ok(rows)
}
