//! What the tests of mappings share.

use std::os::fd::AsRawFd as _;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use pinfold::{Delivery, File, MapAccess, MapOptions, Mapping, OpenOptions, Volume};

pub const PAGE: usize = 4096;
pub const SMALL: u64 = pinfold::MEMORY_MIN;
pub const LARGE: u64 = 64 << 20;
/// No test takes nearly so long, however busy the machine; a hang must end it.
const WATCHDOG: Duration = Duration::from_secs(240);

/// Runs a test in both deliveries and with both budgets, each with a watchdog.
pub fn everywhere(test: impl Fn(&Rig) + Send + Sync + Clone + 'static) {
    for memory in [SMALL, LARGE] {
        for delivery in [Delivery::Handler, Delivery::Inline] {
            watched(&format!("{delivery:?}, {memory} bytes"), {
                let test = test.clone();
                move || test(&Rig::new(memory, delivery))
            });
        }
    }
}

/// Runs `test` in a thread of its own; a hang ends the process, for nothing else ends the thread.
pub fn watched(what: &str, test: impl FnOnce() + Send + 'static) {
    let (done, told) = mpsc::channel();
    let worker = thread::Builder::new()
        .name(thread::current().name().unwrap_or("test").to_owned())
        .spawn(move || {
            test();
            let _ = done.send(());
        })
        .unwrap();
    if told.recv_timeout(WATCHDOG) == Err(mpsc::RecvTimeoutError::Timeout) {
        eprintln!("{what}: hangs");
        std::process::abort();
    }
    if let Err(panic) = worker.join() {
        eprintln!("in {what}");
        std::panic::resume_unwind(panic);
    }
}

pub struct Rig {
    pub volume: Volume,
    pub delivery: Delivery,
    pub dir: tempfile::TempDir,
}

impl Rig {
    pub fn new(memory: u64, delivery: Delivery) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::builder()
            .memory(memory)
            .open_dir(dir.path())
            .unwrap();
        Self {
            volume,
            delivery,
            dir,
        }
    }

    pub fn open(&self, name: &str) -> File {
        let options = OpenOptions::new().read(true).write(true).create(true);
        self.volume.open(name, &options).unwrap()
    }

    /// Makes a file whose bytes are `pattern(len, seed)`, none of them cached.
    pub fn file(&self, name: &str, len: usize, seed: u8) -> File {
        let file = self.open(name);
        assert_eq!(file.write_at(&pattern(len, seed), 0).unwrap(), len);
        file.sync_all().unwrap();
        file.drop_cache().unwrap();
        file
    }

    pub fn map(&self, file: &File, access: MapAccess) -> Mapping {
        self.map_range(file, 0..file.len(), access)
    }

    pub fn map_range(
        &self,
        file: &File,
        range: std::ops::Range<u64>,
        access: MapAccess,
    ) -> Mapping {
        let options = MapOptions::new().access(access).delivery(self.delivery);
        file.map(range, &options).unwrap()
    }
}

pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u64).wrapping_mul(2_654_435_761).to_le_bytes()[2] ^ seed)
        .collect()
}

/// Loads a byte as a program does.
pub fn load(map: &Mapping, at: usize) -> u8 {
    assert!(at < map.len());
    // SAFETY: inside the mapping, which is borrowed.
    unsafe { map.as_ptr().wrapping_add(at).read_volatile() }
}

/// Stores a byte as a program does.
pub fn store(map: &Mapping, at: usize, byte: u8) {
    assert!(at < map.len());
    // SAFETY: inside the mapping, which is borrowed; nobody holds references into it.
    unsafe { map.as_mut_ptr().wrapping_add(at).write_volatile(byte) };
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

/// The same file mapped by the kernel.
pub struct Kernel {
    pub file: std::fs::File,
    addr: *mut libc::c_void,
    pub pages: usize,
}

impl Kernel {
    pub fn new(rig: &Rig, bytes: &[u8], pages: usize, access: MapAccess) -> Self {
        let path = rig.dir.path().join("kernel");
        std::fs::write(&path, bytes).unwrap();
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).open(path).unwrap();
        let flags = match access {
            MapAccess::Private => libc::MAP_PRIVATE,
            MapAccess::Read | MapAccess::Write => libc::MAP_SHARED,
        };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.as_raw_fd();
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let addr = unsafe { libc::mmap(std::ptr::null_mut(), pages * PAGE, prot, flags, fd, 0) };
        assert_ne!(addr, libc::MAP_FAILED);
        Self { file, addr, pages }
    }

    pub fn remap(&mut self, pages: usize) {
        // SAFETY: our own mapping; its old address is not used again.
        let addr = unsafe {
            libc::mremap(
                self.addr,
                self.pages * PAGE,
                pages * PAGE,
                libc::MREMAP_MAYMOVE,
            )
        };
        assert_ne!(addr, libc::MAP_FAILED);
        (self.addr, self.pages) = (addr, pages);
    }

    pub fn at(&self, at: usize) -> *mut u8 {
        assert!(at < self.pages * PAGE);
        self.addr.cast::<u8>().wrapping_add(at)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: our own mapping, not used again.
        unsafe { libc::munmap(self.addr, self.pages * PAGE) };
    }
}
