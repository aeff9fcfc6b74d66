//! Locks between processes, and error reports between descriptors.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::{Arc, Mutex};

use pinfold::Object;
use pinfold::testing::{Action, FaultyObject, On, Rule};
use pinfold_store::Operation;
use rustix::fs::FlockOperation;

use crate::support::{mounted, mounted_with};

const CHILD_PATH: &str = "PINFOLD_TEST_LOCK_PATH";

/// Runs one of the ignored tests below in another process; tells whether it passed.
fn elsewhere(test: &str, path: &std::path::Path) -> bool {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env(CHILD_PATH, path)
        .output()
        .unwrap()
        .status
        .success()
}

fn file_for_child() -> fs::File {
    let path = std::env::var_os(CHILD_PATH).expect("run by another test");
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

#[test]
#[ignore = "run by other tests as a process of its own"]
fn child_takes_a_record_lock() {
    let operation = FlockOperation::NonBlockingLockExclusive;
    rustix::fs::fcntl_lock(file_for_child(), operation).unwrap();
}

#[test]
#[ignore = "run by other tests as a process of its own"]
fn child_takes_a_whole_file_lock() {
    rustix::fs::flock(file_for_child(), FlockOperation::NonBlockingLockExclusive).unwrap();
}

#[test]
fn record_locks_hold_between_processes() {
    let Some(fixture) = mounted() else { return };
    let path = fixture.mnt.join("a");
    let file = fs::File::create(&path).unwrap();
    assert!(
        elsewhere("locks::child_takes_a_record_lock", &path),
        "nobody holds it yet"
    );
    rustix::fs::fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
    assert!(!elsewhere("locks::child_takes_a_record_lock", &path));
    drop(file);
    assert!(elsewhere("locks::child_takes_a_record_lock", &path));
}

#[test]
fn whole_file_locks_hold_between_processes() {
    let Some(fixture) = mounted() else { return };
    let path = fixture.mnt.join("a");
    let file = fs::File::create(&path).unwrap();
    assert!(
        elsewhere("locks::child_takes_a_whole_file_lock", &path),
        "nobody holds it yet"
    );
    rustix::fs::flock(&file, FlockOperation::LockShared).unwrap();
    assert!(!elsewhere("locks::child_takes_a_whole_file_lock", &path));
    rustix::fs::flock(&file, FlockOperation::Unlock).unwrap();
    assert!(elsewhere("locks::child_takes_a_whole_file_lock", &path));
}

#[test]
fn each_descriptor_is_told_of_a_write_back_error_once() {
    let stores: Arc<Mutex<Vec<Arc<FaultyObject>>>> = Arc::default();
    let kept = Arc::clone(&stores);
    let layer = move |inner: Arc<dyn Object>| -> Arc<dyn Object> {
        let faulty = FaultyObject::new(inner);
        kept.lock().unwrap().push(Arc::clone(&faulty));
        faulty
    };
    let Some(fixture) = mounted_with(|builder| builder.object_layer(Arc::new(layer))) else {
        return;
    };
    let path = fixture.mnt.join("a");
    let first = fs::File::create(&path).unwrap();
    let second = fs::OpenOptions::new().write(true).open(&path).unwrap();
    first.sync_all().unwrap();
    let store = Arc::clone(&stores.lock().unwrap()[0]);
    let failing = On::Only(Operation::Write);
    store.add(Rule::new(failing, Action::Fail(pinfold::Errno::EIO)));
    first.write_at(&[1; 5000], 0).unwrap();
    let eio = |result: std::io::Result<()>| result.unwrap_err().raw_os_error() == Some(libc::EIO);
    assert!(eio(first.sync_all()));
    store.clear();
    first.sync_all().unwrap();
    assert!(eio(second.sync_all()), "who had it open is told as well");
    second.sync_all().unwrap();
    let later = fs::OpenOptions::new().write(true).open(&path).unwrap();
    later.sync_all().unwrap();
    first.write_at(b"good", 0).unwrap();
    first.sync_all().unwrap();
    assert_eq!(&fs::read(fixture.data.join("a")).unwrap()[..4], b"good");
}
