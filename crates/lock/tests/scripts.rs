//! Section H as scripts: the test decides when a service answers and calls, and what time it is.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use parking_lot::Mutex;
use pinfold_base::Errno;
use pinfold_base::rank::{self, Rank};
use pinfold_lock::Mode::{self, Deferred, Exclusive, Shared, Unlocked};
use pinfold_lock::service::scripted::{Asked, Scripted};
use pinfold_lock::service::{Reply, Token, Wait};
use pinfold_lock::{
    Clock, Doing, Duties, Flags, Glock, HandClock, Name, Options, Refusal, Request, Space, Time,
    lock_all, wait_all,
};

/// A hang is a failure.
const PATIENCE: Duration = Duration::from_secs(60);
const HOLD: Duration = Duration::from_millis(200);
const FILE: Name = Name {
    number: 7,
    generation: 1,
};

/// What duties were called, in order; fails when told to.
#[derive(Default)]
struct Diary {
    lines: Mutex<Vec<String>>,
    sync_fails: Mutex<Option<Errno>>,
    refresh_fails: Mutex<Option<Errno>>,
    /// Two visits by the test: when a refresh begins, and before it ends.
    refresh_stops: Mutex<Option<Arc<Barrier>>>,
}

impl Diary {
    fn note(&self, line: impl Into<String>) {
        // H-3, H-4: a duty that is called with a lock held waits for who waits for the lock.
        self.lines.lock().push(line.into());
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.lines.lock())
    }
}

impl Duties for Diary {
    fn sync(&self, to: Mode) -> Result<(), Errno> {
        rank::rule_zero("a duty");
        self.note(format!("sync {}", to.letters()));
        self.sync_fails.lock().map_or(Ok(()), Err)
    }

    fn invalidate(&self, to: Mode) {
        rank::rule_zero("a duty");
        self.note(format!("drop {}", to.letters()));
    }

    fn refresh(&self) -> Result<(), Errno> {
        self.note("refresh");
        let stops = self.refresh_stops.lock().clone();
        if let Some(stops) = stops {
            stops.wait();
            stops.wait();
        }
        self.refresh_fails.lock().map_or(Ok(()), Err)
    }

    fn drain_direct(&self) {
        self.note("drain");
    }
}

/// A node of a scripted cluster.
struct Node {
    space: Space,
    glock: Arc<Glock>,
    diary: Arc<Diary>,
}

/// A script, its clock, and its nodes' options.
struct Script {
    service: Scripted,
    clock: HandClock,
}

impl Script {
    fn new() -> Self {
        let clock = HandClock::new();
        // A clock at zero is like the moment of the grant.
        clock.advance(Duration::from_secs(1000));
        Self {
            service: Scripted::new(),
            clock,
        }
    }

    fn node(&self, name: &str) -> Node {
        let options = Options {
            hold: HOLD,
            workers: 2,
            clock: Clock::Hand(self.clock.clone()),
        };
        let space = Space::join(&self.service, name, options).unwrap();
        let diary = Arc::new(Diary::default());
        let duties: Arc<dyn Duties> = diary.clone();
        let glock = space.glock(FILE, || duties);
        Node {
            space,
            glock,
            diary,
        }
    }

    /// A node that has the lock in `mode` and no holder.
    fn node_with(&self, name: &str, mode: Mode) -> Node {
        let node = self.node(name);
        let done = lock_later(&node.glock, Request::new(mode));
        self.service.expect_and_grant(name, Unlocked, mode);
        soon(&done).unwrap();
        self.clock.advance(HOLD);
        node.diary.take();
        node
    }

    fn expect(&self, member: &str, from: Mode, to: Mode) -> Asked {
        let asked = self.service.next();
        assert_eq!(
            (asked.member.as_str(), asked.from, asked.to),
            (member, from, to)
        );
        asked
    }
}

/// Takes and lets go in another thread.
fn lock_later(glock: &Arc<Glock>, request: Request) -> Receiver<Result<Mode, Refusal>> {
    let (done, result) = channel();
    let glock = Arc::clone(glock);
    std::thread::spawn(move || {
        let mode = glock.lock(request).map(|_guard| glock.mode());
        done.send(mode)
    });
    result
}

/// Takes in another thread and holds until the returned sender is dropped.
fn hold_later(
    glock: &Arc<Glock>,
    request: Request,
) -> (std::sync::mpsc::Sender<()>, Receiver<Result<(), Refusal>>) {
    let (done, result) = channel();
    let (release, released) = channel::<()>();
    let glock = Arc::clone(glock);
    std::thread::spawn(move || {
        let guard = glock.lock(request);
        let _ = done.send(guard.as_ref().map(|_| ()).map_err(|&why| why));
        let _ = released.recv();
    });
    (release, result)
}

fn soon<T>(result: &Receiver<T>) -> T {
    result.recv_timeout(PATIENCE).expect("it ends")
}

/// Waits for what another thread brings about.
fn until(what: &str, condition: impl Fn() -> bool) {
    let end = std::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(std::time::Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}

fn waiters(glock: &Glock) -> usize {
    glock
        .report()
        .holders
        .iter()
        .filter(|one| !one.holds)
        .count()
}

#[test]
fn t61_a_cached_glock_asks_nobody() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    for mode in [Exclusive, Shared, Deferred] {
        drop(a.glock.lock(Request::new(mode)).unwrap());
    }
    assert_eq!(script.service.unseen(), []);
    assert_eq!(a.diary.take(), ["drain", "drain"], "DF drains nothing");
    assert_eq!(a.glock.report().counts.asked, 1);
}

#[test]
fn t61_the_first_holder_after_un_reads_the_inode_and_the_others_wait() {
    let script = Script::new();
    let a = script.node("a");
    let stops = Arc::new(Barrier::new(2));
    *a.diary.refresh_stops.lock() = Some(Arc::clone(&stops));
    let one = lock_later(&a.glock, Request::new(Shared));
    let asked = script.service.next();
    let other = lock_later(&a.glock, Request::new(Shared));
    until("both are queued", || waiters(&a.glock) == 2);
    script.service.grant(&asked, 1);
    stops.wait();
    assert!(one.try_recv().is_err() && other.try_recv().is_err());
    stops.wait();
    assert_eq!((soon(&one), soon(&other)), (Ok(Shared), Ok(Shared)));
    let refreshes = a
        .diary
        .take()
        .iter()
        .filter(|line| *line == "refresh")
        .count();
    assert_eq!(refreshes, 1);
}

#[test]
fn t61_a_refresh_that_fails_is_the_holders_error_and_owed_to_the_next() {
    let script = Script::new();
    let a = script.node("a");
    *a.diary.refresh_fails.lock() = Some(Errno::ENOENT);
    let one = lock_later(&a.glock, Request::new(Shared));
    script.service.expect_and_grant("a", Unlocked, Shared);
    assert_eq!(soon(&one), Err(Refusal::Failed(Errno::ENOENT)));
    *a.diary.refresh_fails.lock() = None;
    drop(a.glock.lock(Request::new(Shared)).unwrap());
    assert_eq!(a.diary.take(), ["refresh", "refresh", "drain"]);
}

#[test]
fn t61_a_request_that_tries_never_waits() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    let (release, held) = hold_later(&a.glock, Request::new(Exclusive));
    soon(&held).unwrap();
    for flags in [Flags::TRY, Flags::TRY_1CB] {
        let refused = a.glock.lock(Request::new(Shared).with(flags));
        assert_eq!(refused.unwrap_err(), Refusal::TryFailed);
    }
    drop(release);
    until("it is let go", || a.glock.report().holders.is_empty());
    drop(a.glock.lock(Request::new(Shared).with(Flags::TRY)).unwrap());

    // At the service it says how it asks, and takes no for an answer.
    let b = script.node("b");
    for (flags, wait) in [(Flags::TRY, Wait::Try), (Flags::TRY_1CB, Wait::TryAsking)] {
        let tried = lock_later(&b.glock, Request::new(Shared).with(flags));
        let asked = script.expect("b", Unlocked, Shared);
        assert_eq!(asked.wait, wait);
        script.service.reply("b", FILE, Reply::Refused);
        assert_eq!(soon(&tried), Err(Refusal::TryFailed));
    }
}

#[test]
fn t61_a_demotion_is_put_off_by_the_minimum_hold_for_who_queued() {
    let script = Script::new();
    let a = script.node("a");
    let (release, held) = hold_later(&a.glock, Request::new(Exclusive));
    script.service.expect_and_grant("a", Unlocked, Exclusive);
    soon(&held).unwrap();
    script.service.demote("a", FILE, Shared);
    let report = a.glock.report();
    assert!(
        report.demote.is_some_and(|demote| demote.deferred),
        "{report}"
    );
    drop(release);
    until("it is let go", || a.glock.report().holders.is_empty());
    // Meanwhile the node goes on under it.
    drop(a.glock.lock(Request::new(Exclusive)).unwrap());
    script.clock.advance(HOLD - Duration::from_millis(1));
    assert_eq!(a.glock.report().doing, Doing::Nothing);
    a.diary.take();
    script.clock.advance(Duration::from_millis(1));
    script.service.expect_and_grant("a", Exclusive, Shared);
    assert_eq!(a.diary.take(), ["sync SH"]);
    assert_eq!(a.glock.mode(), Shared);
}

#[test]
fn t61_an_idle_glock_is_given_up_at_once() {
    let script = Script::new();
    for (mode, wanted, to, duties) in [
        (Exclusive, Exclusive, Unlocked, &["sync UN", "drop UN"][..]),
        (Exclusive, Shared, Shared, &["sync SH"][..]),
        (Exclusive, Deferred, Deferred, &["sync DF", "drop DF"][..]),
        (Shared, Exclusive, Unlocked, &["sync UN", "drop UN"][..]),
        (Shared, Deferred, Unlocked, &["sync UN", "drop UN"][..]),
        (Deferred, Shared, Unlocked, &["sync UN", "drop UN"][..]),
    ] {
        let name = format!("{}{}", mode.letters(), wanted.letters());
        let node = script.node_with(&name, mode);
        script.service.demote(&name, FILE, wanted);
        script.service.expect_and_grant(&name, mode, to);
        assert_eq!(node.diary.take(), duties, "{name}");
        assert_eq!(node.glock.mode(), to, "{name}");
        assert_eq!(node.glock.report().demote, None, "{name}");
    }
}

#[test]
fn t61_two_different_wishes_merge_to_un() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    let (release, held) = hold_later(&a.glock, Request::new(Exclusive));
    soon(&held).unwrap();
    script.service.demote("a", FILE, Shared);
    script.service.demote("a", FILE, Deferred);
    drop(release);
    script.service.expect_and_grant("a", Exclusive, Unlocked);
    assert_eq!(a.glock.mode(), Unlocked);
}

#[test]
fn t61_a_call_for_un_during_a_fall_to_sh_is_followed_too() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    script.service.demote("a", FILE, Shared);
    let fall = script.expect("a", Exclusive, Shared);
    script.service.demote("a", FILE, Exclusive);
    script.service.grant(&fall, 1);
    script.service.expect_and_grant("a", Shared, Unlocked);
    assert_eq!(a.glock.mode(), Unlocked);
    assert_eq!(a.diary.take(), ["sync SH", "sync UN", "drop UN"]);
}

#[test]
fn t61_a_call_that_overtakes_its_grant_is_kept_and_counts_from_the_grant() {
    let script = Script::new();
    let a = script.node("a");
    let (release, held) = hold_later(&a.glock, Request::new(Shared));
    let asked = script.expect("a", Unlocked, Shared);
    script.service.demote("a", FILE, Exclusive);
    script.service.grant(&asked, 1);
    soon(&held).unwrap();
    let report = a.glock.report();
    assert!(
        report.demote.is_some_and(|demote| demote.deferred),
        "{report}"
    );
    drop(release);
    script.clock.advance(HOLD);
    script.service.expect_and_grant("a", Shared, Unlocked);
    assert_eq!(a.glock.mode(), Unlocked);
}

#[test]
fn t61_exact_and_any_decide_whether_another_mode_serves() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    let exact = lock_later(&a.glock, Request::new(Shared).with(Flags::EXACT));
    script.service.expect_and_grant("a", Exclusive, Shared);
    assert_eq!(soon(&exact), Ok(Shared));
    drop(
        a.glock
            .lock(Request::new(Deferred).with(Flags::ANY))
            .unwrap(),
    );
    assert_eq!(script.service.unseen(), []);
    let plain = lock_later(&a.glock, Request::new(Deferred));
    script.service.expect_and_grant("a", Shared, Unlocked);
    script.service.expect_and_grant("a", Unlocked, Deferred);
    assert_eq!(soon(&plain), Ok(Deferred));
}

#[test]
fn t61_node_scope_shares_ex_inside_the_node() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    let scoped = Request::new(Exclusive).with(Flags::NODE_SCOPE);
    let (_release, held) = hold_later(&a.glock, scoped);
    soon(&held).unwrap();
    drop(a.glock.lock(scoped).unwrap());
    let plain = a.glock.lock(Request::new(Exclusive).with(Flags::TRY));
    assert_eq!(plain.unwrap_err(), Refusal::TryFailed);
}

#[test]
fn t61_nocache_gives_up_at_release() {
    let script = Script::new();
    let a = script.node_with("a", Shared);
    drop(
        a.glock
            .lock(Request::new(Shared).with(Flags::NOCACHE))
            .unwrap(),
    );
    script.service.expect_and_grant("a", Shared, Unlocked);
    assert_eq!(a.glock.mode(), Unlocked);
}

#[test]
fn t61_several_at_once_time_out_and_let_go_of_all() {
    let script = Script::new();
    let a = script.node_with("a", Shared);
    let never = a.space.glock(
        Name {
            number: 8,
            generation: 1,
        },
        || Arc::new(Diary::default()),
    );
    let (done, result) = channel();
    let (one, other) = (Arc::clone(&a.glock), Arc::clone(&never));
    std::thread::spawn(move || {
        let queued = vec![
            one.begin(Request::new(Shared)).unwrap(),
            other.begin(Request::new(Exclusive)).unwrap(),
        ];
        done.send(wait_all(queued).map(|guards| guards.len()))
    });
    let _asked = script.expect("a", Unlocked, Exclusive);
    // The wait counts from when it begins, which is after the request: move on until it is over.
    until("it times out", || {
        script.clock.advance(HOLD);
        match result.try_recv() {
            Ok(outcome) => {
                assert_eq!(outcome, Err(Refusal::Failed(Errno::ESTALE)));
                true
            }
            Err(_) => false,
        }
    });
    assert!(a.glock.report().holders.is_empty());
    assert!(never.report().holders.is_empty());
}

#[test]
fn h7_no_local_waiter_goes_before_a_demotion_that_is_due() {
    let script = Script::new();
    let a = script.node_with("a", Shared);
    let (release, held) = hold_later(&a.glock, Request::new(Shared));
    soon(&held).unwrap();
    script.service.demote("a", FILE, Exclusive);
    let tried = a.glock.lock(Request::new(Shared).with(Flags::TRY));
    assert_eq!(tried.unwrap_err(), Refusal::TryFailed);
    let second = lock_later(&a.glock, Request::new(Shared));
    until("the second is queued", || waiters(&a.glock) == 1);
    drop(release);
    script.service.expect_and_grant("a", Shared, Unlocked);
    script.service.expect_and_grant("a", Unlocked, Shared);
    assert_eq!(soon(&second), Ok(Shared));
}

#[test]
fn h7_a_thread_that_asks_again_is_told_instead_of_waiting_for_itself() {
    let script = Script::new();
    let a = script.node_with("a", Shared);
    let _guard = a.glock.lock(Request::new(Shared)).unwrap();
    script.service.demote("a", FILE, Exclusive);
    let again = a.glock.lock(Request::new(Shared));
    assert_eq!(again.unwrap_err(), Refusal::Failed(Errno::EDEADLK));
}

#[test]
fn h8_a_conversion_falls_to_un_and_queues() {
    let script = Script::new();
    let a = script.node_with("a", Shared);
    let b = script.node_with("b", Shared);
    let from_a = lock_later(&a.glock, Request::new(Exclusive));
    let fall_a = script.expect("a", Shared, Unlocked);
    let from_b = lock_later(&b.glock, Request::new(Exclusive));
    let fall_b = script.expect("b", Shared, Unlocked);
    script.service.grant(&fall_a, 1);
    let rise_a = script.expect("a", Unlocked, Exclusive);
    script.service.grant(&fall_b, 1);
    let _rise_b = script.expect("b", Unlocked, Exclusive);
    script.service.grant(&rise_a, 2);
    assert_eq!(soon(&from_a), Ok(Exclusive));
    script.service.demote("a", FILE, Exclusive);
    script.clock.advance(HOLD);
    script.service.expect_and_grant("a", Exclusive, Unlocked);
    let granted = Reply::Granted {
        mode: Exclusive,
        token: Token(3),
    };
    script.service.reply("b", FILE, granted);
    assert_eq!(soon(&from_b), Ok(Exclusive));
    assert_eq!(b.glock.token(), Token(3));
}

#[cfg(debug_assertions)]
#[test]
#[should_panic(expected = "lock order")]
fn h9_an_inode_lock_under_a_glock_panics() {
    let script = Script::new();
    let a = script.node_with("a", Shared);
    let _guard = a.glock.lock(Request::new(Shared)).unwrap();
    let _inode = rank::enter(Rank::Inode);
}

#[cfg(debug_assertions)]
#[test]
#[should_panic(expected = "lock order")]
fn h3_a_glock_under_a_folio_lock_panics() {
    let script = Script::new();
    let a = script.node_with("a", Shared);
    let _folio = rank::enter(Rank::Folio);
    let _guard = a.glock.lock(Request::new(Shared));
}

#[cfg(debug_assertions)]
#[test]
#[should_panic(expected = "rule zero broken")]
fn h11_a_fault_under_a_glock_panics() {
    let script = Script::new();
    let a = script.node_with("a", Shared);
    let _guard = a.glock.lock(Request::new(Shared)).unwrap();
    rank::rule_zero("a copy to the user");
}

#[test]
fn h10_two_glocks_are_asked_for_in_the_order_of_their_numbers() {
    let script = Script::new();
    let a = script.node("a");
    let lower = Name {
        number: 3,
        generation: 9,
    };
    let other = a.space.glock(lower, || Arc::new(Diary::default()));
    let (done, result) = channel();
    let glock = Arc::clone(&a.glock);
    std::thread::spawn(move || {
        let request = Request::new(Exclusive);
        let guards = lock_all(&[(&glock, request), (&other, request)]);
        done.send(guards.map(|guards| guards.len()))
    });
    for expected in [lower, FILE] {
        let asked = script.expect("a", Unlocked, Exclusive);
        assert_eq!(asked.name, expected);
        script.service.grant(&asked, 1);
    }
    assert_eq!(soon(&result), Ok(2));
}

#[test]
fn h13_a_grant_before_the_dead_are_fenced_gives_nothing() {
    let script = Script::new();
    let a = script.node("a");
    let waits = lock_later(&a.glock, Request::new(Exclusive));
    let asked = script.expect("a", Unlocked, Exclusive);
    script.service.freeze("a", 1);
    script.service.grant(&asked, 1);
    assert_eq!(a.glock.report().doing, Doing::Frozen);
    assert_eq!((a.glock.mode(), waiters(&a.glock)), (Unlocked, 1));
    script.service.thaw("a", 1);
    assert_eq!(soon(&waits), Ok(Exclusive));
}

#[test]
fn h13_errors_unlocks_and_noexp_pass_a_recovery() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    script.service.freeze("a", 1);
    script.service.demote("a", FILE, Exclusive);
    script.service.expect_and_grant("a", Exclusive, Unlocked);
    assert_eq!(a.glock.mode(), Unlocked);

    let fails = lock_later(&a.glock, Request::new(Shared));
    let _asked = script.expect("a", Unlocked, Shared);
    script
        .service
        .reply("a", FILE, Reply::Failed(Errno::ENOLCK));
    assert_eq!(soon(&fails), Err(Refusal::Failed(Errno::ENOLCK)));

    // A reply that was kept goes through with the first NOEXP that comes.
    let waits = lock_later(&a.glock, Request::new(Shared));
    script.service.expect_and_grant("a", Unlocked, Shared);
    assert_eq!(a.glock.report().doing, Doing::Frozen);
    let recovers = lock_later(&a.glock, Request::new(Shared).with(Flags::NOEXP));
    assert_eq!(soon(&recovers), Ok(Shared));
    assert_eq!(soon(&waits), Ok(Shared));
}

#[test]
fn h14_a_call_during_a_recovery_is_followed_after_it() {
    let script = Script::new();
    let a = script.node("a");
    let (release, held) = hold_later(&a.glock, Request::new(Exclusive));
    let asked = script.expect("a", Unlocked, Exclusive);
    script.service.freeze("a", 1);
    script.service.grant(&asked, 1);
    script.service.demote("a", FILE, Shared);
    script.service.thaw("a", 1);
    soon(&held).unwrap();
    drop(release);
    script.clock.advance(HOLD);
    script.service.expect_and_grant("a", Exclusive, Shared);
    assert_eq!(a.glock.mode(), Shared);
}

#[test]
fn h15_the_end_of_a_recovery_that_a_later_one_replaced_means_nothing() {
    let script = Script::new();
    let a = script.node("a");
    let waits = lock_later(&a.glock, Request::new(Exclusive));
    let asked = script.expect("a", Unlocked, Exclusive);
    script.service.freeze("a", 1);
    script.service.freeze("a", 2);
    script.service.grant(&asked, 1);
    script.service.thaw("a", 1);
    assert_eq!(a.glock.report().doing, Doing::Frozen);
    // Glocks that are made meanwhile are under the block as well.
    let late = a.space.glock(
        Name {
            number: 9,
            generation: 1,
        },
        || Arc::new(Diary::default()),
    );
    let late_waits = lock_later(&late, Request::new(Shared));
    script.service.expect_and_grant("a", Unlocked, Shared);
    assert_eq!(late.report().doing, Doing::Frozen);
    script.service.thaw("a", 2);
    assert_eq!(soon(&waits), Ok(Exclusive));
    assert_eq!(soon(&late_waits), Ok(Shared));
}

#[test]
fn h16_nothing_known_from_before_un_is_used() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    script.service.demote("a", FILE, Exclusive);
    script.service.expect_and_grant("a", Exclusive, Unlocked);
    let skips = lock_later(&a.glock, Request::new(Shared).with(Flags::SKIP));
    script.service.expect_and_grant("a", Unlocked, Shared);
    assert_eq!(soon(&skips), Ok(Shared));
    a.diary.take();
    // SKIP leaves the duty to whoever looks at the inode next, and only to that one.
    drop(a.glock.lock(Request::new(Shared)).unwrap());
    drop(a.glock.lock(Request::new(Shared)).unwrap());
    assert_eq!(a.diary.take(), ["refresh", "drain", "drain"]);
}

#[test]
fn t64_a_lock_whose_write_back_fails_is_not_handed_over() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    *a.diary.sync_fails.lock() = Some(Errno::ENOSPC);
    script.service.demote("a", FILE, Exclusive);
    until("the node withdraws", || a.space.check().is_err());
    until("the service is told", || {
        script.service.gone() == [("a".to_owned(), "abandoned")]
    });
    assert_eq!(a.diary.take(), ["sync UN"], "nothing was dropped");
    assert_eq!(a.glock.mode(), Exclusive);
    let refused = a.glock.lock(Request::new(Shared));
    assert_eq!(refused.unwrap_err(), Refusal::Failed(Errno::EIO));
    assert_eq!(script.service.unseen(), [], "nothing was given away");
    let new = Name {
        number: 99,
        generation: 0,
    };
    let new = a.space.glock(new, || Arc::new(Diary::default()));
    assert!(new.lock(Request::new(Shared)).is_err());
}

#[test]
fn t64_a_fall_that_ends_in_another_mode_makes_the_node_withdraw() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    script.service.demote("a", FILE, Shared);
    let _fall = script.expect("a", Exclusive, Shared);
    // What is still cached for SH would be there under UN.
    let reply = Reply::Granted {
        mode: Unlocked,
        token: Token(1),
    };
    script.service.reply("a", FILE, reply);
    assert_eq!(a.space.check(), Err(Errno::EIO));
    assert!(a.glock.lock(Request::new(Shared)).is_err());
}

#[test]
fn t63_a_node_stops_by_its_own_clock_at_the_end_of_its_lease() {
    let script = Script::new();
    let end = script.clock.now().after(Duration::from_secs(10));
    script.service.lease(end);
    let a = script.node_with("a", Exclusive);
    let waits = {
        let other = Name {
            number: 8,
            generation: 1,
        };
        let other = a.space.glock(other, || Arc::new(Diary::default()));
        lock_later(&other, Request::new(Shared))
    };
    let _asked = script.expect("a", Unlocked, Shared);
    // A renewal is noticed.
    script.service.lease(end.after(Duration::from_secs(10)));
    script.clock.advance(Duration::from_secs(15));
    assert_eq!(a.space.check(), Ok(()));
    assert!(waits.try_recv().is_err());
    script.clock.advance(Duration::from_secs(5));
    // Nobody has to ask for it to happen.
    assert_eq!(soon(&waits), Err(Refusal::Failed(Errno::EIO)));
    assert_eq!(a.space.check(), Err(Errno::EIO));
    assert!(a.glock.lock(Request::new(Shared)).is_err());
    script.service.demote("a", FILE, Exclusive);
    assert_eq!(script.service.unseen(), [], "nothing was given away");
    assert_eq!(a.diary.take(), Vec::<String>::new());
}

#[test]
fn t63_a_node_that_is_told_it_is_none_stops() {
    let script = Script::new();
    let a = script.node("a");
    let waits = lock_later(&a.glock, Request::new(Shared));
    let _asked = script.expect("a", Unlocked, Shared);
    script.service.lose("a", Errno::ENOTCONN);
    assert_eq!(soon(&waits), Err(Refusal::Failed(Errno::EIO)));
    assert_eq!(a.space.check(), Err(Errno::ENOTCONN));
    // What the service says afterwards is not heard.
    let granted = Reply::Granted {
        mode: Shared,
        token: Token(1),
    };
    script.service.reply("a", FILE, granted);
    assert_eq!(a.glock.mode(), Unlocked);
}

#[test]
fn a_node_that_leaves_has_given_everything_up() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    let (done, left) = channel();
    std::thread::spawn(move || done.send((a.space.leave(PATIENCE), a.diary.take())));
    script.service.expect_and_grant("a", Exclusive, Unlocked);
    let (result, duties) = left.recv_timeout(PATIENCE).unwrap();
    assert_eq!(result, Ok(()));
    assert_eq!(duties, ["sync UN", "drop UN"]);
    assert_eq!(script.service.gone(), [("a".to_owned(), "left")]);
}

#[test]
fn a_retired_glock_is_forgotten_once_nobody_keeps_it() {
    let script = Script::new();
    let a = script.node_with("a", Exclusive);
    a.space.retire(&a.glock);
    script.service.expect_and_grant("a", Exclusive, Unlocked);
    assert_eq!(a.space.reap(), 0, "the test still keeps it");
    let Node { space, glock, .. } = a;
    drop(glock);
    until("a worker lets go of it", || space.reap() == 1);
    assert!(space.report().is_empty());
}

#[test]
fn the_dump_tells_who_waits_for_what() {
    let script = Script::new();
    let a = script.node_with("a", Shared);
    let (release, held) = hold_later(&a.glock, Request::new(Shared));
    soon(&held).unwrap();
    let waits = lock_later(&a.glock, Request::new(Exclusive).with(Flags::NOCACHE));
    until("it is queued", || waiters(&a.glock) == 1);
    script.clock.advance(Duration::from_millis(30));
    script.service.demote("a", FILE, Exclusive);
    script.clock.advance(Duration::from_millis(12));
    let text = a.glock.report().to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[0].starts_with("G:  s:SH n:7/1 f:D t:SH d:UN/12 m:200 k:1 "),
        "{text}"
    );
    assert!(lines[1].starts_with(" H: s:SH f:H p:"), "{text}");
    assert!(lines[2].starts_with(" H: s:EX f:cW p:"), "{text}");
    assert!(lines[2].ends_with(" w:42"), "{text}");
    drop(release);
    script.service.expect_and_grant("a", Shared, Unlocked);
    script.service.expect_and_grant("a", Unlocked, Exclusive);
    soon(&waits).unwrap();
}

#[test]
fn the_machines_clock_goes_on() {
    let before = Time::now();
    assert!(before > Time::ZERO && Time::now() >= before);
}
