//! Glocks: one lock per file whose mode is the right to cache it (SEMANTICS.md section H).
//!
//! *Owns*: the modes and which of them go together; the trait [`Duties`] that a demotion calls.
//!
//! *Does not own*: files, pages. Until a lock service joins several nodes, one process serves a directory and
//! every file is implicitly held in [`Mode::Exclusive`].
//!
//! *Locking*: class 2.

/// What a node may do with a file's data while it holds the lock in this mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// UN: nothing.
    Unlocked,
    /// SH: cache clean data and metadata.
    Shared,
    /// DF: cache metadata only; data moves by direct I/O.
    Deferred,
    /// EX: cache everything, dirty.
    Exclusive,
}

impl Mode {
    /// Tells whether two nodes may hold these modes at once: SH with SH, DF with DF, UN with anything.
    #[must_use]
    pub const fn compatible(self, other: Self) -> bool {
        matches!(
            (self, other),
            (Self::Unlocked, _)
                | (_, Self::Unlocked)
                | (Self::Shared, Self::Shared)
                | (Self::Deferred, Self::Deferred)
        )
    }
}

/// What a holder must do before it gives a lock up; implemented by the room that caches.
pub trait Duties: Send + Sync {
    /// Writes back what is dirty; after an error the lock is not handed over.
    ///
    /// # Errors
    /// Whatever kept a byte from being stored.
    fn sync(&self, to: Mode) -> Result<(), pinfold_base::Errno>;

    /// Drops what may not be cached in the new mode.
    fn invalidate(&self, to: Mode);
}

#[cfg(test)]
mod tests {
    use super::Mode::{self, Deferred, Exclusive, Shared, Unlocked};

    #[test]
    fn only_equal_sharing_modes_go_together() {
        let modes = [Unlocked, Shared, Deferred, Exclusive];
        let pairs: Vec<(Mode, Mode)> = modes
            .iter()
            .flat_map(|&a| modes.iter().map(move |&b| (a, b)))
            .filter(|&(a, b)| a != Unlocked && b != Unlocked && a.compatible(b))
            .collect();
        assert_eq!(pairs, [(Shared, Shared), (Deferred, Deferred)]);
    }
}
