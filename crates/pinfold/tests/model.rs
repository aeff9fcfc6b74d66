//! Random programs on a file against bytes in memory: what a volume holds is what was written, whatever was done to
//! its cache meanwhile.
//!
//! A failing program is made smaller and printed; kept as `model/regressions/NAME.txt` it is replayed by every run.
//! `PINFOLD_MODEL_SECONDS=N` runs longer, `PINFOLD_MODEL_SEEDS=A..B` runs chosen seeds (`A` alone: just that one), both
//! together: those seeds for so long.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]
#![allow(
    unsafe_code,
    reason = "loads and stores of mapped memory, as a program makes them"
)]

#[path = "model/machine.rs"]
mod machine;
#[path = "model/maps.rs"]
mod maps;
#[path = "model/mixed.rs"]
mod mixed;
#[path = "model/program.rs"]
mod program;
#[path = "model/threads.rs"]
mod threads;

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use machine::Mismatch;
use program::{Program, Verb};

/// How long the default run takes.
const SECONDS: u64 = 10;

fn seconds() -> u64 {
    std::env::var("PINFOLD_MODEL_SECONDS").map_or(SECONDS, |text| {
        text.parse().expect("PINFOLD_MODEL_SECONDS is a number")
    })
}

/// Which seeds to run, and until when.
fn seeds() -> (Range<u64>, Instant) {
    let number = |text: &str| -> u64 { text.parse().expect("PINFOLD_MODEL_SEEDS is A or A..B") };
    match std::env::var("PINFOLD_MODEL_SEEDS") {
        Ok(text) => {
            let range = match text.split_once("..") {
                Some((from, to)) => number(from)..number(to),
                None => number(&text)..number(&text) + 1,
            };
            // All of them, however long that takes, unless a time is given as well.
            let limited = std::env::var_os("PINFOLD_MODEL_SECONDS").is_some();
            let most = if limited { seconds() } else { 24 * 3600 };
            (range, Instant::now() + Duration::from_secs(most))
        }
        Err(_) => (0..u64::MAX, Instant::now() + Duration::from_secs(seconds())),
    }
}

fn report(title: &str, program: &Program, mismatch: &Mismatch) -> ! {
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let small = program::shrink(program, |candidate| {
        machine::run(candidate).is_err_and(|other| other.class() == mismatch.class())
    });
    let saw = machine::run(&small).err();
    std::panic::set_hook(quiet);
    let last = saw.as_ref().unwrap_or(mismatch);
    panic!(
        "{title}, first seen: {mismatch:?}\nsmaller: {last:?}\nkeep as tests/model/regressions/NAME.txt:\n\n{small}"
    );
}

#[test]
fn random_programs_leave_what_they_wrote() {
    let (seeds, until) = seeds();
    let mut runs = 0;
    for seed in seeds {
        if Instant::now() > until {
            break;
        }
        let program = Program::generate(seed);
        if let Err(mismatch) = machine::run(&program) {
            report(&format!("seed {seed}"), &program, &mismatch);
        }
        runs += 1;
    }
    println!("{runs} programs");
    assert!(runs > 0, "not even one program was run");
}

/// The same on three nodes, one operation after the other: each sees what the others have done. What a private mapping has copied
/// is cut off on its own node alone, and what must not wait may have to for a glock.
#[test]
fn random_programs_on_several_nodes_leave_what_they_wrote() {
    let (seeds, until) = seeds();
    let until = until - Duration::from_secs(seconds()) / 2;
    let mut runs = 0;
    for seed in seeds {
        if Instant::now() > until {
            break;
        }
        let mut program = Program::generate(seed);
        let left_out = [Verb::StorePrivate, Verb::ReadPrivate, Verb::ReadNowait];
        program.ops.retain(|op| !left_out.contains(&op.verb));
        if let Err(mismatch) = machine::run_on(&program, 3) {
            panic!("seed {seed} on three nodes: {mismatch:?}\n\n{program}");
        }
        runs += 1;
    }
    println!("{runs} programs");
    assert!(runs > 0, "not even one program was run");
}

#[test]
fn programs_that_failed_once_leave_what_they_wrote() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model/regressions");
    let mut count = 0;
    for entry in std::fs::read_dir(&kept).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "txt") {
            continue;
        }
        let program: Program = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        if let Err(mismatch) = machine::run(&program) {
            panic!("{}: {mismatch:?}", path.display());
        }
        count += 1;
    }
    assert!(count > 0, "{} holds at least one program", kept.display());
}

#[test]
fn threads_on_disjoint_ranges_see_only_what_was_written() {
    let until = Instant::now() + Duration::from_secs(seconds().div_ceil(2));
    let first = seeds().0.start;
    let mut round = first;
    while round == first || Instant::now() < until {
        threads::round(round, [64, 200, 4096][(round % 3) as usize]);
        round += 1;
    }
    println!("{} rounds", round - first);
}
