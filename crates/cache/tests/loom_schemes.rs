//! The three schemes of 2019 (T47), and two gates taken in either order, under loom.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p pinfold-cache --release --test loom_schemes`, in a target directory of its own.
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::mem::ManuallyDrop;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use pinfold_cache::Gate;
use pinfold_cache::fdm::{Turn, add_while_blocking};
use pinfold_cache::schemes::{OneWord, PageLock, Scheme, TwoWords};

/// Explores with a bound on preemptions: three find what people find.
fn bounded(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// E-1: one of the two sees the other, whoever came first.
fn one_sees_the_other<S: Scheme + 'static>() {
    loom::model(|| {
        let page = Arc::new(S::default());
        let device = {
            let page = page.clone();
            thread::spawn(move || page.pin())
        };
        let clean = page.begin();
        let pinned = device.join().unwrap();
        assert!(!(clean && pinned), "both missed each other");
    });
}

/// E-2: nor do they when pins come and go: the device never writes to bytes on their way to the store.
fn bytes_are_stable<S: Scheme + 'static>() {
    bounded(3, || {
        let page = Arc::new((S::default(), UnsafeCell::new(0u64)));
        let device = {
            let page = page.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    if page.0.pin() {
                        page.1.with_mut(|_| ());
                        page.0.unpin();
                    }
                }
            })
        };
        if page.0.begin() {
            page.1.with(|_| ());
        }
        page.0.end();
        device.join().unwrap();
    });
}

#[test]
fn t47_one_word_misses_nothing() {
    one_sees_the_other::<OneWord>();
    bytes_are_stable::<OneWord>();
}

#[test]
fn t47_the_page_lock_misses_nothing() {
    one_sees_the_other::<PageLock>();
    bytes_are_stable::<PageLock>();
}

#[test]
fn t47_two_words_with_full_fences_miss_nothing() {
    one_sees_the_other::<TwoWords<true>>();
    bytes_are_stable::<TwoWords<true>>();
}

/// These two must find the failure, or those above show nothing.
#[test]
#[should_panic(expected = "both missed each other")]
fn t47_two_words_with_write_barriers_miss_each_other() {
    one_sees_the_other::<TwoWords<false>>();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn t47_two_words_with_write_barriers_let_a_device_write_to_bytes_under_write_back() {
    bytes_are_stable::<TwoWords<false>>();
}

/// Two gates and what they keep apart: whoever adds to a file and whoever blocks it.
struct Two {
    gates: [Gate; 2],
    /// How often each was let go for the other's sake.
    dropped: AtomicUsize,
}

/// D-1: each thread blocks one gate and needs the other, as often as it is sent back.
fn crossing(ordered: bool) {
    bounded(3, move || {
        let two = Arc::new(Two {
            gates: [Gate::default(), Gate::default()],
            dropped: AtomicUsize::new(0),
        });
        let write = move |two: &Two, own: usize, other: usize| {
            // Given back at the end alone: a model that found a deadlock must not run destructors.
            let blocked = ManuallyDrop::new(two.gates[own].block());
            loop {
                let (gate, mine) = (&two.gates[other], &two.gates[own]);
                if !ordered {
                    drop(gate.add());
                    break;
                }
                let note = || {
                    two.dropped.fetch_add(1, Ordering::Relaxed);
                };
                match add_while_blocking((gate, other as u64), (mine, own as u64), note) {
                    Turn::Added(add) => {
                        drop(add);
                        break;
                    }
                    Turn::Dropped => {}
                    Turn::Own => panic!("two files with one number"),
                }
            }
            drop(ManuallyDrop::into_inner(blocked));
        };
        let down = {
            let two = two.clone();
            thread::spawn(move || write(&two, 1, 0))
        };
        write(&two, 0, 1);
        down.join().unwrap();
        // The later file's writer alone lets go, and not again and again for one turn of the other.
        assert!(two.dropped.load(Ordering::Relaxed) <= 2);
        for gate in &two.gates {
            assert!(gate.try_add().is_some(), "a gate was left blocked");
        }
    });
}

#[test]
fn d1_writers_of_two_files_that_need_each_others_gates_both_end() {
    crossing(true);
}

/// Without the order each waits for what the other holds.
#[test]
fn d1_without_an_order_they_wait_for_each_other() {
    finds_a_deadlock("d1_crossing_without_an_order");
}

#[test]
#[ignore = "ends in a deadlock, and that ends the process"]
fn d1_crossing_without_an_order() {
    crossing(false);
}

/// D-3: the gate is fair, so who holds it over several faults and asks again for each comes to wait for one who waits
/// for him.
#[test]
fn d3_asking_again_and_again_for_a_gate_that_is_held_waits_for_a_blocker_in_between() {
    finds_a_deadlock("d3_asking_again");
}

#[test]
#[ignore = "ends in a deadlock, and that ends the process"]
fn d3_asking_again() {
    bounded(3, || {
        let gate = Arc::new(Gate::default());
        let blocker = {
            let gate = gate.clone();
            thread::spawn(move || drop(gate.block()))
        };
        let held = ManuallyDrop::new(gate.add());
        for _fault in 0..2 {
            drop(gate.add());
        }
        drop(ManuallyDrop::into_inner(held));
        blocker.join().unwrap();
    });
}

/// Fails unless a model of this program ends in a deadlock: it must, or the models that do not show nothing. In a process of
/// its own, for unwinding runs into loom again, which is an abort.
fn finds_a_deadlock(model: &str) {
    let program = std::env::current_exe().unwrap();
    let ended = std::process::Command::new(program)
        .args(["--exact", model, "--ignored", "--nocapture"])
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success(), "{model} found no deadlock");
    assert!(said.contains("deadlock; threads"), "{model}: {said}");
}

/// D-2: the own gate is not asked for at all, whoever waits for it.
#[test]
fn d2_the_own_gate_is_refused_at_once() {
    bounded(3, || {
        let gate = Arc::new(Gate::default());
        let filler = {
            let gate = gate.clone();
            thread::spawn(move || drop(gate.add()))
        };
        let blocked = gate.block();
        let turn = add_while_blocking((&gate, 7), (&gate, 7), || panic!("let go"));
        assert!(matches!(turn, Turn::Own));
        drop(turn);
        drop(blocked);
        filler.join().unwrap();
    });
}

/// While the gate is let go others get through, and it is blocked again when the wait is over.
#[test]
fn d5_a_gate_that_is_let_go_is_blocked_again() {
    bounded(2, || {
        let gates = Arc::new((Gate::default(), Gate::default()));
        let pages = Arc::new(UnsafeCell::new(0u64));
        let holder = {
            let gates = gates.clone();
            thread::spawn(move || drop(gates.0.block()))
        };
        let filler = {
            let (gates, pages) = (gates.clone(), pages.clone());
            thread::spawn(move || {
                let _add = gates.1.add();
                pages.with_mut(|_| ());
            })
        };
        let blocked = gates.1.block();
        let turn = add_while_blocking((&gates.0, 1), (&gates.1, 2), || ());
        drop(turn);
        pages.with_mut(|_| ());
        drop(blocked);
        holder.join().unwrap();
        filler.join().unwrap();
    });
}
