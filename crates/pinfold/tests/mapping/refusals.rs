//! Faults that cannot be served: SIGBUS for loads and stores, `EFAULT` for system calls, errors from the mapping's own calls;
//! and that it ends when its reason does.

use std::io::{Read, Write};
use std::ops::Range;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinfold::{
    Delivery, Errno, File, MapAccess, MapOptions, Mapping, Object, Privilege, Tracking, Volume,
};
use pinfold_store::testing::MemoryObject;
use pinfold_store::{Geometry, Operation, Seek, StoreError, StoreResult, SyncScope, Transfer};

use super::rig::{PAGE, Rig, SMALL, bytes, bytes_mut, load, pattern, store, watched};

/// What a child exits with after the SIGBUS it was meant to get.
const GOT_BUS: i32 = 42;

const FINE: u8 = 0;
const UNREADABLE: u8 = 1;
const FULL: u8 = 2;
const PANICS: u8 = 3;

/// A store that fails as it is told.
#[derive(Debug)]
struct Moody {
    inner: Arc<dyn Object>,
    mood: Arc<AtomicU8>,
}

impl Moody {
    fn is(&self, mood: u8) -> bool {
        self.mood.load(Ordering::SeqCst) == mood
    }
}

impl Object for Moody {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn read(&self, batch: Vec<Transfer>) {
        assert!(!self.is(PANICS), "the store panics, as it was told to");
        if !self.is(UNREADABLE) {
            return self.inner.read(batch);
        }
        for transfer in batch {
            let error = StoreError {
                operation: Operation::Read,
                offset: transfer.offset,
                len: transfer.segments.bytes() as u64,
                errno: Errno::EIO,
            };
            (transfer.done)(pinfold::Progress::stopped(0, error));
        }
    }

    fn write(&self, batch: Vec<Transfer>) {
        self.inner.write(batch);
    }

    fn len(&self) -> StoreResult<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> StoreResult<()> {
        self.inner.set_len(len)
    }

    fn allocate(&self, range: Range<u64>) -> StoreResult<()> {
        if !self.is(FULL) {
            return self.inner.allocate(range);
        }
        Err(StoreError {
            operation: Operation::Write,
            offset: range.start,
            len: range.end - range.start,
            errno: Errno::ENOSPC,
        })
    }

    fn punch(&self, range: Range<u64>) -> StoreResult<()> {
        self.inner.punch(range)
    }

    fn space_left(&self) -> Option<u64> {
        self.is(FULL).then_some(0)
    }

    fn sync(&self, scope: SyncScope) -> StoreResult<()> {
        self.inner.sync(scope)
    }

    fn seek(&self, what: Seek, offset: u64) -> StoreResult<Option<u64>> {
        self.inner.seek(what, offset)
    }
}

struct Sick {
    rig: Rig,
    mood: Arc<AtomicU8>,
    file: File,
}

/// A file of 20 pages in a store whose mood can be changed.
fn sick(delivery: Delivery) -> Sick {
    let mood = Arc::new(AtomicU8::new(FINE));
    let dir = tempfile::tempdir().unwrap();
    let shared = Arc::clone(&mood);
    let inner: Arc<dyn Object> = MemoryObject::new();
    let volume = Volume::builder()
        .memory(SMALL)
        .object_layer(Arc::new(move |_| {
            Arc::new(Moody {
                inner: Arc::clone(&inner),
                mood: Arc::clone(&shared),
            })
        }))
        .open_dir(dir.path())
        .unwrap();
    let rig = Rig {
        volume,
        delivery,
        dir,
    };
    let file = rig.file("a", 20 * PAGE, 1);
    Sick { rig, mood, file }
}

impl Sick {
    fn map(&self) -> Mapping {
        // What first stores meet here has to meet them when they come.
        let options = MapOptions::new()
            .access(MapAccess::Write)
            .delivery(self.rig.delivery)
            .tracking(Tracking::Sync);
        self.file.map(0..self.file.len(), &options).unwrap()
    }

    fn be(&self, mood: u8) {
        self.mood.store(mood, Ordering::SeqCst);
    }
}

static EXPECTED_PAGE: AtomicUsize = AtomicUsize::new(0);

/// Ends the process: well if it is told of the page that was expected to fail.
fn expect_bus(page: *const u8) {
    extern "C" fn on_bus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel passes a siginfo to a handler installed with SA_SIGINFO.
        let info = unsafe { &*info };
        // SAFETY: SIGBUS carries an address.
        let addr = unsafe { info.si_addr() } as usize;
        let right = addr / PAGE == EXPECTED_PAGE.load(Ordering::SeqCst);
        // SAFETY: ends the process without unwinding.
        unsafe { libc::_exit(if right { GOT_BUS } else { 1 }) };
    }
    EXPECTED_PAGE.store(page.addr() / PAGE, Ordering::SeqCst);
    // SAFETY: all-zero bytes are a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_bus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: a complete action with a handler of the right type.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
}

/// Puts the program's handler below the library's: programs install theirs first, or call `faultin`'s afterwards.
fn handler_first() {
    expect_bus(std::ptr::null());
}

/// A case by name: it ends in SIGBUS.
type Case = (&'static str, fn(Delivery));

const CASES: [Case; 5] = [
    ("beyond_end", |delivery| {
        handler_first();
        let sick = sick(delivery);
        let map = sick
            .rig
            .map_range(&sick.file, 0..30 * PAGE as u64, MapAccess::Read);
        load(&map, 19 * PAGE);
        aim(&map, 20);
        load(&map, 20 * PAGE + 5);
    }),
    ("unreadable", |delivery| {
        handler_first();
        let sick = sick(delivery);
        let map = sick.map();
        sick.be(UNREADABLE);
        aim(&map, 3);
        load(&map, 3 * PAGE + 7);
    }),
    ("full", |delivery| {
        handler_first();
        let sick = sick(delivery);
        let map = sick.map();
        load(&map, 3 * PAGE);
        sick.be(FULL);
        // Loads go on although stores do not.
        load(&map, 4 * PAGE);
        aim(&map, 3);
        store(&map, 3 * PAGE + 7, 1);
    }),
    ("full_at_once", |delivery| {
        handler_first();
        let sick = sick(delivery);
        let map = sick.map();
        sick.be(FULL);
        aim(&map, 18);
        store(&map, 18 * PAGE + 7, 1);
    }),
    ("panics", |delivery| {
        handler_first();
        let sick = sick(delivery);
        let map = sick.map();
        sick.be(PANICS);
        aim(&map, 3);
        load(&map, 3 * PAGE + 7);
    }),
];

fn aim(map: &Mapping, page: usize) {
    EXPECTED_PAGE.store(map.as_ptr().addr() / PAGE + page, Ordering::SeqCst);
}

#[test]
#[ignore = "run by the tests below, in a process of its own"]
fn child() {
    let case = std::env::var("PINFOLD_CASE").unwrap();
    let (name, delivery) = case.split_once(' ').unwrap();
    let delivery = if delivery == "Inline" {
        Delivery::Inline
    } else {
        Delivery::Handler
    };
    let (_, body) = CASES.iter().find(|(known, _)| *known == name).unwrap();
    body(delivery);
    panic!("{case}: no signal came");
}

#[test]
fn an_access_that_cannot_be_served_is_a_signal_with_its_address() {
    watched("signals", || {
        for (case, _) in CASES {
            for delivery in ["Handler", "Inline"] {
                let mut child = Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "mapping::refusals::child", "--ignored"])
                    .env("PINFOLD_CASE", format!("{case} {delivery}"))
                    .stdout(std::process::Stdio::null())
                    .stderr(std::process::Stdio::null())
                    .spawn()
                    .unwrap();
                let begun = Instant::now();
                let status = loop {
                    if let Some(status) = child.try_wait().unwrap() {
                        break status;
                    }
                    if begun.elapsed() > Duration::from_secs(60) {
                        child.kill().unwrap();
                        panic!("{case}, {delivery}: hangs");
                    }
                    thread::sleep(Duration::from_millis(5));
                };
                assert_eq!(status.code(), Some(GOT_BUS), "{case}, {delivery}: {status}");
            }
        }
    });
}

fn in_both(test: impl Fn(&Sick) + Send + Copy + 'static) {
    for delivery in [Delivery::Handler, Delivery::Inline] {
        watched(&format!("{delivery:?}"), move || test(&sick(delivery)));
    }
}

#[test]
fn calls_of_the_mapping_tell_the_error_instead() {
    in_both(|sick| {
        let map = sick.map();
        let mut byte = [0];
        sick.be(UNREADABLE);
        assert_eq!(map.read(5, &mut byte).unwrap_err().errno(), Errno::EIO);
        assert_eq!(map.pin(0..10, false).unwrap_err().errno(), Errno::EIO);
        sick.be(FULL);
        assert_eq!(map.read(5, &mut byte).unwrap(), 1);
        assert_eq!(map.write(5, &byte).unwrap_err().errno(), Errno::ENOSPC);
        let error = map.pin(0..10, true).unwrap_err();
        assert_eq!(error.errno(), Errno::ENOSPC);
        assert!(error.to_string().contains(" a (bytes 0 to 10)"), "{error}");
        sick.be(FINE);
        assert_eq!(map.write(5, &[7]).unwrap(), 1);
        assert_eq!(load(&map, 5), 7);
    });
}

#[test]
fn a_store_that_recovers_is_asked_again() {
    in_both(|sick| {
        let map = sick.map();
        let mut pipe = std::io::pipe().unwrap();
        for mood in [UNREADABLE, PANICS] {
            sick.be(mood);
            // By a system call, which gets EFAULT where a load would get SIGBUS.
            let error = pipe.1.write(bytes(&map, 3 * PAGE, 10)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
            sick.be(FINE);
            let begun = Instant::now();
            while pipe.1.write(bytes(&map, 3 * PAGE, 10)).is_err()
                && sick.rig.delivery == Delivery::Handler
            {
                assert!(
                    begun.elapsed() < Duration::from_secs(60),
                    "refused for ever"
                );
                thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(load(&map, 3 * PAGE), pattern(20 * PAGE, 1)[3 * PAGE]);
            sick.file.drop_cache().unwrap();
        }
        let faults = sick.rig.volume.statistics().faults;
        let handler = sick.rig.delivery == Delivery::Handler;
        assert_eq!(faults.faults_panicked > 0, handler, "{faults:?}");
        assert_eq!(faults.faults_refused > 0, handler, "{faults:?}");
    });
}

#[test]
fn system_calls_on_mapped_memory_work_where_a_thread_serves_faults() {
    watched("system calls", || {
        let rig = Rig::new(SMALL, Delivery::Handler);
        let file = rig.file("a", 100 * PAGE, 1);
        let map = rig.map_range(&file, 0..200 * PAGE as u64, MapAccess::Write);
        let privilege = rig.volume.capabilities().mappings.unwrap();
        let mut pipe = std::io::pipe().unwrap();
        let old = pattern(100 * PAGE, 1);
        let mut back = vec![0; PAGE];
        for page in (0..100).rev() {
            let sent = pipe.1.write(bytes(&map, page * PAGE, PAGE));
            if !privilege.serves_kernel() {
                assert_eq!(sent.unwrap_err().raw_os_error(), Some(libc::EFAULT));
                return;
            }
            assert_eq!(sent.unwrap(), PAGE);
            pipe.0.read_exact(&mut back).unwrap();
            assert!(back == old[page * PAGE..][..PAGE], "page {page}");
        }
        pipe.1.write_all(&[5; 2 * PAGE]).unwrap();
        pipe.0
            .read_exact(bytes_mut(&map, 60 * PAGE + 5, 2 * PAGE))
            .unwrap();
        map.flush(0..100 * PAGE).unwrap();
        let stored = std::fs::read(rig.dir.path().join("a")).unwrap();
        assert!(
            stored[60 * PAGE + 5..62 * PAGE + 5]
                .iter()
                .all(|&byte| byte == 5)
        );
        // Beyond the end of the file it is EFAULT, until the file reaches there; then at once not any more.
        for page in 101..120u64 {
            let place = page as usize * PAGE;
            let error = pipe.1.write(bytes(&map, place, 10)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
            file.set_len((page + 1) * PAGE as u64).unwrap();
            assert_eq!(load(&map, place), 0, "page {page}");
        }
    });
}

#[test]
fn without_privilege_mappings_serve_the_program_itself() {
    watched("user mode only", || {
        for delivery in [Delivery::Handler, Delivery::Inline] {
            let dir = tempfile::tempdir().unwrap();
            let volume = Volume::builder()
                .memory(SMALL)
                .mapping_privileges(Privilege::UserModeOnly..=Privilege::UserModeOnly)
                .open_dir(dir.path())
                .unwrap();
            let rig = Rig {
                volume,
                delivery,
                dir,
            };
            let had = rig.volume.capabilities().mappings.unwrap();
            assert_eq!(had, Privilege::UserModeOnly);
            let file = rig.file("a", 100 * PAGE, 1);
            let map = rig.map(&file, MapAccess::Write);
            let old = pattern(100 * PAGE, 1);
            for page in 0..100 {
                assert_eq!(load(&map, page * PAGE), old[page * PAGE]);
                store(&map, page * PAGE + 1, 0xcc);
            }
            // The library's own calls need no help of the kernel's.
            let copy = rig.open("b");
            let written = copy.write_at(bytes(&map, 0, 100 * PAGE), 0).unwrap();
            assert_eq!(written, 100 * PAGE);
            let private = rig.map(&file, MapAccess::Private);
            let written = copy.write_at(bytes(&private, 0, 100 * PAGE), 0).unwrap();
            assert_eq!(written, 100 * PAGE);
            let mut pipe = std::io::pipe().unwrap();
            map.advise(pinfold::Advice::Random, 0..map.len()).unwrap();
            file.drop_cache().unwrap();
            let error = pipe.1.write(bytes(&map, 7 * PAGE, 5)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
            let pinned = map.pin(7 * PAGE..8 * PAGE, false).unwrap();
            assert_eq!(pipe.1.write(bytes(&map, 7 * PAGE, 5)).unwrap(), 5);
            drop(pinned);
        }
    });
}
