//! Memory, addresses, descriptors and numbers of mappings run out: the budget holds, calls fail with the reason, what works
//! goes on working, and everything works again once there is room. Each case in a process of its own.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pinfold::{
    Advice, AlignedBuf, Delivery, Errno, MapAccess, MapOptions, Mapping, OpenOptions, Volume,
};
use pinfold_mem::region::signal::Handler;

use super::rig::{PAGE, Rig, SMALL, load, pattern, store, watched};

/// Longer than any case takes on a busy machine; two of them fit in the watchdog's time.
const CHILD_MAX: Duration = Duration::from_secs(110);

/// Runs a case in both deliveries, each in a child.
pub fn in_a_child(case: &'static str) {
    watched(case, move || {
        for delivery in ["Handler", "Inline"] {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "mapping::limits::child",
                    "--ignored",
                    "--nocapture",
                ])
                .env("PINFOLD_CASE", case)
                .env("PINFOLD_CASE_DELIVERY", delivery)
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut pipe = child.stderr.take().unwrap();
            let told = thread::spawn(move || {
                let mut told = String::new();
                let _ = pipe.read_to_string(&mut told);
                told
            });
            let begun = Instant::now();
            let status = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break status;
                }
                if begun.elapsed() > CHILD_MAX {
                    child.kill().unwrap();
                }
                thread::sleep(Duration::from_millis(10));
            };
            let told = told.join().unwrap();
            assert!(status.success(), "{case}, {delivery}: {status}: {told}");
        }
    });
}

#[test]
#[ignore = "run by the tests below, in a process of its own"]
fn child() {
    let delivery = if std::env::var("PINFOLD_CASE_DELIVERY").unwrap() == "Inline" {
        Delivery::Inline
    } else {
        Delivery::Handler
    };
    match std::env::var("PINFOLD_CASE").unwrap().as_str() {
        "budget" => budget(delivery),
        "descriptors" => descriptors(delivery),
        "addresses" => addresses(delivery),
        "file size" => file_size(delivery),
        "direct writes at the limit" => direct_writes_at_the_limit(delivery),
        "mappings" => mappings(delivery),
        "map count" => map_count(delivery),
        "threads" => threads(delivery),
        "stores while it moves" => super::remap::stores(delivery),
        "single stores while it moves" => super::remap::single_stores(delivery),
        other => panic!("no case is called {other}"),
    }
}

/// Returns a line of /proc/self/status, in bytes.
fn status(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    let number = line.split_whitespace().nth(1).unwrap();
    number.parse::<u64>().unwrap() * 1024
}

fn limit(what: libc::__rlimit_resource_t, to: u64) -> u64 {
    // SAFETY: all-zero bytes are a valid rlimit.
    let mut now: libc::rlimit = unsafe { std::mem::zeroed() };
    // SAFETY: it points to a rlimit.
    assert_eq!(unsafe { libc::getrlimit(what, &raw mut now) }, 0);
    let before = now.rlim_cur;
    now.rlim_cur = to;
    // SAFETY: as above.
    assert_eq!(unsafe { libc::setrlimit(what, &raw const now) }, 0);
    before
}

/// Loads, stores and reads a file of eight times the budget, in turns.
fn budget(delivery: Delivery) {
    const BUDGET: u64 = 8 << 20;
    /// Stacks, tables of the program, what tests themselves allocate.
    const CONSTANT: u64 = 6 << 20;
    let rig = Rig::new(BUDGET, delivery);
    let pages = (8 * BUDGET) as usize / PAGE;
    let file = rig.open("a");
    file.set_len(8 * BUDGET).unwrap();
    let before = status("VmRSS");
    // From here on the highest mark counts.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let map = rig.map(&file, MapAccess::Write);
    let mut buf = vec![0; 64 * PAGE];
    for round in 0..2u8 {
        for page in 0..pages {
            assert_eq!(load(&map, page * PAGE + 5), round);
        }
        for page in 0..pages {
            store(&map, page * PAGE + 5, round + 1);
        }
        for start in (0..pages).step_by(64) {
            let got = file.read_at(&mut buf, (start * PAGE) as u64).unwrap();
            assert_eq!(got, buf.len());
            assert_eq!(buf[5], round + 1);
        }
        if round == 0 {
            map.advise(Advice::Sequential, 0..map.len()).unwrap();
        }
    }
    let most = status("VmHWM") - before;
    assert!(
        most <= BUDGET + BUDGET / 10 + CONSTANT,
        "{most} bytes for a budget of {BUDGET}, {before} before"
    );
}

/// A file with something in it, mapped and used; whatever runs out, it goes on.
struct Working {
    rig: Rig,
    map: Mapping,
    expected: Vec<u8>,
}

impl Working {
    fn new(delivery: Delivery) -> Self {
        let rig = Rig::new(SMALL, delivery);
        let file = rig.file("a", 200 * PAGE, 1);
        let map = rig.map(&file, MapAccess::Write);
        Self {
            map,
            rig,
            expected: pattern(200 * PAGE, 1),
        }
    }

    fn works(&self) {
        for page in (0..200).rev() {
            assert_eq!(
                load(&self.map, page * PAGE + 1),
                self.expected[page * PAGE + 1]
            );
            store(&self.map, page * PAGE + 2, 7);
        }
        self.map.flush(0..self.map.len()).unwrap();
    }
}

fn descriptors(delivery: Delivery) {
    let working = Working::new(delivery);
    let other = working.rig.file("b", 10 * PAGE, 2);
    let before = limit(libc::RLIMIT_NOFILE, 0);
    working.works();
    let options = MapOptions::new().delivery(delivery);
    let error = other.map(0..other.len(), &options).unwrap_err();
    assert_eq!(error.errno(), Errno::EMFILE, "{error}");
    working.works();
    limit(libc::RLIMIT_NOFILE, before);
    let map = other.map(0..other.len(), &options).unwrap();
    assert_eq!(load(&map, 9 * PAGE), pattern(10 * PAGE, 2)[9 * PAGE]);
    working.works();
}

fn addresses(delivery: Delivery) {
    let working = Working::new(delivery);
    let other = working.rig.file("b", 10 * PAGE, 2);
    let size = status("VmSize");
    // The window's own addresses grow by doubling and take half of what is left; the rest has to do for the stacks of all
    // threads that may be started to serve faults, and for what the test allocates.
    let before = limit(libc::RLIMIT_AS, size + (256 << 20));
    let options = MapOptions::new()
        .access(MapAccess::Write)
        .delivery(delivery);
    for end in [1 << 30, 1 << 40, 1 << 60] {
        let error = other.map(0..end, &options).unwrap_err();
        let errno = error.errno();
        assert!(
            [Errno::ENOMEM, Errno::EOVERFLOW, Errno::EFBIG].contains(&errno),
            "{end}: {error}"
        );
        working.works();
    }
    limit(libc::RLIMIT_AS, before);
    let map = other.map(0..1 << 30, &options).unwrap();
    assert_eq!(load(&map, 9 * PAGE), pattern(10 * PAGE, 2)[9 * PAGE]);
    working.works();
}

fn file_size(delivery: Delivery) {
    // SAFETY: no handler is needed to ignore a signal.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let working = Working::new(delivery);
    let other = working.rig.file("b", 10 * PAGE, 2);
    let before = limit(libc::RLIMIT_FSIZE, PAGE as u64);
    // It bounds files; mapped bytes are memory.
    working.works();
    let options = MapOptions::new()
        .access(MapAccess::Write)
        .delivery(delivery);
    let map = other.map(0..1000 * PAGE as u64, &options).unwrap();
    assert_eq!(load(&map, 9 * PAGE), pattern(10 * PAGE, 2)[9 * PAGE]);
    limit(libc::RLIMIT_FSIZE, before);
}

/// A call that goes in pieces is one call: it ends short at the limit, and only the next one is told of it by a signal.
fn direct_writes_at_the_limit(_: Delivery) {
    let signals = Handler::counting(libc::SIGXFSZ).unwrap();
    let dir = tempfile::tempdir().unwrap();
    // Every byte goes by way of a copy, in pieces.
    let volume = Volume::builder()
        .store_timeout(Duration::from_secs(3600))
        .open_dir(dir.path())
        .unwrap();
    let options = OpenOptions::new().read(true).write(true).create(true);
    let file = volume.open("f", &options.direct(true)).unwrap();
    let mut buf = AlignedBuf::zeroed(4 * PAGE);
    let before = limit(libc::RLIMIT_FSIZE, PAGE as u64);
    let written = file.write_at(buf.as_mut_slice(), 0);
    let told = signals.received();
    let again = file.write_at(buf.as_mut_slice(), PAGE as u64);
    let told_again = signals.received();
    limit(libc::RLIMIT_FSIZE, before);
    assert_eq!((written.unwrap(), told), (PAGE, 0));
    assert_eq!((again.unwrap_err().errno(), told_again), (Errno::EFBIG, 1));
}

fn mappings(delivery: Delivery) {
    let working = Working::new(delivery);
    let file = working.rig.file("b", PAGE, 1);
    let options = MapOptions::new().delivery(delivery);
    let mut many = Vec::new();
    let error = loop {
        match file.map(0..PAGE as u64, &options) {
            Ok(map) => many.push(map),
            Err(error) => break error,
        }
        assert!(many.len() < 1 << 17, "there is no limit");
    };
    assert_eq!(
        error.errno(),
        Errno::ENOMEM,
        "after {}: {error}",
        many.len()
    );
    assert!(many.len() > 1000, "{} mappings are few", many.len());
    working.works();
    assert_eq!(load(many.last().unwrap(), 1), working.expected[1]);
    many.truncate(10);
    many.push(file.map(0..PAGE as u64, &options).unwrap());
    working.works();
}

/// Pages of which every other one may be read: each is a mapping of its own to the kernel.
struct Patchwork(*mut libc::c_void);

impl Patchwork {
    const LEN: usize = 1 << 30;

    /// Takes all mappings that the process may still have.
    fn new() -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let null = std::ptr::null_mut();
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let addr = unsafe { libc::mmap(null, Self::LEN, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(addr, libc::MAP_FAILED);
        let pages = (0..Self::LEN).step_by(2 * PAGE);
        let refused = pages.map(|at| addr.wrapping_byte_add(at)).any(|page| {
            // SAFETY: a page of that mapping.
            unsafe { libc::mprotect(page, PAGE, libc::PROT_READ) != 0 }
        });
        assert!(refused, "there is no limit");
        Self(addr)
    }
}

impl Drop for Patchwork {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, used by nobody.
        unsafe { libc::munmap(self.0, Self::LEN) };
    }
}

fn map_count(delivery: Delivery) {
    let mut working = Working::new(delivery);
    let file = working.rig.file("b", 10 * PAGE, 2);
    let options = MapOptions::new().delivery(delivery);
    let mut first = file.map(0..file.len(), &options).unwrap();
    let patchwork = Patchwork::new();
    let told = |error: pinfold::Error| {
        assert_eq!(error.errno(), Errno::ENOMEM, "{error}");
        assert!(error.to_string().contains("vm.max_map_count"), "{error}");
    };
    let mut few = Vec::new();
    told(loop {
        match file.map(0..file.len(), &options) {
            Ok(map) => few.push(map),
            Err(error) => break error,
        }
        assert!(few.len() < 10, "there is room");
    });
    told(first.unmap(5 * PAGE..6 * PAGE).unwrap_err());
    let before = (working.map.as_ptr(), working.map.len());
    if let Err(error) = working.map.remap(1000 * PAGE, true) {
        told(error);
        assert_eq!((working.map.as_ptr(), working.map.len()), before);
    }
    working.works();
    drop(patchwork);
    let map = file.map(0..file.len(), &options).unwrap();
    assert_eq!(load(&map, 9 * PAGE), pattern(10 * PAGE, 2)[9 * PAGE]);
    first.unmap(6 * PAGE..7 * PAGE).unwrap();
    working.map.remap(2000 * PAGE, true).unwrap();
    working.works();
}

/// Sixteen threads fault, all over a file that is many times the least budget.
fn threads(delivery: Delivery) {
    let rig = Rig::new(SMALL, delivery);
    let pages = 1000;
    let file = rig.open("a");
    file.set_len((pages * PAGE) as u64).unwrap();
    let map = rig.map(&file, MapAccess::Write);
    let stored = AtomicUsize::new(0);
    thread::scope(|scope| {
        for thread in 0..16usize {
            let (map, stored) = (&map, &stored);
            scope.spawn(move || {
                let mut page = thread * 61;
                for round in 0..400 {
                    page = (page * 5 + 7 * round + 1) % pages;
                    let at = page * PAGE + thread;
                    let was = load(map, at);
                    store(map, at, was + 1);
                    stored.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let mut sum = 0;
    let mut bytes = vec![0; pages * PAGE];
    file.read_at(&mut bytes, 0).unwrap();
    for page in 0..pages {
        sum += bytes[page * PAGE..page * PAGE + 16]
            .iter()
            .map(|&byte| usize::from(byte))
            .sum::<usize>();
    }
    assert_eq!(sum, stored.into_inner(), "a store was lost");
}

#[test]
fn a_mapping_of_eight_times_the_budget_stays_within_it() {
    in_a_child("budget");
}

#[test]
fn without_descriptors_what_is_mapped_works_and_more_is_refused() {
    in_a_child("descriptors");
}

#[test]
fn without_addresses_what_is_mapped_works_and_more_is_refused() {
    in_a_child("addresses");
}

#[test]
fn the_limit_on_file_sizes_concerns_no_mapping() {
    in_a_child("file size");
}

#[test]
fn a_direct_write_in_pieces_ends_short_at_the_limit_on_file_sizes() {
    in_a_child("direct writes at the limit");
}

#[test]
fn too_many_mappings_are_refused_until_some_have_gone() {
    in_a_child("mappings");
}

#[test]
fn without_room_for_a_mapping_in_the_kernel_s_count_the_error_says_so() {
    in_a_child("map count");
}

#[test]
fn sixteen_threads_fault_with_the_least_budget_and_lose_no_store() {
    in_a_child("threads");
}
