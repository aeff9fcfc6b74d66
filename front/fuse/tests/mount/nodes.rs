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

use crate::support::{Fixture, is_root, mounted_as};

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
