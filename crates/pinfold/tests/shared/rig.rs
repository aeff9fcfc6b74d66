//! What the tests of several nodes share.

use std::os::fd::AsRawFd as _;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use pinfold::glocks::Options;
use pinfold::glocks::service::local::Local;
use pinfold::{Delivery, File, MapAccess, MapOptions, Mapping, OpenOptions, Volume, VolumeBuilder};

/// How long anything that is not stuck takes at most, however busy the machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// Makes a mapping that stays: the first of a process waits for calls under way, and other tests have some that take long.
fn keep_a_mapping() {
    static KEPT: OnceLock<Mapping> = OnceLock::new();
    KEPT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::builder().memory(MEMORY).open_dir(dir.path());
        let file = volume.unwrap().open("f", &rw()).unwrap();
        file.set_len(1).unwrap();
        map(&file, MapAccess::Read, Delivery::Inline)
    });
}

/// Runs a test; a hang ends the process.
pub fn watched(test: impl FnOnce() + Send + 'static) {
    keep_a_mapping();
    pinfold::testing::within(PATIENCE, test);
}

pub const PAGE: usize = 4096;
pub const MEMORY: u64 = 16 << 20;

/// Two nodes on one directory.
pub struct Rig {
    pub nodes: Vec<Volume>,
    pub service: Local,
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
        Self::with(nodes, hold, |_, builder| builder)
    }

    /// As [`Rig::of`], each node's volume as `set` says. Every other node leaves weak holds behind while it brings memory in,
    /// unless [`MAY_DEMOTE_ENV`] says `all` or `none`.
    pub fn with(
        nodes: usize,
        hold: Duration,
        set: impl Fn(usize, VolumeBuilder) -> VolumeBuilder,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let service = Local::new();
        let nodes = (0..nodes)
            .map(|node| {
                let builder = Volume::builder().memory(MEMORY).may_demote(weak(node));
                let builder = set(node, builder);
                let builder = builder.join(&service, &format!("node{node}"), options(hold));
                builder.unwrap().open_dir(dir.path()).unwrap()
            })
            .collect();
        Self {
            nodes,
            service,
            dir,
        }
    }

    /// Opens a file on every node.
    pub fn everywhere(&self, name: &str) -> Vec<Arc<File>> {
        (0..self.nodes.len())
            .map(|node| Arc::new(self.open(node, name)))
            .collect()
    }

    /// Opens a file on one node; makes it if there is none.
    pub fn open(&self, node: usize, name: &str) -> File {
        self.open_with(node, name, &rw())
    }

    pub fn open_with(&self, node: usize, name: &str, options: &OpenOptions) -> File {
        self.nodes[node].open(name, options).unwrap()
    }
}

/// The variable that says which nodes leave weak holds behind.
const MAY_DEMOTE_ENV: &str = "PINFOLD_MAY_DEMOTE";

fn weak(node: usize) -> bool {
    match std::env::var(MAY_DEMOTE_ENV).as_deref() {
        Ok("all") => true,
        Ok("none") => false,
        Ok(other) => panic!("{MAY_DEMOTE_ENV} is {other:?}, not all or none"),
        Err(_) => node % 2 == 1,
    }
}

pub fn rw() -> OpenOptions {
    OpenOptions::new().read(true).write(true).create(true)
}

pub fn options(hold: Duration) -> Options {
    Options {
        hold,
        ..Options::default()
    }
}

/// Runs a test in both deliveries of faults.
pub fn both(test: impl Fn(Delivery) + Send + Sync + Copy + 'static) {
    for delivery in [Delivery::Handler, Delivery::Inline] {
        watched(move || test(delivery));
    }
}

pub fn map(file: &File, access: MapAccess, delivery: Delivery) -> Mapping {
    let options = MapOptions::new().access(access).delivery(delivery);
    file.map(0..file.len(), &options).unwrap()
}

/// A word of mapped memory, as a program that shares it uses it.
pub fn word(map: &Mapping, at: usize) -> &AtomicU64 {
    assert!(at + 8 <= map.len() && at.is_multiple_of(8));
    // SAFETY: inside the mapping, which is borrowed, and aligned; everybody uses it as an atomic word.
    unsafe { AtomicU64::from_ptr(map.as_mut_ptr().wrapping_add(at).cast()) }
}

/// The mapped bytes as a buffer of a call. The library copies them as raw memory.
pub fn bytes(map: &Mapping, at: usize, len: usize) -> &[u8] {
    assert!(at + len <= map.len());
    // SAFETY: inside the mapping; handed to calls that make raw copies only.
    unsafe { std::slice::from_raw_parts(map.as_ptr().wrapping_add(at), len) }
}

/// The mapped bytes as a target of a call.
#[expect(
    clippy::mut_from_ref,
    reason = "a mapping is memory that anybody may change"
)]
pub fn bytes_mut(map: &Mapping, at: usize, len: usize) -> &mut [u8] {
    assert!(at + len <= map.len());
    // SAFETY: as for `bytes`; used by one call at a time.
    unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().wrapping_add(at), len) }
}

/// Tells whether a system call can read a byte there.
pub fn readable(addr: *const u8) -> bool {
    let (_from, to) = std::io::pipe().unwrap();
    // SAFETY: the kernel reads the byte or answers EFAULT.
    unsafe { libc::write(to.as_raw_fd(), addr.cast(), 1) == 1 }
}

/// Waits until something is so, which it will be unless there is a bug; the watchdog ends the wait otherwise.
pub fn until(mut so: impl FnMut() -> bool) {
    while !so() {
        std::thread::sleep(Duration::from_millis(1));
    }
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

/// Asserts that bytes are what they should be, and tells where they first are not.
#[track_caller]
pub fn same(seen: impl AsRef<[u8]>, expected: impl AsRef<[u8]>) {
    let (seen, expected) = (seen.as_ref(), expected.as_ref());
    assert_eq!(seen.len(), expected.len(), "so many bytes");
    let differ = seen.iter().zip(expected).position(|(a, b)| a != b);
    if let Some(at) = differ {
        panic!("byte {at} is {}, not {}", seen[at], expected[at]);
    }
}
