use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const LAYOUT: Layout = Layout {
    files: 1,
    pages: 1,
    whole: false,
};

fn call(node: u32, kind: Kind, value: u64, start: u64, end: u64) -> Call {
    Call {
        node,
        register: 0,
        kind,
        way: Way::Buffered,
        torn: false,
        value,
        start,
        end: if end == 0 { End::Never } else { End::At(end) },
    }
}

fn write(node: u32, value: u64, start: u64, end: u64) -> Call {
    call(node, Kind::Write, value, start, end)
}

fn read(node: u32, value: u64, start: u64, end: u64) -> Call {
    call(node, Kind::Read, value, start, end)
}

fn sync(node: u32, start: u64, end: u64) -> Call {
    call(node, Kind::Sync, 0, start, end)
}

fn history(calls: Vec<Call>, deaths: &[(u32, u64)]) -> History {
    let death = |&(node, fenced): &(u32, u64)| {
        (
            node,
            Death {
                fenced: Some(fenced),
            },
        )
    };
    History {
        layout: LAYOUT,
        calls,
        deaths: deaths.iter().map(death).collect(),
        volatile: true,
    }
}

/// Says what is wrong, and how many calls show it.
fn wrong(calls: Vec<Call>, deaths: &[(u32, u64)]) -> Option<(Wrong, usize)> {
    let verdict = check(history(calls, deaths));
    verdict
        .violations
        .first()
        .map(|violation| (violation.wrong, violation.calls.len()))
}

#[test]
fn a_stale_read_is_found_among_good_calls() {
    let mut calls: Vec<Call> = (1..100)
        .map(|n| write(1, n, 1000 + 10 * n, 1005 + 10 * n))
        .collect();
    assert_eq!(wrong(calls.clone(), &[]), None);
    calls.push(read(2, 50, 1507, 1516));
    assert_eq!(wrong(calls.clone(), &[]), None);
    calls.push(read(2, 49, 1516, 1518));
    assert_eq!(wrong(calls, &[]), Some((Wrong::Stale, 3)));
}

#[test]
fn a_lost_update_is_found() {
    let calls = vec![write(1, 7, 10, 20), write(2, 8, 30, 40), read(1, 7, 50, 60)];
    assert_eq!(wrong(calls, &[]), Some((Wrong::Stale, 3)));
}

#[test]
fn a_value_that_nobody_wrote_is_found() {
    let calls = vec![write(1, 7, 10, 20), read(2, 9, 30, 40)];
    assert_eq!(wrong(calls, &[]), Some((Wrong::NeverWritten, 1)));
    let early = vec![read(2, 7, 1, 2), write(1, 7, 10, 20)];
    assert_eq!(wrong(early, &[]), Some((Wrong::Stale, 2)));
    let twice = vec![write(1, 7, 10, 20), write(2, 7, 10, 20)];
    assert_eq!(wrong(twice, &[]), Some((Wrong::BadHistory, 2)));
}

#[test]
fn a_torn_page_is_found() {
    let mut torn = read(2, 7, 30, 40);
    torn.torn = true;
    let calls = vec![write(1, 7, 10, 20), torn];
    assert_eq!(wrong(calls, &[]), Some((Wrong::Torn, 1)));
}

#[test]
fn reads_that_go_backwards_are_found() {
    let calls = vec![
        write(1, 7, 10, 1000),
        write(2, 8, 10, 1000),
        read(3, 7, 20, 30),
        read(3, 8, 40, 50),
        read(4, 7, 60, 70),
    ];
    assert_eq!(wrong(calls[..4].to_vec(), &[]), None);
    assert_eq!(wrong(calls, &[]), Some((Wrong::Backwards, 5)));
}

#[test]
fn what_a_dead_node_had_not_synced_may_be_lost_and_what_it_had_may_not() {
    let lost = vec![
        write(1, 7, 10, 20),
        sync(1, 25, 30),
        write(1, 8, 40, 50),
        read(1, 8, 60, 70),
        read(2, 7, 200, 210),
    ];
    assert_eq!(wrong(lost.clone(), &[(1, 100)]), None);
    // A living node loses nothing, nor does one whose cache outlives it.
    assert_eq!(wrong(lost.clone(), &[]), Some((Wrong::Stale, 3)));
    let mut kept = history(lost.clone(), &[(1, 100)]);
    kept.volatile = false;
    assert_eq!(check(kept).violations[0].wrong, Wrong::Stale);
    // What went past the cache is stored.
    let mut direct = lost.clone();
    direct[2].way = Way::Direct;
    assert_eq!(wrong(direct, &[(1, 100)]), Some((Wrong::Stale, 3)));
    // One that began too early keeps nothing, the next does, but only if it was acknowledged.
    for (start, end, expected) in [
        (45, 80, None),
        (50, 80, Some((Wrong::LostSync, 3))),
        (50, 0, None),
    ] {
        let mut synced = lost.clone();
        synced.push(sync(1, start, end));
        assert_eq!(wrong(synced, &[(1, 100)]), expected, "{start} {end}");
    }
    // And what another node has seen is stored too.
    let mut seen = lost;
    seen.push(read(3, 8, 150, 160));
    assert_eq!(wrong(seen, &[(1, 100)]), Some((Wrong::Stale, 3)));
}

#[test]
fn while_it_lives_a_node_that_dies_has_to_be_right() {
    let calls = vec![
        write(1, 7, 10, 20),
        write(1, 8, 40, 50),
        read(1, 7, 60, 70),
        read(2, 7, 200, 210),
    ];
    assert_eq!(wrong(calls, &[(1, 100)]), Some((Wrong::Stale, 3)));
}

#[test]
fn a_write_without_an_answer_may_come_until_its_node_is_fenced() {
    let calls = vec![
        write(1, 7, 10, 0),
        write(2, 8, 200, 210),
        read(2, 8, 220, 230),
        read(2, 7, 300, 310),
    ];
    assert_eq!(wrong(calls.clone(), &[(1, 250)]), None);
    assert_eq!(
        wrong(calls.clone(), &[(1, 150)]),
        Some((Wrong::LateWrite, 3))
    );
    // One that was begun after its node was fenced has no time at all.
    let mut late = calls;
    late[0].start = 240;
    assert_eq!(
        wrong(late, &[(1, 150)]).map(|w| w.0),
        Some(Wrong::LateWrite)
    );
}

/// What a register does whose nodes keep what they write until another wants it.
#[derive(Default)]
struct Machine {
    stored: u64,
    dirty: Option<(u32, u64)>,
}

impl Machine {
    fn others(&mut self, node: u32) {
        if let Some((owner, value)) = self.dirty
            && owner != node
        {
            self.stored = value;
            self.dirty = None;
        }
    }

    fn value(&self) -> u64 {
        self.dirty.map_or(self.stored, |(_, value)| value)
    }
}

/// Runs the machine with calls that overlap, and nodes that die; some nodes never return.
fn simulate(random: &mut SmallRng) -> History {
    let mut machine = Machine::default();
    let mut calls = Vec::new();
    let mut deaths = BTreeMap::new();
    let mut nodes = [1, 2, 3];
    let wide = random.random_range(2..60);
    let mut time = 1000;
    for number in 1..random.random_range(20..200_u64) {
        time += random.random_range(1..20);
        let node = nodes[random.random_range(0..3)];
        let mut one = write(
            node,
            number,
            time - random.random_range(0..wide),
            time + random.random_range(0..wide),
        );
        match random.random_range(0..12) {
            0 => {
                if machine.dirty.is_some_and(|(owner, _)| owner == node) {
                    machine.others(0);
                }
                one = Call {
                    kind: Kind::Sync,
                    value: 0,
                    ..one
                };
            }
            1..=5 => {
                machine.others(node);
                one = Call {
                    kind: Kind::Read,
                    value: machine.value(),
                    ..one
                };
            }
            6 => {
                machine.others(0);
                machine.stored = number;
                one.way = Way::Direct;
            }
            7 => {
                machine.others(0);
                continue;
            }
            8 if random.random_bool(0.5) => {
                if machine.dirty.is_some_and(|(owner, _)| owner == node) {
                    machine.dirty = None;
                }
                let fenced = Some(time + 1);
                deaths.insert(node, Death { fenced });
                // Those under way never return.
                for other in &mut calls {
                    let other: &mut Call = other;
                    if other.node == node && matches!(other.end, End::At(end) if end > time) {
                        other.end = End::Never;
                    }
                }
                // Another begins where nobody waits for what this one did.
                for place in &mut nodes {
                    if *place == node {
                        *place = 10 + deaths.len() as u32;
                    }
                }
                time += 1;
                continue;
            }
            _ => {
                machine.others(node);
                machine.dirty = Some((node, number));
            }
        }
        // A node that is new cannot have begun before.
        calls.push(one);
    }
    History {
        layout: LAYOUT,
        calls,
        deaths,
        volatile: true,
    }
}

#[test]
fn what_nodes_that_die_may_do_is_never_called_wrong() {
    let mut doubtful = 0;
    for seed in 0..6_000 {
        let history = simulate(&mut SmallRng::seed_from_u64(seed));
        let verdict = check(history);
        assert!(
            verdict.is_good(),
            "seed {seed}: {}",
            verdict.violations.first().expect("one at least")
        );
        doubtful += verdict.doubtful;
    }
    assert!(doubtful > 5_000, "{doubtful}");
}

/// Most reads that are made to return an earlier value are found out; the others happen to be allowed.
#[test]
fn what_is_made_wrong_is_found() {
    let (mut made, mut found) = (0, 0);
    for seed in 0..3_000 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut history = simulate(&mut random);
        let reads: Vec<usize> = (0..history.calls.len())
            .filter(|&at| history.calls[at].kind == Kind::Read)
            .collect();
        let Some(&at) = reads.get(reads.len() / 2) else {
            continue;
        };
        let was = history.calls[at].value;
        let older = history.calls[..at]
            .iter()
            .filter(|call| call.kind == Kind::Write && call.value < was.saturating_sub(8))
            .map(|call| call.value)
            .next_back();
        let Some(older) = older else { continue };
        history.calls[at].value = older;
        made += 1;
        found += usize::from(!check(history).is_good());
    }
    assert!(made > 500 && found * 10 > made * 7, "{found} of {made}");
}

#[test]
fn as_many_calls_as_a_long_run_makes_are_checked_in_seconds() {
    // Ten million in a release build; a debug build gets fewer.
    let count = if cfg!(debug_assertions) {
        200_000
    } else {
        10_000_000_u64
    };
    let mut calls = Vec::new();
    for number in 1..=count / 2 {
        let register = (number % 256) as u32;
        let start = number * 10;
        let at = |call: Call| Call { register, ..call };
        calls.push(at(write(1, number, start, start + 9)));
        calls.push(at(read(2, number, start + 5, start + 30)));
    }
    let history = History {
        layout: Layout {
            pages: 64,
            ..LAYOUT
        },
        calls,
        deaths: BTreeMap::new(),
        volatile: true,
    };
    let begun = std::time::Instant::now();
    let verdict = check(history);
    println!("{} calls in {:?}", verdict.calls, begun.elapsed());
    assert!(verdict.is_good());
    assert_eq!(verdict.registers, 256);
}
