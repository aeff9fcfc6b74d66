//! A checker that tries every order (Wing and Gong 1993), for histories of a few calls.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::zones::{Op, contradiction};

/// Tells whether the remaining calls can follow on a register that holds `value`.
fn explains(ops: &[Op], remaining: u32, value: u64) -> bool {
    let left = || (0..ops.len()).filter(move |at| remaining & (1 << at) != 0);
    if left().all(|at| !ops[at].sure) {
        return true;
    }
    left().any(|at| {
        let op = ops[at];
        let may_be_next = left().all(|other| ops[other].end >= op.start);
        let rest = remaining & !(1 << at);
        if op.write {
            // One without an answer may have no effect; then it may as well come last, which is covered above, unless
            // others have to wait for its end.
            (!op.sure && explains(ops, rest, value))
                || (may_be_next && explains(ops, rest, op.value))
        } else {
            may_be_next && op.value == value && explains(ops, rest, value)
        }
    })
}

fn draw(random: &mut SmallRng) -> Vec<Op> {
    let count = random.random_range(2..=7);
    let times = random.random_range(3..=16);
    let values = random.random_range(1..=4);
    let mut ops = Vec::new();
    for call in 0..count {
        let start = random.random_range(1..=times);
        let long = random.random_range(0..=times / 2);
        let value = random.random_range(0..=values);
        let written = ops.iter().any(|op: &Op| op.write && op.value == value);
        let write = value != 0 && !written && random.random_bool(0.6);
        let sure = !write || random.random_bool(0.8);
        let bounded = sure || random.random_bool(0.5);
        ops.push(Op {
            value,
            start,
            end: if bounded { start + long } else { u64::MAX },
            write,
            sure,
            call,
        });
    }
    ops
}

#[test]
fn the_fast_checker_says_what_trying_every_order_says() {
    let mut random = SmallRng::seed_from_u64(1);
    let (mut good, mut bad) = (0, 0);
    for round in 0..60_000 {
        let ops = draw(&mut random);
        let all = (1_u32 << ops.len()) - 1;
        let slow = explains(&ops, all, 0);
        let fast = contradiction(&mut ops.clone());
        assert_eq!(slow, fast.is_none(), "round {round}: {ops:?} {fast:?}");
        if let Some(found) = fast {
            bad += 1;
            // What is shown contradicts itself, by the slow checker too, and nothing of it can be left out.
            let shown = &found.ops;
            let all = (1_u32 << shown.len()) - 1;
            assert!(!explains(shown, all, 0), "round {round}: {shown:?}");
            for (at, left_out) in shown.iter().enumerate() {
                let is_read = |op: &Op| !op.write && op.value == left_out.value;
                if !left_out.write || !shown.iter().any(is_read) {
                    assert!(explains(shown, all & !(1 << at), 0), "round {round}");
                }
            }
        } else {
            good += 1;
        }
    }
    assert!(good > 5_000 && bad > 5_000, "{good} good, {bad} bad");
}
