//! Several threads on one file: each writes a range of its own, which ends in the middle of pages, by calls and by stores
//! through mappings, around the cache, over pages that it pins, from its own memory and from another mapping, while others
//! read and load everything, sync, drop the cache and the mappings' entries, map and unmap, and cut, grow and punch what
//! lies behind.
//!
//! Every byte of a range carries its owner's version. A reader may meet any version between the last one that was
//! complete when it began and the last one that was begun when it ended, in any mixture (writes are not atomic), but
//! never an older one, and never a byte of another range.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pinfold::{
    Advice, AlignedBuf, Delivery, File, MapAccess, MapOptions, Mapping, OpenOptions, Tracking,
    Volume,
};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

/// Borders of the ranges: on pages, beside them, and two inside one page.
const BORDERS: &[u64] = &[0, 4096, 10_000, 10_100, 200_000, 262_144, 400_001];
/// Versions that each owner writes; they fit a byte together with the owner's number.
const VERSIONS: u64 = 30;
const PAGE: u64 = 4096;
/// Bytes that an owner pins at most: all of them together must leave room.
const PINNED_MAX: usize = 2 * 4096;
/// A round that takes so long hangs.
const ROUND_MAX: Duration = Duration::from_secs(240);

struct Shared {
    file: File,
    direct: File,
    /// One of each delivery, over more than the file.
    maps: [Mapping; 2],
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
    let file = volume.open("file", &options).unwrap();
    let map = |delivery| {
        let options = MapOptions::new()
            .access(MapAccess::Write)
            .delivery(delivery);
        file.map(0..2 * BORDERS[owners], &options).unwrap()
    };
    let shared = Shared {
        maps: [map(Delivery::Handler), map(Delivery::Inline)],
        direct: volume.open("file", &options.direct(true)).unwrap(),
        file,
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
    let counts = volume.statistics().cache;
    assert_eq!(counts.foll_pin_acquired, counts.foll_pin_released);
    volume.close().unwrap();
    let mut stored = std::fs::read(dir.path().join("file")).unwrap();
    let behind = stored.split_off(BORDERS[owners] as usize);
    assert!(behind.iter().all(|&byte| byte == 0), "nobody wrote there");
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

impl Shared {
    fn map(&self, rng: &mut SmallRng) -> &Mapping {
        &self.maps[rng.random_range(0..2)]
    }

    /// Writes by a call, by stores, or by a call from mapped memory.
    fn write(&self, rng: &mut SmallRng, at: u64, source: &[u8]) {
        let map = self.map(rng);
        let wrote = match rng.random_range(0..6) {
            0 => self.file.write_at(source, at).unwrap(),
            4 => self.write_direct(at, source),
            5 if source.len() <= PINNED_MAX => {
                // Others may have pinned what may be pinned.
                let pinned = map.pin(at as usize..at as usize + source.len(), true);
                let wrote = map.write(at as usize, source).unwrap();
                drop(pinned);
                wrote
            }
            5 => self.file.write_at(source, at).unwrap(),
            1 => map.write(at as usize, source).unwrap(),
            2 => {
                // SAFETY: inside the mapping; nobody holds references into it.
                unsafe {
                    let to = map.as_mut_ptr().wrapping_add(at as usize);
                    std::ptr::copy_nonoverlapping(source.as_ptr(), to, source.len());
                }
                source.len()
            }
            _ => {
                let to = map.as_mut_ptr().wrapping_add(at as usize);
                // SAFETY: inside the mapping; the library makes raw copies into it.
                let to = unsafe { std::slice::from_raw_parts_mut(to, source.len()) };
                // From the file into the mapping of the same bytes and back: nothing changes, everything is dirty.
                let wrote = self.file.write_at(source, at).unwrap();
                assert_eq!(self.file.read_at(to, at).unwrap(), wrote);
                self.file.write_at(to, at).unwrap()
            }
        };
        assert_eq!(wrote, source.len());
    }

    /// Writes whole pages around the cache, and the edges through it.
    fn write_direct(&self, at: u64, source: &[u8]) -> usize {
        let end = at + source.len() as u64;
        let (first, last) = (at.next_multiple_of(PAGE), end / PAGE * PAGE);
        if first >= last {
            return self.file.write_at(source, at).unwrap();
        }
        let (head, rest) = source.split_at((first - at) as usize);
        let (whole, tail) = rest.split_at((last - first) as usize);
        let mut aligned = AlignedBuf::zeroed(whole.len());
        let aligned = &mut aligned.as_mut_slice()[..whole.len()];
        aligned.copy_from_slice(whole);
        self.file.write_at(head, at).unwrap()
            + self.direct.write_at(aligned, first).unwrap()
            + self.file.write_at(tail, last).unwrap()
    }

    /// Reads whole pages around the cache.
    fn read_direct(&self, at: u64, target: &mut [u8]) -> usize {
        let first = at / PAGE * PAGE;
        let skip = (at - first) as usize;
        let len = (skip + target.len()).next_multiple_of(PAGE as usize);
        let mut aligned = AlignedBuf::zeroed(len);
        let got = self
            .direct
            .read_at(&mut aligned.as_mut_slice()[..len], first)
            .unwrap();
        let there = got.saturating_sub(skip).min(target.len());
        target[..there].copy_from_slice(&aligned.as_mut_slice()[skip..skip + there]);
        there
    }

    /// Reads by a call or by loads.
    fn read(&self, rng: &mut SmallRng, at: u64, target: &mut [u8]) {
        let map = self.map(rng);
        let got = match rng.random_range(0..4) {
            3 => self.read_direct(at, target),
            0 => self.file.read_at(target, at).unwrap(),
            1 => map.read(at as usize, target).unwrap(),
            _ => {
                // SAFETY: inside the mapping and below the file's end, which nobody cuts so far.
                unsafe {
                    let from = map.as_ptr().wrapping_add(at as usize);
                    std::ptr::copy_nonoverlapping(from, target.as_mut_ptr(), target.len());
                }
                target.len()
            }
        };
        assert_eq!(got, target.len());
    }
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
            shared.write(&mut rng, start, &vec![byte(owner, version); len as usize]);
        }
        shared.complete[owner].store(version, Ordering::SeqCst);
        let mut back = vec![0; (range.end - range.start) as usize];
        shared.read(&mut rng, range.start, &mut back);
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
        shared.read(&mut rng, start, &mut target);
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
        let map = shared.map(&mut rng);
        let end = BORDERS[BORDERS.len() - 1];
        let from = rng.random_range(0..end as usize);
        match rng.random_range(0..11) {
            7 => shared.file.write_back(from as u64..end).unwrap(),
            8 => {
                let pattern = [Advice::Random, Advice::Sequential, Advice::WillNeed];
                map.advise(pattern[from % 3], from..end as usize).unwrap();
            }
            9 => shared
                .file
                .punch(end.next_multiple_of(PAGE)..2 * end)
                .unwrap(),
            10 => {
                let tracking = [Tracking::Auto, Tracking::Sync][from % 2];
                let access = [MapAccess::Read, MapAccess::Write, MapAccess::Private][from % 3];
                let options = MapOptions::new().access(access).tracking(tracking);
                let start = from as u64 / PAGE * PAGE;
                let passing = shared.file.map(start..end, &options).unwrap();
                passing.read(0, &mut [0; 100]).unwrap();
            }
            0 => shared.file.sync_data().unwrap(),
            1 => shared.file.sync_all().unwrap(),
            2 => shared.file.drop_cache().unwrap(),
            3 => map.advise(Advice::DontNeed, from..map.len()).unwrap(),
            4 => map.flush(from..end as usize).unwrap(),
            5 => shared.file.set_len(end + rng.random_range(0..end)).unwrap(),
            _ => shared.file.set_len(end).unwrap(),
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..3_000)));
    }
}
