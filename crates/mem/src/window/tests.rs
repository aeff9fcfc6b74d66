use super::*;
use crate::region_for_tests::alone;

/// Resident bytes of the process, in pages.
fn resident_pages() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse().unwrap()
}

fn byte_at(map: &UserMap, page: u64) -> u8 {
    let addr = map.addr_of(page).unwrap();
    // SAFETY: a page of a live mapping, present or a hole; raw access.
    unsafe { std::ptr::with_exposed_provenance::<u8>(addr).read_volatile() }
}

#[test]
fn an_address_once_given_stays_while_the_window_grows() {
    let window = Window::new().unwrap();
    window.ensure(1).unwrap();
    let first = window.alias(0);
    window.write_page(0, 100, b"early");
    window.ensure(5000).unwrap();
    assert_eq!(window.alias(0), first);
    for page in [1023u64, 1024, 2047, 2048, 4095, 4096, 4999] {
        window.write_page(page, 0, &page.to_ne_bytes());
    }
    let map = window.user_map(0..5000, UserMapKind::SharedRead).unwrap();
    for page in [1023u64, 1024, 2047, 2048, 4095, 4096, 4999] {
        assert_eq!(byte_at(&map, page), page.to_ne_bytes()[0]);
    }
    let mut early = [0; 5];
    window.read_page(0, 100, &mut early);
    assert_eq!(&early, b"early");
}

#[test]
fn segments_of_the_alias_follow_each_other() {
    let mut next = 0;
    for segment in 0..SEGMENTS_MAX {
        let pages = segment_pages(segment);
        assert_eq!(pages.start, next);
        assert_eq!(segment_of(pages.start), segment);
        assert_eq!(segment_of(pages.end - 1), segment);
        next = pages.end;
    }
    assert!(next >= PAGES_MAX);
}

#[test]
#[should_panic(expected = "not of this window")]
fn a_page_that_was_not_asked_for_has_no_address() {
    let window = Window::new().unwrap();
    window.ensure(1).unwrap();
    let _ = window.alias(1024);
}

#[test]
fn an_impossible_size_is_refused() {
    let window = Window::new().unwrap();
    assert_eq!(
        window.ensure(u64::MAX).unwrap_err().errno(),
        Errno::EOVERFLOW
    );
    assert_eq!(window.ensure(PAGES_MAX).unwrap_err().errno(), Errno::ENOMEM);
    let end = window.user_map(PAGES_MAX - 1..PAGES_MAX, UserMapKind::SharedRead);
    assert_eq!(end.unwrap_err().errno(), Errno::ENOMEM);
}

#[test]
fn a_punched_page_is_gone_from_every_mapping() {
    let window = Window::new().unwrap();
    let map = window.user_map(0..3, UserMapKind::SharedRead).unwrap();
    let private = window.user_map(0..3, UserMapKind::Private).unwrap();
    for page in 0..3 {
        window.write_page(page, 0, &[7; 10]);
    }
    assert_eq!((byte_at(&map, 1), byte_at(&private, 1)), (7, 7));
    window.punch(1..2).unwrap();
    assert_eq!((byte_at(&map, 1), byte_at(&private, 1)), (0, 0));
    assert_eq!((byte_at(&map, 0), byte_at(&map, 2)), (7, 7));
}

#[test]
fn a_dropped_alias_keeps_the_bytes_and_counts_once() {
    const PAGES: u64 = 4096;
    let window = Window::new().unwrap();
    window.ensure(PAGES).unwrap();
    window.populate(0..PAGES).unwrap();
    for page in 0..PAGES {
        window.write_page(page, 0, &page.to_ne_bytes());
    }
    let with = resident_pages();
    window.drop_alias(0..PAGES);
    let without = resident_pages();
    assert!(without + PAGES / 2 < with, "{with} then {without}");
    for page in 0..PAGES {
        let mut bytes = [0; 8];
        window.read_page(page, 0, &mut bytes);
        assert_eq!(u64::from_ne_bytes(bytes), page);
    }
}

#[test]
fn pages_are_filled_across_segments() {
    let window = Window::new().unwrap();
    window.ensure(2000).unwrap();
    let buf = Arc::new(crate::span::AlignedBuf::zeroed(4 * PAGE));
    let segments = Segments::of_buf(&buf, 4 * PAGE);
    let bytes: Vec<u8> = (0..4 * PAGE).map(|at| (at / 7) as u8).collect();
    segments.copy_from(0, &bytes);
    window.fill(1022, &segments.spans()[0]);
    for (page, wanted) in (1022..1026).zip(bytes.chunks(PAGE)) {
        let mut got = vec![0; PAGE];
        window.read_page(page, 0, &mut got);
        assert_eq!(got, wanted);
    }
}

#[test]
fn what_was_unmapped_is_left_to_others() {
    let window = Window::new().unwrap();
    let map = window.user_map(10..20, UserMapKind::SharedWrite).unwrap();
    map.unmap(12..14).unwrap();
    map.unmap(13..16).unwrap();
    assert_eq!(map.mapped().as_slice(), [10..12, 16..20]);
    assert_eq!(map.drop_entries(11..13), Err(Errno::ENOMEM));
    map.drop_entries(16..20).unwrap();
    // Somebody else takes the place; dropping the map must leave it alone.
    let place = std::ptr::with_exposed_provenance_mut(map.addr_of(12).unwrap());
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: FIXED_NOREPLACE replaces nothing.
    let other = unsafe { rustix::mm::mmap_anonymous(place, PAGE, prot, flags) }.unwrap();
    // SAFETY: mapped just now.
    unsafe { other.cast::<u8>().write_volatile(9) };
    drop(map);
    // SAFETY: as above.
    assert_eq!(unsafe { other.cast::<u8>().read_volatile() }, 9);
    // SAFETY: ours, not used again.
    unsafe { munmap(other, PAGE) }.unwrap();
}

const LIMIT: u64 = 16 * PAGE_SIZE;

fn limit_file_size(hard: bool) {
    let limit = rustix::process::Rlimit {
        current: Some(LIMIT),
        maximum: hard.then_some(LIMIT),
    };
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
}

#[test]
fn a_hard_file_size_limit_is_an_error_and_not_a_signal() {
    let name = "window::tests::a_hard_file_size_limit_is_an_error_and_not_a_signal";
    let nobody = rustix::process::geteuid().is_root().then_some(65534);
    if !alone(name, nobody) {
        return;
    }
    limit_file_size(true);
    let window = Window::new().unwrap();
    let (bytes, limit) = (17 * PAGE_SIZE, LIMIT);
    assert_eq!(
        window.ensure(17),
        Err(WindowError::FileSizeLimit { bytes, limit })
    );
    window.ensure(16).unwrap();
    window.write_page(15, 0, b"x");
}

#[test]
fn a_soft_file_size_limit_is_put_out_of_the_way_and_back() {
    let name = "window::tests::a_soft_file_size_limit_is_put_out_of_the_way_and_back";
    if !alone(name, None) {
        return;
    }
    limit_file_size(false);
    let window = Window::new().unwrap();
    window.ensure(5000).unwrap();
    assert_eq!(file_size(), Some(LIMIT));
}

#[test]
fn many_ranges_lose_their_entries_together_and_keep_their_pages() {
    use crate::uffd::{ScanFor, scan};
    // More ranges than go into one call, of one page and of several.
    const GROUPS: u64 = 75;
    let window = Window::new().unwrap();
    let map = window
        .user_map(0..GROUPS * 4, UserMapKind::SharedRead)
        .unwrap();
    for page in 0..GROUPS * 4 {
        window.write_page(page, 0, &[page as u8]);
        assert_eq!(byte_at(&map, page), page as u8);
    }
    let parts: Vec<_> = (0..GROUPS)
        .map(|group| group * 4..group * 4 + 1 + group % 3)
        .collect();
    map.drop_many(&parts).unwrap();
    let mut present = Vec::new();
    let whole = map.addr()..map.addr() + map.len();
    scan(whole, ScanFor::Present, |run| {
        let page = |addr: usize| ((addr - map.addr()) / PAGE) as u64;
        present.extend(page(run.start)..page(run.end));
    })
    .unwrap();
    let dropped = |page: &u64| parts.iter().any(|part| part.contains(page));
    let expected: Vec<u64> = (0..GROUPS * 4).filter(|page| !dropped(page)).collect();
    assert_eq!(present, expected);
    for page in 0..GROUPS * 4 {
        assert_eq!(byte_at(&map, page), page as u8, "the window has it");
    }
    map.unmap(8..12).unwrap();
    assert_eq!(
        map.drop_many(&parts),
        Err(Errno::ENOMEM),
        "not all is mapped"
    );
}
