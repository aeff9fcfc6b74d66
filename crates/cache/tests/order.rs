//! The order of steps around mappings: what is true of a page at the moment a mapping of it changes, and what a mapping
//! shows when the file changes meanwhile. The mapping is one that looks and waits, so nothing depends on the system.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends there")]

#[path = "rig/program.rs"]
mod program;
#[path = "rig/rig.rs"]
mod rig;

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, Weak};

use pinfold_cache::{FilePages, MapOutcome, MapTarget, Mode, ReverseMap};
use pinfold_mem::uffd::{InstallStop, Installed};
use pinfold_mem::{Access, RawSpan, UserMapKind};
use pinfold_store::testing::MemoryObject;
use program::Program;
use rig::{MOMENT, PAGE, PATIENCE, Rig, WANT, within};

const PAGES: u64 = 8;

/// What happened to the mapping, in order: `(what, page, whether the page was known to be dirty then)`.
type Steps = Vec<(&'static str, u64, bool)>;

/// A mapping that notes what is done to it.
#[derive(Default)]
struct Noted {
    file: Mutex<Weak<FilePages>>,
    steps: Mutex<Steps>,
    /// The next time stores are let in it tells so, and waits.
    hold: Mutex<Option<(Sender<()>, Receiver<()>)>>,
}

impl Noted {
    fn note(&self, what: &'static str, pages: &Range<u64>) {
        let file = self.file.lock().unwrap().upgrade();
        for page in pages.clone() {
            let is_dirty = |file: &Arc<FilePages>| file.next_known_dirty(page) == Some(page);
            let dirty = file.as_ref().is_some_and(is_dirty);
            self.steps.lock().unwrap().push((what, page, dirty));
        }
    }

    fn let_stores_in(&self, pages: &Range<u64>) {
        let held = self.hold.lock().unwrap().take();
        if let Some((told, go_on)) = held {
            told.send(()).unwrap();
            go_on.recv().unwrap();
        }
        self.note("stores", pages);
    }

    fn steps(&self) -> Steps {
        std::mem::take(&mut self.steps.lock().unwrap())
    }
}

/// The same as a target of faults.
struct Target(Arc<Noted>);

impl MapTarget for Target {
    fn covers(&self) -> Range<u64> {
        0..PAGES
    }

    fn shared(&self) -> bool {
        true
    }

    /// Has the cache put the bytes there by hand.
    fn copy(&self, _page: u64, _from: RawSpan, _protect: bool) -> Installed {
        Installed {
            pages: 0,
            stop: Some(InstallStop::NoMemory),
        }
    }

    fn resume(&self, pages: Range<u64>, protect: bool) -> Installed {
        if protect {
            self.0.note("loads", &pages);
        } else {
            self.0.let_stores_in(&pages);
        }
        Installed {
            pages: (pages.end - pages.start) as usize,
            stop: None,
        }
    }

    fn unprotect(&self, pages: Range<u64>) {
        self.0.let_stores_in(&pages);
    }
}

impl ReverseMap for Noted {
    fn unmap(&self, pages: Range<u64>) {
        self.note("gone", &pages);
    }

    fn protect(&self, pages: Range<u64>) {
        self.note("protected", &pages);
    }
}

fn with_noted(body: impl FnOnce(&Arc<FilePages>, &Arc<Noted>, &Target) + Send + 'static) {
    within(PATIENCE * 2, || {
        let rig = Rig::with_room();
        let store = MemoryObject::with(&[b'o'; PAGES as usize * PAGE]);
        let file = FilePages::new(&rig.cache, store, PAGES * PAGE as u64);
        let noted = Arc::new(Noted::default());
        *noted.file.lock().unwrap() = Arc::downgrade(&file);
        file.open_window(PAGES, Arc::clone(&noted) as Arc<dyn ReverseMap>)
            .unwrap();
        body(&file, &noted, &Target(Arc::clone(&noted)));
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        drop(file);
        rig.is_empty();
    });
}

fn map(file: &Arc<FilePages>, page: u64, access: Access, target: &Target) {
    let outcome = file.map(page, access, page..page + 1, None, target);
    assert_eq!(outcome, Ok(MapOutcome::Mapped));
}

/// F-1, INV2: a page is dirty when a mapping of it begins to let stores in, whichever way it comes there.
#[test]
fn f1_a_page_is_dirty_before_it_can_be_stored_to() {
    with_noted(|file, noted, target| {
        // Not cached; cached; mapped for reading; mapped for reading and cleaned.
        map(file, 1, Access::Write, target);
        drop(file.read(2, &WANT).unwrap());
        map(file, 2, Access::Write, target);
        map(file, 3, Access::Read, target);
        assert_eq!(noted.steps().last(), Some(&("loads", 3, false)));
        map(file, 3, Access::Write, target);
        assert_eq!(noted.steps(), [("stores", 3, true)]);
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        noted.steps();
        for page in 1..4 {
            map(file, page, Access::Write, target);
            assert_eq!(noted.steps(), [("stores", page, true)]);
        }
    });
}

/// F-8: a fault that is about to let stores in is over before write-back protects the page, so a page that was found
/// clean is not opened by somebody who looked before.
#[test]
fn f8_stores_are_let_in_before_a_page_is_protected_or_not_at_all() {
    with_noted(|file, noted, target| {
        map(file, 3, Access::Write, target);
        file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
        noted.steps();
        let (tell, told) = channel();
        let (let_go, go_on) = channel();
        *noted.hold.lock().unwrap() = Some((tell, go_on));
        std::thread::scope(|scope| {
            scope.spawn(|| map(file, 3, Access::Write, target));
            told.recv_timeout(PATIENCE).unwrap();
            let pass = scope.spawn(|| file.write_back(0..u64::MAX, Mode::Integrity).unwrap());
            std::thread::sleep(MOMENT);
            assert!(!pass.is_finished(), "clean while stores are let in");
            let_go.send(()).unwrap();
            assert_eq!(pass.join().unwrap(), 1);
        });
        // Dirty at both moments: protected first, clean after that (F-2).
        let expected = [("stores", 3, true), ("protected", 3, true)];
        assert_eq!(noted.steps(), expected);
        assert!(!file.is_dirty());
    });
}

/// F-7: neighbours that are cached do not come along from behind the new end.
#[test]
fn f7_neighbours_behind_the_new_end_stay_out() {
    with_noted(|file, noted, target| {
        for page in 0..PAGES {
            map(file, page, Access::Read, target);
        }
        noted.steps();
        // As a truncation does, which sets the size before it drops pages.
        file.set_end(3 * PAGE as u64);
        let outcome = file.map(1, Access::Read, 0..PAGES, None, target);
        assert_eq!(outcome, Ok(MapOutcome::Mapped));
        let mapped = noted.steps();
        let mut pages: Vec<u64> = mapped.iter().map(|step| step.1).collect();
        pages.sort_unstable();
        assert_eq!(pages, [0, 1, 2], "with its neighbours, those of the file");
        file.truncate(3 * PAGE as u64);
    });
}

/// F-6, INV7: of the page that holds the end only what is below it goes to the store, and the rest is zeroed each time.
#[test]
fn f6_the_page_of_the_end_is_stored_up_to_it_and_zeroed_behind_it() {
    within(PATIENCE * 2, || {
        let rig = Rig::with_room();
        let stored = MemoryObject::with(&[b'o'; 100]);
        let file = FilePages::new(&rig.cache, stored.clone(), 100);
        {
            let Some(program) = Program::start(&file, 1, UserMapKind::SharedWrite) else {
                return;
            };
            for byte in 1..4 {
                program.store(0, 50, byte);
                program.store(0, 200, byte);
                assert_eq!(program.load(0, 200), byte, "until it is stored");
                file.write_back(0..u64::MAX, Mode::Integrity).unwrap();
                assert_eq!(stored.bytes().len(), 100, "behind the end");
                assert_eq!(stored.bytes()[50], byte);
                assert_eq!(program.load(0, 200), 0, "zeroed");
            }
        }
        drop(file);
        rig.is_empty();
    });
}
