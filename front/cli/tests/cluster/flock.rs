//! flock(2) on two mounts of one directory, and in the directory itself.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{LIMIT, Node, Place, is_there, rounds};

const TRY: FlockOperation = FlockOperation::NonBlockingLockExclusive;
const TRY_SHARED: FlockOperation = FlockOperation::NonBlockingLockShared;

/// `flock [OPTIONS] FILE COMMAND…`, ended in the end.
fn flock_program(at: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", &LIMIT.as_secs().to_string(), "flock"])
        .args(arguments)
        .current_dir(at)
        .stdout(Stdio::null());
    command
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < LIMIT, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process that has the lock at `node`, until it is killed.
fn holder(node: &Node) -> Child {
    // No process between it and us: it is the one that is killed.
    let child = Command::new("flock")
        .args(["--no-fork", "file", "sleep", &LIMIT.as_secs().to_string()])
        .current_dir(&node.mnt)
        .spawn()
        .unwrap();
    let file = File::open(node.mnt.join("file")).unwrap();
    until("the holder has it", || match flock(&file, TRY_SHARED) {
        Ok(()) => flock(&file, FlockOperation::Unlock).is_err(),
        Err(error) => error == Errno::WOULDBLOCK,
    });
    child
}

#[test]
fn t62_flock_holds_between_mounts_and_in_the_directory() {
    let place = Place::new();
    let Some(nodes) = place.two() else { return };
    let path = place.path("data").join("file");
    std::fs::write(&path, "").unwrap();
    let open = |path| File::options().read(true).write(true).open(path).unwrap();
    let [one, two] = [&nodes[0], &nodes[1]].map(|node| open(node.mnt.join("file")));
    let beside = open(path);
    flock(&one, TRY).unwrap();
    for other in [&two, &beside] {
        assert_eq!(flock(other, TRY), Err(Errno::WOULDBLOCK));
        assert_eq!(flock(other, TRY_SHARED), Err(Errno::WOULDBLOCK));
    }
    if is_there("flock") {
        for at in [&nodes[1].mnt, &place.path("data")] {
            let refused = flock_program(at, &["--nonblock", "file", "true"]).status();
            assert_eq!(refused.unwrap().code(), Some(1));
        }
    }
    // Locks of records are others, of all of them too.
    rustix::fs::fcntl_lock(&two, TRY).unwrap();
    rustix::fs::fcntl_lock(&two, FlockOperation::Unlock).unwrap();
    assert_eq!(flock(&beside, TRY_SHARED), Err(Errno::WOULDBLOCK));

    // Shared by three; then one alone, as soon as nobody else has it.
    flock(&one, TRY_SHARED).unwrap();
    flock(&two, TRY_SHARED).unwrap();
    flock(&beside, TRY_SHARED).unwrap();
    assert_eq!(flock(&beside, TRY), Err(Errno::WOULDBLOCK));
    flock(&one, FlockOperation::Unlock).unwrap();
    flock(&beside, FlockOperation::Unlock).unwrap();
    flock(&two, TRY).unwrap();
    assert_eq!(flock(&one, TRY_SHARED), Err(Errno::WOULDBLOCK));

    // It is the open file's: a copy of the descriptor keeps it, and the last close gives it back.
    let copy = two.as_fd().try_clone_to_owned().unwrap();
    drop(two);
    assert_eq!(flock(&one, TRY_SHARED), Err(Errno::WOULDBLOCK));
    drop(copy);
    until("the last close gives it back", || {
        flock(&beside, TRY).is_ok()
    });
    drop((one, beside));
    nodes.into_iter().for_each(Node::end);
}

#[test]
fn t62_a_sum_under_flock_is_exact_whoever_waits() {
    // More than threads that serve requests, on either mount.
    const WAITERS: usize = 24;
    let place = Place::new();
    let Some(nodes) = place.two_lively() else {
        return;
    };
    for name in ["file", "sum"] {
        std::fs::write(nodes[0].mnt.join(name), "0").unwrap();
    }
    let gate = File::open(nodes[0].mnt.join("file")).unwrap();
    flock(&gate, TRY).unwrap();
    let count = rounds();
    std::thread::scope(|scope| {
        for waiter in 0..2 * WAITERS {
            let mnt = &nodes[waiter % 2].mnt;
            scope.spawn(move || {
                let file = File::open(mnt.join("file")).unwrap();
                for _ in 0..count {
                    // Shared first: the change lets others pass, and is no deadlock.
                    flock(&file, FlockOperation::LockShared).unwrap();
                    flock(&file, FlockOperation::LockExclusive).unwrap();
                    let text = std::fs::read_to_string(mnt.join("sum")).unwrap();
                    let sum: usize = text.parse().unwrap();
                    std::fs::write(mnt.join("sum"), (sum + 1).to_string()).unwrap();
                    flock(&file, FlockOperation::Unlock).unwrap();
                }
            });
        }
        // All of them wait, and others are served.
        for round in 0..20 {
            for node in &nodes {
                let text = round.to_string();
                std::fs::write(node.mnt.join("beside"), &text).unwrap();
                assert_eq!(
                    std::fs::read_to_string(node.mnt.join("beside")).unwrap(),
                    text
                );
            }
        }
        assert_eq!(
            std::fs::read_to_string(nodes[1].mnt.join("sum")).unwrap(),
            "0"
        );
        flock(&gate, FlockOperation::Unlock).unwrap();
    });
    let sum = std::fs::read_to_string(nodes[0].mnt.join("sum")).unwrap();
    assert_eq!(sum, (2 * WAITERS * count).to_string());
    drop(gate);
    nodes.into_iter().for_each(Node::end);
}

#[test]
fn t63_flock_goes_with_whoever_is_killed_and_so_does_the_wait_for_it() {
    let place = Place::new();
    if !is_there("flock") {
        return;
    }
    let Some(nodes) = place.two() else { return };
    std::fs::write(nodes[0].mnt.join("file"), "").unwrap();
    let mut holds = holder(&nodes[0]);
    // Of the other mount: killed while it waits, it ends.
    let mut waits = Command::new("flock")
        .args(["--no-fork", "file", "true"])
        .current_dir(&nodes[1].mnt)
        .spawn()
        .unwrap();
    until("it waits", || {
        let stack = format!("/proc/{}/syscall", waits.id());
        let call = std::fs::read_to_string(stack).unwrap_or_default();
        call.starts_with("73 ") || call.starts_with("32 ") || call.is_empty()
    });
    waits.kill().unwrap();
    assert_eq!(waits.wait().unwrap().code(), None);
    let file = File::open(nodes[1].mnt.join("file")).unwrap();
    assert_eq!(flock(&file, TRY), Err(Errno::WOULDBLOCK));
    holds.kill().unwrap();
    holds.wait().unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();

    // And with a mount.
    flock(&file, FlockOperation::Unlock).unwrap();
    drop(file);
    let mut holds = holder(&nodes[0]);
    let [mut one, two] = nodes;
    let file = File::open(two.mnt.join("file")).unwrap();
    assert_eq!(flock(&file, TRY), Err(Errno::WOULDBLOCK));
    one.child.kill().unwrap();
    one.child.wait().unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    holds.kill().unwrap();
    holds.wait().unwrap();
    drop((file, one));
    two.end();
}

/// A lock of fcntl's that is an open file's (F_OFD_SETLK) goes with it, and has nothing to do with its flock.
#[test]
fn t62_locks_of_an_open_file_go_with_it() {
    const PROGRAM: &str = "
import fcntl, struct, sys, time
one, two = (open(name, 'r+b') for name in sys.argv[1:])
def record(file, kind):
    fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, struct.pack('hhqqi4x', kind, 0, 0, 0, 0))
def refused(call, *arguments):
    try:
        call(*arguments)
    except BlockingIOError:
        return True
    return False
record(one, fcntl.F_WRLCK)
assert refused(record, two, fcntl.F_RDLCK)
fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
assert refused(fcntl.flock, one, fcntl.LOCK_SH | fcntl.LOCK_NB)
fcntl.flock(two, fcntl.LOCK_UN)
assert refused(record, two, fcntl.F_RDLCK), 'unlocking the file unlocked its records'
one.close()
while refused(record, two, fcntl.F_WRLCK):
    time.sleep(0.005)
";
    let place = Place::new();
    if !is_there("python3") {
        return;
    }
    let Some(nodes) = place.two() else { return };
    std::fs::write(nodes[0].mnt.join("file"), "").unwrap();
    let files = [&nodes[0], &nodes[1]].map(|node| node.mnt.join("file"));
    let files = files.each_ref().map(|path| path.to_str().unwrap());
    let arguments = [&["-c", PROGRAM], &files[..]].concat();
    super::must("python3", &arguments, &place.path("data"));
    nodes.into_iter().for_each(Node::end);
}
