//! The first mapping of a process, made while other threads are inside the library. Alone in its process.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use pinfold::{MapOptions, OpenOptions, Volume};
use pinfold_store::Object;
use pinfold_store::testing::DeferredObject;

/// Longer than the library waits for a call at most.
const PATIENCE: Duration = Duration::from_secs(100);

/// A handler that interrupts a call which began without signals being kept away may find a lock of ours under itself. So a
/// program does not get its first address before such calls have ended.
#[test]
fn t67_the_first_mapping_waits_for_the_calls_under_way() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["slow", "mapped"] {
        std::fs::write(dir.path().join(name), [7; 8192]).unwrap();
    }
    let objects: Arc<std::sync::Mutex<Vec<Arc<DeferredObject>>>> = Arc::default();
    let theirs = Arc::clone(&objects);
    let layer = move |object: Arc<dyn Object>| -> Arc<dyn Object> {
        let deferred = DeferredObject::new(object);
        theirs.lock().unwrap().push(Arc::clone(&deferred));
        deferred
    };
    let volume = Volume::builder()
        .memory(1 << 20)
        .object_layer(Arc::new(layer))
        .open_dir(dir.path())
        .unwrap();
    let options = OpenOptions::new().read(true).write(true);
    let slow = volume.open("slow", &options).unwrap();
    let mapped = volume.open("mapped", &options).unwrap();
    let store = Arc::clone(&objects.lock().unwrap()[0]);
    let (released, (tell, told)) = (Arc::new(AtomicBool::new(false)), mpsc::channel());
    let reader = thread::spawn(move || {
        let mut byte = [0];
        assert_eq!(slow.read_at(&mut byte, 0).unwrap(), 1);
        slow
    });
    assert!(store.wait_queued(1, PATIENCE));
    let mapper = {
        let (released, tell) = (Arc::clone(&released), tell);
        thread::spawn(move || {
            let map = mapped.map(0..8192, &MapOptions::new());
            let early = !released.load(Ordering::SeqCst);
            tell.send(early).unwrap();
            map
        })
    };
    // Time for the mapping to be made early, if nothing keeps it.
    let early = told.recv_timeout(Duration::from_millis(300));
    released.store(true, Ordering::SeqCst);
    store.open();
    assert!(early.is_err(), "mapped while a call was under way");
    assert!(!told.recv_timeout(PATIENCE).unwrap());
    match mapper.join().unwrap() {
        Ok(map) => assert_eq!(map.len(), 8192),
        Err(error) => eprintln!("no mappings here: {error}"),
    }
    drop(reader.join().unwrap());
}
