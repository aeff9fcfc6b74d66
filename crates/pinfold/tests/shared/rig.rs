//! What the tests of several nodes share.

use std::sync::Arc;
use std::time::Duration;

use pinfold::glocks::service::local::Local;
use pinfold::glocks::{LockService, Options, Space};
use pinfold::{File, OpenOptions, Volume};

/// How long anything that is not stuck takes at most, however busy the machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// Runs a test; a hang ends the process.
pub fn watched(test: impl FnOnce() + Send + 'static) {
    pinfold::testing::within(PATIENCE, test);
}

pub const PAGE: usize = 4096;
pub const MEMORY: u64 = 16 << 20;

/// Two nodes on one directory.
pub struct Rig {
    pub nodes: Vec<Volume>,
    pub dir: tempfile::TempDir,
}

impl Rig {
    pub fn new() -> Self {
        Self::of(2)
    }

    pub fn of(nodes: usize) -> Self {
        Self::with_hold(nodes, Duration::from_millis(2))
    }

    pub fn with_hold(nodes: usize, hold: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let service = Local::new();
        let nodes = (0..nodes)
            .map(|node| open(&service, &format!("node{node}"), hold, &dir))
            .collect();
        Self { nodes, dir }
    }

    /// Opens a file on one node; makes it if there is none.
    pub fn open(&self, node: usize, name: &str) -> File {
        self.open_with(node, name, &rw())
    }

    pub fn open_with(&self, node: usize, name: &str, options: &OpenOptions) -> File {
        self.nodes[node].open(name, options).unwrap()
    }
}

pub fn rw() -> OpenOptions {
    OpenOptions::new().read(true).write(true).create(true)
}

pub fn space(service: &dyn LockService, name: &str, hold: Duration) -> Arc<Space> {
    let options = Options {
        hold,
        ..Options::default()
    };
    Arc::new(Space::join(service, name, options).unwrap())
}

pub fn open(
    service: &dyn LockService,
    name: &str,
    hold: Duration,
    dir: &tempfile::TempDir,
) -> Volume {
    Volume::builder()
        .memory(MEMORY)
        .glocks(space(service, name, hold))
        .open_dir(dir.path())
        .unwrap()
}

pub fn filled(len: usize, byte: u8) -> Vec<u8> {
    vec![byte; len]
}

pub fn read(file: &File, len: usize, at: u64) -> Vec<u8> {
    let mut buf = vec![0; len];
    let got = file.read_at(&mut buf, at).unwrap();
    buf.truncate(got);
    buf
}
