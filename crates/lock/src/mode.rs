//! What a lock lets a node do, and what a request may ask for.

use std::ops::BitOr;

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
    /// The modes, weakest first.
    pub const ALL: [Self; 4] = [
        Self::Unlocked,
        Self::Shared,
        Self::Deferred,
        Self::Exclusive,
    ];

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

    /// Tells whether a change from this mode to `to` only gives rights up, so that no other node is waited for.
    ///
    /// Every other change goes through UN: two nodes that kept SH while each waits for EX would wait for ever (H-8).
    #[must_use]
    pub const fn falls_to(self, to: Self) -> bool {
        !matches!(self, Self::Unlocked)
            && matches!(
                (self, to),
                (_, Self::Unlocked) | (Self::Exclusive, Self::Shared | Self::Deferred)
            )
    }

    /// The mode to fall to when another node wants `wanted`: EX leaves nothing, DF and SH can be shared.
    #[must_use]
    pub const fn left_for(wanted: Self) -> Self {
        match wanted {
            Self::Exclusive | Self::Unlocked => Self::Unlocked,
            Self::Deferred => Self::Deferred,
            Self::Shared => Self::Shared,
        }
    }

    /// The two letters of the field: `UN`, `SH`, `DF`, `EX`.
    #[must_use]
    pub const fn letters(self) -> &'static str {
        match self {
            Self::Unlocked => "UN",
            Self::Shared => "SH",
            Self::Deferred => "DF",
            Self::Exclusive => "EX",
        }
    }

    /// The mode that these letters name.
    #[must_use]
    pub fn from_letters(letters: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.letters() == letters)
    }
}

/// How a request differs from plainly waiting for its mode.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Flags(u16);

impl Flags {
    /// Nothing special.
    pub const NONE: Self = Self(0);
    /// TRY: never waits for another holder.
    pub const TRY: Self = Self(1);
    /// TRY_1CB: as TRY, and the owners are asked once to give way.
    pub const TRY_1CB: Self = Self(1 << 1);
    /// ANY: SH and DF serve each other.
    pub const ANY: Self = Self(1 << 2);
    /// EXACT: no stronger mode serves.
    pub const EXACT: Self = Self(1 << 3);
    /// NODE_SCOPE: EX against other nodes, shared with holders of this node that ask for the same.
    pub const NODE_SCOPE: Self = Self(1 << 4);
    /// NOCACHE: the lock is given up at release.
    pub const NOCACHE: Self = Self(1 << 5);
    /// SKIP: the inode is not read again, even if that is owed.
    pub const SKIP: Self = Self(1 << 6);
    /// NOEXP: granted during recovery too.
    pub const NOEXP: Self = Self(1 << 7);
    /// FAULT: on behalf of an instruction that runs only after the lock was let go. The mode is kept for the minimum hold
    /// although nobody is queued.
    pub const FAULT: Self = Self(1 << 8);

    const LETTERS: [(Self, char); 9] = [
        (Self::TRY, 't'),
        (Self::TRY_1CB, 'T'),
        (Self::ANY, 'a'),
        (Self::EXACT, 'E'),
        (Self::NODE_SCOPE, 'n'),
        (Self::NOCACHE, 'c'),
        (Self::SKIP, 's'),
        (Self::NOEXP, 'e'),
        (Self::FAULT, 'f'),
    ];

    /// Tells whether all of `other` are set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Tells whether the request never waits for another holder.
    #[must_use]
    pub const fn tries(self) -> bool {
        self.0 & (Self::TRY.0 | Self::TRY_1CB.0) != 0
    }

    /// The letters of the dump: gfs2's, and `n` for NODE_SCOPE.
    pub(crate) fn letters(self) -> impl Iterator<Item = char> {
        Self::LETTERS
            .into_iter()
            .filter_map(move |(flag, letter)| self.has(flag).then_some(letter))
    }
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::fmt::Debug for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Flags(")?;
        for letter in self.letters() {
            write!(f, "{letter}")?;
        }
        f.write_str(")")
    }
}

/// What a holder asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Request {
    /// The mode wanted; not UN.
    pub mode: Mode,
    /// How.
    pub flags: Flags,
}

impl Request {
    /// Asks for `mode` and waits for it.
    #[must_use]
    pub const fn new(mode: Mode) -> Self {
        Self {
            mode,
            flags: Flags::NONE,
        }
    }

    /// Adds `flags`.
    #[must_use]
    pub fn with(self, flags: Flags) -> Self {
        Self {
            flags: self.flags | flags,
            ..self
        }
    }
}

/// Tells whether `new` may hold a lock that the node has in `state`, beside the holder at the head of the queue.
///
/// Stricter than gfs2 in one point: the mode the node has must serve `new` beside a holder too. There an EXACT request was
/// granted under EX beside a plain SH holder, and SH under DF beside an ANY holder.
pub(crate) const fn may_grant(state: Mode, beside: Option<Request>, new: Request) -> bool {
    serves(state, new)
        && match beside {
            None => true,
            Some(holder) => match (holder.mode, new.mode) {
                (Mode::Shared, Mode::Shared) | (Mode::Deferred, Mode::Deferred) => true,
                (Mode::Exclusive, Mode::Exclusive) => {
                    holder.flags.has(Flags::NODE_SCOPE) && new.flags.has(Flags::NODE_SCOPE)
                }
                _ => false,
            },
        }
}

const fn serves(state: Mode, new: Request) -> bool {
    match (state, new.mode) {
        (Mode::Shared, Mode::Shared)
        | (Mode::Deferred, Mode::Deferred)
        | (Mode::Exclusive, Mode::Exclusive) => true,
        (Mode::Exclusive, Mode::Shared | Mode::Deferred) => !new.flags.has(Flags::EXACT),
        (Mode::Shared, Mode::Deferred) | (Mode::Deferred, Mode::Shared) => {
            new.flags.has(Flags::ANY) && !new.flags.has(Flags::EXACT)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::Mode::{self, Deferred, Exclusive, Shared, Unlocked};
    use super::{Flags, Request, may_grant};

    #[test]
    fn only_equal_sharing_modes_go_together() {
        let pairs: Vec<(Mode, Mode)> = Mode::ALL
            .iter()
            .flat_map(|&a| Mode::ALL.iter().map(move |&b| (a, b)))
            .filter(|&(a, b)| a != Unlocked && b != Unlocked && a.compatible(b))
            .collect();
        assert_eq!(pairs, [(Shared, Shared), (Deferred, Deferred)]);
    }

    #[test]
    fn modes_fall_and_never_rise_in_place() {
        let falls: Vec<String> = Mode::ALL
            .iter()
            .flat_map(|&a| Mode::ALL.iter().map(move |&b| (a, b)))
            .filter(|&(a, b)| a.falls_to(b))
            .map(|(a, b)| format!("{}-{}", a.letters(), b.letters()))
            .collect();
        assert_eq!(falls, ["SH-UN", "DF-UN", "EX-UN", "EX-SH", "EX-DF"]);
    }

    /// Section H's rule written out as a table, one row for each mode the node has.
    #[test]
    fn t61_who_may_hold_without_a_holder() {
        let table = [
            // state, request: plain, EXACT, ANY, ANY and EXACT
            (Unlocked, Shared, [false, false, false, false]),
            (Unlocked, Deferred, [false, false, false, false]),
            (Unlocked, Exclusive, [false, false, false, false]),
            (Shared, Shared, [true, true, true, true]),
            (Shared, Deferred, [false, false, true, false]),
            (Shared, Exclusive, [false, false, false, false]),
            (Deferred, Shared, [false, false, true, false]),
            (Deferred, Deferred, [true, true, true, true]),
            (Deferred, Exclusive, [false, false, false, false]),
            (Exclusive, Shared, [true, false, true, false]),
            (Exclusive, Deferred, [true, false, true, false]),
            (Exclusive, Exclusive, [true, true, true, true]),
        ];
        let ways = [
            Flags::NONE,
            Flags::EXACT,
            Flags::ANY,
            Flags::ANY | Flags::EXACT,
        ];
        for (state, mode, expected) in table {
            for (flags, expected) in ways.into_iter().zip(expected) {
                let new = Request { mode, flags };
                assert_eq!(may_grant(state, None, new), expected, "{state:?} {new:?}");
            }
        }
    }

    #[test]
    fn t61_who_may_hold_beside_a_holder() {
        for held in [Shared, Deferred, Exclusive] {
            for asked in [Shared, Deferred, Exclusive] {
                for scopes in 0..4 {
                    let scope = |bit: u32| match scopes & bit {
                        0 => Flags::NONE,
                        _ => Flags::NODE_SCOPE,
                    };
                    let holder = Request::new(held).with(scope(1));
                    let new = Request::new(asked).with(scope(2));
                    let expected = held == asked && (held != Exclusive || scopes == 3);
                    let granted = may_grant(Exclusive, Some(holder), new);
                    assert_eq!(granted, expected, "{holder:?} {new:?}");
                }
            }
        }
    }
}
