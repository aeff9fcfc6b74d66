//! What keeps a mode beyond its holders: a fault whose instruction has yet to run, and pinned memory.

use std::time::Duration;

use super::*;

const HOLD: Duration = Duration::from_millis(200);
const START: Time = Time::ZERO;

/// A glock that was granted in `mode` at [`START`] for a request that is over.
fn used(mode: Mode, flags: Flags) -> Machine {
    let mut machine = Machine::new(HOLD, None);
    let id = HolderId(1);
    machine.enqueue(id, 1, Request::new(mode).with(flags));
    assert!(matches!(machine.run(START).work, Some(Work::Ask { .. })));
    let token = Token(1);
    machine.reply(Reply::Granted { mode, token }, START);
    machine.run(START);
    assert_eq!(machine.standing(id), Standing::Granted);
    machine.dequeue(id);
    machine.run(START);
    machine
}

fn left(machine: &mut Machine, now: Time) -> Option<Mode> {
    match machine.run(now).work {
        Some(Work::Leave { to, .. }) => Some(to),
        Some(work) => panic!("{work:?}"),
        None => None,
    }
}

#[test]
fn a_mode_that_served_a_fault_is_kept_for_the_minimum_hold_though_nobody_is_queued() {
    let mut machine = used(Mode::Exclusive, Flags::FAULT);
    machine.remote(Mode::Shared, START);
    let effects = machine.run(START);
    assert_eq!(
        (effects.work, effects.alarm),
        (None, Some(START.after(HOLD)))
    );
    assert_eq!(left(&mut machine, START.after(HOLD)), Some(Mode::Shared));
    // What no fault used goes at once.
    let mut machine = used(Mode::Exclusive, Flags::NONE);
    machine.remote(Mode::Shared, START);
    assert_eq!(left(&mut machine, START), Some(Mode::Shared));
}

#[test]
fn the_hold_for_a_fault_counts_from_the_grant_and_not_from_the_last_fault() {
    let mut machine = used(Mode::Exclusive, Flags::FAULT);
    let late = START.after(HOLD);
    let fault = Request::new(Mode::Exclusive).with(Flags::FAULT);
    assert_eq!(machine.enqueue(HolderId(2), 2, fault), Enqueued::Granted);
    machine.dequeue(HolderId(2));
    machine.remote(Mode::Exclusive, late);
    assert_eq!(left(&mut machine, late), Some(Mode::Unlocked));
}

#[test]
fn another_call_of_the_node_waits_for_a_fault_as_well_but_not_long() {
    let mut machine = used(Mode::Shared, Flags::FAULT);
    let direct = Request::new(Mode::Deferred);
    assert_eq!(machine.enqueue(HolderId(2), 2, direct), Enqueued::Queued);
    assert_eq!(left(&mut machine, START), None);
    assert_eq!(
        left(&mut machine, START.after(HOLD_MIN)),
        Some(Mode::Unlocked)
    );
    let mut machine = used(Mode::Shared, Flags::FAULT);
    machine.enqueue(HolderId(2), 2, direct.with(Flags::TRY));
    machine.run(START);
    let refused = Standing::Refused(Refusal::TryFailed);
    assert_eq!(machine.standing(HolderId(2)), refused);
}

#[test]
fn a_kept_mode_is_not_given_up_and_goes_on_to_serve_the_node() {
    let mut machine = used(Mode::Exclusive, Flags::NONE);
    machine.keep(Mode::Exclusive);
    machine.remote(Mode::Shared, START);
    assert_eq!(left(&mut machine, START), None);
    for mode in [Mode::Shared, Mode::Deferred, Mode::Exclusive] {
        let request = Request::new(mode);
        assert_eq!(machine.enqueue(HolderId(2), 2, request), Enqueued::Granted);
        machine.dequeue(HolderId(2));
        assert_eq!(left(&mut machine, START), None, "{mode:?}");
    }
    assert_eq!(machine.report(NAME, START).pins, 1);
    machine.unkeep(Mode::Exclusive);
    assert_eq!(left(&mut machine, START), Some(Mode::Shared));
}

#[test]
fn a_mode_kept_for_reading_falls_to_sh_and_no_further() {
    let mut machine = used(Mode::Exclusive, Flags::NONE);
    machine.keep(Mode::Shared);
    machine.remote(Mode::Shared, START);
    assert_eq!(left(&mut machine, START), Some(Mode::Shared));
    machine.left(Ok(()));
    let (mode, token) = (Mode::Shared, Token(1));
    machine.reply(Reply::Granted { mode, token }, START);
    machine.run(START);
    machine.remote(Mode::Exclusive, START);
    assert_eq!(left(&mut machine, START), None);
    // What would need it to fall is told, for it may be the one that keeps it.
    let write = Request::new(Mode::Exclusive);
    machine.enqueue(HolderId(2), 2, write);
    assert_eq!(left(&mut machine, START), None);
    let refused = Standing::Refused(Refusal::Failed(Errno::EBUSY));
    assert_eq!(machine.standing(HolderId(2)), refused);
    machine.unkeep(Mode::Shared);
    assert_eq!(left(&mut machine, START), Some(Mode::Unlocked));
}

const NAME: Name = Name {
    number: 1,
    generation: 0,
};
