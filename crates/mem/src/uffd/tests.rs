//! The facts of SEMANTICS.md section 0, each held against the running kernel.

use std::os::fd::RawFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pinfold_base::Progress;

use super::*;
use crate::copy::CopyStop;
use crate::iov::{Direction, IovCursor};
use crate::mapped::{self, Lent, MappedMemory, Registration, SignalVerdict};
use crate::region_for_tests::alone;
use crate::span::AlignedBuf;
use crate::window::{UserMapKind, Window, WindowError};

mod moves;

const P: usize = PAGE;

/// Runs `work` on a thread of its own and fails when it hangs: a fault that nobody resolves sleeps for ever.
fn within<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    let worker = std::thread::spawn(move || done.send(work()));
    match result.recv_timeout(Duration::from_secs(120)) {
        Ok(value) => value,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("hangs"),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            let panicked = worker.join().map(drop).unwrap_err();
            std::panic::resume_unwind(panicked)
        }
    }
}

/// A window of eight pages, one registered user map of it, and a page of each letter to install.
struct Rig {
    window: Arc<Window>,
    map: UserMap,
    uffd: Uffd,
    letters: Arc<AlignedBuf>,
    /// What the signal handler was told.
    signals: Mutex<Vec<(usize, Access)>>,
}

const PAGES: u64 = 8;

impl Rig {
    fn new(delivery: Delivery, privileges: RangeInclusive<Privilege>) -> Arc<Self> {
        Self::of(UserMapKind::SharedWrite, delivery, privileges, false)
    }

    fn of(
        kind: UserMapKind,
        delivery: Delivery,
        privileges: RangeInclusive<Privilege>,
        wp_async: bool,
    ) -> Arc<Self> {
        let window = Window::new().unwrap();
        let map = window.user_map(0..PAGES, kind).unwrap();
        let uffd = Uffd::open(delivery, privileges, wp_async).unwrap();
        uffd.register(&map).unwrap();
        let mut letters = AlignedBuf::zeroed(PAGES as usize * P);
        for (page, letter) in letters.as_mut_slice().chunks_mut(P).zip(b'a'..) {
            page.fill(letter);
        }
        Arc::new(Self {
            window,
            map,
            uffd,
            letters: Arc::new(letters),
            signals: Mutex::new(Vec::new()),
        })
    }

    /// Enters it into the table of mappings, so that SIGBUS reaches it.
    fn in_table(self: &Arc<Self>) -> Registration {
        let range = self.at(0, 0)..self.at(PAGES, 0);
        mapped::insert(range, Arc::clone(self) as Arc<dyn MappedMemory>).unwrap()
    }

    fn at(&self, page: u64, byte: usize) -> usize {
        self.map.addr() + page as usize * P + byte
    }

    fn source(&self, page: u64, pages: usize) -> RawSpan {
        let addr = self.letters.as_ptr().wrapping_add(page as usize * P);
        RawSpan {
            addr: addr.expose_provenance(),
            len: pages * P,
        }
    }

    fn copy(&self, page: u64, pages: usize, protect: bool) -> Installed {
        self.uffd
            .copy(self.at(page, 0), self.source(page, pages), protect)
    }

    fn resume(&self, page: u64, pages: usize, protect: bool) -> Installed {
        self.uffd.resume(self.at(page, 0), pages * P, protect)
    }

    fn told(&self) -> Vec<(usize, Access)> {
        std::mem::take(&mut self.signals.lock().unwrap())
    }

    /// Serves one event the way a signal is.
    fn serve_one(&self) -> Event {
        let mut events = [Event::NONE];
        assert_eq!(self.uffd.read_events(&mut events), Ok(1));
        self.serve(events[0].addr, events[0].access);
        events[0]
    }

    fn serve(&self, addr: usize, access: Access) {
        let page = ((addr - self.map.addr()) / P) as u64;
        let protect = access == Access::Read;
        let mut installed = self.copy(page, 1, protect);
        if installed.stop == Some(InstallStop::Exists) {
            installed = self.resume(page, 1, protect);
        }
        if installed.stop == Some(InstallStop::Exists) && access == Access::Write {
            self.uffd.unprotect(addr & !(P - 1), P).unwrap();
        }
    }
}

impl MappedMemory for Rig {
    fn signal_fault(&self, addr: usize, access: Access) -> SignalVerdict {
        self.signals.lock().unwrap().push((addr, access));
        set_errno(libc::EDOM);
        self.serve(addr, access);
        SignalVerdict::Resolved
    }

    fn with_lent(
        &self,
        _: usize,
        _: usize,
        _: Access,
        _: &mut dyn FnMut(*mut u8, usize) -> usize,
    ) -> Lent {
        Lent::NeedFault
    }

    fn fault_in(&self, _: usize, len: usize, _: Access) -> usize {
        len
    }
}

fn set_errno(value: i32) {
    // SAFETY: the address of this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: valid as long as the thread lives.
    unsafe { errno.write(value) };
}

fn load(addr: usize) -> u8 {
    // SAFETY: a byte of a rig's mapping, reached by raw accesses only.
    unsafe { std::ptr::with_exposed_provenance::<u8>(addr).read_volatile() }
}

fn store(addr: usize, value: u8) {
    // SAFETY: as in `load`.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(addr).write_volatile(value) }
}

/// Writes ten bytes of mapped memory to a file: an access by the kernel.
fn kernel_reads(addr: usize) -> Result<usize, Errno> {
    let to = rustix::fs::memfd_create(c"test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let fd: RawFd = to.as_raw_fd();
    // SAFETY: the kernel reads the bytes or answers EFAULT.
    let n = unsafe { libc::write(fd, std::ptr::with_exposed_provenance(addr), 10) };
    usize::try_from(n).map_err(|_| Errno::from(std::io::Error::last_os_error()))
}

fn installed(pages: usize, stop: impl Into<Option<InstallStop>>) -> Installed {
    Installed {
        pages,
        stop: stop.into(),
    }
}

#[test]
fn fact_1_an_inline_fault_is_byte_exact_and_says_what_it_wanted() {
    within(|| {
        let rig = Rig::new(Delivery::Inline, Privilege::ANY);
        let _table = rig.in_table();
        // Missing, for a load: mapped for reading.
        set_errno(libc::ERANGE);
        assert_eq!(load(rig.at(0, 123)), b'a');
        let errno = std::io::Error::last_os_error().raw_os_error();
        assert_eq!(
            errno,
            Some(libc::ERANGE),
            "served as if nothing had happened"
        );
        assert_eq!(rig.told(), [(rig.at(0, 123), Access::Read)]);
        assert_eq!(load(rig.at(0, 4000)), b'a');
        assert_eq!(rig.told(), []);
        // Write-protected.
        store(rig.at(0, 777), b'!');
        assert_eq!(rig.told(), [(rig.at(0, 777), Access::Write)]);
        store(rig.at(0, 778), b'!');
        assert_eq!(rig.told(), []);
        // Missing, for a store: writable at once.
        store(rig.at(1, 5), b'!');
        assert_eq!(rig.told(), [(rig.at(1, 5), Access::Write)]);
        store(rig.at(1, 6), b'!');
        assert_eq!(rig.told(), []);
        // Minor: the window has the page.
        rig.window.write_page(2, 0, b"window");
        assert_eq!(load(rig.at(2, 1)), b'i');
        assert_eq!(rig.told(), [(rig.at(2, 1), Access::Read)]);
        let mut seen = [0; 3];
        rig.window.read_page(0, 776, &mut seen);
        assert_eq!(&seen, b"a!!");
    });
}

#[test]
fn fact_1_kernel_accesses_to_absent_pages_fail_and_do_not_signal() {
    within(|| {
        let rig = Rig::new(Delivery::Inline, Privilege::ANY);
        let _table = rig.in_table();
        assert_eq!(kernel_reads(rig.at(3, 0)), Err(Errno::EFAULT));
        // Across a border: what is there goes through.
        let _ = load(rig.at(3, 0));
        assert_eq!(rig.told().len(), 1);
        assert_eq!(kernel_reads(rig.at(3, P - 4)), Ok(4));
        // Write-protected is absent for a store of the kernel's.
        let (from, to) = std::io::pipe().unwrap();
        assert_eq!(rustix::io::write(&to, b"x"), Ok(1));
        let target = std::ptr::with_exposed_provenance_mut(rig.at(3, 0));
        // SAFETY: the kernel writes a byte of the mapping or answers EFAULT.
        let n = unsafe { libc::read(from.as_raw_fd(), target, 1) };
        assert_eq!(n, -1);
        let page = std::ptr::with_exposed_provenance_mut(rig.at(4, 0));
        // SAFETY: populating changes no contents.
        let populated =
            unsafe { rustix::mm::madvise(page, P, rustix::mm::Advice::LinuxPopulateRead) };
        assert_eq!(populated, Err(rustix::io::Errno::FAULT));
        assert_eq!(rig.told(), []);
    });
}

#[test]
fn fact_2_a_handler_serves_loads_stores_and_system_calls() {
    within(|| {
        let rig = Rig::new(Delivery::Handler, Privilege::Device..=Privilege::Full);
        assert!(rig.uffd.privilege().serves_kernel());
        let faulting = {
            let rig = Arc::clone(&rig);
            std::thread::spawn(move || {
                let read = load(rig.at(0, 99));
                store(rig.at(0, 100), b'!');
                rig.window.write_page(1, 0, b"minor");
                let minor = load(rig.at(1, 2));
                let kernel = kernel_reads(rig.at(2, P - 5));
                // SAFETY: no memory is involved.
                (unsafe { libc::gettid() }, read, minor, kernel)
            })
        };
        let kinds = [
            (rig.at(0, 99), Access::Read, FaultKind::Missing),
            (rig.at(0, 100), Access::Write, FaultKind::WriteProtected),
            (rig.at(1, 2), Access::Read, FaultKind::Minor),
            (rig.at(2, P - 5), Access::Read, FaultKind::Missing),
            (rig.at(3, 0), Access::Read, FaultKind::Missing),
        ];
        let events: Vec<_> = kinds.iter().map(|_| rig.serve_one()).collect();
        let (thread, read, minor, kernel) = faulting.join().unwrap();
        for (event, (addr, access, kind)) in events.iter().zip(kinds) {
            // The kernel's copies may touch a page at another byte than the first.
            assert_eq!(event.addr / P, addr / P, "{event:?}");
            assert_eq!((event.access, event.kind), (access, kind));
            assert_eq!(event.thread, thread as u32);
        }
        assert_eq!(events[0].addr, kinds[0].0);
        assert_eq!((read, minor, kernel), (b'a', b'n', Ok(10)));
    });
}

#[test]
fn fact_2_user_mode_only_leaves_the_kernel_without_and_the_program_waiting() {
    within(|| {
        let only = Privilege::UserModeOnly..=Privilege::UserModeOnly;
        let rig = Rig::new(Delivery::Handler, only);
        assert_eq!(rig.uffd.privilege(), Privilege::UserModeOnly);
        assert_eq!(kernel_reads(rig.at(0, 0)), Err(Errno::EFAULT));
        let faulting = {
            let rig = Arc::clone(&rig);
            std::thread::spawn(move || load(rig.at(0, 0)))
        };
        assert_eq!(rig.serve_one().addr, rig.at(0, 0));
        assert_eq!(faulting.join().unwrap(), b'a');
        assert_eq!(kernel_reads(rig.at(0, 0)), Ok(10));
    });
}

#[test]
fn readers_of_events_go_home_when_told() {
    within(|| {
        let rig = Rig::new(Delivery::Handler, Privilege::ANY);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let rig = Arc::clone(&rig);
                std::thread::spawn(move || rig.uffd.read_events(&mut [Event::NONE; 4]))
            })
            .collect();
        rig.uffd.stop();
        for reader in readers {
            assert_eq!(reader.join().unwrap(), Ok(0));
        }
        assert_eq!(rig.uffd.read_events(&mut []), Err(Errno::EINVAL));
        let inline = Rig::new(Delivery::Inline, Privilege::ANY);
        assert_eq!(
            inline.uffd.read_events(&mut [Event::NONE]),
            Err(Errno::EINVAL)
        );
    });
}

#[test]
fn fact_3_resuming_stops_at_holes_and_at_what_is_mapped() {
    within(|| {
        let rig = Rig::new(Delivery::Inline, Privilege::ANY);
        let _table = rig.in_table();
        for page in [0, 1, 3, 4, 5] {
            rig.window.write_page(page, 0, &[b'0' + page as u8]);
        }
        assert_eq!(rig.resume(0, 4, true), installed(2, InstallStop::Hole));
        assert_eq!(rig.resume(2, 2, true), installed(0, InstallStop::Hole));
        assert_eq!(rig.resume(4, 1, true), installed(1, None));
        assert_eq!(rig.resume(3, 3, true), installed(1, InstallStop::Exists));
        assert_eq!(rig.resume(4, 2, true), installed(0, InstallStop::Exists));
        assert_eq!(rig.resume(5, 1, false), installed(1, None));
        // With protection it is for reading: no fault for a load, one for a store.
        assert_eq!(load(rig.at(3, 0)), b'3');
        assert_eq!(rig.told(), []);
        store(rig.at(3, 0), b'!');
        assert_eq!(rig.told(), [(rig.at(3, 0), Access::Write)]);
        store(rig.at(5, 0), b'!');
        assert_eq!(rig.told(), []);
    });
}

#[test]
fn fact_4_a_dropped_entry_is_minor_and_a_punched_page_is_missing() {
    within(|| {
        let rig = Rig::new(Delivery::Handler, Privilege::ANY);
        assert_eq!(rig.copy(0, 2, true), installed(2, None));
        rig.map.drop_entries(0..1).unwrap();
        rig.window.punch(1..2).unwrap();
        let faulting = {
            let rig = Arc::clone(&rig);
            std::thread::spawn(move || [load(rig.at(0, 0)), load(rig.at(1, 0))])
        };
        assert_eq!(rig.serve_one().kind, FaultKind::Minor);
        assert_eq!(rig.serve_one().kind, FaultKind::Missing);
        assert_eq!(faulting.join().unwrap(), *b"ab");
    });
}

#[test]
fn fact_4_installing_without_protection_overrides_an_earlier_one() {
    within(|| {
        let rig = Rig::new(Delivery::Inline, Privilege::ANY);
        let _table = rig.in_table();
        assert_eq!(rig.copy(0, 3, true), installed(3, None));
        // Protection outlives a dropped entry, and a punch.
        rig.map.drop_entries(0..1).unwrap();
        rig.window.punch(1..2).unwrap();
        assert_eq!(rig.resume(0, 1, false), installed(1, None));
        assert_eq!(rig.copy(1, 1, false), installed(1, None));
        // One set on a page that is not there counts as well.
        rig.uffd.protect(rig.at(4, 0), P).unwrap();
        assert_eq!(rig.copy(4, 1, false), installed(1, None));
        for page in [0, 1, 4] {
            store(rig.at(page, 0), b'!');
        }
        assert_eq!(rig.told(), []);
        store(rig.at(2, 0), b'!');
        assert_eq!(rig.told().len(), 1);
    });
}

#[test]
fn fact_5_stores_through_the_alias_pass_protection() {
    within(|| {
        let rig = Rig::new(Delivery::Inline, Privilege::ANY);
        let _table = rig.in_table();
        assert_eq!(rig.copy(0, 1, true), installed(1, None));
        rig.window.write_page(0, 0, b"!");
        assert_eq!(load(rig.at(0, 0)), b'!');
        assert_eq!(rig.told(), []);
    });
}

#[test]
fn fact_6_a_poisoned_page_is_fatal_until_it_is_installed() {
    within(|| {
        let rig = Rig::new(Delivery::Handler, Privilege::ANY);
        let _table = rig.in_table();
        if !rig.uffd.can_poison() {
            assert_eq!(rig.uffd.poison(rig.at(0, 0), P), Err(Errno::EOPNOTSUPP));
            return;
        }
        let again = |page| {
            rig.uffd.poison(rig.at(page, 0), P).unwrap();
            assert_eq!(kernel_reads(rig.at(page, 0)), Err(Errno::EFAULT));
        };
        again(0);
        assert_eq!(rig.copy(0, 1, true), installed(1, None));
        assert_eq!(kernel_reads(rig.at(0, 0)), Ok(10));
        assert_eq!(rig.uffd.poison(rig.at(0, 0), P), Err(Errno::EEXIST));
        again(1);
        rig.map.drop_entries(1..2).unwrap();
        rig.uffd.poison(rig.at(1, 0), P).unwrap();
        // Who waits gets SIGBUS; here the handler serves it after all.
        let faulting = {
            let rig = Arc::clone(&rig);
            std::thread::spawn(move || load(rig.at(2, 5)))
        };
        assert_eq!(rig.uffd.read_events(&mut [Event::NONE]), Ok(1));
        rig.uffd.poison(rig.at(2, 0), P).unwrap();
        assert_eq!(faulting.join().unwrap(), b'c');
        assert_eq!(rig.told(), [(rig.at(2, 5), Access::Read)]);
    });
}

#[test]
fn fact_8_a_forked_child_has_no_mapping() {
    within(|| {
        let rig = Rig::new(Delivery::Inline, Privilege::ANY);
        assert_eq!(rig.copy(0, 1, true), installed(1, None));
        // SAFETY: the child makes copies and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let mut byte = 0u8;
            let from = std::ptr::with_exposed_provenance(rig.at(0, 0));
            // SAFETY: a wild address here; the copy says so.
            let copied = unsafe { crate::copy::copy_nofault(&raw mut byte, from, 1) };
            // SAFETY: ends the child.
            unsafe { libc::_exit(if copied.done == 0 { 7 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: waits for our child.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert!(libc::WIFEXITED(status), "status {status:#x}");
        assert_eq!(libc::WEXITSTATUS(status), 7);
    });
}

#[test]
fn fact_8_descriptors_are_out_of_the_way_and_closed_on_exec() {
    let rig = Rig::new(Delivery::Handler, Privilege::ANY);
    for fd in [&rig.uffd.fd, &rig.uffd.stop] {
        let flags = rustix::io::fcntl_getfd(fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        if most.current.is_none_or(|most| most > 600) {
            assert!(fd.as_raw_fd() >= 512);
        }
    }
}

#[test]
fn fact_8_closing_the_descriptor_ends_the_charge_without_a_word() {
    if !alone(
        "uffd::tests::fact_8_closing_the_descriptor_ends_the_charge_without_a_word",
        None,
    ) {
        return;
    }
    let rig = Rig::new(Delivery::Handler, Privilege::ANY);
    assert_eq!(rig.copy(0, 1, true), installed(1, None));
    assert!(rig.uffd.is_open());
    // SAFETY: closes what others own, as a program does that makes a daemon of itself; nothing of it is used after that
    // but to see what it says.
    assert_eq!(unsafe { libc::close_range(3, u32::MAX, 0) }, 0);
    assert!(!rig.uffd.is_open());
    // A page that is not there reads as zeros, a protected one takes a store.
    assert_eq!(load(rig.at(1, 0)), 0);
    store(rig.at(0, 0), b'!');
    assert_eq!(
        rig.resume(2, 1, true).stop,
        Some(InstallStop::Other(Errno::EBADF))
    );
    assert_eq!(rig.uffd.read_events(&mut [Event::NONE]), Err(Errno::EBADF));
    println!("1 passed");
    // Destructors would close descriptors that are not theirs any more.
    std::process::exit(0);
}

#[test]
fn fact_9_copying_never_overwrites() {
    within(|| {
        let rig = Rig::new(Delivery::Inline, Privilege::ANY);
        let _table = rig.in_table();
        rig.window.write_page(2, 0, b"kept");
        assert_eq!(rig.copy(0, 4, true), installed(2, InstallStop::Exists));
        assert_eq!(rig.copy(2, 1, true), installed(0, InstallStop::Exists));
        assert_eq!(rig.resume(2, 1, true), installed(1, None));
        assert_eq!(load(rig.at(2, 0)), b'k');
        assert_eq!(rig.copy(0, 1, false), installed(0, InstallStop::Exists));
        assert_eq!(rig.told(), []);
        // The existing protection stays.
        store(rig.at(0, 0), b'!');
        assert_eq!(rig.told().len(), 1);
        // A source that is none is no hole.
        let bad = RawSpan { addr: P, len: P };
        let outcome = rig.uffd.copy(rig.at(5, 0), bad, true);
        assert_eq!(outcome, installed(0, InstallStop::Other(Errno::EFAULT)));
    });
}

#[test]
fn fact_9_an_unmapped_part_ends_a_batch_without_a_prefix() {
    within(|| {
        let rig = Rig::new(Delivery::Inline, Privilege::ANY);
        for page in 0..PAGES {
            rig.window.write_page(page, 0, b"x");
        }
        rig.map.unmap(3..5).unwrap();
        assert_eq!(rig.resume(2, 2, true), installed(0, InstallStop::Gone));
        assert_eq!(rig.resume(3, 1, true), installed(0, InstallStop::Gone));
        assert_eq!(rig.resume(2, 1, true), installed(1, None));
        assert_eq!(rig.resume(5, 1, true), installed(1, None));
        // Protection spans gaps.
        rig.uffd.unprotect(rig.at(2, 0), 4 * P).unwrap();
        rig.uffd.protect(rig.at(0, 0), 8 * P).unwrap();
        assert_eq!(rig.uffd.protect(rig.at(3, 0), P), Err(Errno::ENOENT));
    });
}

#[test]
fn fact_11_asynchronous_protection_counts_stores_without_a_fault() {
    within(|| {
        let kind = UserMapKind::SharedWrite;
        let rig = Rig::of(kind, Delivery::Inline, Privilege::ANY, true);
        let _table = rig.in_table();
        let all = rig.at(0, 0)..rig.at(4, 0);
        let scanned = |what| {
            let mut pages = Vec::new();
            scan(all.clone(), what, |run| {
                pages.extend(run.step_by(P).map(|addr| (addr - rig.at(0, 0)) / P));
            })
            .unwrap();
            pages
        };
        assert_eq!(rig.copy(0, 4, true), installed(4, None));
        assert_eq!(scanned(ScanFor::Present), [0, 1, 2, 3]);
        assert_eq!(scanned(ScanFor::Written), []);
        store(rig.at(1, 0), b'!');
        store(rig.at(2, 0), b'!');
        assert_eq!(rig.told(), []);
        assert_eq!(scanned(ScanFor::Written), [1, 2]);
        assert_eq!(scanned(ScanFor::WrittenAndProtect), [1, 2]);
        assert_eq!(scanned(ScanFor::Written), []);
        // A store between the scan and a dropped entry is not lost, and an entry that was protected keeps its mark.
        store(rig.at(2, 0), b'?');
        rig.map.drop_entries(0..4).unwrap();
        assert_eq!(scanned(ScanFor::Present), []);
        assert_eq!(scanned(ScanFor::Written), [2]);
        // Missing pages are told as ever.
        rig.window.punch(0..1).unwrap();
        assert_eq!(load(rig.at(0, 0)), b'a');
        assert_eq!(rig.told(), [(rig.at(0, 0), Access::Read)]);
    });
}

#[test]
fn scanning_for_stores_is_refused_where_protection_waits_for_somebody() {
    let rig = Rig::new(Delivery::Inline, Privilege::ANY);
    assert_eq!(rig.copy(0, 1, true), installed(1, None));
    let range = rig.at(0, 0)..rig.at(1, 0);
    let outcome = scan(range, ScanFor::WrittenAndProtect, |_| {});
    assert_eq!(outcome, Err(Errno::EPERM));
}

#[test]
fn private_stores_stay_with_their_mapping() {
    within(|| {
        let kind = UserMapKind::Private;
        let rig = Rig::of(kind, Delivery::Inline, Privilege::ANY, false);
        let _table = rig.in_table();
        rig.window.write_page(0, 0, b"shared");
        assert_eq!(rig.resume(0, 1, true), installed(1, None));
        assert_eq!(load(rig.at(0, 0)), b's');
        store(rig.at(0, 0), b'P');
        assert_eq!(rig.told(), [(rig.at(0, 0), Access::Write)]);
        assert_eq!(load(rig.at(0, 0)), b'P');
        let mut seen = [0; 6];
        rig.window.read_page(0, 0, &mut seen);
        assert_eq!(&seen, b"shared");
        // A copied page does not follow the window any more, and a punch leaves it alone.
        rig.window.write_page(0, 1, b"HARED");
        rig.window.punch(0..1).unwrap();
        assert_eq!([load(rig.at(0, 0)), load(rig.at(0, 1))], *b"Ph");
        assert_eq!(rig.told(), []);
    });
}

#[test]
fn a_waiting_copy_touches_what_is_not_lent_and_is_served_in_the_middle() {
    within(|| {
        // Nothing is ever lent by the rig.
        let kind = UserMapKind::Private;
        let inline = Rig::of(kind, Delivery::Inline, Privilege::ANY, false);
        let _table = inline.in_table();
        for page in 0..3 {
            inline.window.write_page(page, 0, &[b'a' + page as u8; P]);
        }
        let spans = [RawSpan {
            addr: inline.at(0, 10),
            len: 3 * P - 10,
        }];
        // SAFETY: reads mapped memory.
        let mut cursor = unsafe { IovCursor::from_raw(Direction::Source, &spans) };
        let mut out = vec![0; 3 * P - 10];
        assert_eq!(
            cursor.copy_slice_nofault(&mut out).done,
            0,
            "an ordinary copy does not wait"
        );
        assert_eq!(
            cursor.copy_slice_waiting(&mut out),
            Progress::complete(3 * P as u64 - 10)
        );
        assert_eq!((out[0], out[P], out[3 * P - 11]), (b'a', b'b', b'c'));
        // The other way, into private copies.
        // SAFETY: writes mapped memory that nobody refers to.
        let mut cursor = unsafe { IovCursor::from_raw(Direction::Target, &spans) };
        assert_eq!(cursor.copy_slice_waiting(&mut [b'!'; 5]).done, 5);
        assert_eq!([load(inline.at(0, 9)), load(inline.at(0, 14))], *b"a!");
    });
}

#[test]
fn a_waiting_copy_sleeps_where_a_handler_serves_and_ends_where_nobody_can() {
    within(|| {
        let rig = Rig::new(Delivery::Handler, Privilege::ANY);
        let _table = rig.in_table();
        let copying = {
            let rig = Arc::clone(&rig);
            std::thread::spawn(move || {
                let spans = [RawSpan {
                    addr: rig.at(0, P - 2),
                    len: 4,
                }];
                // SAFETY: reads mapped memory.
                let mut cursor = unsafe { IovCursor::from_raw(Direction::Source, &spans) };
                let mut out = [0; 4];
                assert_eq!(cursor.copy_slice_waiting(&mut out), Progress::complete(4));
                out
            })
        };
        assert_eq!(rig.serve_one().addr, rig.at(0, P - 2));
        assert_eq!(rig.serve_one().addr, rig.at(1, 0));
        assert_eq!(copying.join().unwrap(), *b"aabb");
        // Unmapped while the table still has it.
        rig.map.unmap(5..6).unwrap();
        let spans = [RawSpan {
            addr: rig.at(5, 7),
            len: 4,
        }];
        // SAFETY: an address with nothing behind it; the copy says so.
        let mut cursor = unsafe { IovCursor::from_raw(Direction::Source, &spans) };
        let stop = CopyStop::NeedFault {
            addr: rig.at(5, 7),
            access: Access::Read,
        };
        let outcome = cursor.copy_slice_waiting(&mut [0; 4]);
        assert_eq!(outcome, Progress::stopped(0, stop));
    });
}

#[test]
fn only_whole_privileges_that_were_allowed_are_used() {
    let refused = Uffd::open(
        Delivery::Inline,
        Privilege::Device..=Privilege::Device,
        false,
    );
    match refused {
        Ok(uffd) => assert_eq!(uffd.privilege(), Privilege::Device),
        Err(error) => assert!(matches!(error, UffdError::Refused { .. }), "{error}"),
    }
}

#[test]
fn fact_7_an_unprivileged_process_serves_its_own_faults() {
    let name = "uffd::tests::fact_7_an_unprivileged_process_serves_its_own_faults";
    let nobody = rustix::process::geteuid().is_root().then_some(65534);
    if !alone(name, nobody) {
        return;
    }
    within(|| {
        let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
        let inline = Rig::new(Delivery::Inline, Privilege::ANY);
        let expected = match (sysctl.trim(), std::fs::File::open("/dev/userfaultfd")) {
            ("1", _) => Privilege::Full,
            (_, Ok(_)) => Privilege::Device,
            (_, Err(_)) => Privilege::UserModeOnly,
        };
        assert_eq!(inline.uffd.privilege(), expected);
        let _table = inline.in_table();
        assert_eq!(load(inline.at(0, 7)), b'a');
        store(inline.at(0, 8), b'!');
        assert_eq!(inline.told().len(), 2);
        let rig = Rig::new(Delivery::Handler, Privilege::ANY);
        let faulting = {
            let rig = Arc::clone(&rig);
            std::thread::spawn(move || load(rig.at(1, 0)))
        };
        assert_eq!(rig.serve_one().addr, rig.at(1, 0));
        assert_eq!(faulting.join().unwrap(), b'b');
    });
}
