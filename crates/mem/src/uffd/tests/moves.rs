//! Mappings that are moved, made longer or given a neighbour: by us, or by a program that knows nothing of registrations.

use super::*;

/// Makes a rig of half the pages, with nothing behind them, and another mapping of all of them that it may move to.
fn rig_with_room(kind: UserMapKind) -> (Arc<Rig>, UserMap) {
    let rig = Rig::of(kind, Delivery::Inline, Privilege::ANY, false);
    rig.map.unmap(PAGES / 2..PAGES).unwrap();
    let other = rig.window.user_map(0..PAGES, kind).unwrap();
    (rig, other)
}

/// Moves a mapping as a program does that knows nothing of registrations.
fn moved(from: usize, to: usize, len: usize) {
    let (from, to) = (from as *mut _, to as *mut _);
    let flags = rustix::mm::MremapFlags::MAYMOVE;
    // SAFETY: both are mappings of a test's own.
    unsafe { rustix::mm::mremap_fixed(from, len, len, flags, to) }.unwrap();
}

#[test]
fn fact_8_a_mapping_that_is_moved_is_nobody_s_and_so_is_the_neighbour_it_is_joined_with() {
    within(|| {
        let (rig, other) = rig_with_room(UserMapKind::SharedWrite);
        rig.uffd.register(&other).unwrap();
        assert_eq!(rig.copy(0, 2, true), installed(2, None));
        moved(rig.at(0, 0), other.addr(), 4 * P);
        // A page that is not there is made, of zeros, and nobody is told; what was protected is not.
        assert_eq!(load(other.addr() + 2 * P), 0);
        assert_eq!(load(other.addr()), b'a');
        store(other.addr() + P, b'!');
        // The neighbour did not move.
        let resumed = rig.uffd.resume(other.addr() + 4 * P, P, true);
        assert_eq!(resumed, installed(0, InstallStop::Gone));
        rig.window.punch(2..3).unwrap();
        rig.uffd.register(&other).unwrap();
        for page in [2, 4] {
            let resumed = rig.uffd.resume(other.addr() + page * P, P, true);
            assert_eq!(resumed, installed(0, InstallStop::Hole), "served again");
        }
        // Its addresses may be anybody's: it must not unmap them.
        std::mem::forget(rig);
    });
}

#[test]
fn a_private_mapping_is_carried_with_its_copies_and_its_neighbours_stay_registered() {
    within(|| {
        let (rig, other) = rig_with_room(UserMapKind::Private);
        rig.uffd.register(&other).unwrap();
        for page in 0..3 {
            rig.window.write_page(page, 0, &[b'0' + page as u8; 2]);
        }
        assert_eq!(rig.resume(0, 2, false), installed(2, None));
        store(rig.at(1, 0), b'!');
        rig.map.carry_to(&other, &rig.uffd).unwrap();
        assert_eq!(load(other.addr() + P), b'!');
        assert_eq!(load(other.addr() + P + 1), b'1');
        assert_eq!(load(other.addr()), b'0');
        let there = |page: usize| rig.uffd.resume(other.addr() + page * P, P, false);
        assert_eq!(there(2), installed(1, None));
        // What was not moved was never without charge.
        assert_eq!(there(4), installed(0, InstallStop::Hole));
        // Where it was, it is as if mapped anew: nothing there, and in charge.
        let _table = rig.in_table();
        assert_eq!(load(rig.at(1, 0)), b'b');
        assert_eq!(rig.told(), [(rig.at(1, 0), Access::Read)]);
        // Once more, with what the first time was added: the kernel has made one mapping of both.
        store(other.addr() + 2 * P, b'?');
        let third = rig.window.user_map(0..2 * PAGES, UserMapKind::Private);
        let third = third.unwrap();
        rig.uffd.register(&third).unwrap();
        other.carry_to(&third, &rig.uffd).unwrap();
        let copies = [1, 2].map(|page| load(third.addr() + page * P));
        assert_eq!(&copies, b"!?");
    });
}

#[test]
fn fact_8_a_longer_mapping_is_in_charge_of_what_was_added() {
    within(|| {
        for kind in [UserMapKind::SharedWrite, UserMapKind::Private] {
            let (rig, _other) = rig_with_room(kind);
            let _table = rig.in_table();
            rig.map.extend(PAGES - 1).unwrap();
            rig.map.extend(PAGES).unwrap();
            rig.window.write_page(PAGES - 1, 3, b"x");
            assert_eq!(rig.resume(PAGES - 1, 1, false), installed(1, None));
            let seen = load(rig.at(PAGES - 1, 3));
            assert_eq!((seen, rig.told().len()), (b'x', 0));
            let hole = rig.resume(PAGES - 2, 1, false);
            assert_eq!(hole, installed(0, InstallStop::Hole));
            // One mapping, which a child does not get: what held for the rest holds for the addition.
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let range = format!("{:x}-{:x} ", rig.at(0, 0), rig.at(PAGES, 0));
            let (_, ours) = maps.split_once(&range).expect("one mapping has it all");
            let flags = ours.lines().find(|line| line.starts_with("VmFlags"));
            assert!(flags.unwrap().contains(" dc"), "{flags:?}");
        }
    });
}

#[test]
fn a_mapping_with_a_hole_neither_grows_nor_moves() {
    let rig = Rig::of(
        UserMapKind::Private,
        Delivery::Inline,
        Privilege::ANY,
        false,
    );
    let other = rig.window.user_map(0..PAGES, UserMapKind::Private).unwrap();
    rig.map.unmap(2..3).unwrap();
    let refused = WindowError::System {
        call: "mremap",
        errno: Errno::EFAULT,
    };
    assert_eq!(rig.map.extend(PAGES + 1), Err(refused));
    assert_eq!(rig.map.carry_to(&other, &rig.uffd), Err(refused));
    assert_eq!(rig.map.mapped().as_slice(), [0..2, 3..PAGES]);
    assert_eq!(other.mapped().first(), Some(&(0..PAGES)));
}
