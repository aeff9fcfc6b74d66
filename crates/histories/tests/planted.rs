//! Every kind of mistake is made once, by nodes that leave a protection out, and found.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use pinfold_base::Errno;
use pinfold_histories::check::{self, Death, History, Wrong};
use pinfold_histories::node::{self, Control, Mix};
use pinfold_histories::place::locked::{Locked, Plant};
use pinfold_histories::place::{Place, Spec, path_of};
use pinfold_histories::record::{Call, End, Kind, Way, read};
use pinfold_histories::{Layout, PAGE, now, value_of};
use pinfold_lock::service::local::Local;
use pinfold_lock::{Options, Space};

const LAYOUT: Layout = Layout {
    files: 2,
    pages: 4,
    whole: true,
};

fn files(dir: &Path) {
    for file in 0..LAYOUT.files {
        let file = std::fs::File::create(path_of(dir, file)).unwrap();
        file.set_len(u64::from(LAYOUT.pages) * PAGE as u64).unwrap();
    }
}

fn join(service: &Local, dir: &Path, node: u32, plant: Plant) -> Locked {
    let options = Options {
        hold: Duration::from_millis(1),
        ..Options::default()
    };
    let space = Space::join(service, &format!("node{node}"), options).unwrap();
    Locked::open(dir, LAYOUT, space, plant).unwrap()
}

/// Has three nodes of two threads each do what they like, with `plant` left out.
fn race(plant: Plant, seed: u64, calls: usize) -> check::Verdict {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    files(dir);
    let _control = Control::create(dir).unwrap();
    let service = Local::new();
    std::thread::scope(|scope| {
        for node in 1..=3 {
            let place = join(&service, dir, node, plant);
            let spec = node::Spec {
                place: Spec::Kernel,
                dir: dir.to_path_buf(),
                layout: LAYOUT,
                node,
                threads: 2,
                seed,
                calls,
                logs: dir.to_path_buf(),
                mix: Mix::default(),
            };
            scope.spawn(move || {
                node::work(&spec, &place).unwrap();
                Box::new(place).leave().unwrap();
            });
        }
    });
    let mut all = Vec::new();
    for node in 1..=3 {
        for thread in 0..2 {
            read(&dir.join(format!("{node}.{thread}.log")), &mut all).unwrap();
        }
    }
    check::check(History {
        layout: LAYOUT,
        calls: all,
        deaths: BTreeMap::new(),
        volatile: true,
    })
}

/// Tells what is found in runs with the plant, which goes wrong sooner or later.
fn found(plant: Plant, wanted: &[Wrong]) {
    for seed in 0..100 {
        let verdict = race(plant, seed, 400);
        let named = verdict.violations.iter().map(|violation| violation.wrong);
        if named.into_iter().any(|wrong| wanted.contains(&wrong)) {
            return;
        }
    }
    panic!("{plant:?} is never found out");
}

#[test]
fn t62_nodes_that_leave_nothing_out_are_never_found_wrong() {
    for seed in 0..3 {
        let verdict = race(Plant::Nothing, seed, 400);
        assert!(verdict.is_good(), "{}", verdict.violations[0]);
        assert!(verdict.calls > 2400 && verdict.registers > 10);
    }
}

#[test]
fn nodes_that_take_no_glock_are_found_out() {
    found(Plant::Unlocked, &[Wrong::Stale, Wrong::Backwards]);
}

#[test]
fn pages_written_in_halves_are_found_out() {
    found(Plant::Halves, &[Wrong::Torn]);
}

#[test]
fn pages_that_are_kept_without_a_glock_are_found_out() {
    found(Plant::Keeps, &[Wrong::Stale, Wrong::Backwards]);
}

#[test]
fn updates_that_are_dropped_at_the_hand_over_are_found_out() {
    found(Plant::Drops, &[Wrong::Stale, Wrong::Backwards]);
}

/// Calls one after the other, each recorded.
#[derive(Default)]
struct Script {
    calls: Vec<Call>,
    deaths: BTreeMap<u32, Death>,
}

const AT: u64 = PAGE as u64;
const REGISTER: u32 = LAYOUT.register(0, 1, 0);

impl Script {
    fn note(&mut self, node: u32, kind: Kind, value: u64, start: u64, end: End) {
        self.calls.push(Call {
            node,
            register: if kind == Kind::Sync { 0 } else { REGISTER },
            kind,
            way: Way::Buffered,
            torn: false,
            value,
            start,
            end,
        });
    }

    fn put(&mut self, place: &Locked, node: u32, number: u64) {
        let (start, value) = (now(), value_of(node, 0, number));
        let done = place.put(Way::Buffered, 0, AT, &value.to_ne_bytes());
        done.unwrap();
        self.note(node, Kind::Write, value, start, End::At(now()));
    }

    fn get(&mut self, place: &Locked, node: u32) -> u64 {
        let (start, mut word) = (now(), [0; 8]);
        place.get(Way::Buffered, 0, AT, &mut word).unwrap();
        let value = u64::from_ne_bytes(word);
        self.note(node, Kind::Read, value, start, End::At(now()));
        value
    }

    fn sync(&mut self, place: &Locked, node: u32) {
        let start = now();
        place.sync(0).unwrap();
        self.note(node, Kind::Sync, 0, start, End::At(now()));
    }

    fn died(&mut self, node: u32) {
        let fenced = Some(now());
        self.deaths.insert(node, Death { fenced });
    }

    fn wrong(self) -> Option<Wrong> {
        let verdict = check::check(History {
            layout: LAYOUT,
            calls: self.calls,
            deaths: self.deaths,
            volatile: true,
        });
        verdict.violations.first().map(|one| one.wrong)
    }
}

/// Node 1 writes, syncs, and dies; node 2 looks.
fn after_a_sync(plant: Plant) -> Option<Wrong> {
    let scratch = tempfile::tempdir().unwrap();
    files(scratch.path());
    let service = Local::new();
    let mut script = Script::default();
    let one = join(&service, scratch.path(), 1, plant);
    script.put(&one, 1, 1);
    script.sync(&one, 1);
    one.crash();
    service.fence("node1");
    script.died(1);
    let two = join(&service, scratch.path(), 2, plant);
    script.get(&two, 2);
    script.wrong()
}

#[test]
fn t63_an_fsync_that_lies_is_found_out() {
    assert_eq!(after_a_sync(Plant::Nothing), None);
    assert_eq!(after_a_sync(Plant::Lies), Some(Wrong::LostSync));
}

/// Node 1 dies while a write of its is on the way, which arrives when node 2 has the file.
fn after_a_late_write(plant: Plant) -> (Result<(), Errno>, Option<Wrong>) {
    let scratch = tempfile::tempdir().unwrap();
    files(scratch.path());
    let service = Local::new();
    let mut script = Script::default();
    let one = join(&service, scratch.path(), 1, plant);
    script.put(&one, 1, 1);
    script.sync(&one, 1);
    let token = one.token(0).unwrap();
    let late = value_of(1, 0, 2);
    script.note(1, Kind::Write, late, now(), End::Never);
    one.crash();
    service.fence("node1");
    script.died(1);
    let two = join(&service, scratch.path(), 2, plant);
    assert_eq!(script.get(&two, 2), value_of(1, 0, 1));
    let arrived = two.write_late(0, 1, &late.to_ne_bytes().repeat(PAGE / 8), token);
    drop(two);
    let three = join(&service, scratch.path(), 3, plant);
    script.get(&three, 3);
    (arrived, script.wrong())
}

#[test]
fn h13_t63_a_write_that_arrives_after_fencing_is_found_out_or_refused_by_its_token() {
    assert_eq!(
        after_a_late_write(Plant::Nothing),
        (Err(Errno::ESTALE), None)
    );
    assert_eq!(
        after_a_late_write(Plant::Unfenced),
        (Ok(()), Some(Wrong::LateWrite))
    );
}
