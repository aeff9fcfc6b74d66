//! Writes that come after another node has the lock, of a node that does not know it: only the store can refuse them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pinfold::glocks::Mode;
use pinfold::glocks::service::scripted::Scripted;
use pinfold::testing::{DeferredObject, FencedObject, Tokens};
use pinfold::{Errno, Object, Volume};

use super::rig::{MEMORY, PAGE, filled, options, read, rw, same, until, watched};

/// Two nodes that know nothing of each other: a script grants whatever either asks for, as a service does once it takes
/// the one for dead that has the lock.
struct Apart {
    service: Scripted,
    grants: AtomicU64,
    tokens: Arc<Tokens>,
    /// What node `a` sends to the store waits here.
    slow: Arc<Mutex<Option<Arc<DeferredObject>>>>,
    nodes: [Volume; 2],
    dir: tempfile::TempDir,
}

impl Apart {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let service = Scripted::new();
        let tokens: Arc<Tokens> = Arc::default();
        let slow: Arc<Mutex<Option<Arc<DeferredObject>>>> = Arc::default();
        let nodes = ["a", "b"].map(|name| {
            let (tokens, slow) = (Arc::clone(&tokens), Arc::clone(&slow));
            let layer = move |object: Arc<dyn Object>| {
                let fenced: Arc<dyn Object> = FencedObject::new(object, &tokens);
                if name == "b" {
                    return fenced;
                }
                let deferred = DeferredObject::new(fenced);
                *slow.lock().unwrap() = Some(Arc::clone(&deferred));
                deferred
            };
            Volume::builder()
                .memory(MEMORY)
                .join(&service, name, options(Duration::ZERO))
                .unwrap()
                .object_layer(Arc::new(layer))
                .open_dir(dir.path())
                .unwrap()
        });
        Self {
            service,
            grants: AtomicU64::new(0),
            tokens,
            slow,
            nodes,
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
                    let token = self.grants.fetch_add(1, Ordering::Relaxed) + 1;
                    self.service.grant(&self.service.next(), token);
                }
            }
            working.join().unwrap()
        })
    }
}

/// T63, H-13: a node's write is under way when the node is taken for dead; it arrives when the next owner has read.
#[test]
fn t63_h13_a_late_write_is_refused_by_a_store_that_compares_tokens() {
    watched(|| {
        let apart = Apart::new();
        let [a, b] = &apart.nodes;
        std::fs::write(apart.dir.path().join("f"), filled(PAGE, b'o')).unwrap();
        let file = apart.granting(|| a.open("f", &rw()).unwrap());
        apart.granting(|| file.write_at(&filled(PAGE, b'l'), 0).unwrap());
        let slow = apart.slow.lock().unwrap().clone().unwrap();
        let before = apart.tokens.newest();
        thread::scope(|scope| {
            let storing = scope.spawn(|| file.write_back(0..PAGE as u64));
            until(|| !slow.queued().is_empty());
            let other = apart.granting(|| b.open("f", &rw()).unwrap());
            // It only reads: that alone closes the store to what is older.
            same(apart.granting(|| read(&other, PAGE, 0)), filled(PAGE, b'o'));
            assert!(apart.tokens.newest() > before);
            slow.open();
            let refused = storing.join().unwrap().unwrap_err();
            assert_eq!(refused.errno(), Errno::ESTALE);
            assert_eq!(apart.tokens.refused(), 1);
            let stored = || std::fs::read(apart.dir.path().join("f")).unwrap();
            same(stored(), filled(PAGE, b'o'));
            // Who has the right stores.
            apart.granting(|| other.write_at(&filled(PAGE, b'n'), 0).unwrap());
            apart.granting(|| other.sync_all().unwrap());
            same(stored(), filled(PAGE, b'n'));
            // Nor does it help the late one to try again.
            assert!(file.write_back(0..PAGE as u64).is_err());
            same(stored(), filled(PAGE, b'n'));
            // What has the lock anew takes its token up before it reads.
            let glock = || {
                let reports = b.glocks().unwrap().report();
                let number = other.node().id().inode;
                let mut found = reports.iter().filter(|report| report.name.number == number);
                found.next().unwrap().clone()
            };
            apart.granting(|| {
                apart.service.demote("b", glock().name, Mode::Exclusive);
                until(|| glock().mode == Mode::Unlocked);
            });
            same(apart.granting(|| read(&other, PAGE, 0)), filled(PAGE, b'n'));
            assert_eq!(apart.tokens.newest(), glock().token.0);
        });
        drop(file);
        // Or the volumes' ends would wait for grants of nobody's.
        for node in &apart.nodes {
            node.glocks().unwrap().withdraw(Errno::EIO);
        }
    });
}
