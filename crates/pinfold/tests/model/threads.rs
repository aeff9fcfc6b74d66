//! Several threads on one file: each writes a range of its own, which ends in the middle of pages, while others read
//! everything, sync, and drop the cache.
//!
//! Every byte of a range carries its owner's version. A reader may meet any version between the last one that was
//! complete when it began and the last one that was begun when it ended, in any mixture (writes are not atomic), but
//! never an older one, and never a byte of another range.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pinfold::{File, OpenOptions, Volume};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

/// Borders of the ranges: on pages, beside them, and two inside one page.
const BORDERS: &[u64] = &[0, 4096, 10_000, 10_100, 200_000, 262_144, 400_001];
/// Versions that each owner writes; they fit a byte together with the owner's number.
const VERSIONS: u64 = 30;
/// A round that takes so long hangs.
const ROUND_MAX: Duration = Duration::from_secs(60);

struct Shared {
    file: File,
    /// Per owner: the last version begun, and the last one complete.
    begun: Vec<AtomicU64>,
    complete: Vec<AtomicU64>,
    over: AtomicBool,
}

/// Runs one round on a volume with so many pages.
pub fn round(seed: u64, pages: u64) {
    let alarm = std::sync::Arc::new(AtomicBool::new(false));
    let theirs = std::sync::Arc::clone(&alarm);
    let watchdog = std::thread::spawn(move || {
        std::thread::park_timeout(ROUND_MAX);
        if !theirs.load(Ordering::Relaxed) {
            super::machine::hangs(&format!("threads: round {seed} with {pages} pages hangs"));
        }
    });
    watched_round(seed, pages);
    alarm.store(true, Ordering::Relaxed);
    watchdog.thread().unpark();
    watchdog.join().unwrap();
}

fn watched_round(seed: u64, pages: u64) {
    let dir = tempfile::tempdir().unwrap();
    let volume = Volume::builder()
        .memory(pages * 4096)
        .open_dir(dir.path())
        .unwrap();
    let options = OpenOptions::new().read(true).write(true).create(true);
    let owners = BORDERS.len() - 1;
    let shared = Shared {
        file: volume.open("file", &options).unwrap(),
        begun: (0..owners).map(|_| AtomicU64::new(0)).collect(),
        complete: (0..owners).map(|_| AtomicU64::new(0)).collect(),
        over: AtomicBool::new(false),
    };
    for owner in 0..owners {
        let first = vec![byte(owner, 0); range(owner).count()];
        assert_eq!(
            shared.file.write_at(&first, range(owner).start).unwrap(),
            first.len()
        );
    }
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..owners)
            .map(|owner| {
                let shared = &shared;
                scope.spawn(move || own(shared, owner, seed))
            })
            .collect();
        let others = [
            scope.spawn(|| observe(&shared, seed)),
            scope.spawn(|| disturb(&shared, seed)),
        ];
        let ended: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        // Set before anything panics, or the others would go on for ever.
        shared.over.store(true, Ordering::Relaxed);
        for end in ended.into_iter().chain(others.map(|other| other.join())) {
            if let Err(panic) = end {
                std::panic::resume_unwind(panic);
            }
        }
    });
    drop(shared);
    volume.close().unwrap();
    let stored = std::fs::read(dir.path().join("file")).unwrap();
    for owner in 0..owners {
        for at in range(owner) {
            assert_eq!(
                stored[at as usize],
                byte(owner, VERSIONS),
                "stored byte {at}, owner {owner}"
            );
        }
    }
}

fn range(owner: usize) -> std::ops::Range<u64> {
    BORDERS[owner]..BORDERS[owner + 1]
}

fn byte(owner: usize, version: u64) -> u8 {
    1 + (owner as u64 * (VERSIONS + 1) + version) as u8
}

/// Writes version after version over the whole range, in pieces in any order, and reads each back.
fn own(shared: &Shared, owner: usize, seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed << 8 | owner as u64);
    let range = range(owner);
    for version in 1..=VERSIONS {
        shared.begun[owner].store(version, Ordering::SeqCst);
        let piece = rng.random_range(1..20_000u64).min(range.end - range.start);
        let mut starts: Vec<u64> = range.clone().step_by(piece as usize).collect();
        if rng.random_bool(0.5) {
            starts.reverse();
        }
        for start in starts {
            let len = piece.min(range.end - start);
            let source = vec![byte(owner, version); len as usize];
            assert_eq!(shared.file.write_at(&source, start).unwrap(), source.len());
        }
        shared.complete[owner].store(version, Ordering::SeqCst);
        let mut back = vec![0; (range.end - range.start) as usize];
        assert_eq!(
            shared.file.read_at(&mut back, range.start).unwrap(),
            back.len()
        );
        let bad = back.iter().position(|&got| got != byte(owner, version));
        assert_eq!(
            bad,
            None,
            "owner {owner} reads back version {version}: {:?}",
            bad.map(|at| back[at])
        );
    }
}

/// Reads across all ranges and checks that each byte is one its owner may have written by then.
fn observe(shared: &Shared, seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0xabcd);
    let end = BORDERS[BORDERS.len() - 1];
    let owners = BORDERS.len() - 1;
    while !shared.over.load(Ordering::Relaxed) {
        let start = rng.random_range(0..end);
        let len = rng.random_range(1..60_000).min(end - start);
        let least: Vec<u64> = (0..owners)
            .map(|owner| shared.complete[owner].load(Ordering::SeqCst))
            .collect();
        let mut target = vec![0; len as usize];
        assert_eq!(
            shared.file.read_at(&mut target, start).unwrap(),
            target.len()
        );
        let most: Vec<u64> = (0..owners)
            .map(|owner| shared.begun[owner].load(Ordering::SeqCst))
            .collect();
        for (at, &got) in (start..).zip(&target) {
            let owner = BORDERS.partition_point(|&border| border <= at) - 1;
            let allowed = byte(owner, least[owner])..=byte(owner, most[owner]);
            assert!(
                allowed.contains(&got),
                "byte {at} of owner {owner} is {got}, allowed {allowed:?}"
            );
        }
    }
}

/// Syncs and drops the cache while the others work.
fn disturb(shared: &Shared, seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x1234);
    while !shared.over.load(Ordering::Relaxed) {
        match rng.random_range(0..3) {
            0 => shared.file.sync_data().unwrap(),
            1 => shared.file.sync_all().unwrap(),
            _ => shared.file.drop_cache().unwrap(),
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..3_000)));
    }
}
