//! What a cached glock costs; run by hand in release:
//! `cargo test -p pinfold-lock --release --test cost -- --ignored --nocapture`.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::sync::{Arc, Mutex};
use std::time::Instant;

use pinfold_base::Errno;
use pinfold_lock::service::local::Local;
use pinfold_lock::{Duties, Mode, Name, Options, Request, Space};

const TIMES: u64 = 5_000_000;
const ROUNDS: usize = 5;

struct Nothing;

impl Duties for Nothing {
    fn sync(&self, _to: Mode) -> Result<(), Errno> {
        Ok(())
    }

    fn invalidate(&self, _to: Mode) {}
}

#[test]
#[ignore = "a measurement, in release only"]
fn a_cached_glock_against_a_mutex() {
    let space = Space::join(&Local::new(), "one", Options::default()).unwrap();
    let name = Name {
        number: 1,
        generation: 0,
    };
    let glock = space.glock(name, || Arc::new(Nothing));
    let mutex = Mutex::new(0_u64);
    // The best of some rounds: others use the machine too.
    let best = |work: &dyn Fn()| {
        let round = |_| {
            let start = Instant::now();
            (0..TIMES).for_each(|_| work());
            start.elapsed().as_nanos() as f64 / TIMES as f64
        };
        (0..ROUNDS).map(round).fold(f64::MAX, f64::min)
    };
    let plain = best(&|| *std::hint::black_box(&mutex).lock().unwrap() += 1);
    for mode in [Mode::Exclusive, Mode::Shared] {
        let request = Request::new(mode);
        let held = best(&|| drop(std::hint::black_box(&*glock).lock(request).unwrap()));
        println!(
            "{}: {held:.1} ns, {:.1} times a mutex ({plain:.1} ns)",
            mode.letters(),
            held / plain
        );
    }
    assert_eq!(glock.report().counts.asked, 1);
}
