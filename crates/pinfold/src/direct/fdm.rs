//! Direct writes in the `faults_disabled_mapping` mode: memory that is not there is brought in with the gate blocked
//! (SEMANTICS.md section D).
//!
//! *Owns*: the rounds of one write under one inode lock, and how many there are.
//!
//! *Does not own*: who waits for which gate ([`pinfold_cache::fdm`]); what is left when this does not succeed: the write then
//! goes on as every other, with nothing held.
//!
//! *Locking*: inode lock and gate, both while pages of other files are read. Pins stay leaves: they are had after memory was
//! brought in, and not kept while more is. bcachefs keeps them, and uses what it has when its locks were dropped.
//!
//! ```text
//!  round: drop cached pages | pin | all there ─────────► transfer, drop cached pages, done
//!                                 |- some cold ────────► give pins back, bring in, pin again
//!                                 |- the gate was open ► next round: what was dropped may be cached again (D-5)
//!                                 '- it does not come ─► transfer what there is; the caller goes on
//! ```

use std::cell::Cell;

use pinfold_base::Progress;
use pinfold_cache::BlockGuard;
use pinfold_mem::faultin::fault_in_cursor_mapped;
use pinfold_mem::{IovCursor, PinStop};

use super::{Stop, past_cache, pin_bytes_max, store, write_bound};
use crate::inode::Inode;

/// Times memory is brought in that is gone again when it is to be pinned.
const BRING_IN_MAX: u32 = 2;
/// Times a write begins anew because its gate was open, before it goes on with nothing held.
const ROUNDS_MAX: u32 = 8;

/// Why a round begins anew.
struct Dropped;

/// Writes as [`past_cache`] and [`store`] do; the inode's lock is held and `blocked` is its gate's.
pub(super) fn write(
    inode: &Inode,
    cursor: &mut IovCursor<'_>,
    offset: u64,
    blocked: &BlockGuard<'_>,
) -> Progress<Stop> {
    let count = cursor.count();
    for _ in 0..ROUNDS_MAX {
        let mut dropped = false;
        let moved = past_cache(inode, offset, count, || {
            write_round(inode, cursor, offset, blocked).unwrap_or_else(|Dropped| {
                dropped = true;
                Progress::complete(0)
            })
        });
        if !dropped {
            return moved;
        }
    }
    Progress::stopped(0, Stop::Pin(PinStop::Cold))
}

/// Stores what one transfer may pin, brought in first as far as it comes.
fn write_round(
    inode: &Inode,
    cursor: &mut IovCursor<'_>,
    offset: u64,
    blocked: &BlockGuard<'_>,
) -> Result<Progress<Stop>, Dropped> {
    let window = cursor.count().min(pin_bytes_max(inode));
    for _ in 0..BRING_IN_MAX {
        // Tried first: what is there costs its pins, and no look at each page before.
        let short = Cell::new(false);
        let moved = store(inode, cursor, |segments| {
            short.set(segments.bytes() < window);
            if short.get() {
                return Progress::complete(0);
            }
            write_bound(inode, offset, segments)
        });
        let cold = moved.done == 0 && matches!(moved.stop, Some(Stop::Pin(PinStop::Cold)));
        if !cold && !short.get() {
            return Ok(moved);
        }
        if !cold {
            break;
        }
        let bring_in = || fault_in_cursor_mapped(cursor, window);
        let brought = inode.pages().while_blocked(blocked, bring_in);
        if brought.dropped {
            return Err(Dropped);
        }
        if !brought.result {
            break;
        }
    }
    Ok(store(inode, cursor, |segments| {
        write_bound(inode, offset, segments)
    }))
}
