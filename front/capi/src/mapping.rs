//! Mappings: which addresses show which file, munmap's right to take any part of them, mremap's to move them.
//!
//! *Owns*: the table of mapped address ranges, and what is pinned in them.
//!
//! *Does not own*: the mappings themselves, their faults: crate `pinfold`.
//!
//! *Locking*: the table's lock is held for look-ups and changes alone. Each mapping has a lock of its own, taken for reading by
//! what uses it and for writing to unmap a part; its list of pins has another, taken after that.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_uchar, c_void};
use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use pinfold::{Advice, Delivery, Errno, MapAccess, MapOptions, Mapping, PAGE_SIZE, Pinned};

use crate::call::answer;
use crate::descriptor;
use crate::errors::{Outcome, refuse};
use crate::fork;
use crate::user;
use crate::volume::Served;

const PAGE: usize = PAGE_SIZE as usize;
/// Pins of one mapping at most.
const PINS_MAX: usize = 4096;

/// A mapping and what is pinned in it. Its parts that are still mapped refer to it from the table.
struct Mapped {
    /// Before the mapping they refer to, so that they are dropped first.
    pins: Mutex<Vec<Pin>>,
    mapping: RwLock<Mapping>,
    access: MapAccess,
    /// Keeps the volume open.
    _served: Arc<Served>,
}

struct Pin {
    /// The addresses the program named.
    range: Range<usize>,
    _pinned: Pinned<'static>,
}

/// A range of addresses that is mapped, in whole pages.
#[derive(Clone)]
struct Part {
    end: usize,
    mapped: Arc<Mapped>,
}

/// By first address.
static PARTS: RwLock<BTreeMap<usize, Part>> = RwLock::new(BTreeMap::new());

/// Returns the addresses of a mapping, in whole pages.
fn addresses(mapping: &Mapping) -> Range<usize> {
    let base = mapping.as_ptr().expose_provenance();
    base..base + mapping.len().next_multiple_of(PAGE)
}

/// Translates addresses to a range of the mapping, without the rest of its last page; `None` where it is not any more: it has
/// moved since they were looked up.
fn inside(mapping: &Mapping, range: &Range<usize>) -> Option<Range<usize>> {
    let all = addresses(mapping);
    let at = |addr: usize| (addr - all.start).min(mapping.len());
    let whole = all.start <= range.start && range.end <= all.end;
    whole.then(|| at(range.start)..at(range.end))
}

/// Some addresses, and the mapping they lie in.
type Found = (Range<usize>, Arc<Mapped>);

/// Lists the mapped parts of a range of addresses, lowest first, and tells whether they cover it.
fn parts_of(range: &Range<usize>) -> (Vec<Found>, bool) {
    let parts = PARTS.read();
    let before = parts.range(..range.start).next_back();
    let rest = parts.range(range.clone());
    let mut found = Vec::new();
    let (mut reached, mut whole) = (range.start, true);
    for (&start, part) in before.into_iter().chain(rest) {
        if part.end <= range.start {
            continue;
        }
        let common = start.max(range.start)..part.end.min(range.end);
        whole &= common.start == reached;
        reached = common.end;
        found.push((common, Arc::clone(&part.mapped)));
    }
    (found, whole && reached == range.end)
}

/// Reads a range of addresses as msync and the like take it: it begins at a page and is made of whole ones.
fn pages_at(addr: *const c_void, len: usize) -> Outcome<Range<usize>> {
    let start = addr.addr();
    let end = len
        .checked_next_multiple_of(PAGE)
        .and_then(|len| start.checked_add(len));
    match end {
        Some(end) if start.is_multiple_of(PAGE) => Ok(start..end),
        Some(_) => refuse(Errno::EINVAL, "the address"),
        None => refuse(Errno::ENOMEM, "the length"),
    }
}

/// Maps `length` bytes of a file from `offset` on, as mmap(2): MAP_SHARED, MAP_SHARED_VALIDATE or MAP_PRIVATE; PROT_READ,
/// PROT_WRITE. `addr` is a hint and not followed; MAP_FIXED, PROT_EXEC and PROT_NONE are ENOTSUP. Returns MAP_FAILED on failure.
#[unsafe(no_mangle)]
pub extern "C" fn pf_mmap(
    addr: *mut c_void,
    length: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off_t,
) -> *mut c_void {
    let _ = addr;
    let mapped = answer(|| {
        let description = descriptor::of(fd)?;
        let (access, populate) = kind_of(prot, flags)?;
        let Ok(start) = u64::try_from(offset) else {
            return refuse(Errno::EINVAL, "the offset");
        };
        if length == 0 || !start.is_multiple_of(PAGE_SIZE) {
            return refuse(Errno::EINVAL, "the length or the offset");
        }
        let Some(end) = start.checked_add(length as u64) else {
            return refuse(Errno::EOVERFLOW, "the range");
        };
        let file = description.file_or(Errno::ENODEV)?;
        let options = MapOptions::new()
            .access(access)
            .delivery(if description.served.inline_faults() {
                Delivery::Inline
            } else {
                Delivery::Handler
            })
            .advice(if populate {
                Advice::WillNeed
            } else {
                Advice::Normal
            });
        let mapping = file.map(start..end, &options)?;
        let base = mapping.as_ptr().expose_provenance();
        let mapped = Arc::new(Mapped {
            pins: Mutex::new(Vec::new()),
            mapping: RwLock::new(mapping),
            access,
            _served: Arc::clone(&description.served),
        });
        let end = base + length.next_multiple_of(PAGE);
        PARTS.write().insert(base, Part { end, mapped });
        // An address of user space.
        Ok(base as isize)
    });
    // MAP_FAILED is -1.
    std::ptr::with_exposed_provenance_mut(mapped as usize)
}

/// Translates protection and flags; tells as well whether pages are to be brought in at once.
fn kind_of(prot: c_int, flags: c_int) -> Outcome<(MapAccess, bool)> {
    const IGNORED: c_int = libc::MAP_POPULATE
        | libc::MAP_NORESERVE
        | libc::MAP_NONBLOCK
        | libc::MAP_LOCKED
        | libc::MAP_DENYWRITE
        | libc::MAP_EXECUTABLE
        | libc::MAP_STACK;
    const FIXED: c_int = libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE;
    if flags & FIXED != 0 {
        return refuse(Errno::EOPNOTSUPP, "MAP_FIXED");
    }
    let kind = flags & libc::MAP_TYPE;
    let other = flags & !(libc::MAP_TYPE | IGNORED);
    if other != 0 {
        // Only the validating kind refuses what it does not know; MAP_ANONYMOUS and huge pages have no file.
        let errno = match kind {
            libc::MAP_SHARED_VALIDATE => Errno::EOPNOTSUPP,
            _ => Errno::EINVAL,
        };
        return refuse(errno, "the flags");
    }
    if prot & !(libc::PROT_READ | libc::PROT_WRITE) != 0 || prot == libc::PROT_NONE {
        return refuse(Errno::EOPNOTSUPP, "the protection");
    }
    let writes = prot & libc::PROT_WRITE != 0;
    let access = match (kind, writes) {
        (libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE | libc::MAP_PRIVATE, false) => {
            MapAccess::Read
        }
        (libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE, true) => MapAccess::Write,
        (libc::MAP_PRIVATE, true) => MapAccess::Private,
        _ => return refuse(Errno::EINVAL, "the flags"),
    };
    Ok((access, flags & libc::MAP_POPULATE != 0))
}

/// Tells whether any byte of a range of addresses is a mapping of this library: 1 or 0.
#[unsafe(no_mangle)]
pub extern "C" fn pf_is_mapped(addr: *const c_void, length: usize) -> c_int {
    if fork::in_child() {
        // A child has none: what it finds there now is its own.
        return 0;
    }
    let start = addr.addr();
    let (found, _) = parts_of(&(start..start.saturating_add(length.max(1))));
    c_int::from(!found.is_empty())
}

/// Unmaps the pages of a range, whole mappings or parts, as munmap(2); addresses that are not this library's stay as they are.
/// What is pinned there is unpinned. EBUSY for a part of a mapping that has pins elsewhere.
#[unsafe(no_mangle)]
pub extern "C" fn pf_munmap(addr: *mut c_void, length: usize) -> c_int {
    answer(|| {
        if length == 0 {
            return refuse(Errno::EINVAL, "the length");
        }
        let range = pages_at(addr, length).or_else(|_| refuse(Errno::EINVAL, "the range"))?;
        let (found, _) = parts_of(&range);
        for (part, mapped) in found {
            unmap(&part, &mapped)?;
        }
        Ok(0)
    })
}

fn unmap(part: &Range<usize>, mapped: &Arc<Mapped>) -> Outcome<()> {
    // Nobody begins to use it from here on; who uses it already lets go first.
    let mut mapping = mapped.mapping.write();
    {
        let mut pins = mapped.pins.lock();
        let apart = |pin: &Pin| pin.range.end <= part.start || part.end <= pin.range.start;
        if pins.iter().any(apart) {
            return refuse(Errno::EBUSY, "other parts of the mapping are pinned");
        }
        // None may be left: they refer to the mapping that is about to change.
        pins.clear();
    }
    if !take_out(part, mapped) {
        // Somebody else unmapped it meanwhile, or moved it.
        return Ok(());
    }
    let all = addresses(&mapping);
    let outcome = if all.start < part.start && part.end == all.end {
        // What is left may become longer again.
        mapping.remap(part.start - all.start, false)
    } else {
        // The table had it, so it is inside.
        let bytes = inside(&mapping, part).unwrap_or_default();
        mapping.unmap(bytes)
    };
    outcome.inspect_err(|_| put_back(part, mapped))?;
    Ok(())
}

/// Enters a range into the table.
fn put_back(range: &Range<usize>, mapped: &Arc<Mapped>) {
    let part = Part {
        end: range.end,
        mapped: Arc::clone(mapped),
    };
    PARTS.write().insert(range.start, part);
}

/// Makes a mapping longer or shorter, as mremap(2); MREMAP_MAYMOVE. A whole mapping, or what munmap left of its beginning,
/// may become longer; any part of one may become shorter. Private copies move along; what pointed to the old addresses does not.
/// EBUSY while it is pinned; MREMAP_FIXED, MREMAP_DONTUNMAP, a length of 0 before and a part that would become longer are
/// ENOTSUP. Returns MAP_FAILED on failure, with nothing changed.
#[unsafe(no_mangle)]
pub extern "C" fn pf_mremap(
    old_address: *mut c_void,
    old_size: usize,
    new_size: usize,
    flags: c_int,
) -> *mut c_void {
    const UNLIKE: c_int = libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let mapped = answer(|| {
        if flags & !(UNLIKE | libc::MREMAP_MAYMOVE) != 0 {
            return refuse(Errno::EINVAL, "the flags");
        }
        if new_size == 0 || !old_address.addr().is_multiple_of(PAGE) {
            return refuse(Errno::EINVAL, "the address or the length");
        }
        if flags & UNLIKE != 0 || old_size == 0 {
            return refuse(
                Errno::EOPNOTSUPP,
                "a place of the program's choice, or a second mapping",
            );
        }
        let range = pages_at(old_address, old_size)?;
        let (mut found, whole) = parts_of(&range);
        let Some((_, mapped)) = found.pop().filter(|_| whole && found.is_empty()) else {
            return refuse(Errno::EFAULT, "the range does not lie in one mapping");
        };
        let Some(pages) = new_size.checked_next_multiple_of(PAGE) else {
            return refuse(Errno::ENOMEM, "the length");
        };
        let may_move = flags & libc::MREMAP_MAYMOVE != 0;
        // An address of user space.
        resize(&range, &mapped, new_size, pages, may_move).map(|base| base as isize)
    });
    std::ptr::with_exposed_provenance_mut(mapped as usize)
}

/// Gives what lies at `range` a length of `len` bytes, which is so many whole `pages`; returns its address.
fn resize(
    range: &Range<usize>,
    mapped: &Arc<Mapped>,
    len: usize,
    pages: usize,
    may_move: bool,
) -> Outcome<usize> {
    if pages < range.len() {
        unmap(&(range.start + pages..range.end), mapped)?;
        return Ok(range.start);
    }
    let mut mapping = mapped.mapping.write();
    if *range != addresses(&mapping) {
        if pages == range.len() {
            return Ok(range.start);
        }
        return refuse(Errno::EOPNOTSUPP, "a part of a mapping would become longer");
    }
    if !mapped.pins.lock().is_empty() {
        return refuse(Errno::EBUSY, "the mapping is pinned");
    }
    // Out of the table first: the addresses may be another mapping's before this returns.
    if !take_out(range, mapped) {
        return refuse(Errno::EFAULT, "the range is not mapped as a whole");
    }
    let outcome = mapping.remap(len, may_move);
    let now = addresses(&mapping);
    put_back(&now, mapped);
    outcome?;
    Ok(now.start)
}

/// Takes a range out of the table, splitting what it lies in; tells whether it was there.
fn take_out(range: &Range<usize>, mapped: &Arc<Mapped>) -> bool {
    let mut parts = PARTS.write();
    let found = parts.range(..=range.start).next_back();
    let Some((&start, part)) = found else {
        return false;
    };
    if part.end < range.end || !Arc::ptr_eq(&part.mapped, mapped) {
        return false;
    }
    let part = part.clone();
    parts.remove(&start);
    let rest = [start..range.start, range.end..part.end];
    for left in rest.into_iter().filter(|left| !left.is_empty()) {
        let mapped = Arc::clone(&part.mapped);
        let end = left.end;
        parts.insert(left.start, Part { end, mapped });
    }
    true
}

/// Does something with every mapped part of a range; `ENOMEM` after that if some of it is not mapped, as in Linux.
fn each_part(
    range: &Range<usize>,
    mut work: impl FnMut(&Mapping, Range<usize>) -> Outcome<()>,
) -> Outcome<c_int> {
    let (found, mut whole) = parts_of(range);
    for (part, mapped) in found {
        let mapping = mapped.mapping.read();
        match inside(&mapping, &part) {
            Some(bytes) => work(&mapping, bytes)?,
            None => whole = false,
        }
    }
    if !whole {
        return refuse(Errno::ENOMEM, "the range is not mapped as a whole");
    }
    Ok(0)
}

/// Makes stores to a range durable (MS_SYNC) or nothing at once (MS_ASYNC), as msync(2).
#[unsafe(no_mangle)]
pub extern "C" fn pf_msync(addr: *mut c_void, length: usize, flags: c_int) -> c_int {
    const KNOWN: c_int = libc::MS_ASYNC | libc::MS_SYNC | libc::MS_INVALIDATE;
    const BOTH: c_int = libc::MS_ASYNC | libc::MS_SYNC;
    answer(|| {
        if flags & !KNOWN != 0 || flags & BOTH == BOTH {
            return refuse(Errno::EINVAL, "the flags");
        }
        let range = pages_at(addr, length)?;
        each_part(&range, |mapping, part| {
            if flags & libc::MS_SYNC != 0 {
                mapping.flush(part)?;
            }
            Ok(())
        })
    })
}

/// Tells what the program is about to do with a range, as madvise(2): MADV_NORMAL, MADV_RANDOM and MADV_SEQUENTIAL, which
/// concern the whole mapping, MADV_WILLNEED, MADV_DONTNEED, MADV_COLD, MADV_PAGEOUT. MADV_DONTFORK, MADV_DODUMP and
/// MADV_DONTDUMP change nothing. Others are EINVAL.
#[unsafe(no_mangle)]
pub extern "C" fn pf_madvise(addr: *mut c_void, length: usize, advice: c_int) -> c_int {
    answer(|| {
        let advice = match advice {
            libc::MADV_NORMAL => Some(Advice::Normal),
            libc::MADV_RANDOM => Some(Advice::Random),
            libc::MADV_SEQUENTIAL => Some(Advice::Sequential),
            libc::MADV_WILLNEED => Some(Advice::WillNeed),
            libc::MADV_DONTNEED => Some(Advice::DontNeed),
            libc::MADV_COLD | libc::MADV_PAGEOUT | libc::MADV_DONTFORK => None,
            libc::MADV_DODUMP | libc::MADV_DONTDUMP => None,
            _ => return refuse(Errno::EINVAL, "the advice"),
        };
        let range = pages_at(addr, length)?;
        each_part(&range, |mapping, part| {
            if let Some(advice) = advice {
                mapping.advise(advice, part)?;
            }
            Ok(())
        })
    })
}

/// Tells for each page of a range, in one byte each, whether it is in memory, as mincore(2).
///
/// # Safety
/// `vector` is the caller's to lend.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pf_mincore(
    addr: *mut c_void,
    length: usize,
    vector: *mut c_uchar,
) -> c_int {
    answer(|| {
        let range = pages_at(addr, length)?;
        if !parts_of(&range).1 {
            return refuse(Errno::ENOMEM, "the range is not mapped as a whole");
        }
        let mut at = vector.expose_provenance();
        each_part(&range, |mapping, part| {
            let resident = mapping.resident(part)?;
            let mut bytes: Vec<u8> = resident.into_iter().map(u8::from).collect();
            // SAFETY: passed on to the caller.
            unsafe { user::write_bytes(at, &mut bytes) }?;
            at = at.wrapping_add(bytes.len());
            Ok(())
        })
    })
}

/// Accepts the protection a mapping has; another is ENOTSUP.
#[unsafe(no_mangle)]
pub extern "C" fn pf_mprotect(addr: *mut c_void, length: usize, prot: c_int) -> c_int {
    answer(|| {
        let range = pages_at(addr, length)?;
        let access = match prot {
            libc::PROT_READ => [MapAccess::Read; 2],
            _ if prot == libc::PROT_READ | libc::PROT_WRITE => {
                [MapAccess::Write, MapAccess::Private]
            }
            _ => return refuse(Errno::EOPNOTSUPP, "the protection"),
        };
        let (found, whole) = parts_of(&range);
        if !found
            .iter()
            .all(|(_, mapped)| access.contains(&mapped.access))
        {
            return refuse(Errno::EOPNOTSUPP, "another protection than the mapping's");
        }
        if !whole {
            return refuse(Errno::ENOMEM, "the range is not mapped as a whole");
        }
        Ok(0)
    })
}

/// Brings a range that lies in one mapping into memory and keeps it there, mapped, until pf_unpin: system calls and devices
/// may use it, and no access waits or gets SIGBUS. With `for_writing` it may be stored to. EFAULT beyond the file's end; ENOMEM
/// when a quarter of the volume's budget is pinned already.
#[unsafe(no_mangle)]
pub extern "C" fn pf_pin(addr: *mut c_void, length: usize, for_writing: c_int) -> c_int {
    answer(|| {
        let range = named(addr, length)?;
        let (mut found, whole) = parts_of(&range);
        let Some((_, mapped)) = found.pop().filter(|_| whole && found.is_empty()) else {
            return refuse(Errno::ENOMEM, "the range does not lie in one mapping");
        };
        let mapping = mapped.mapping.read();
        let Some(bytes) = inside(&mapping, &range) else {
            return refuse(Errno::ENOMEM, "the range does not lie in one mapping");
        };
        let pinned = mapping.pin(bytes, for_writing != 0)?;
        let mut pins = mapped.pins.lock();
        if pins.len() == PINS_MAX {
            return refuse(Errno::ENOMEM, "one more pin");
        }
        // SAFETY: lengthens a borrow of `mapped.mapping`. The mapping does not move: it lies in an Arc. The pin is kept in
        // `mapped.pins`, which is dropped before it; `unmap` and `resize`, which alone change it, empty that list first or
        // find it empty, under the lock that is held here for reading.
        let pinned = unsafe { std::mem::transmute::<Pinned<'_>, Pinned<'static>>(pinned) };
        pins.push(Pin {
            range,
            _pinned: pinned,
        });
        Ok(0)
    })
}

/// Ends the latest pf_pin of the same address and length; EINVAL if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn pf_unpin(addr: *mut c_void, length: usize) -> c_int {
    answer(|| {
        let range = named(addr, length)?;
        let (mut found, _) = parts_of(&range);
        if let Some((_, mapped)) = found.pop() {
            // As for whoever pins: nobody unmaps meanwhile.
            let _used = mapped.mapping.read();
            let mut pins = mapped.pins.lock();
            if let Some(at) = pins.iter().rposition(|pin| pin.range == range) {
                pins.swap_remove(at);
                return Ok(0);
            }
        }
        refuse(Errno::EINVAL, "nothing like that is pinned")
    })
}

fn named(addr: *const c_void, length: usize) -> Outcome<Range<usize>> {
    let start = addr.addr();
    match start.checked_add(length) {
        Some(end) if length > 0 => Ok(start..end),
        _ => refuse(Errno::EINVAL, "the range"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errno(prot: c_int, flags: c_int) -> Option<Errno> {
        kind_of(prot, flags).err().map(|failure| failure.errno())
    }

    #[test]
    fn protection_and_flags_say_what_is_mapped() {
        const RW: c_int = libc::PROT_READ | libc::PROT_WRITE;
        let kind = |prot, flags| kind_of(prot, flags).unwrap();
        assert_eq!(
            kind(libc::PROT_READ, libc::MAP_PRIVATE),
            (MapAccess::Read, false)
        );
        assert_eq!(kind(RW, libc::MAP_PRIVATE), (MapAccess::Private, false));
        let populated = libc::MAP_SHARED | libc::MAP_POPULATE;
        assert_eq!(kind(RW, populated), (MapAccess::Write, true));
        assert_eq!(errno(RW, 0), Some(Errno::EINVAL));
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        assert_eq!(errno(RW, anonymous), Some(Errno::EINVAL));
        let dax = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
        assert_eq!(errno(RW, dax), Some(Errno::EOPNOTSUPP));
        let fixed = libc::MAP_SHARED | libc::MAP_FIXED;
        assert_eq!(errno(RW, fixed), Some(Errno::EOPNOTSUPP));
        assert_eq!(
            errno(libc::PROT_EXEC, libc::MAP_SHARED),
            Some(Errno::EOPNOTSUPP)
        );
    }
}
