//! The table of the crate's first page as code: what keeps two operations on one page apart.
//!
//! `tests/table.rs` races every pair and compares the table in the crate's documentation with this one, so that neither
//! drifts from the other.

/// What may happen to a cached page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Its contents are brought from the store.
    Fill,
    /// Its contents are copied to a reader.
    ReadCopy,
    /// A writer changes its contents.
    Write,
    /// Its contents are stored.
    WriteBack,
    /// Its frame is wanted for another page.
    Evict,
    /// It leaves the file: cut off, punched out, or replaced by a direct write.
    Truncate,
    /// It is brought into a user mapping, moves to the window for that, or is loaded and stored to there.
    Map,
}

impl Operation {
    /// All of them, in the table's order.
    pub const ALL: [Self; 7] = [
        Self::Fill,
        Self::ReadCopy,
        Self::Write,
        Self::WriteBack,
        Self::Evict,
        Self::Truncate,
        Self::Map,
    ];

    /// Returns the name the table uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fill => "fill",
            Self::ReadCopy => "read copy",
            Self::Write => "write",
            Self::WriteBack => "write-back",
            Self::Evict => "evict",
            Self::Truncate => "truncate",
            Self::Map => "map",
        }
    }
}

/// Returns what keeps `a` and `b` on one page apart, in whichever order they come.
#[must_use]
pub const fn separation(a: Operation, b: Operation) -> &'static str {
    use Operation::{Evict, Fill, Map, ReadCopy, Truncate, Write, WriteBack};
    match (a, b) {
        (Fill, Fill) => "index shard",
        (Fill, ReadCopy) | (ReadCopy, Fill) => "not UPTODATE",
        (Fill, Write) | (Write, Fill) => "folio lock",
        (Fill, WriteBack) | (WriteBack, Fill) => "not DIRTY",
        (Fill, Evict) | (Evict, Fill) => "LOCKED",
        (Fill, Truncate) | (Truncate, Fill) => "gate, folio lock",
        (ReadCopy, ReadCopy) => "–",
        (ReadCopy, Write) | (Write, ReadCopy) => "– (as in the kernel)",
        (ReadCopy, WriteBack) | (WriteBack, ReadCopy) => "–",
        (ReadCopy, Evict | Truncate) | (Evict | Truncate, ReadCopy) => "reference",
        (Write, Write) => "folio lock",
        (Write, WriteBack) | (WriteBack, Write) => "folio lock, then DIRTY again",
        (Write, Evict) | (Evict, Write) => "LOCKED, DIRTY",
        (Write, Truncate) | (Truncate, Write) => "inode lock (above), folio lock",
        (WriteBack, WriteBack | Evict | Truncate) | (Evict | Truncate, WriteBack) => "WRITEBACK",
        (Evict, Evict | Truncate) | (Truncate, Evict) => "LOCKED",
        (Fill, Map) | (Map, Fill) => "not UPTODATE",
        (ReadCopy, Map) | (Map, ReadCopy) => "reference: keeps a snapshot",
        (Write | Map, Map) | (Map, Write) => "folio lock",
        (WriteBack, Map) | (Map, WriteBack) => "folio lock, protected before clean",
        (Evict, Map) | (Map, Evict) => "LOCKED, clean is protected",
        (Truncate, Map) | (Map, Truncate) => "gate (stores), folio lock, then the size again",
        (Truncate, Truncate) => "inode lock (above), folio lock",
    }
}
