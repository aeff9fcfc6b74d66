//! Everything at once on one file larger than the cache, with contents that tell when they were written; with a store that
//! is late now and then, and with one whose transfers end in an order that is drawn.
//!
//! Each page has one writer thread. A page's contents carry a generation; every fourth generation is zeros (a punch, or
//! a cut and growth of the whole file). Before it changes a page a writer raises `begun`, afterwards `done`; whoever
//! reads a word must find a generation that was not over before the read began and had begun before it ended.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use pinfold::testing::{Action, DeferredObject, FaultyObject, MemoryObject, On, Rule, Seed};
use pinfold::{AlignedBuf, File, Object};

use crate::rig::{PATIENCE, Rig, within};

const PAGE: usize = 4096;
const PAGES: u64 = 150;
const WRITERS: u64 = 2;
/// Pages of one read.
const SPAN_MAX: u64 = 12;

struct Page {
    begun: AtomicU64,
    done: AtomicU64,
}

struct Storm {
    file: Arc<File>,
    direct: Arc<File>,
    pages: Vec<Page>,
    /// Held exclusively by who cuts the file: its pages are everybody's.
    whole: RwLock<()>,
    stop: AtomicBool,
}

fn is_zeros(generation: u64) -> bool {
    generation.is_multiple_of(4)
}

fn word(page: u64, generation: u64) -> u64 {
    if is_zeros(generation) {
        0
    } else {
        page << 40 | generation
    }
}

fn fill(buf: &mut [u8], page: u64, generation: u64) {
    for chunk in buf.chunks_mut(8) {
        chunk.copy_from_slice(&word(page, generation).to_le_bytes());
    }
}

impl Storm {
    fn new(rig: &Rig) -> Arc<Self> {
        let file = rig.open(false);
        file.set_len(PAGES * PAGE as u64).unwrap();
        Arc::new(Self {
            file,
            direct: rig.open(true),
            pages: (0..PAGES)
                .map(|_| Page {
                    begun: AtomicU64::new(0),
                    done: AtomicU64::new(0),
                })
                .collect(),
            whole: RwLock::new(()),
            stop: AtomicBool::new(false),
        })
    }

    fn write(&self, seed: &mut Seed, mine: u64) {
        let _shared = self.whole.read().unwrap();
        let page = seed.below(PAGES / WRITERS) * WRITERS + mine;
        let state = &self.pages[page as usize];
        let mut generation = state.done.load(Ordering::SeqCst) + 1;
        if is_zeros(generation) && seed.below(4) != 0 {
            generation += 1;
        }
        let offset = page * PAGE as u64;
        state.begun.store(generation, Ordering::SeqCst);
        if is_zeros(generation) {
            self.file.punch(offset..offset + PAGE as u64).unwrap();
        } else {
            let mut buf = AlignedBuf::zeroed(PAGE);
            let bytes = buf.as_mut_slice();
            fill(bytes, page, generation);
            match seed.below(4) {
                0 => assert_eq!(self.direct.write_at(bytes, offset).unwrap(), PAGE),
                // In two halves: the first one has to read the rest, or wait for it.
                1 => {
                    let at = seed.below(511) as usize * 8 + 8;
                    assert_eq!(
                        self.file
                            .write_at(&bytes[at..], offset + at as u64)
                            .unwrap(),
                        PAGE - at
                    );
                    assert_eq!(self.file.write_at(&bytes[..at], offset).unwrap(), at);
                }
                _ => assert_eq!(self.file.write_at(bytes, offset).unwrap(), PAGE),
            }
        }
        state.done.store(generation, Ordering::SeqCst);
    }

    fn cut(&self, seed: &mut Seed) {
        let _alone = self.whole.write().unwrap();
        let len = seed.below(PAGES * PAGE as u64 / 8) * 8;
        // A page that is cut in the middle is written anew afterwards.
        let first = len / PAGE as u64;
        for page in &self.pages[first as usize..] {
            let zeros = (page.done.load(Ordering::SeqCst) / 4 + 1) * 4;
            page.begun.store(zeros, Ordering::SeqCst);
        }
        self.file.set_len(len).unwrap();
        let at = (len % PAGE as u64) as usize;
        if at != 0 {
            let mut bytes = vec![0xee; PAGE];
            let got = self.file.read_at(&mut bytes, first * PAGE as u64).unwrap();
            assert_eq!(got, at);
            self.file
                .write_at(&vec![0; at], first * PAGE as u64)
                .unwrap();
        }
        self.file.set_len(PAGES * PAGE as u64).unwrap();
        for page in &self.pages[first as usize..] {
            let zeros = page.begun.load(Ordering::SeqCst);
            page.done.store(zeros, Ordering::SeqCst);
        }
    }

    /// Reads somewhere, some way, and judges every word.
    fn look(&self, seed: &mut Seed, way: u64) {
        let first = seed.below(PAGES);
        let count = (1 + seed.below(SPAN_MAX)).min(PAGES - first);
        let lows: Vec<u64> = self.pages[first as usize..(first + count) as usize]
            .iter()
            .map(|page| page.done.load(Ordering::SeqCst))
            .collect();
        let mut buf = AlignedBuf::zeroed(count as usize * PAGE);
        let offset = first * PAGE as u64;
        let got = match way {
            0 => {
                let lease = self.file.lend(offset, count as usize * PAGE).unwrap();
                let mut at = 0;
                for span in lease.spans() {
                    at += span.copy_to(0, &mut buf.as_mut_slice()[at..]);
                }
                at
            }
            1 => self.direct.read_at(buf.as_mut_slice(), offset).unwrap(),
            _ => self.file.read_at(buf.as_mut_slice(), offset).unwrap(),
        };
        for (i, words) in buf.as_mut_slice()[..got / 8 * 8].chunks(8).enumerate() {
            let page = first + (i * 8 / PAGE) as u64;
            let (low, high) = (
                lows[(page - first) as usize],
                self.pages[page as usize].begun.load(Ordering::SeqCst),
            );
            let found = u64::from_le_bytes(words.try_into().unwrap());
            let allowed = (low..=high).any(|generation| word(page, generation) == found);
            assert!(
                allowed,
                "way {way}: page {page} byte {} holds {:#x} (page {}, generation {}), allowed are generations {low} to {high}",
                i * 8 % PAGE,
                found,
                found >> 40,
                found & 0xff_ffff_ffff,
            );
        }
    }

    fn disturb(&self, seed: &mut Seed) {
        match seed.below(5) {
            0 => self.file.sync_all().unwrap(),
            1 => self.file.drop_cache().unwrap(),
            2 => {
                let from = seed.below(PAGES) * PAGE as u64;
                self.file.write_back(from..from + 65_536).unwrap();
            }
            3 => self.cut(seed),
            _ => std::thread::sleep(Duration::from_micros(seed.below(2000))),
        }
    }
}

/// Ends the others' loops also when one of them fails.
struct StopAll<'a>(&'a AtomicBool);

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn run(number: u64, length: Duration) {
    let mut seed = Seed::new(number);
    let memory = MemoryObject::new();
    let store = FaultyObject::new(memory.clone());
    // Some transfers come late and out of order.
    for _ in 0..seed.below(40) {
        let delay = Duration::from_micros(seed.below(3000));
        let on = [On::Only(pinfold_store::Operation::Read), On::Any][seed.below(2) as usize];
        store.add(Rule::new(on, Action::Delay(delay)).nth(1 + seed.below(200)));
    }
    let object: Arc<dyn Object> = store;
    let rig = Rig::with_interval(object, Duration::from_millis(1 + seed.below(20)));
    let storm = rage(&rig, number, length);
    at_rest(&rig, &storm, &memory);
}

/// Has everybody at it for `length`; returns what is to be found afterwards.
fn rage(rig: &Rig, number: u64, length: Duration) -> Arc<Storm> {
    let storm = Storm::new(rig);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..WRITERS + 4 {
            let storm = &storm;
            let mut seed = Seed::new(number * 100 + thread);
            scope.spawn(move || {
                let _stop = StopAll(&storm.stop);
                while !storm.stop.load(Ordering::SeqCst) && start.elapsed() < length {
                    match thread {
                        0 | 1 => storm.write(&mut seed, thread),
                        2 => storm.disturb(&mut seed),
                        _ => storm.look(&mut seed, thread - 3),
                    }
                }
            });
        }
    });
    storm
}

/// The same over a store whose transfers, and not only some, end when a scheduler says so: it draws how many it lets
/// gather, and which of them is next, before its bytes move or behind that.
fn run_scheduled(number: u64, length: Duration) {
    /// Transfers gathered before one of them is let go, at most.
    const GATHER_MAX: u64 = 6;
    /// Looks at the queue before it is gathered enough: those who would add to it may wait for what is in it.
    const LOOKS_MAX: u64 = 2;
    let mut seed = Seed::new(number ^ 0x5eed);
    let memory = MemoryObject::new();
    let slow = match seed.below(2) {
        0 => DeferredObject::new(memory.clone()),
        _ => DeferredObject::holding_completions(memory.clone()),
    };
    let rig = Rig::with_interval(slow.clone(), Duration::from_millis(1 + seed.below(20)));
    let over = AtomicBool::new(false);
    let storm = std::thread::scope(|scope| {
        let scheduler = scope.spawn(|| {
            // However it ends, whoever waits for a transfer must not wait for ever.
            let _open = OpenAll(&slow);
            while !over.load(Ordering::SeqCst) {
                let gather = 1 + seed.below(GATHER_MAX);
                for _ in 0..LOOKS_MAX {
                    if slow.queued().len() as u64 >= gather {
                        break;
                    }
                    std::thread::yield_now();
                }
                let waiting = slow.queued().len() as u64;
                if waiting > 0 {
                    slow.release(seed.below(waiting) as usize);
                }
            }
        });
        let storm = {
            let _over = StopAll(&over);
            rage(&rig, number, length)
        };
        scheduler.join().unwrap();
        storm
    });
    at_rest(&rig, &storm, &memory);
}

/// Lets every transfer go, also when the scheduler fails.
struct OpenAll<'a>(&'a DeferredObject);

impl Drop for OpenAll<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// Everything that was written is there, from the cache and from the store, and nothing is held.
fn at_rest(rig: &Rig, storm: &Storm, memory: &MemoryObject) {
    let mut seed = Seed::new(0);
    for page in &storm.pages {
        assert_eq!(
            page.begun.load(Ordering::SeqCst),
            page.done.load(Ordering::SeqCst)
        );
    }
    for way in 0..3 {
        for _ in 0..100 {
            storm.look(&mut seed, way);
        }
    }
    storm.file.sync_all().unwrap();
    assert_eq!(rig.volume.statistics().pages_dirty, 0);
    let stored = memory.bytes();
    assert_eq!(stored.len(), PAGES as usize * PAGE);
    for (page, bytes) in (0..).zip(stored.chunks(PAGE)) {
        let generation = storm.pages[page as usize].done.load(Ordering::SeqCst);
        let mut right = vec![0; PAGE];
        fill(&mut right, page, generation);
        assert!(
            bytes == right,
            "page {page} in the store is not generation {generation}"
        );
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn nothing_stale_is_read_and_nothing_lost_whatever_happens_at_once() {
    let end = Instant::now() + Duration::from_secs(number("PINFOLD_RACE_SECONDS", 8));
    let mut seed = number("PINFOLD_RACE_SEED", 1);
    while Instant::now() < end {
        println!("PINFOLD_RACE_SEED={seed}");
        within(PATIENCE, move || run(seed, Duration::from_millis(400)));
        seed += 1;
    }
}

#[test]
fn nothing_is_stale_or_lost_in_whatever_order_transfers_end() {
    let end = Instant::now() + Duration::from_secs(number("PINFOLD_RACE_SECONDS", 5));
    let mut seed = number("PINFOLD_RACE_SEED", 1);
    while Instant::now() < end {
        println!("PINFOLD_RACE_SEED={seed}");
        // Each transfer takes a turn of the scheduler, which is one thread of many on a busy machine.
        within(PATIENCE * 4, move || {
            run_scheduled(seed, Duration::from_millis(400))
        });
        seed += 1;
    }
}
