//! Nodes that use one file in every way at once: whoever begins to read sees at least what was written before.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinfold::{AlignedBuf, File, MapAccess, Mapping};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::rig::{PAGE, Rig, both, filled, map, read, rw, word};

const NODES: usize = 3;
const PAGES: usize = 6;
/// What each thread does, unless a time was asked for.
const OPERATIONS: usize = 60;
/// The variable that asks for a longer run, in seconds for each delivery.
const SECONDS_ENV: &str = "PINFOLD_SHARED_SECONDS";

/// One node's ways to the file.
struct Ways {
    buffered: File,
    direct: File,
    mapped: Mapping,
}

impl Ways {
    fn write(&self, random: &mut SmallRng, page: usize, number: u64) {
        let at = (page * PAGE) as u64;
        match random.random_range(0..3) {
            0 => {
                let wrote = self.buffered.write_at(&number.to_ne_bytes(), at).unwrap();
                assert_eq!(wrote, 8);
            }
            1 => {
                let mut buf = AlignedBuf::zeroed(PAGE);
                buf.as_mut_slice()[..8].copy_from_slice(&number.to_ne_bytes());
                let wrote = self.direct.write_at(&buf.as_mut_slice()[..PAGE], at);
                assert_eq!(wrote.unwrap(), PAGE);
            }
            _ => word(&self.mapped, page * PAGE).store(number, Ordering::SeqCst),
        }
    }

    fn read(&self, random: &mut SmallRng, page: usize) -> (&'static str, u64) {
        let at = (page * PAGE) as u64;
        let number = |bytes: &[u8]| u64::from_ne_bytes(bytes[..8].try_into().unwrap());
        match random.random_range(0..3) {
            0 => ("buffered", number(&read(&self.buffered, 8, at))),
            1 => {
                let mut buf = AlignedBuf::zeroed(PAGE);
                let got = self.direct.read_at(&mut buf.as_mut_slice()[..PAGE], at);
                assert_eq!(got.unwrap(), PAGE);
                ("direct", number(buf.as_mut_slice()))
            }
            _ => {
                let word = word(&self.mapped, page * PAGE);
                ("mapped", word.load(Ordering::SeqCst))
            }
        }
    }

    /// What else goes on; none of it changes what is read.
    fn disturb(&self, random: &mut SmallRng) {
        match random.random_range(0..4) {
            0 => self.buffered.sync_data().unwrap(),
            1 => self.buffered.drop_cache().unwrap(),
            2 => drop(self.mapped.pin(0..2 * PAGE, random.random()).unwrap()),
            _ => {
                let len = self.buffered.node().attributes().unwrap().len;
                assert!(len >= (PAGES * PAGE) as u64);
                self.buffered.append(&[1; 10]).unwrap();
            }
        }
    }
}

fn go_on(step: usize, end: Option<Instant>) -> bool {
    end.map_or(step < OPERATIONS, |end| Instant::now() < end)
}

/// T62: three nodes, each with a thread that writes its own pages and two that read any; INV6 is what fails.
#[test]
fn t62_whoever_reads_sees_what_any_node_wrote_before_in_whatever_way() {
    both(|delivery| {
        let time = std::env::var(SECONDS_ENV)
            .ok()
            .map(|text| text.parse().expect("PINFOLD_SHARED_SECONDS is a number"));
        let end = time.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let seed: u64 = SmallRng::from_os_rng().random();
        println!("seed {seed}");
        let rig = Rig::of(NODES);
        let ways: Vec<Ways> = (0..NODES)
            .map(|node| {
                let buffered = rig.open(node, "f");
                if node == 0 {
                    buffered.write_at(&filled(PAGES * PAGE, 0), 0).unwrap();
                }
                Ways {
                    mapped: map(&buffered, MapAccess::Write, delivery),
                    direct: rig.open_with(node, "f", &rw().direct(true)),
                    buffered,
                }
            })
            .collect();
        let written: [AtomicU64; PAGES] = Default::default();
        let written = &written;
        thread::scope(|scope| {
            for (node, ways) in ways.iter().enumerate() {
                let random =
                    move |thread: u64| SmallRng::seed_from_u64(seed ^ (node as u64 * 16 + thread));
                scope.spawn(move || {
                    let mut random = random(0);
                    let mut step = 0;
                    while go_on(step, end) {
                        let page = node + NODES * random.random_range(0..PAGES / NODES);
                        let number = written[page].load(Ordering::SeqCst) + 1;
                        ways.write(&mut random, page, number);
                        written[page].store(number, Ordering::SeqCst);
                        step += 1;
                    }
                });
                for thread in 1..3 {
                    scope.spawn(move || {
                        let mut random = random(thread);
                        let mut step = 0;
                        while go_on(step, end) {
                            let page = random.random_range(0..PAGES);
                            let before = written[page].load(Ordering::SeqCst);
                            let (way, seen) = ways.read(&mut random, page);
                            assert!(
                                seen >= before,
                                "seed {seed}: a {way} read of page {page} on node {node} found {seen}, not {before}"
                            );
                            if random.random_range(0..16) == 0 {
                                ways.disturb(&mut random);
                            }
                            step += 1;
                        }
                    });
                }
            }
        });
        let wanted = |page: usize| written[page].load(Ordering::SeqCst).to_ne_bytes();
        for ways in &ways {
            for page in 0..PAGES {
                assert_eq!(read(&ways.buffered, 8, (page * PAGE) as u64), wanted(page));
            }
        }
    });
}
