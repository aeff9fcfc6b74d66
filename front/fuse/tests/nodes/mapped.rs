//! Shared mappings.

use std::time::Duration;

use pinfold::Errno;

use crate::rig::{Program, Rig};

const SIGBUS: i32 = 7;

/// Both programs do the same at once.
fn both(programs: &mut [Program; 2], code: impl Fn(usize) -> String) {
    for (which, program) in programs.iter_mut().enumerate() {
        program.begin(&code(which));
    }
    for program in programs {
        assert_eq!(program.end(), "None");
    }
}

#[test]
fn t62_a_store_through_a_mapping_is_seen_on_the_other_mount_at_once() {
    let Some(rig) = Rig::new() else { return };
    let mut programs = rig.programs();
    programs[0].run("os.truncate(opened('f'), 12288)");
    for program in &mut programs {
        program.map("f", 12288);
    }
    for round in 1..=20 {
        let here = round % 2;
        let at = (round * 8) % 12280 / 8 * 8;
        let value = round as u64 * 1_000_003;
        programs[here].put(value, at);
        assert_eq!(programs[1 - here].get(at), value, "by a mapping");
        let read = format!("struct.unpack('<Q', os.pread(fd, 8, {at}))[0]");
        assert_eq!(
            programs[1 - here].run(&read),
            value.to_string(),
            "by a read"
        );
        assert_eq!(
            programs[here].run(&read),
            value.to_string(),
            "by a read here"
        );
        let write = format!("os.pwrite(fd, struct.pack('<Q', {}), {at})", value + 1);
        programs[1 - here].run(&write);
        assert_eq!(programs[here].get(at), value + 1, "written there");
        assert_eq!(programs[1 - here].get(at), value + 1, "written here");
    }
}

#[test]
fn t62_a_mapped_counter_of_two_mounts_counts_every_step_taken_under_a_file_lock() {
    const TIMES: usize = 40;
    let Some(rig) = Rig::new() else { return };
    let mut programs = rig.programs();
    programs[0].run("os.truncate(opened('f'), 4096)");
    programs[0].map("f", 4096);
    programs[1].map("f", 4096);
    both(&mut programs, |_| {
        format!(
            "for _ in range({TIMES}):\n fcntl.lockf(fd, fcntl.LOCK_EX)\n put(m, get(m) + 1)\n fcntl.lockf(fd, fcntl.LOCK_UN)"
        )
    });
    for program in &mut programs {
        assert_eq!(program.get(0), 2 * TIMES as u64);
    }
}

#[test]
fn t62_two_mounts_that_store_to_one_page_without_a_lock_both_get_on() {
    let Some(rig) = Rig::new() else { return };
    let mut programs = rig.programs();
    programs[0].run("os.truncate(opened('f'), 4096)");
    programs[0].map("f", 4096);
    programs[1].map("f", 4096);
    // Each stores to a place of its own and watches the other's until that is done.
    both(&mut programs, |which| {
        let (own, other) = (which * 64, (1 - which) * 64);
        format!(
            "i = seen = 0\nwhile i < 3000 or seen < 3000:\n if i < 3000:\n  i += 1\n  put(m, i, {own})\n  assert get(m, {own}) == i\n now = get(m, {other})\n assert now >= seen, (now, seen)\n seen = now"
        )
    });
}

#[test]
fn h1_two_mounts_write_each_file_from_a_mapping_of_the_other() {
    let Some(rig) = Rig::new() else { return };
    let mut programs = rig.programs();
    programs[0].run("[os.truncate(opened(name), 65536) for name in 'ab']");
    both(&mut programs, |which| {
        let (to, from) = if which == 0 { ("a", "b") } else { ("b", "a") };
        format!(
            "to = opened('{to}')\nm = mapped(opened('{from}'), 65536)\nfor i in range(40):\n m[i * 4] = i\n assert os.pwrite(to, memoryview(m)[:40000], 100) == 40000\n assert os.preadv(to, [memoryview(m)[8192:16384]], 4096) == 8192"
        )
    });
}

#[test]
fn h2_a_file_is_written_from_its_own_mapping() {
    let Some(rig) = Rig::new() else { return };
    let mut programs = rig.programs();
    programs[0].run("os.truncate(opened('f'), 16384)");
    both(&mut programs, |which| {
        format!(
            "fd = opened('f')\nm = mapped(fd, 16384)\nfor i in range(30):\n put(m, i, {which} * 8)\n assert os.pwrite(fd, memoryview(m)[{which} * 8:{which} * 8 + 8], 8192 + {which} * 8) == 8\n assert get(m, 8192 + {which} * 8) == i"
        )
    });
}

#[test]
fn stores_and_writes_to_one_page_lose_nothing_of_each_other() {
    let Some(rig) = Rig::new() else { return };
    // Three programs on one mount, and one that takes the file away from it time and again.
    let at = |node: usize| Program::start(&rig.nodes[node].mnt);
    let mut programs = [at(0), at(0), at(0), at(1)];
    programs[0].run("os.truncate(opened('f'), 8192)");
    for (which, program) in programs.iter_mut().enumerate() {
        program.map("f", 8192);
        let own = which * 16;
        let step = match which {
            0 => "put(m, i, at)",
            _ => "os.pwrite(fd, struct.pack('<Q', i), at)",
        };
        program.begin(&format!(
            "for i in range(1, 400):\n at = {own} + i % 2 * 4096\n {step}\n assert get(m, at) == i, (get(m, at), i)\n assert struct.unpack('<Q', os.pread(fd, 8, at))[0] == i"
        ));
    }
    for program in &mut programs {
        assert_eq!(program.end(), "None");
    }
    for which in 0..4 {
        for other in &mut programs {
            assert_eq!(other.get(which * 16), 398);
            assert_eq!(other.get(which * 16 + 4096), 399);
        }
    }
}

#[test]
fn a_mapping_follows_the_end_of_the_file_that_the_other_mount_moves() {
    let Some(rig) = Rig::new() else { return };
    let [mut one, mut two] = rig.programs();
    // Python maps no more than there is.
    one.run("os.truncate(opened('f'), 16384)");
    one.map("f", 16384);
    two.map("f", 16384);
    one.run("os.truncate(fd, 0)\nos.pwrite(fd, b'x' * 100, 0)");
    assert_eq!(one.run("m[99], m[100]"), "(120, 0)");
    // Longer within the page: nobody here asks for the size before storing there.
    two.run("os.pwrite(fd, b'y' * 3000, 100)");
    one.run("m[2000] = 122\nm.flush()");
    assert_eq!(two.run("m[1999], m[2000], m[3099]"), "(121, 122, 121)");
    // Longer by pages: a page that is read tells of it.
    two.run("os.truncate(fd, 10000)");
    two.run("m[0] = 65\nm[9999] = 66");
    assert_eq!(one.run("m[0], m[9999]"), "(65, 66)");
    one.run("m[9000] = 67");
    assert_eq!(two.run("m[9000]"), "67");
    // Shorter: what is behind the end is gone, within its page too.
    two.run("os.truncate(fd, 5000)");
    two.run("os.truncate(fd, 6000)");
    assert_eq!(one.run("m[4999], m[5000], m[5999]"), "(0, 0, 0)");
    assert_eq!(one.dies("m[9000]"), Some(SIGBUS));
    assert_eq!(two.dies("m[8192]"), Some(SIGBUS));
}

#[test]
fn a_file_is_cut_and_grows_under_mappings_that_are_stored_to() {
    let Some(rig) = Rig::new() else { return };
    let mut programs = rig.programs();
    programs[0].run("os.truncate(opened('f'), 65536)");
    for program in &mut programs {
        program.map("f", 65536);
    }
    // The first two pages stay; what is behind them comes and goes.
    both(&mut programs, |which| {
        format!(
            "for i in range(1, 30):\n put(m, i, {which} * 4096)\n os.ftruncate(fd, 8192 + i * 100)\n assert get(m, {which} * 4096) == i\n put(m, i, {which} * 4096 + 8)\n os.ftruncate(fd, 65536)"
        )
    });
    for program in &mut programs {
        for at in [0, 8, 4096, 4104] {
            assert_eq!(program.get(at), 29);
        }
    }
}

#[test]
fn pages_that_were_read_before_somebody_could_store_to_them_are_not_stored_to_unseen() {
    let Some(rig) = Rig::new() else { return };
    let [mut one, mut two] = rig.programs();
    one.run("os.pwrite(opened('f'), bytes(8192), 0)");
    // Both have the page to read.
    for program in [&mut one, &mut two] {
        program.run("r = mapped(opened('f', os.O_RDONLY), 8192, mmap.PROT_READ)");
        program.run("assert r[0] == 0 and r[5000] == 0");
    }
    // Now one may store: by a page that is there already it would do so without anybody's knowing.
    one.map("f", 8192);
    one.put(7, 0);
    assert_eq!(two.run("r[0]"), "7");
    assert_eq!(one.run("r[0]"), "7");
}

#[test]
fn h6_pages_are_served_while_calls_wait_for_glocks_on_every_thread() {
    // One thread for the session, and none of it may wait.
    let Some(rig) = Rig::with(Duration::from_millis(1), Some(1)) else {
        return;
    };
    let mut programs = rig.programs();
    programs[0].run("[os.truncate(opened(name), 8192) for name in 'abcd']");
    both(&mut programs, |which| {
        format!(
            "
def use(name, i):
 fd = opened(name)
 m = mapped(fd, 8192)
 for j in range(3):
  put(m, j, 8 * i)
  os.pwrite(fd, struct.pack('<Q', j), 4096 + 8 * i)
  os.fstat(fd)
  assert struct.unpack('<Q', os.pread(fd, 8, 8 * i))[0] == j
  done.append(name)

done = []
threads = [threading.Thread(target=use, args=('abcd'[i % 4], i + 16 * {which})) for i in range(16)]
for t in threads: t.start()

for t in threads: t.join()

assert len(done) == 48, len(done)
"
        )
    });
}

#[test]
fn t64_a_node_that_has_withdrawn_leaves_no_page_in_its_mappings_and_can_be_unmounted() {
    let Some(rig) = Rig::new() else { return };
    // No other: what waits for a lock of a node that has withdrawn waits until that leaves, at the test's end.
    let mut one = Program::start(&rig.nodes[0].mnt);
    one.run("os.pwrite(opened('f'), bytes(8192), 0)");
    one.map("f", 8192);
    one.put(1, 0);
    rig.nodes[0].volume.glocks().unwrap().withdraw(Errno::EIO);
    assert_eq!(
        one.dies("while True: put(m, 2, 0)"),
        Some(SIGBUS),
        "the page goes, and does not come back"
    );
    let refused = std::fs::metadata(rig.nodes[0].mnt.join("f")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(5));
}

#[test]
fn what_is_stored_through_a_mapping_is_durable_after_a_sync_on_the_other_mount() {
    let Some(rig) = Rig::new() else { return };
    let [mut one, mut two] = rig.programs();
    one.run("os.truncate(opened('f'), 8192)");
    one.map("f", 8192);
    one.put(42, 4096);
    two.run("fd = opened('f')\nos.fsync(fd)");
    let stored = std::fs::read(rig.data.join("f")).unwrap();
    assert_eq!(stored[4096..4104], 42u64.to_le_bytes());
    // Unmapped, closed and synced here: nothing is left behind.
    one.put(43, 4096);
    one.run("m.close()\nos.fsync(fd)");
    let stored = std::fs::read(rig.data.join("f")).unwrap();
    assert_eq!(stored[4096..4104], 43u64.to_le_bytes());
}
