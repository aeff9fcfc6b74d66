//! Every pair of operations on one page, raced, and the table in the crate's documentation held to the one in code.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

#[path = "rig/program.rs"]
mod program;
#[path = "rig/rig.rs"]
mod rig;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use pinfold_cache::separation::{Operation, separation};
use pinfold_cache::{FilePages, Mode};
use pinfold_mem::UserMapKind;
use pinfold_store::Object;
use pinfold_store::testing::MemoryObject;
use program::Program;
use rig::{PAGE, PATIENCE, Rig, WANT, within};

/// The page everything happens to, and its size in the file, which another page follows.
const TARGET: u64 = 3;
const ROUNDS: u64 = 300;

/// One page, its neighbours, and a second file that wants its frame.
struct Scene {
    rig: Rig,
    file: Arc<FilePages>,
    store: Arc<MemoryObject>,
    other: Arc<FilePages>,
    /// Stands for the inode's lock, which writers and truncation hold above the cache.
    inode: Mutex<()>,
    begun: AtomicU64,
    done: AtomicU64,
    others_page: AtomicU64,
    /// A mapping of the file, for the races with one; none where the system does not let us.
    program: Option<Program>,
    mapped_uses: AtomicU64,
}

impl Scene {
    fn new(mapped: bool) -> Self {
        let rig = Rig::new();
        let store = MemoryObject::with(&vec![0; 2 * TARGET as usize * PAGE]);
        let other = MemoryObject::with(&vec![0xaa; 400 * PAGE]);
        let file = FilePages::new(&rig.cache, store.clone(), 2 * TARGET * PAGE as u64);
        let kind = UserMapKind::SharedWrite;
        Self {
            program: mapped
                .then(|| Program::start(&file, 2 * TARGET, kind))
                .flatten()
                .inspect(Program::serve_more),
            mapped_uses: AtomicU64::new(0),
            file,
            other: FilePages::new(&rig.cache, other, 400 * PAGE as u64),
            rig,
            store,
            inode: Mutex::new(()),
            begun: AtomicU64::new(0),
            done: AtomicU64::new(0),
            others_page: AtomicU64::new(0),
        }
    }

    /// Begins a generation of the page: odd ones are written, even ones are zeros.
    fn begin(&self, written: bool) -> u64 {
        let done = self.done.load(Ordering::SeqCst);
        let next = done + 1 + u64::from((done + 1).is_multiple_of(2) == written);
        self.begun.store(next, Ordering::SeqCst);
        next
    }

    fn run(&self, operation: Operation) {
        match operation {
            Operation::Fill => {
                self.file.invalidate(TARGET..TARGET + 1);
                self.look();
            }
            Operation::ReadCopy => self.look(),
            Operation::Write => {
                let _inode = self.inode.lock().unwrap();
                let generation = self.begin(true);
                let folio = self.file.write_begin(TARGET, 0, PAGE, false).unwrap();
                let bytes: Vec<u8> = generation.to_le_bytes().repeat(PAGE / 8);
                folio.write(0, &bytes);
                folio.commit_to((TARGET + 1) * PAGE as u64);
                self.file.note_dirty_file();
                self.done.store(generation, Ordering::SeqCst);
            }
            Operation::WriteBack => {
                self.file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
            }
            Operation::Evict => {
                for _ in 0..40 {
                    let page = self.others_page.fetch_add(1, Ordering::Relaxed) % 400;
                    let found = self.other.read(page, &WANT).unwrap();
                    let mut byte = [0];
                    found.read(17, &mut byte);
                    assert_eq!(byte, [0xaa], "another file's page {page}");
                }
            }
            Operation::Truncate => {
                let _inode = self.inode.lock().unwrap();
                let generation = self.begin(false);
                let (cut, end) = (TARGET * PAGE as u64, self.file.end());
                let block = self.file.gate().block();
                self.file.truncate(cut);
                self.store.set_len(cut).unwrap();
                self.store.set_len(end).unwrap();
                self.file.set_end(end);
                drop(block);
                self.done.store(generation, Ordering::SeqCst);
            }
            Operation::Map => {
                let Some(program) = &self.program else {
                    return;
                };
                let uses = self.mapped_uses.fetch_add(1, Ordering::Relaxed);
                if uses.is_multiple_of(2) {
                    self.look_at(|word| program.load_word(TARGET, word * 8));
                    return;
                }
                let _inode = self.inode.lock().unwrap();
                let generation = self.begin(true);
                for at in (0..PAGE).step_by(8) {
                    program.store_word(TARGET, at, generation);
                }
                self.done.store(generation, Ordering::SeqCst);
            }
        }
    }

    fn look(&self) {
        let mut bytes = vec![0; PAGE];
        let low = self.done.load(Ordering::SeqCst);
        self.file.read(TARGET, &WANT).unwrap().read(0, &mut bytes);
        self.judge(
            low,
            bytes
                .chunks(8)
                .map(|word| u64::from_le_bytes(word.try_into().unwrap())),
        );
    }

    /// As `look`, with the words from elsewhere.
    fn look_at(&self, word: impl Fn(usize) -> u64) {
        let low = self.done.load(Ordering::SeqCst);
        self.judge(low, (0..PAGE / 8).map(word));
    }

    /// Every word is of a generation that was not over before (`low`), and had begun before it ended.
    fn judge(&self, low: u64, words: impl Iterator<Item = u64>) {
        for word in words.collect::<Vec<_>>() {
            let high = self.begun.load(Ordering::SeqCst);
            let zeros = (low..=high).any(|generation| generation.is_multiple_of(2));
            let allowed =
                (word == 0 && zeros) || (!word.is_multiple_of(2) && (low..=high).contains(&word));
            assert!(allowed, "{word} is not of the generations {low} to {high}");
        }
    }
}

fn race(a: Operation, b: Operation) {
    let scene = Scene::new([a, b].contains(&Operation::Map));
    let start = Barrier::new(2);
    std::thread::scope(|scope| {
        for operation in [a, b] {
            let (scene, start) = (&scene, &start);
            scope.spawn(move || {
                start.wait();
                for _ in 0..ROUNDS {
                    scene.run(operation);
                }
            });
        }
    });
    scene.look();
    scene.run(Operation::WriteBack);
    let generation = scene.done.load(Ordering::SeqCst);
    let word = if generation.is_multiple_of(2) {
        0
    } else {
        generation
    };
    let stored = scene.store.bytes();
    let page = &stored[TARGET as usize * PAGE..][..PAGE];
    assert!(
        page.chunks(8).all(|w| w == word.to_le_bytes()),
        "the stored page"
    );
    let Scene {
        rig,
        file,
        other,
        program,
        ..
    } = scene;
    drop(program);
    rig.is_at_rest();
    drop((file, other));
    rig.is_empty();
}

#[test]
fn every_pair_of_operations_on_one_page_is_kept_apart() {
    for (i, &a) in Operation::ALL.iter().enumerate() {
        for &b in &Operation::ALL[i..] {
            assert_eq!(separation(a, b), separation(b, a));
            println!("{} and {}: {}", a.name(), b.name(), separation(a, b));
            within(PATIENCE, move || race(a, b));
        }
    }
}

#[test]
fn the_table_in_the_documentation_is_the_one_in_code() {
    let documented = include_str!("../src/lib.rs");
    for (i, &a) in Operation::ALL.iter().enumerate() {
        let mut row = format!("//! | **{}** |", a.name());
        for (j, &b) in Operation::ALL.iter().enumerate() {
            match j < i {
                true => row.push_str(" |"),
                false => row.push_str(&format!(" {} |", separation(a, b))),
            }
        }
        assert!(documented.lines().any(|line| line == row), "missing: {row}");
    }
}
