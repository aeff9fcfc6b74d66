//! A mount of one of several nodes, with a lock service that does as it is told.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use pinfold::Errno;
use pinfold::glocks::service::{Events, Reply, Session, Token, Wait};
use pinfold::glocks::{JoinError, LockService, Mode, Name, Options, Time};
use pinfold_fuse::{MountOptions, Revoker};

use crate::support::{Fixture, installed, is_root, mounted_as, python};

/// Grants what is asked for at once, but for inodes of which nothing is to be had.
#[derive(Debug, Default, Clone)]
struct Grudging(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    refused: Mutex<HashSet<u64>>,
    tokens: AtomicU64,
}

struct Member(Grudging, Weak<dyn Events>);

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Member")
    }
}

impl LockService for Grudging {
    fn join(&self, _: &str, events: Weak<dyn Events>) -> Result<Box<dyn Session>, JoinError> {
        Ok(Box::new(Member(self.clone(), events)))
    }
}

impl Session for Member {
    fn request(&self, name: Name, _from: Mode, to: Mode, _wait: Wait) {
        let shared = &self.0.0;
        let refuses = shared.refused.lock().unwrap().contains(&name.number);
        let reply = if refuses && to != Mode::Unlocked {
            Reply::Failed(Errno::EIO)
        } else {
            let token = Token(shared.tokens.fetch_add(1, Ordering::Relaxed));
            Reply::Granted { mode: to, token }
        };
        if let Some(events) = self.1.upgrade() {
            events.reply(name, reply);
        }
    }

    fn good_until(&self) -> Option<Time> {
        None
    }

    fn leave(&self) {}

    fn abandon(&self) {}
}

/// A mounted node; `None` where FUSE cannot be had.
fn node(service: &Grudging) -> Option<Fixture> {
    let revoker = Revoker::default();
    let told = revoker.demoted();
    let options = MountOptions {
        shared: Some(revoker),
        ..MountOptions::default()
    };
    mounted_as(&options, |builder| {
        let builder = builder.join(service, "one", Options::default()).unwrap();
        builder.demoted(told)
    })
}

#[test]
fn a_listing_has_the_names_of_which_attributes_are_not_to_be_had_or_fails() {
    let service = Grudging::default();
    let Some(fixture) = node(&service) else {
        return;
    };
    let names = ["a", "b", "c", "d"];
    for refused in names {
        // A directory for each turn: what was granted once is not asked for again.
        let dir = format!("without-{refused}");
        fs::create_dir(fixture.data.join(&dir)).unwrap();
        for name in names {
            fs::write(fixture.data.join(&dir).join(name), name).unwrap();
        }
        let inode = fs::metadata(fixture.data.join(&dir).join(refused))
            .unwrap()
            .ino();
        service.0.refused.lock().unwrap().insert(inode);
        let listed: Result<Vec<_>, _> = fs::read_dir(fixture.mnt.join(&dir))
            .unwrap()
            .map(|entry| entry.map(|entry| entry.file_name().into_string().unwrap()))
            .collect();
        if let Ok(mut listed) = listed {
            listed.sort();
            assert_eq!(listed, names, "without {refused}'s attributes");
        }
        assert!(fs::metadata(fixture.mnt.join(&dir).join(refused)).is_err());
    }
}

#[test]
fn a_write_to_a_shared_file_takes_its_glock_once() {
    let Some(fixture) = node(&Grudging::default()) else {
        return;
    };
    if !is_root() {
        return;
    }
    let file = fs::File::create(fixture.mnt.join("f")).unwrap();
    let inode = file.metadata().unwrap().ino();
    let taken = || {
        let reports = fixture.volume.glocks().unwrap().report();
        let report = reports.iter().find(|report| report.name.number == inode);
        report.unwrap().counts.queued
    };
    // The kernel may ask for attributes of its own accord, but not with each write.
    let least = (0..8).map(|turn| {
        let before = taken();
        file.write_at(b"some bytes", turn * 10).unwrap();
        taken() - before
    });
    assert_eq!(least.min(), Some(1));
}

/// One thread waits for a record while another closes a descriptor of the file, which gives all of the process's locks back, and
/// begins anew.
#[test]
fn a_record_that_a_thread_waited_for_is_held_whatever_another_closed_meanwhile() {
    const CODE: &str = r#"
import fcntl, os, struct, sys, threading, time
stored, mounted = sys.argv[1:]
def ofd(fd, command, kind, start):
    return struct.unpack("hhqqi4x", fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, 0, start, 1, 0)))[0]
beside = os.open(stored, os.O_RDWR)
def is_free(start):
    return ofd(beside, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, start) == fcntl.F_UNLCK
def until(so):
    end = time.monotonic() + 60
    while not so():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True
for turn in range(5):
    before = os.open(stored, os.O_RDWR)
    ofd(before, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, 0)
    waiter = os.open(mounted, os.O_RDWR)
    tid, outcome = [], []
    def wait():
        tid.append(threading.get_native_id())
        try:
            fcntl.lockf(waiter, fcntl.LOCK_EX, 1, 0)
            outcome.append("held")
        except OSError as error:
            outcome.append(error.errno)
    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: tid and open(f"/proc/self/task/{tid[0]}/syscall").read().startswith("72 "))
    one = os.open(mounted, os.O_RDWR)
    fcntl.lockf(one, fcntl.LOCK_EX, 1, 10)
    other = os.open(mounted, os.O_RDWR)
    os.close(one)
    fcntl.lockf(other, fcntl.LOCK_EX, 1, 20)
    assert until(lambda: is_free(10)), "what was closed is locked still"
    os.close(before)
    thread.join()
    # The thread that tries for it may have come between the two: then it is told so.
    assert outcome[0] in ("held", 9), outcome
    assert outcome[0] != "held" or not is_free(0), "who was told that it has the record has not"
    os.close(waiter)
    os.close(other)
"#;
    if !installed("python3") {
        return;
    }
    let Some(fixture) = node(&Grudging::default()) else {
        return;
    };
    fs::write(fixture.data.join("f"), "contents").unwrap();
    python(CODE, &[&fixture.data.join("f"), &fixture.mnt.join("f")]);
}
