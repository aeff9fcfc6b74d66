//! Whether this kernel says enough about stores to find them without a fault.

use pinfold_base::{Errno, PAGE_SIZE};

use super::{ScanFor, Uffd, scan};
use crate::window::{UserMapKind, Window, WindowError};

/// Tells whether stores through mappings of `uffd` can be found by [`scan`] alone.
///
/// Tried on a mapping of its own: a page that has no entry must count as stored to, one that is protected must not, and
/// dropping its entry must not change that. A kernel that answers otherwise would let a store be lost whose entry is gone.
///
/// # Errors
/// No memory file, no addresses, or the scan's refusal (see [`scan`]).
pub fn tracks_stores(uffd: &Uffd) -> Result<bool, Errno> {
    if !uffd.wp_async() {
        return Ok(false);
    }
    let refused = |error: WindowError| error.errno();
    let window = Window::new().map_err(refused)?;
    let map = window
        .user_map(0..2, UserMapKind::SharedWrite)
        .map_err(refused)?;
    uffd.register(&map)?;
    window.populate(0..1)?;
    let page = PAGE_SIZE as usize;
    if uffd.resume(map.addr(), page, true).pages != 1 {
        return Ok(false);
    }
    // The second page was never mapped.
    let unknown = map.addr() + page..map.addr() + 2 * page;
    let only_unknown = || {
        let mut found = Vec::new();
        let both = map.addr()..map.addr() + 2 * page;
        scan(both, ScanFor::Written, |run| found.push(run))?;
        Ok::<bool, Errno>(found == [unknown.clone()])
    };
    if !only_unknown()? {
        return Ok(false);
    }
    map.drop_entries(0..1)?;
    only_unknown()
}
