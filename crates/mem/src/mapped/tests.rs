use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use pinfold_base::Progress;

use super::*;
use crate::arena::Arena;
use crate::copy::CopyStop;
use crate::faultin;
use crate::homes::Homes;
use crate::iov::{Direction, IovCursor};
use crate::lend::Limits;
use crate::quiet::Quiet;
use crate::span::{RawSpan, Segments};
use crate::uffd::{self, ScanFor};
use crate::window::{UserMap, UserMapKind, Window};

/// Serves no fault and counts its fault-ins; an answer for look-ups to find.
struct Answer(usize);

impl MappedMemory for Answer {
    fn signal_fault(&self, _: usize, _: Access) -> SignalVerdict {
        SignalVerdict::NotOurs
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

    /// Says which answer it is.
    fn fault_in(&self, _: usize, _: usize, _: Access) -> usize {
        self.0
    }
}

/// Addresses nobody can have mapped, a different gibibyte for each test: the table is the whole process's.
fn at(test: usize, addr: usize) -> usize {
    (1 << 55) + (test << 30) + addr
}

fn enter(test: usize, range: Range<usize>, which: usize) -> Result<Registration, InsertError> {
    insert(
        at(test, range.start)..at(test, range.end),
        Arc::new(Answer(which)),
    )
}

fn which(test: usize, addr: usize) -> Option<usize> {
    find(at(test, addr), |memory, _| {
        memory.fault_in(0, 0, Access::Read)
    })
}

#[test]
fn an_address_finds_the_mapping_that_has_it() {
    let b = enter(1, 0x3000..0x5000, 2).unwrap();
    let a = enter(1, 0x1000..0x2000, 1).unwrap();
    assert!(any());
    let found = |addr| which(1, addr);
    assert_eq!(found(0xfff), None);
    assert_eq!((found(0x1000), found(0x1fff)), (Some(1), Some(1)));
    assert_eq!((found(0x2000), found(0x2fff)), (None, None));
    assert_eq!((found(0x3000), found(0x4fff)), (Some(2), Some(2)));
    assert_eq!(found(0x5000), None);
    let extent = |addr, len| extent(at(1, addr), len);
    assert_eq!(extent(0x800, 0x1000), Extent::Plain(0x800));
    assert_eq!(extent(0x1800, 0x1000), Extent::Mapped(0x800));
    assert_eq!(extent(0x3000, 0x10), Extent::Mapped(0x10));
    assert_eq!(extent(0x5000, 0x10), Extent::Plain(0x10));
    assert!(touches(at(1, 0x800), 0x801) && !touches(at(1, 0x800), 0x800));
    drop(a);
    assert_eq!((found(0x1000), found(0x3000)), (None, Some(2)));
    drop(b);
    assert_eq!(found(0x3000), None);
}

#[test]
fn a_range_is_entered_once() {
    let _a = enter(2, 0x1000..0x3000, 1).unwrap();
    for range in [0x0..0x1001, 0x2fff..0x4000, 0x1000..0x3000, 0x1800..0x1801] {
        assert_eq!(enter(2, range, 2).map(drop), Err(InsertError::Taken));
    }
    assert_eq!(
        enter(2, 0x5000..0x5000, 2).map(drop),
        Err(InsertError::Taken)
    );
    assert_eq!(which(2, 0x2000), Some(1));
}

#[test]
fn a_hole_leaves_the_rest_in_place() {
    let mut a = enter(3, 0x1000..0x6000, 1).unwrap();
    a.exclude(at(3, 0x2000)..at(3, 0x3000)).unwrap();
    a.exclude(at(3, 0x5000)..at(3, 0x9000)).unwrap();
    let found: Vec<_> = (1..7).map(|page| which(3, page << 12).is_some()).collect();
    assert_eq!(found, [true, false, true, true, false, false]);
    drop(a);
    assert!((1..7).all(|page| which(3, page << 12).is_none()));
}

#[test]
fn removal_waits_for_a_look_up_that_is_under_way_and_for_no_other() {
    let slow = enter(4, 0x1000..0x2000, 1).unwrap();
    let other = enter(4, 0x2000..0x3000, 2).unwrap();
    let (begun, end, removed) = (
        AtomicBool::new(false),
        AtomicBool::new(false),
        AtomicBool::new(false),
    );
    let wait = |flag: &AtomicBool| {
        let since = Instant::now();
        while !flag.load(Ordering::SeqCst) {
            assert!(
                since.elapsed() < Duration::from_secs(120),
                "nothing happens"
            );
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            find(at(4, 0x1000), |_, _| {
                begun.store(true, Ordering::SeqCst);
                wait(&end);
                assert!(!removed.load(Ordering::SeqCst));
            })
        });
        wait(&begun);
        // Not held up by the look-up of its neighbour.
        drop(other);
        scope.spawn(|| {
            drop(slow);
            removed.store(true, Ordering::SeqCst);
        });
        let since = Instant::now();
        while which(4, 0x1000).is_some() {
            assert!(since.elapsed() < Duration::from_secs(120), "still found");
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(20));
        assert!(!removed.load(Ordering::SeqCst), "removed under a look-up");
        end.store(true, Ordering::SeqCst);
        wait(&removed);
    });
}

#[test]
fn look_ups_race_with_changes_and_never_see_a_stranger() {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for page in 0..8 {
                        if let Some(found) = which(5, page << 12) {
                            assert_eq!(found, page);
                        }
                    }
                }
            });
        }
        for round in 0..2000 {
            let page = round % 8;
            let a = enter(5, page << 12..(page + 1) << 12, page).unwrap();
            assert_eq!(which(5, page << 12), Some(page));
            drop(a);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_table_of_many_chunks_finds_what_a_list_would() {
    const PLACES: usize = 200;
    let mut held: Vec<Option<(usize, Registration)>> = (0..PLACES).map(|_| None).collect();
    let place = |round: usize| (round * round * 7 + round * 31) % PLACES;
    let range = |place: usize| place * 0x3000 + 0x1000..place * 0x3000 + 0x2000;
    let check = |held: &[Option<(usize, Registration)>]| {
        for (place, there) in held.iter().enumerate() {
            let at = range(place);
            let expected = there.as_ref().map(|(number, _)| *number);
            assert_eq!(which(7, at.start), expected, "place {place}");
            assert_eq!(which(7, at.end - 1), expected, "place {place}");
            assert_eq!(which(7, at.start - 1), None);
            assert_eq!(which(7, at.end), None);
        }
    };
    for round in 0..3000 {
        let place = place(round);
        match held[place].take() {
            // Grows, then shrinks, then grows again.
            Some(_) if (round / 1000) % 2 == 1 => {}
            Some(there) => held[place] = Some(there),
            None if (round / 1000) % 2 == 1 => {}
            None => held[place] = Some((round, enter(7, range(place), round).unwrap())),
        }
        if round % 50 == 0 {
            check(&held);
        }
        if held[place].is_some() {
            let taken = enter(7, range(place), 0).map(drop);
            assert_eq!(taken, Err(InsertError::Taken));
        }
    }
    check(&held);
    let there = |held: &[Option<_>]| held.iter().flatten().count();
    assert!(there(&held) > 20);
    for at in (0..PLACES).rev() {
        held[at] = None;
        if at % 20 == 0 {
            check(&held);
        }
    }
}

#[test]
fn a_range_made_longer_is_found_throughout_and_takes_nobody_s_place() {
    let mut a = enter(8, 0x1000..0x3000, 1).unwrap();
    let b = enter(8, 0x5000..0x6000, 2).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(which(8, 0x2000), Some(1), "lost while it is made longer");
            }
        });
        a.extend(at(8, 0x4000)).unwrap();
        a.extend(at(8, 0x5000)).unwrap();
        assert_eq!(a.extend(at(8, 0x5001)), Err(InsertError::Taken));
        stop.store(true, Ordering::Relaxed);
    });
    let found: Vec<_> = (1..7).map(|page| which(8, page << 12)).collect();
    assert_eq!(found, [Some(1), Some(1), Some(1), Some(1), Some(2), None]);
    drop(b);
    a.exclude(at(8, 0x2000)..at(8, 0x3000)).unwrap();
    a.extend(at(8, 0x7000)).unwrap();
    let found: Vec<_> = (1..8).map(|page| which(8, page << 12)).collect();
    let one = Some(1);
    assert_eq!(found, [one, None, one, one, one, one, None]);
    drop(a);
    assert!((1..8).all(|page| which(8, page << 12).is_none()));
}

/// A window's pages, lent through its alias where they are valid; nothing is ever mapped for the program, so whoever touches
/// an address instead of asking is caught.
struct Lender {
    window: Arc<Window>,
    map: UserMap,
    valid: Mutex<[bool; 4]>,
    /// Largest part lent at a time.
    part: usize,
    faulted_in: Mutex<Vec<(usize, usize, Access)>>,
    /// Parts that are pinned now.
    pins: Arc<AtomicUsize>,
}

/// Counts itself.
struct Pin(Arc<AtomicUsize>);

impl Drop for Pin {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

const P: usize = 4096;

impl Lender {
    fn new(kind: UserMapKind) -> Arc<Self> {
        let window = Window::new().unwrap();
        let map = window.user_map(0..4, kind).unwrap();
        for (page, letter) in (0..4).zip(b'a'..) {
            window.write_page(page, 0, &[letter; P]);
        }
        Arc::new(Self {
            window,
            map,
            valid: Mutex::new([true, true, false, false]),
            part: P,
            faulted_in: Mutex::new(Vec::new()),
            pins: Arc::default(),
        })
    }

    fn enter(self: &Arc<Self>) -> Registration {
        let addr = self.map.addr();
        insert(
            addr..addr + 4 * P,
            Arc::clone(self) as Arc<dyn MappedMemory>,
        )
        .unwrap()
    }

    fn span(&self, at: usize, len: usize) -> RawSpan {
        let addr = self.map.addr() + at;
        RawSpan { addr, len }
    }

    fn untouched(&self) -> bool {
        let addr = self.map.addr();
        let mut touched = 0;
        uffd::scan(addr..addr + 4 * P, ScanFor::Present, |_| touched += 1).unwrap();
        touched == 0
    }
}

impl MappedMemory for Lender {
    fn signal_fault(&self, _: usize, _: Access) -> SignalVerdict {
        SignalVerdict::NotOurs
    }

    fn with_lent(
        &self,
        addr: usize,
        len: usize,
        access: Access,
        copy: &mut dyn FnMut(*mut u8, usize) -> usize,
    ) -> Lent {
        if access == Access::Write && self.map.kind() == UserMapKind::SharedRead {
            return Lent::Fatal;
        }
        let mut done = 0;
        while done < len {
            let at = addr + done - self.map.addr();
            if !self.valid.lock().unwrap()[at / P] {
                break;
            }
            let n = (P - at % P).min(len - done).min(self.part);
            let ours = self.window.alias((at / P) as u64).wrapping_add(at % P);
            let moved = copy(ours, n);
            done += moved;
            if moved < n {
                break;
            }
        }
        if done > 0 {
            Lent::Done(done)
        } else {
            Lent::NeedFault
        }
    }

    fn pin(&self, addr: usize, len: usize, access: Access) -> PinnedPart {
        let homes = Arc::new(Homes::new(Arena::new(1).unwrap()));
        homes.open(Arc::clone(&self.window));
        let mut segments = homes.segments();
        let lent = self.with_lent(addr, len, access, &mut |_, n| {
            let at = addr + segments.bytes() - self.map.addr();
            self.window
                .push_page(&mut segments, (at / P) as u64, at % P, n);
            n
        });
        let Lent::Done(got) = lent else {
            return PinnedPart::none(PinStop::Cold);
        };
        self.pins.fetch_add(1, Ordering::Relaxed);
        PinnedPart {
            segments,
            pins: Box::new(Pin(Arc::clone(&self.pins))),
            stop: (got < len).then_some(PinStop::Cold),
        }
    }

    fn fault_in(&self, addr: usize, len: usize, access: Access) -> usize {
        let at = addr - self.map.addr();
        self.faulted_in.lock().unwrap().push((at, len, access));
        let mut valid = self.valid.lock().unwrap();
        // The last page cannot be had.
        valid[at / P..((at + len).div_ceil(P)).min(3)].fill(true);
        (at + len).saturating_sub((3 * P).max(at))
    }
}

#[test]
fn a_copy_goes_through_the_library_s_own_address_and_across_borders() {
    let lender = Lender::new(UserMapKind::SharedWrite);
    let _table = lender.enter();
    let plain = [b'.'; 10];
    let plain_span = RawSpan {
        addr: plain.as_ptr().expose_provenance(),
        len: 10,
    };
    let spans = [plain_span, lender.span(P - 3, 6), plain_span];
    // SAFETY: reads our bytes and mapped memory.
    let mut cursor = unsafe { IovCursor::from_raw(Direction::Source, &spans) };
    let mut out = [0; 26];
    assert_eq!(cursor.copy_slice_nofault(&mut out), Progress::complete(26));
    assert_eq!(&out, b"..........aaabbb..........");
    let target = [lender.span(P - 2, 4)];
    // SAFETY: writes mapped memory that nobody refers to.
    let mut cursor = unsafe { IovCursor::from_raw(Direction::Target, &target) };
    assert_eq!(cursor.copy_slice_nofault(&mut b"WXYZ".to_owned()).done, 4);
    let mut seen = [0; 3];
    lender.window.read_page(0, P - 3, &mut seen);
    assert_eq!(&seen, b"aWX");
    lender.window.read_page(1, 0, &mut seen);
    assert_eq!(&seen, b"YZb");
    assert!(lender.untouched());
}

#[test]
fn a_page_that_is_not_there_stops_the_copy_at_its_first_byte_and_is_faulted_in_by_a_call() {
    let lender = Lender::new(UserMapKind::SharedWrite);
    let _table = lender.enter();
    let spans = [lender.span(100, 4 * P - 100)];
    // SAFETY: reads mapped memory.
    let mut cursor = unsafe { IovCursor::from_raw(Direction::Source, &spans) };
    let mut out = vec![0; 4 * P];
    let stop = |page: usize| CopyStop::NeedFault {
        addr: lender.map.addr() + page * P,
        access: Access::Read,
    };
    let first = cursor.copy_slice_nofault(&mut out);
    let good = (2 * P - 100) as u64;
    assert_eq!(first, Progress::stopped(good, stop(2)));
    assert_eq!(faultin::fault_in_cursor(&cursor, 2 * P), P);
    assert_eq!(
        cursor.copy_slice_nofault(&mut out),
        Progress::stopped(P as u64, stop(3))
    );
    assert_eq!(out[..P], [b'c'; P]);
    let asked = std::mem::take(&mut *lender.faulted_in.lock().unwrap());
    assert_eq!(asked, [(2 * P, 2 * P, Access::Read)]);
    // Both ways of making memory writeable ask for a store, and store nothing.
    assert_eq!(faultin::fault_in_safe_writeable(lender.span(10, 10)), 0);
    assert_eq!(faultin::fault_in_writeable(lender.span(10, 10)), 0);
    let asked = std::mem::take(&mut *lender.faulted_in.lock().unwrap());
    assert_eq!(asked, [(10, 10, Access::Write); 2]);
    assert!(lender.untouched());
}

#[test]
fn a_store_where_none_is_allowed_is_fatal() {
    let lender = Lender::new(UserMapKind::SharedRead);
    let _table = lender.enter();
    let spans = [lender.span(5, 10)];
    // SAFETY: mapped memory that nobody refers to.
    let mut cursor = unsafe { IovCursor::from_raw(Direction::Target, &spans) };
    let outcome = cursor.copy_slice_nofault(&mut [0; 10]);
    let addr = spans[0].addr;
    assert_eq!(outcome, Progress::stopped(0, CopyStop::Fatal { addr }));
}

#[test]
fn fault_in_crosses_from_plain_memory_into_a_mapping_and_out_again() {
    // A mapping between two pages of our own: reserve five pages and put the window's in the middle.
    let region = crate::region::Region::pages(6).unwrap();
    let at = region.iov(0..6 * P).spans()[0].addr;
    let lender = Lender::new(UserMapKind::SharedWrite);
    let _table = insert(
        at + P..at + 5 * P,
        Arc::new(Shifted(Arc::clone(&lender), at + P)) as Arc<dyn MappedMemory>,
    )
    .unwrap();
    let whole = RawSpan {
        addr: at,
        len: 6 * P,
    };
    assert_eq!(faultin::fault_in_readable(whole), 2 * P);
    let short = RawSpan {
        addr: at,
        len: 4 * P,
    };
    assert_eq!(faultin::fault_in_readable(short), 0);
    // SAFETY: reads the region and mapped memory.
    let mut cursor = unsafe { IovCursor::from_raw(Direction::Source, &[short]) };
    let mut out = vec![9; 4 * P];
    assert_eq!(
        cursor.copy_slice_nofault(&mut out),
        Progress::complete(4 * P as u64)
    );
    assert_eq!(
        (out[0], out[P], out[2 * P], out[3 * P]),
        (0, b'a', b'b', b'c')
    );
}

/// A lender seen at another address.
struct Shifted(Arc<Lender>, usize);

impl MappedMemory for Shifted {
    fn signal_fault(&self, _: usize, _: Access) -> SignalVerdict {
        SignalVerdict::NotOurs
    }

    fn with_lent(
        &self,
        addr: usize,
        len: usize,
        access: Access,
        copy: &mut dyn FnMut(*mut u8, usize) -> usize,
    ) -> Lent {
        let addr = addr - self.1 + self.0.map.addr();
        self.0.with_lent(addr, len, access, copy)
    }

    fn fault_in(&self, addr: usize, len: usize, access: Access) -> usize {
        self.0
            .fault_in(addr - self.1 + self.0.map.addr(), len, access)
    }
}

#[test]
fn mapped_memory_is_lent_pinned_and_by_our_own_address() {
    let lender = Lender::new(UserMapKind::SharedWrite);
    let _table = lender.enter();
    let plain = vec![0u8; P];
    let plain_span = RawSpan {
        addr: plain.as_ptr().expose_provenance(),
        len: P,
    };
    let lend = |spans: &[RawSpan], mapped_max: usize, granule: usize| {
        // SAFETY: nothing is read.
        let cursor = unsafe { IovCursor::from_raw(Direction::Source, spans) };
        let limits = Limits {
            mapped_max,
            granule,
        };
        let lending = Segments::lend_user(&cursor, &limits, |segments| {
            let pinned = lender.pins.load(Ordering::Relaxed);
            let spans = segments.spans().iter();
            (
                pinned,
                spans.map(|s| s.as_ptr() as usize).collect::<Vec<_>>(),
            )
        });
        assert_eq!(lender.pins.load(Ordering::Relaxed), 0, "all are back");
        (lending.bytes, lending.stop, lending.outcome)
    };
    let plain_at = plain_span.addr;
    assert_eq!(
        lend(&[plain_span], 0, 1),
        (P, None, Some((0, vec![plain_at])))
    );
    let ours = lender.window.alias(0) as usize;
    let span = lender.span(100, 200);
    let both = Some((1, vec![plain_at, ours + 100, plain_at]));
    let spans = [plain_span, span, plain_span];
    assert_eq!(lend(&spans, P, 1), (2 * P + 200, None, both));
    // The third page is not there: what is before it goes, in whole granules.
    let cold = Some(PinStop::Cold);
    let span = lender.span(100, 4 * P - 100);
    let part = Some((1, vec![ours + 100]));
    assert_eq!(lend(&[span], 4 * P, 1), (2 * P - 100, cold, part.clone()));
    assert_eq!(lend(&[span], 4 * P, 512), (2 * P - 512, cold, part.clone()));
    assert_eq!(
        lend(&[span], P, 512),
        (P, Some(PinStop::Full), part.clone())
    );
    let nothing = lender.span(2 * P, P);
    assert_eq!(lend(&[nothing], P, 1), (0, cold, None));
}

#[test]
fn a_thread_that_is_quiet_hears_of_signals_when_it_has_let_go() {
    use crate::region::signal::{Handler, send_to_thread};
    let handler = Handler::counting(libc::SIGUSR1).unwrap();
    // SAFETY: no memory is involved.
    let me = unsafe { libc::gettid() };
    let _mapping = enter(6, 0x1000..0x2000, 1).unwrap();
    {
        let _outer = Quiet::enter();
        {
            let _inner = Quiet::enter();
            send_to_thread(me, libc::SIGUSR1).unwrap();
        }
        assert_eq!(handler.received(), 0);
    }
    assert_eq!(handler.received(), 1);
    // A copy's fault is not kept away.
    let _quiet = Quiet::enter();
    let half = crate::region_for_tests::Half::new();
    let mut sink = [0u8; 8];
    // SAFETY: the copy reports what it cannot read.
    let copied =
        unsafe { crate::copy::copy_nofault(sink.as_mut_ptr(), half.as_ptr().wrapping_add(P), 8) };
    assert_eq!(copied.done, 0);
}
