//! Nodes that lose their right to the directory: nothing of theirs is read or stored any more, and nothing hangs.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pinfold::glocks::service::scripted::Scripted;
use pinfold::glocks::{Clock, HandClock, Mode, Name, Options, Time};
use pinfold::testing::{Action, DeferredObject, FaultyObject, On, Rule};
use pinfold::{
    Delivery, Errno, ErrorKind, File, MapAccess, Mapping, Object, Volume, VolumeBuilder,
};
use pinfold_store::Operation;

use super::rig::{
    MEMORY, PAGE, Rig, both, filled, map, read, readable, rw, same, until, watched, word,
};

/// Every kind of use of a file by a node that has withdrawn.
fn all_is_refused(volume: &Volume, file: &File, mapped: &Mapping) {
    let io = |result: pinfold::Result<usize>| result.unwrap_err();
    let mut buf = [0; 16];
    let refusals = [
        io(file.read_at(&mut buf, 0)),
        io(file.read_at(&mut buf, 1 << 30)),
        io(file.write_at(&buf, 0)),
        file.set_len(5).unwrap_err(),
        file.sync_all().unwrap_err(),
        file.node().attributes().unwrap_err(),
        volume.metadata("f").unwrap_err(),
        volume.open("f", &rw()).unwrap_err(),
        volume.create_dir("d", 0o755).unwrap_err(),
        volume.remove_file("f").unwrap_err(),
        io(mapped.read(0, &mut buf)),
        mapped.pin(0..PAGE, false).unwrap_err(),
    ];
    for refusal in refusals {
        assert_eq!(refusal.errno(), Errno::EIO, "{refusal}");
    }
    // What a load gets as SIGBUS, a system call gets as an error.
    until(|| !readable(mapped.as_ptr()));
}

/// T64: what a node has to hand over cannot be stored: the lock stays, the node stops, and the other sees what is stored
/// once it may.
#[test]
fn t64_a_file_that_cannot_be_stored_is_not_handed_over() {
    both(|delivery| {
        let faulty: Arc<Mutex<Vec<Arc<FaultyObject>>>> = Arc::default();
        let made = Arc::clone(&faulty);
        let rig = Rig::with(2, Duration::from_millis(2), move |node, builder| {
            let made = Arc::clone(&made);
            if node == 1 {
                return builder;
            }
            builder.object_layer(Arc::new(move |object| {
                let object = FaultyObject::new(object);
                made.lock().unwrap().push(Arc::clone(&object));
                object as Arc<dyn Object>
            }))
        });
        let files = rig.everywhere("f");
        files[0].write_at(&filled(2 * PAGE, b'o'), 0).unwrap();
        files[0].sync_all().unwrap();
        let mapped = map(&files[0], MapAccess::Write, delivery);
        for object in &*faulty.lock().unwrap() {
            let write = On::Only(Operation::Write);
            object.add(Rule::new(write, Action::Fail(Errno::ENOSPC)));
        }
        files[0].write_at(&filled(PAGE, b'n'), 0).unwrap();
        word(&mapped, PAGE).store(1, Ordering::SeqCst);
        thread::scope(|scope| {
            let reader = scope.spawn(|| read(&files[1], 2 * PAGE, 0));
            until(|| rig.nodes[0].glocks().unwrap().check().is_err());
            all_is_refused(&rig.nodes[0], &files[0], &mapped);
            assert!(!reader.is_finished(), "the lock was handed over");
            rig.service.fence("node0");
            same(reader.join().unwrap(), filled(2 * PAGE, b'o'));
        });
    });
}

#[test]
fn a_node_that_withdraws_stops_and_can_be_dropped() {
    both(|delivery| {
        let mut rig = Rig::new();
        let file = rig.open(0, "f");
        file.write_at(&filled(3 * PAGE, b'o'), 0).unwrap();
        file.sync_all().unwrap();
        file.write_at(b"lost", 0).unwrap();
        let mapped = map(&file, MapAccess::Write, delivery);
        let pinned = mapped.pin(PAGE..2 * PAGE, true).unwrap();
        assert_eq!(
            word(&mapped, 0).load(Ordering::SeqCst).to_ne_bytes()[..4],
            *b"lost"
        );
        assert!(readable(mapped.as_ptr()));
        rig.nodes[0].glocks().unwrap().withdraw(Errno::EIO);
        all_is_refused(&rig.nodes[0], &file, &mapped);
        // Memory that a device may be using stays what it is, and is nobody's.
        drop(pinned);
        drop(mapped);
        drop(file);
        drop(rig.nodes.remove(0));
        rig.service.fence("node0");
        same(read(&rig.open(0, "f"), 4, 0), b"oooo");
    });
}

/// Several writers are slowed down when the node withdraws: what they wait for will not be stored any more.
#[test]
fn writers_slowed_down_by_a_node_that_withdraws_get_an_error() {
    watched(|| {
        let slow: Arc<Mutex<Vec<Arc<FaultyObject>>>> = Arc::default();
        let made = Arc::clone(&slow);
        let rig = Rig::with(1, Duration::ZERO, move |_, builder| {
            let made = Arc::clone(&made);
            builder
                .dirty_limit(8 * PAGE as u64)
                .object_layer(Arc::new(move |object| {
                    let object = FaultyObject::new(object);
                    let rule = Rule::new(On::Only(Operation::Write), Action::Fail(Errno::EIO));
                    object.add(rule);
                    made.lock().unwrap().push(Arc::clone(&object));
                    object as Arc<dyn Object>
                }))
        });
        let file = rig.open(0, "f");
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut at = 0;
                loop {
                    match file.write_at(&filled(PAGE, 1), at) {
                        Ok(done) => at += done as u64,
                        Err(error) => break error,
                    }
                }
            });
            until(|| rig.nodes[0].statistics().cache.throttled > 0);
            rig.nodes[0].glocks().unwrap().withdraw(Errno::EIO);
            assert_eq!(writer.join().unwrap().errno(), Errno::EIO);
        });
    });
}

/// A node whose clock and lock service are the test's.
struct Alone {
    service: Scripted,
    clock: HandClock,
    volume: Volume,
    dir: tempfile::TempDir,
}

const LEASE: Duration = Duration::from_secs(10);

impl Alone {
    fn new() -> Self {
        Self::with(|builder| builder)
    }

    fn with(set: impl FnOnce(VolumeBuilder) -> VolumeBuilder) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let service = Scripted::new();
        let clock = HandClock::new();
        service.lease(Time::from_start(LEASE));
        let options = Options {
            clock: Clock::Hand(clock.clone()),
            ..Options::default()
        };
        let volume = set(Volume::builder().memory(MEMORY))
            .join(&service, "a", options)
            .unwrap()
            .open_dir(dir.path())
            .unwrap();
        Self {
            service,
            clock,
            volume,
            dir,
        }
    }

    /// Grants whatever is asked for while `work` runs.
    fn granting<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        thread::scope(|scope| {
            let working = scope.spawn(work);
            while !working.is_finished() {
                if self.service.unseen().is_empty() {
                    thread::sleep(Duration::from_millis(1));
                } else {
                    self.service.grant(&self.service.next(), 1);
                }
            }
            working.join().unwrap()
        })
    }
}

/// H-13 seen from the node that stood still: at its next look at the clock it stores nothing more, whatever its lock service
/// has told it or not, and reads nothing that it has cached.
#[test]
fn h13_after_its_lease_a_node_uses_nothing_it_has_cached() {
    for delivery in [Delivery::Handler, Delivery::Inline] {
        watched(move || {
            let alone = Alone::new();
            let file = alone.granting(|| alone.volume.open("f", &rw()).unwrap());
            alone.granting(|| file.write_at(&filled(PAGE, b'o'), 0).unwrap());
            alone.granting(|| file.sync_all().unwrap());
            let mapped = map(&file, MapAccess::Write, delivery);
            alone.granting(|| file.write_at(&filled(PAGE, b'n'), 0).unwrap());
            alone.granting(|| word(&mapped, 0).load(Ordering::SeqCst));
            assert!(readable(mapped.as_ptr()));
            alone.clock.advance(LEASE);
            // Nothing is acknowledged that nobody will ever see.
            let refused = file.write_at(b"late", 0).unwrap_err();
            assert_eq!(refused.errno(), Errno::EIO);
            // Not one more transfer, even where the caller does not mind.
            let refused = file.sync_all().unwrap_err();
            assert_eq!(refused.errno(), Errno::EIO);
            all_is_refused(&alone.volume, &file, &mapped);
            drop((mapped, file));
            let Alone { volume, dir, .. } = alone;
            drop(volume);
            let stored = std::fs::read(dir.path().join("f")).unwrap();
            same(stored, filled(PAGE, b'o'));
        });
    }
}

/// H-13: a transfer that was about to be made when the lease ended is not made after it.
#[test]
fn h13_a_transfer_that_comes_after_the_lease_is_not_made() {
    watched(|| {
        let slow: Arc<Mutex<Option<Arc<DeferredObject>>>> = Arc::default();
        let made = Arc::clone(&slow);
        let alone = Alone::with(|builder| {
            builder.object_layer(Arc::new(move |object| {
                let object = DeferredObject::new(object);
                *made.lock().unwrap() = Some(Arc::clone(&object));
                object as Arc<dyn Object>
            }))
        });
        let file = alone.granting(|| alone.volume.open("f", &rw()).unwrap());
        alone.granting(|| file.write_at(&filled(PAGE, b'n'), 0).unwrap());
        let slow = slow.lock().unwrap().clone().unwrap();
        thread::scope(|scope| {
            let storing = scope.spawn(|| file.write_back(0..PAGE as u64));
            until(|| !slow.queued().is_empty());
            alone.clock.advance(LEASE);
            slow.open();
            let refused = storing.join().unwrap().unwrap_err();
            assert_eq!(refused.errno(), Errno::EIO);
        });
        let stored = std::fs::read(alone.dir.path().join("f")).unwrap();
        same(stored, b"");
    });
}

/// T62 (b): another node's call that comes right after a fault is put off until the instruction can have run, although nobody
/// holds the lock any more.
#[test]
fn t62_a_call_that_comes_right_after_a_fault_is_put_off() {
    both(|delivery| {
        let alone = Alone::new();
        let file = alone.granting(|| alone.volume.open("f", &rw()).unwrap());
        alone.granting(|| file.set_len(PAGE as u64).unwrap());
        let mapped = alone.granting(|| map(&file, MapAccess::Write, delivery));
        let name = name_of(&alone.volume, &file);
        let report = || {
            let reports = alone.volume.glocks().unwrap().report();
            let found = reports.into_iter().find(|report| report.name == name);
            found.unwrap()
        };
        word(&mapped, 0).store(1, Ordering::SeqCst);
        // The pool's thread lets go of it after the store may go on.
        until(|| report().holders.is_empty());
        alone.service.demote("a", name, Mode::Exclusive);
        assert!(report().demote.unwrap().deferred, "taken away at once");
        alone.clock.advance(Options::default().hold);
        let asked = alone.service.next();
        assert_eq!((asked.from, asked.to), (Mode::Exclusive, Mode::Unlocked));
        alone.service.grant(&asked, 1);
        alone.granting(|| drop((mapped, file)));
        // Or the volume's end would wait for a grant of nobody's.
        alone.volume.glocks().unwrap().withdraw(Errno::EIO);
    });
}

/// The name of a file's glock.
fn name_of(volume: &Volume, file: &File) -> Name {
    let number = file.node().id().inode;
    let reports = volume.glocks().unwrap().report();
    let found = reports.iter().find(|report| report.name.number == number);
    found.unwrap().name
}

/// H-7: the node holds SH in a call, another wants EX, and the call asks for more of the file: pages that are cached need
/// no glock, and those that are not are asked for anew, behind the other.
#[test]
fn h7_a_reader_goes_on_with_what_it_has_while_another_node_waits() {
    watched(|| {
        let alone = Alone::new();
        let file = alone.granting(|| alone.volume.open("f", &rw()).unwrap());
        alone.granting(|| file.write_at(&filled(2 * PAGE, b'o'), 0).unwrap());
        let held = name_of(&alone.volume, &file);
        alone.service.demote("a", held, Mode::Shared);
        let asked = alone.service.next();
        assert_eq!((asked.from, asked.to), (Mode::Exclusive, Mode::Shared));
        // Stored by now; the answer is under way, and what is cached may be read meanwhile.
        let stored = std::fs::read(alone.dir.path().join("f")).unwrap();
        same(stored, filled(2 * PAGE, b'o'));
        same(read(&file, PAGE, 0), filled(PAGE, b'o'));
        alone.service.grant(&asked, 1);
        same(read(&file, PAGE, PAGE as u64), filled(PAGE, b'o'));
        assert_eq!(alone.service.unseen(), []);
        alone.granting(|| drop(file));
        let kind = ErrorKind::Glock(Errno::EIO);
        alone.service.lose("a", Errno::ENOTCONN);
        let refused = alone.volume.open("f", &rw()).unwrap_err();
        assert_eq!((refused.kind(), refused.errno()), (kind, Errno::EIO));
    });
}
