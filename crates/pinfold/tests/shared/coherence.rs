//! Bytes, sizes, times and names: what one node did, the other sees.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use pinfold::testing::{Action, FaultyObject, On, Rule};
use pinfold::{
    AllocateMode, Errno, ErrorKind, Object, OpenOptions, SetAttributes, SetTime, Volume,
};
use pinfold_store::Operation;

use super::rig::{MEMORY, PAGE, Rig, filled, read, rw, same, until, watched};

#[test]
fn a_read_sees_what_another_node_wrote_before() {
    watched(|| {
        let rig = Rig::new();
        let [a, b] = [0, 1].map(|node| rig.open(node, "f"));
        for round in 0..50u8 {
            let (writer, reader) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
            let bytes = filled(3 * PAGE + 17, round + 1);
            assert_eq!(writer.write_at(&bytes, 5).unwrap(), bytes.len());
            same(read(reader, bytes.len(), 5), &bytes);
            // Both hold it now, and go on reading.
            same(read(writer, bytes.len(), 5), &bytes);
        }
    });
}

#[test]
fn sizes_follow_growth_and_cuts_of_another_node() {
    watched(|| {
        let rig = Rig::new();
        let [a, b] = [0, 1].map(|node| rig.open(node, "f"));
        a.write_at(&filled(10_000, b'a'), 0).unwrap();
        assert_eq!(b.len(), 10_000);
        b.set_len(5000).unwrap();
        same(read(&a, 20_000, 0), filled(5000, b'a'));
        a.set_len(6000).unwrap();
        let mut expected = filled(5000, b'a');
        expected.resize(6000, 0);
        same(read(&b, 20_000, 0), expected);
        same(read(&b, 1, 6000), b"");
        a.write_at(b"z", 6000).unwrap();
        same(read(&b, 2, 6000), b"z");
        b.punch(0..PAGE as u64).unwrap();
        same(read(&a, PAGE, 0), filled(PAGE, 0));
        a.allocate(AllocateMode::Extend, 0..1 << 20).unwrap();
        assert_eq!(b.len(), 1 << 20);
    });
}

#[test]
fn attributes_are_those_that_another_node_left() {
    watched(|| {
        let rig = Rig::new();
        let [a, b] = [0, 1].map(|node| rig.open(node, "f"));
        a.write_at(&filled(100, 1), 0).unwrap();
        let [one, other] = [&a, &b].map(|file| file.node().attributes().unwrap());
        assert_eq!((one.len, one.modified), (other.len, other.modified));
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let set = SetAttributes {
            modified: SetTime::At(then),
            permissions: Some(0o600),
            ..SetAttributes::default()
        };
        b.node().set_attributes(&set).unwrap();
        let seen = a.node().attributes().unwrap();
        assert_eq!((seen.modified, seen.permissions), (then, 0o600));
        // A node that looks for the first time sees what is cached elsewhere.
        a.write_at(&filled(200, 2), 0).unwrap();
        let looked = rig.nodes[1].metadata("f").unwrap();
        assert_eq!(looked.len, 200);
        assert!(looked.modified > then);
    });
}

#[test]
fn a_sync_makes_durable_what_another_node_wrote() {
    watched(|| {
        let rig = Rig::new();
        let [a, b] = [0, 1].map(|node| rig.open(node, "f"));
        a.write_at(&filled(9000, 3), 0).unwrap();
        b.sync_all().unwrap();
        let stored = std::fs::read(rig.dir.path().join("f")).unwrap();
        same(stored, filled(9000, 3));
    });
}

#[test]
fn direct_and_buffered_calls_of_two_nodes_agree() {
    watched(|| {
        let rig = Rig::new();
        let a = rig.open(0, "f");
        let b = rig.open_with(1, "f", &rw().direct(true));
        let mut buf = pinfold::AlignedBuf::zeroed(2 * PAGE);
        for round in 1..20u8 {
            a.write_at(&filled(4 * PAGE, round), 0).unwrap();
            assert_eq!(b.read_at(buf.as_mut_slice(), 0).unwrap(), 2 * PAGE);
            same(&buf.as_mut_slice()[..2 * PAGE], filled(2 * PAGE, round));
            buf.as_mut_slice().fill(100 + round);
            assert_eq!(
                b.write_at(&buf.as_mut_slice()[..2 * PAGE], PAGE as u64)
                    .unwrap(),
                2 * PAGE
            );
            let seen = read(&a, 4 * PAGE, 0);
            same(&seen[..PAGE], filled(PAGE, round));
            same(&seen[PAGE..3 * PAGE], filled(2 * PAGE, 100 + round));
            same(&seen[3 * PAGE..], filled(PAGE, round));
        }
    });
}

/// DF is shared: it changes nodes for none of the transfers that by-pass the cache and leave the size as it is.
#[test]
fn direct_reads_and_writes_of_two_nodes_keep_the_mode_they_share() {
    watched(|| {
        let rig = Rig::new();
        let [a, b] = [0, 1].map(|node| rig.open_with(node, "f", &rw().direct(true)));
        let mut buf = pinfold::AlignedBuf::zeroed(4 * PAGE);
        let bytes = buf.as_mut_slice();
        a.write_at(&bytes[..4 * PAGE], 0).unwrap();
        let inode = a.node().id().inode;
        let asked = || {
            let reports = rig.nodes.iter().map(|node| node.glocks().unwrap().report());
            let of_file = reports
                .flatten()
                .filter(|report| report.name.number == inode);
            of_file.map(|report| report.counts.asked).sum::<u64>()
        };
        let mut before = None;
        for round in 1..10u8 {
            for (writer, reader) in [(&a, &b), (&b, &a)] {
                bytes.fill(round);
                assert_eq!(writer.write_at(&bytes[..PAGE], 0).unwrap(), PAGE);
                bytes.fill(0);
                assert_eq!(reader.read_at(&mut bytes[..PAGE], 0).unwrap(), PAGE);
                same(&bytes[..PAGE], filled(PAGE, round));
            }
            assert_eq!(asked(), *before.get_or_insert_with(asked));
        }
    });
}

#[test]
fn names_that_another_node_changes_are_seen_at_once() {
    watched(|| {
        let rig = Rig::new();
        let (a, b) = (&rig.nodes[0], &rig.nodes[1]);
        a.create_dir("d", 0o755).unwrap();
        a.open("d/x", &rw()).unwrap().write_at(b"x", 0).unwrap();
        let held = b.open("d/x", &rw()).unwrap();
        a.rename("d/x", "y").unwrap();
        assert!(b.metadata("d/x").is_err());
        assert_eq!(b.metadata("y").unwrap().id, held.node().id());
        b.hard_link("y", "d/z").unwrap();
        assert_eq!(a.metadata("y").unwrap().links, 2);
        a.remove_file("y").unwrap();
        b.remove_file("d/z").unwrap();
        // Unlinked, and open on the other node: it lives until that lets go.
        same(read(&held, 9, 0), b"x");
        let new = OpenOptions::new().write(true).create_new(true);
        a.open("d/x", &new).unwrap();
        let refused = b.open("d/x", &new).unwrap_err();
        assert_eq!(refused.errno(), pinfold::Errno::EEXIST);
    });
}

/// A file whose last name and whose last opener on one node are gone is not over: what that node could not store as it was
/// closed is stored all the same, for another has it open.
#[test]
fn an_unlinked_file_keeps_what_one_node_has_dirty_for_another_that_has_it_open() {
    watched(|| {
        let fails: Arc<AtomicBool> = Arc::default();
        let failing = Arc::clone(&fails);
        let rig = Rig::with(2, Duration::from_millis(2), move |node, builder| {
            let failing = Arc::clone(&failing);
            builder.object_layer(Arc::new(move |object| {
                let object = FaultyObject::new(object);
                if node == 0 && failing.load(Ordering::Relaxed) {
                    let first = Rule::new(On::Only(Operation::Write), Action::Fail(Errno::EIO));
                    object.add(first.nth(1));
                }
                object as Arc<dyn Object>
            }))
        });
        for (closes_first, fails_first) in
            [(false, false), (true, false), (false, true), (true, true)]
        {
            fails.store(fails_first, Ordering::Relaxed);
            let [a, b] = [0, 1].map(|node| rig.open(node, "f"));
            a.write_at(&filled(1000, 7), 0).unwrap();
            if closes_first {
                drop(a);
                rig.nodes[0].remove_file("f").unwrap();
            } else {
                rig.nodes[0].remove_file("f").unwrap();
                drop(a);
            }
            same(read(&b, 20_000, 0), filled(1000, 7));
            b.write_at(&filled(10, 8), 1000).unwrap();
            assert_eq!(b.len(), 1010);
        }
    });
}

/// What git does on both sides: write a new file, and rename it over the name that others look for.
#[test]
fn a_name_that_two_nodes_replace_is_always_there_and_whole() {
    watched(|| {
        let rig = Rig::new();
        let put = |node: usize, round: u8| {
            let temporary = format!("new{node}");
            let file = rig.open(node, &temporary);
            let len = 1000 * (1 + usize::from(round) % 5);
            file.write_at(&filled(len, round), 0).unwrap();
            drop(file);
            rig.nodes[node].rename(&temporary, "head").unwrap();
        };
        put(0, 0);
        std::thread::scope(|scope| {
            for node in 0..2 {
                let (put, rig) = (&put, &rig);
                scope.spawn(move || (1..40).for_each(|round| put(node, round)));
                scope.spawn(move || {
                    for _ in 0..40 {
                        let options = OpenOptions::new().read(true);
                        let file = rig.nodes[node].open("head", &options).unwrap();
                        let seen = read(&file, 10_000, 0);
                        let round = seen[0];
                        same(seen, filled(1000 * (1 + usize::from(round) % 5), round));
                    }
                });
            }
        });
    });
}

#[test]
fn data_of_a_file_unlinked_elsewhere_outlives_its_writer() {
    watched(|| {
        let rig = Rig::new();
        let [a, b] = [0, 1].map(|node| rig.open(node, "f"));
        a.write_at(&filled(PAGE, 7), 0).unwrap();
        rig.nodes[0].remove_file("f").unwrap();
        drop(a);
        same(read(&b, PAGE, 0), filled(PAGE, 7));
    });
}

#[test]
fn a_volume_without_glocks_is_kept_out() {
    watched(|| {
        let rig = Rig::new();
        let alone = Volume::builder().memory(MEMORY).open_dir(rig.dir.path());
        assert_eq!(alone.unwrap_err().kind(), ErrorKind::AlreadyServed);
        let dir = rig.dir.path().to_owned();
        let Rig {
            nodes, dir: _kept, ..
        } = rig;
        drop(nodes);
        drop(Volume::builder().memory(MEMORY).open_dir(dir).unwrap());
    });
}

/// A handler of the program that faulted on top of such a thread would wait for it.
#[test]
fn threads_of_a_node_run_no_handler_of_the_program() {
    watched(|| {
        let _rig = Rig::new();
        let field = |status: &str, name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap().trim().to_owned()
        };
        let glock_threads = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap();
            // A thread of another test may have ended.
            let statuses = tasks
                .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok());
            let ours = statuses.filter(|status| field(status, "Name:").starts_with("glock-"));
            ours.collect::<Vec<String>>()
        };
        // Two nodes have five each, which name themselves when they come to run.
        until(|| glock_threads().len() >= 10);
        for status in glock_threads() {
            let blocked = u64::from_str_radix(&field(&status, "SigBlk:"), 16).unwrap();
            assert!(blocked & 1 << (libc::SIGUSR1 - 1) != 0, "{status}");
        }
    });
}

#[test]
fn nodes_that_end_leave_their_locks_to_the_others() {
    watched(|| {
        let mut rig = Rig::of(3);
        let a = rig.open(0, "f");
        a.write_at(&filled(PAGE, 9), 0).unwrap();
        drop(a);
        rig.nodes.remove(0).close().unwrap();
        same(read(&rig.open(0, "f"), PAGE, 0), filled(PAGE, 9));
        drop(rig.nodes.remove(0));
        rig.open(0, "f").write_at(b"alone", 0).unwrap();
    });
}
