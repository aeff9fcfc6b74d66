//! Reading pages of one file while the gate of another is blocked: the `faults_disabled_mapping` scheme (SEMANTICS.md
//! section D, after bcachefs).
//!
//! A volume's option, for comparison; the default is rule zero, under which nobody who blocks a gate reads a page of a
//! mapping. It costs others nothing: only who would have to wait for a gate looks whether his thread blocks one.
//!
//! *Owns*: the order in which the gates of two files are waited for; the blocked gate that is let go where that order
//! forbids to wait; the note of it, kept by the thread, that tells the direct write to invalidate once more.
//!
//! *Does not own*: the direct write (`pinfold`), which blocks the gate, drops cached pages before and after, and decides how
//! often it tries.
//!
//! *Locking*: waits for a gate with another one blocked (class 4 twice), the one with the higher number of the two. Never
//! by an address, and not across nodes: a glock cannot be had in such an order.
//!
//! ```text
//!  a page of G is missing, the thread blocks F:
//!    try ADD(G) |- there ─────────► read the page
//!               |- G is F ────────► refused: it could only wait for itself (D-2)
//!               |- G after F ─────► wait for ADD(G), F stays blocked; read the page
//!               '- G before F ────► let F go, wait for ADD(G), leave it, block F again; refused, and F was dropped (D-5)
//! ```

use std::cell::RefCell;
use std::cmp::Ordering;
use std::sync::Arc;

use pinfold_base::rank;

use crate::CacheError;
use crate::file::FilePages;
use crate::gate::{AddGuard, BlockGuard, Gate};

/// What became of asking for a gate with another one blocked.
#[derive(Debug)]
#[must_use = "after `Dropped` whatever was true of the blocked file has to be made true again"]
pub enum Turn<'a> {
    /// The right to insert pages; the own gate was blocked throughout.
    Added(AddGuard<'a>),
    /// It is the very gate that is blocked.
    Own,
    /// The own gate was let go for a while and is blocked again; ask again.
    Dropped,
}

/// Asks for the right to insert pages behind `wanted`, in a thread that blocks `own`; the numbers say which comes first.
/// Calls `dropped` when `own` has been let go.
pub fn add_while_blocking<'a>(
    wanted: (&'a Gate, u64),
    own: (&Gate, u64),
    dropped: impl FnOnce(),
) -> Turn<'a> {
    if let Some(add) = wanted.0.try_add() {
        // Whatever the order: who does not wait is waited for by nobody.
        return Turn::Added(add);
    }
    match wanted.1.cmp(&own.1) {
        Ordering::Equal => Turn::Own,
        Ordering::Greater => Turn::Added(wanted.0.add()),
        Ordering::Less => {
            own.0.unblocked(|| {
                dropped();
                drop(wanted.0.add());
            });
            Turn::Dropped
        }
    }
}

/// What a thread blocks while it brings memory in.
struct Blocked {
    file: Arc<FilePages>,
    dropped: bool,
}

thread_local! {
    static BLOCKED: RefCell<Option<Blocked>> = const { RefCell::new(None) };
}

/// What came of [`FilePages::while_blocked`].
#[derive(Debug)]
#[must_use = "pages dropped before have to be dropped again if the gate was open meanwhile"]
pub struct Brought<R> {
    /// What the work returned.
    pub result: R,
    /// Whether the gate was let go in between: the file's pages may be cached again.
    pub dropped: bool,
}

/// Forgets what the thread blocks, panics included.
struct Scope;

impl Drop for Scope {
    fn drop(&mut self) {
        BLOCKED.take();
    }
}

impl FilePages {
    /// Runs `bring_in`, which may read pages of any file, in a thread that blocks this file's gate. Reads that can only be had
    /// by letting the gate go, and those of missing pages of this very file, fail with [`CacheError::WouldBlock`]. Only
    /// reads: what makes a page dirty waits for its gate in any order (D-6).
    ///
    /// May hold class 1 and the gate, and nothing else.
    pub fn while_blocked<R>(
        self: &Arc<Self>,
        _blocked: &BlockGuard<'_>,
        bring_in: impl FnOnce() -> R,
    ) -> Brought<R> {
        BLOCKED.set(Some(Blocked {
            file: Arc::clone(self),
            dropped: false,
        }));
        let scope = Scope;
        let _permit = rank::permit_under_gate();
        let result = bring_in();
        let dropped = BLOCKED.with_borrow(|own| own.as_ref().is_some_and(|own| own.dropped));
        drop(scope);
        Brought { result, dropped }
    }

    /// Waits for the right to insert pages, as [`Gate::add`] does, unless this thread blocks a gate.
    ///
    /// # Errors
    /// [`CacheError::WouldBlock`] where it does, and cannot wait as well.
    #[inline]
    #[track_caller]
    pub(crate) fn add(&self) -> Result<AddGuard<'_>, CacheError> {
        match self.gate().try_add() {
            Some(add) => Ok(add),
            None => self.add_slow(),
        }
    }

    #[cold]
    #[track_caller]
    fn add_slow(&self) -> Result<AddGuard<'_>, CacheError> {
        // Nothing is blocked by a thread whose variables are gone.
        let own = BLOCKED
            .try_with(|own| own.borrow().as_ref().map(|own| Arc::clone(&own.file)))
            .unwrap_or_default();
        let Some(own) = own else {
            return Ok(self.gate().add());
        };
        let dropped = || {
            own.cache().counters.gates_dropped.bump();
            BLOCKED.with_borrow_mut(|own| {
                if let Some(own) = own {
                    own.dropped = true;
                }
            });
        };
        let (wanted, own) = ((self.gate(), self.id()), (own.gate(), own.id()));
        match add_while_blocking(wanted, own, dropped) {
            Turn::Added(add) => Ok(add),
            Turn::Own | Turn::Dropped => Err(CacheError::WouldBlock),
        }
    }
}
