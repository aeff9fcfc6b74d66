//! Runs plans for the tests of this crate: one at a time, since some scenarios take times.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use pinfold_scenarios::{ChildCommand, Plan, Record, Scenario, Target, runner, suite};

static TURN: Mutex<()> = Mutex::new(());

/// Tests run beside others, and on machines with other work.
const PATIENCE: u32 = 6;

/// Runs `scenarios` on `target`, with the seed in PINFOLD_SCENARIO_SEED if it is set.
pub fn run_with(
    target: Target,
    scenarios: Vec<&'static Scenario>,
    change: impl FnOnce(&mut Plan),
) -> Vec<Record> {
    let _turn = TURN
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let seed = std::env::var("PINFOLD_SCENARIO_SEED")
        .ok()
        .map_or(1, |seed| seed.parse().expect("a seed is a number"));
    let mut plan = Plan {
        targets: vec![target],
        scenarios,
        seed,
        race: Duration::from_millis(300),
        silence_max: Plan::SILENCE_MAX,
        patience: PATIENCE,
        child: ChildCommand {
            program: env!("CARGO_BIN_EXE_pinfold-scenario").into(),
            args: Vec::new(),
        },
        until: None,
    };
    change(&mut plan);
    runner::run(&plan, &AtomicBool::new(false), &mut |_| {}).unwrap()
}

/// Lists every scenario, or those of PINFOLD_SCENARIO_ONLY (numbers, with commas between).
#[allow(dead_code, reason = "each test program uses its share")]
pub fn scenarios() -> Vec<&'static Scenario> {
    match std::env::var("PINFOLD_SCENARIO_ONLY") {
        Ok(only) => only
            .split(',')
            .map(|number| suite::find(number).expect("a scenario's number"))
            .collect(),
        Err(_) => suite::all(),
    }
}

/// Runs one scenario.
#[allow(dead_code, reason = "each test program uses its share")]
pub fn run_one(target: Target, number: &str) -> Record {
    let scenario = suite::find(number).unwrap();
    run_with(target, vec![scenario], |_| {}).remove(0)
}

/// Tells whether nothing is left in `dir`.
#[allow(dead_code, reason = "each test program uses its share")]
pub fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}
