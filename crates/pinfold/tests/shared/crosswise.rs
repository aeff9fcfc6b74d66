//! Calls of several nodes that each need what the other has: nothing waits in a circle, nothing stale is read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use pinfold::glocks::Counts;
use pinfold::testing::DeferredObject;
use pinfold::{AlignedBuf, File, IovCursor, MapAccess, Object, Volume};

use super::rig::{
    MEMORY, PAGE, Rig, both, bytes, bytes_mut, filled, map, read, rw, same, until, watched, word,
};

const ROUNDS: usize = 40;

/// H-1: node 0 writes A from its mapping of B, node 1 writes B from its mapping of A; each fault needs the glock that the
/// other's write holds.
#[test]
fn h1_two_nodes_write_from_each_other_s_files() {
    both(|delivery| {
        let rig = Rig::new();
        let (a, b) = (rig.everywhere("a"), rig.everywhere("b"));
        a[0].write_at(&filled(4 * PAGE, b'a'), 0).unwrap();
        b[0].write_at(&filled(4 * PAGE, b'b'), 0).unwrap();
        thread::scope(|scope| {
            for (target, source) in [(&a[0], &b[0]), (&b[1], &a[1])] {
                scope.spawn(move || {
                    let from = map(source, MapAccess::Read, delivery);
                    for _ in 0..ROUNDS {
                        let wrote = target.write_at(bytes(&from, 0, 4 * PAGE), 0).unwrap();
                        assert_eq!(wrote, 4 * PAGE);
                    }
                });
            }
        });
        let whole = |file: &File| read(file, 4 * PAGE, 0);
        for file in [&a, &b] {
            same(whole(&file[0]), whole(&file[1]));
            assert!(whole(&file[0]).iter().all(|byte| b"ab".contains(byte)));
        }
    });
}

/// H-2: each node writes a file from its own mapping of that file, at another place and at the same; buffered and direct.
#[test]
fn h2_each_node_writes_a_file_from_its_own_mapping_of_it() {
    both(|delivery| {
        let rig = Rig::new();
        let files = rig.everywhere("f");
        files[0].write_at(&filled(8 * PAGE, b'f'), 0).unwrap();
        let direct = [0, 1].map(|node| rig.open_with(node, "f", &rw().direct(true)));
        thread::scope(|scope| {
            for node in 0..2 {
                let (file, direct) = (&files[node], &direct[node]);
                scope.spawn(move || {
                    let own = map(file, MapAccess::Write, delivery);
                    for round in 0..ROUNDS {
                        let to = if round % 3 == 0 { 0 } else { 4 * PAGE };
                        let through = if round % 2 == 0 { file } else { direct };
                        let wrote = through.write_at(bytes(&own, 0, 4 * PAGE), to as u64);
                        assert_eq!(wrote.unwrap(), 4 * PAGE);
                    }
                });
            }
        });
        same(read(&files[0], 8 * PAGE, 0), filled(8 * PAGE, b'f'));
    });
}

/// H-3, H-4, H-12: direct transfers under way from and to mapped memory, while their files' glocks change nodes all the time
/// and are synced and read ahead. Pins delay a demotion until the transfer ends, and no transfer waits for a glock.
#[test]
fn h4_h12_transfers_under_way_and_demotions_do_not_wait_for_each_other() {
    both(|delivery| {
        let rig = Rig::new();
        let (a, b) = (rig.everywhere("a"), rig.everywhere("b"));
        for file in [&a, &b] {
            file[0].write_at(&filled(16 * PAGE, b'x'), 0).unwrap();
        }
        let direct = |node: usize, name| Arc::new(rig.open_with(node, name, &rw().direct(true)));
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let over = &over;
            // Storms: the other node reads and writes both files, and syncs them.
            for file in [&a[1], &b[1]] {
                scope.spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        let ahead = read(file, 16 * PAGE, 0);
                        assert!(ahead.iter().all(|&byte| byte == b'x'));
                        file.write_at(&filled(100, b'x'), 3 * PAGE as u64).unwrap();
                        file.sync_data().unwrap();
                    }
                });
            }
            let transfers = [
                (direct(0, "a"), &b[0], true),
                (direct(0, "b"), &a[0], false),
            ]
            .map(|(file, mapped, reads)| {
                scope.spawn(move || {
                    let memory = map(mapped, MapAccess::Write, delivery);
                    for round in 0..ROUNDS {
                        let at = (round % 4) * 4 * PAGE;
                        let moved = if reads {
                            file.read_at(bytes_mut(&memory, at, 4 * PAGE), at as u64)
                        } else {
                            file.write_at(bytes(&memory, at, 4 * PAGE), at as u64)
                        };
                        assert_eq!(moved.unwrap(), 4 * PAGE);
                        let pending = file.submit_write(filled(PAGE, b'x'), 0);
                        // Not aligned memory, as it comes: refused or done, it ends.
                        drop(pending.unwrap().wait());
                    }
                })
            });
            let ended = transfers.map(|transfer| transfer.join());
            over.store(true, Ordering::Relaxed);
            ended.into_iter().for_each(|end| end.unwrap());
        });
        for file in [&a[0], &a[1], &b[0], &b[1]] {
            same(read(file, 16 * PAGE, 0), filled(16 * PAGE, b'x'));
        }
    });
}

/// H-5: writers that are slowed down hold their file's EX, which the other node wants; write-back needs no glock, so it goes on.
#[test]
fn h5_writers_slowed_down_under_ex_are_written_back_all_the_same() {
    watched(|| {
        let rig = Rig::with(2, Duration::from_millis(2), |_, builder| {
            builder.dirty_limit(16 * PAGE as u64)
        });
        let files = [rig.everywhere("a"), rig.everywhere("b")];
        thread::scope(|scope| {
            for writer in 0..4 {
                let file = &files[writer / 2][writer % 2];
                scope.spawn(move || {
                    for round in 0..20 {
                        let bytes = filled(32 * PAGE, round);
                        assert_eq!(file.write_at(&bytes, 0).unwrap(), bytes.len());
                    }
                });
            }
        });
        let throttled: u64 = rig
            .nodes
            .iter()
            .map(|node| node.statistics().cache.throttled)
            .sum();
        assert!(throttled > 0, "nobody was slowed down");
        for file in &files {
            same(read(&file[0], 32 * PAGE, 0), read(&file[1], 32 * PAGE, 0));
        }
    });
}

/// H-6: on each node more threads fault on the other's file than there are threads to serve faults.
#[test]
fn h6_faults_that_wait_for_glocks_do_not_keep_their_owners_from_giving_way() {
    const THREADS: usize = 24;
    both(|delivery| {
        let rig = Rig::new();
        let (a, b) = (rig.everywhere("a"), rig.everywhere("b"));
        for file in [&a[0], &b[1]] {
            file.set_len((THREADS * PAGE) as u64).unwrap();
        }
        for round in 0..4 {
            // Each node has its own file dirty, mapped and EX.
            for file in [&a[0], &b[1]] {
                let own = map(file, MapAccess::Write, delivery);
                for page in 0..THREADS {
                    word(&own, page * PAGE).store(round, Ordering::SeqCst);
                }
            }
            thread::scope(|scope| {
                for file in [&b[0], &a[1]] {
                    let theirs = Arc::new(map(file, MapAccess::Write, delivery));
                    for page in 0..THREADS {
                        let theirs = Arc::clone(&theirs);
                        scope.spawn(move || {
                            let word = word(&theirs, page * PAGE);
                            assert_eq!(word.load(Ordering::SeqCst), round);
                            word.store(100, Ordering::SeqCst);
                        });
                    }
                }
            });
        }
    });
}

/// H-8: both nodes have the file for reading and write to it at once: neither waits for the other to stop reading.
#[test]
fn h8_two_nodes_that_both_read_a_file_both_write_it() {
    both(|delivery| {
        let rig = Rig::new();
        let files = rig.everywhere("f");
        files[0].write_at(&filled(4 * PAGE, 1), 0).unwrap();
        let maps = [0, 1].map(|node| map(&files[node], MapAccess::Write, delivery));
        for round in 2..22u64 {
            for node in 0..2 {
                // SH on both, cached and mapped.
                let _seen = word(&maps[node], 2 * PAGE).load(Ordering::SeqCst);
                read(&files[node], 4 * PAGE, 0);
            }
            let start = Barrier::new(2);
            thread::scope(|scope| {
                for (node, map) in maps.iter().enumerate() {
                    let (file, start) = (&files[node], &start);
                    scope.spawn(move || {
                        start.wait();
                        if round % 2 == 0 {
                            word(map, node * PAGE).store(round, Ordering::SeqCst);
                        } else {
                            let at = (node * PAGE) as u64;
                            file.write_at(&round.to_ne_bytes(), at).unwrap();
                        }
                    });
                }
            });
            for file in &files {
                same(read(file, 8, 0), round.to_ne_bytes());
                same(read(file, 8, PAGE as u64), round.to_ne_bytes());
            }
        }
    });
}

/// H-10: two nodes rename between two directories, each in the other direction.
#[test]
fn h10_names_move_between_two_directories_in_both_directions() {
    watched(|| {
        let rig = Rig::new();
        for dir in ["d", "e"] {
            rig.nodes[0].create_dir(dir, 0o755).unwrap();
        }
        rig.open(0, "d/x");
        rig.open(1, "e/y");
        thread::scope(|scope| {
            let moves = [("d/x", "e/x"), ("e/y", "d/y")];
            for (volume, (there, back)) in rig.nodes.iter().zip(moves) {
                scope.spawn(move || {
                    for _ in 0..ROUNDS {
                        volume.rename(there, back).unwrap();
                        volume.rename(back, there).unwrap();
                    }
                });
            }
        });
        assert!(rig.nodes[1].metadata("d/x").is_ok());
        assert!(rig.nodes[0].metadata("e/y").is_ok());
    });
}

/// H-11: a node lists where a file has bytes, into its own cold mapping of that file, while the other writes it.
#[test]
fn h11_records_of_a_file_are_stored_into_its_own_mapping() {
    both(|delivery| {
        let rig = Rig::new();
        let files = rig.everywhere("f");
        for page in 0..8 {
            files[1].write_at(b"data", page * 4 * PAGE as u64).unwrap();
        }
        let own = map(&files[0], MapAccess::Write, delivery);
        for round in 0..ROUNDS as u64 {
            files[1]
                .write_at(b"more", round % 8 * 4 * PAGE as u64)
                .unwrap();
            let mut into = IovCursor::from_mut_slice(bytes_mut(&own, PAGE, PAGE));
            let found = files[0].extents(0..own.len() as u64, &mut into).unwrap();
            assert!(found.records > 0);
        }
    });
}

/// B-7, C-9, T62 (e): a write of node 0 waits for its source, which is slow to come; node 1 cuts the file meanwhile, which nothing
/// keeps from it. What comes then is written behind a hole.
#[test]
fn t62_a_file_is_cut_by_one_node_while_a_write_of_another_waits_for_its_source() {
    for direct in [false, true] {
        both(move |delivery| cut_during_fault_in(direct, false, delivery));
    }
}

/// T61, T62 (e): the same with a weak hold of the glock left behind meanwhile: it is taken away.
#[test]
fn t61_may_demote_a_weak_hold_keeps_no_other_node_from_cutting_the_file() {
    both(|delivery| cut_during_fault_in(false, true, delivery));
}

fn cut_during_fault_in(direct: bool, weak: bool, delivery: pinfold::Delivery) {
    let rig = Rig::with(2, Duration::from_millis(2), |_, builder| {
        builder.may_demote(weak)
    });
    let slow: Arc<std::sync::Mutex<Option<Arc<DeferredObject>>>> = Arc::default();
    let elsewhere = tempfile::tempdir().unwrap();
    std::fs::write(elsewhere.path().join("source"), filled(8 * PAGE, b's')).unwrap();
    let kept = Arc::clone(&slow);
    let sources = Volume::builder()
        .memory(MEMORY)
        .object_layer(Arc::new(move |object| {
            let deferred = DeferredObject::new(object);
            *kept.lock().unwrap() = Some(Arc::clone(&deferred));
            deferred as Arc<dyn Object>
        }))
        .open_dir(elsewhere.path())
        .unwrap();
    let source = sources.open("source", &rw()).unwrap();
    let source = map(&source, MapAccess::Read, delivery);
    let slow = slow.lock().unwrap().clone().unwrap();

    let file = rig.open_with(0, "f", &rw().direct(direct));
    let other = rig.open(1, "f");
    other.write_at(&filled(8 * PAGE, b'o'), 0).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let at = 4 * PAGE as u64;
            file.write_at(bytes(&source, 0, 2 * PAGE), at).unwrap()
        });
        until(|| !slow.queued().is_empty());
        // Were anything held, this would wait for ever.
        other.set_len(PAGE as u64).unwrap();
        assert_eq!(other.len(), PAGE as u64);
        slow.open();
        assert_eq!(writer.join().unwrap(), 2 * PAGE);
    });
    assert_eq!(counts(&rig.nodes[0], &file).stripped, u64::from(weak));
    let mut expected = filled(PAGE, b'o');
    expected.resize(4 * PAGE, 0);
    expected.extend(filled(2 * PAGE, b's'));
    same(read(&other, 9 * PAGE, 0), expected);
}

fn counts(node: &Volume, file: &File) -> Counts {
    let reports = node.glocks().unwrap().report();
    let number = file.node().id().inode;
    let mut found = reports.iter().filter(|report| report.name.number == number);
    found.next().unwrap().counts
}

/// T61: what a weak hold is for: nobody wants the file while its source comes, and the write goes on where it was.
#[test]
fn t61_may_demote_a_write_goes_on_under_the_glock_that_nobody_wanted() {
    both(|delivery| {
        let asked = [false, true].map(|weak| {
            let rig = Rig::with(1, Duration::ZERO, |_, builder| builder.may_demote(weak));
            let (file, source) = (rig.open(0, "f"), rig.open(0, "source"));
            source.write_at(&filled(64 * PAGE, b's'), 0).unwrap();
            file.write_at(b"o", 0).unwrap();
            let cold = map(&source, MapAccess::Read, delivery);
            source.drop_cache().unwrap();
            let before = counts(&rig.nodes[0], &file).queued;
            let wrote = file.write_at(bytes(&cold, 0, 64 * PAGE), 0).unwrap();
            assert_eq!(wrote, 64 * PAGE);
            let after = counts(&rig.nodes[0], &file);
            same(read(&file, 65 * PAGE, 0), filled(64 * PAGE, b's'));
            assert_eq!(after.stripped, 0);
            after.queued - before
        });
        assert!(asked[0] > 1, "a cold source is brought in");
        assert_eq!(asked[1], 1, "the glock was let go of");
    });
}

/// T62 (c): direct writes on node 0, buffered and mapped reads on node 1: after a write returned, nothing older is read.
#[test]
fn t62_direct_writes_of_one_node_are_read_at_once_on_another() {
    both(|delivery| {
        let rig = Rig::new();
        let direct = rig.open_with(0, "f", &rw().direct(true));
        let reader = rig.open(1, "f");
        reader.write_at(&filled(2 * PAGE, 0), 0).unwrap();
        let mapped = map(&reader, MapAccess::Read, delivery);
        let over = AtomicBool::new(false);
        let written = std::sync::atomic::AtomicU64::new(0);
        thread::scope(|scope| {
            let (over, written) = (&over, &written);
            let look = |load: &dyn Fn() -> u64| {
                while !over.load(Ordering::SeqCst) {
                    let before = written.load(Ordering::SeqCst);
                    let seen = load();
                    assert!(seen >= before, "{seen} was read after {before} was written");
                }
            };
            let (reader, mapped) = (&reader, &mapped);
            scope.spawn(move || look(&|| word_of(&read(reader, 8, 0))));
            scope.spawn(move || look(&|| word(mapped, 0).load(Ordering::SeqCst)));
            let mut buf = AlignedBuf::zeroed(PAGE);
            for number in 1..ROUNDS as u64 {
                buf.as_mut_slice()[..8].copy_from_slice(&number.to_ne_bytes());
                assert_eq!(direct.write_at(buf.as_mut_slice(), 0).unwrap(), PAGE);
                written.store(number, Ordering::SeqCst);
            }
            over.store(true, Ordering::SeqCst);
        });
    });
}

fn word_of(bytes: &[u8]) -> u64 {
    u64::from_ne_bytes(bytes.try_into().unwrap())
}

/// B-5, T15: eight threads on two nodes, and on eight, append records; each is whole and none is lost.
#[test]
fn t15_records_appended_by_several_nodes_are_whole_and_all_there() {
    for nodes in [2, 8] {
        watched(move || appended_by(nodes));
    }
}

fn appended_by(nodes: usize) {
    const RECORD: usize = 100;
    const EACH: usize = 60;
    let rig = Rig::of(nodes);
    let options = rw().append(true);
    let open = |node| rig.open_with(node, "log", &options);
    let files: Vec<File> = (0..nodes).map(open).collect();
    thread::scope(|scope| {
        for thread in 0..8u8 {
            let file = &files[usize::from(thread) % nodes];
            scope.spawn(move || {
                for _ in 0..EACH {
                    assert_eq!(
                        file.write_at(&filled(RECORD, thread + 1), 0).unwrap(),
                        RECORD
                    );
                }
            });
        }
    });
    let log = read(&files[0], 10 * 8 * EACH * RECORD, 0);
    assert_eq!(log.len(), 8 * EACH * RECORD);
    let mut counts = [0; 9];
    for record in log.chunks(RECORD) {
        assert!(record.iter().all(|&byte| byte == record[0]), "torn");
        counts[usize::from(record[0])] += 1;
    }
    assert_eq!(counts[1..], [EACH; 8]);
}

/// H-9, T65: no path takes an inode's lock under a glock, and all of them took glocks: the order is checked at each.
#[test]
fn t65_all_paths_of_a_shared_file_keep_the_order_of_locks() {
    use pinfold_base::rank::{self, Rank};
    if !rank::CHECKED {
        return;
    }
    both(|delivery| {
        let before = rank::entered(Rank::Glock);
        let rig = Rig::new();
        let files = rig.everywhere("f");
        let direct = rig.open_with(0, "f", &rw().direct(true));
        files[0].write_at(&filled(4 * PAGE, 1), 0).unwrap();
        let [one, two] = [0, 1].map(|node| map(&files[node], MapAccess::Write, delivery));
        word(&two, 0).store(1, Ordering::SeqCst);
        assert_eq!(
            direct.read_at(bytes_mut(&one, PAGE, PAGE), 0).unwrap(),
            PAGE
        );
        assert_eq!(direct.write_at(bytes(&one, 0, PAGE), 0).unwrap(), PAGE);
        files[1].append(&[2; 10]).unwrap();
        files[0].punch(0..PAGE as u64).unwrap();
        files[1].set_len(3 * PAGE as u64).unwrap();
        files[0].sync_all().unwrap();
        files[1].seek_to(pinfold::Seek::Data, 0).unwrap();
        rig.nodes[0].rename("f", "g").unwrap();
        rig.nodes[1].remove_file("g").unwrap();
        assert!(rank::entered(Rank::Glock) > before + 20);
    });
}
