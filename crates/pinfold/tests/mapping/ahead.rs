//! What faults have read ahead, and by whom: never by the thread that waits.

use std::time::{Duration, Instant};

use pinfold::{Advice, Delivery, MapAccess};

use super::rig::{LARGE, PAGE, Rig, load, pattern, watched};

const PAGES: usize = 2048;
const PATIENCE: Duration = Duration::from_secs(60);

fn in_both_deliveries(test: impl Fn(&Rig) + Send + Sync + Copy + 'static) {
    for delivery in [Delivery::Handler, Delivery::Inline] {
        watched(&format!("{delivery:?}"), move || {
            test(&Rig::new(LARGE, delivery));
        });
    }
}

/// Waits for what another thread does in its own time.
fn comes(what: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !what() {
        assert!(Instant::now() < deadline, "it never came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn loads_at_a_constant_distance_have_the_next_pages_read_ahead() {
    in_both_deliveries(|rig| {
        let file = rig.file("a", PAGES * PAGE, 1);
        let map = rig.map(&file, MapAccess::Read);
        let ahead = || rig.volume.statistics().cache.pages_read_ahead;
        let before = ahead();
        let expected = pattern(PAGES * PAGE, 1);
        for at in (0..5).map(|step| (50 + step * 31) * PAGE) {
            assert_eq!(load(&map, at), expected[at]);
        }
        comes(|| ahead() == before + 4);
        for at in (5..40).map(|step| (50 + step * 31) * PAGE) {
            assert_eq!(load(&map, at), expected[at]);
        }
    });
}

#[test]
fn loads_at_random_read_nothing_but_their_pages() {
    in_both_deliveries(|rig| {
        let file = rig.file("a", PAGES * PAGE, 1);
        let map = rig.map(&file, MapAccess::Write);
        let statistics = || rig.volume.statistics().cache;
        let before = statistics();
        // Every other page at most, lest two of them make a walk.
        let mut pages: Vec<usize> = Vec::new();
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..80 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let page = (random % (PAGES as u64 / 2)) as usize * 2;
            load(&map, page * PAGE);
            pages.push(page);
        }
        pages.sort_unstable();
        pages.dedup();
        let after = statistics();
        assert_eq!(after.pages_read_ahead, before.pages_read_ahead);
        assert_eq!(after.pages_read - before.pages_read, pages.len() as u64);
    });
}

#[test]
fn what_a_program_says_it_will_need_comes_without_a_fault() {
    in_both_deliveries(|rig| {
        let file = rig.file("a", PAGES * PAGE, 1);
        let map = rig.map(&file, MapAccess::Read);
        let faults = || rig.volume.statistics().faults.faults;
        let before = faults();
        map.advise(Advice::WillNeed, 0..map.len()).unwrap();
        let all = |resident: Vec<bool>| resident.into_iter().all(|there| there);
        comes(|| all(map.resident(0..map.len()).unwrap()));
        assert_eq!(faults(), before);
        let expected = pattern(PAGES * PAGE, 1);
        for at in (0..PAGES).map(|page| page * PAGE + page) {
            assert_eq!(load(&map, at), expected[at]);
        }
    });
}
