use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::*;

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
            assert!(since.elapsed() < Duration::from_secs(10), "nothing happens");
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
            assert!(since.elapsed() < Duration::from_secs(10), "still found");
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
