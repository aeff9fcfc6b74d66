//! The checker: every register by itself has to look like one register that calls reach one at a time.
//!
//! *Owns*: which calls of a history count and until when they may take effect; the names of what is wrong.
//!
//! *Does not own*: the decision for plain calls ([`zones`]); how histories come about.
//!
//! *Locking*: none.
//!
//! A read without an answer counts for nothing. A write without an answer may have taken effect at any time from its begin
//! until its node was fenced, or not at all.
//!
//! Where a node's death loses what it had not stored, a write of a dead node is *doubtful* if it went through the cache, no
//! acknowledged sync of its node began after it, and no other node read its value. Doubtful writes count, with all that
//! read them, up to the last answered call of that node; for the time after it they may be gone. So the register is looked at
//! once for each death that leaves doubtful writes, from the death before up to this one, and once as a whole without any
//! of them.

pub mod zones;

#[cfg(test)]
mod brute;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::RangeInclusive;

use crate::Layout;
use crate::record::{Call, End, Kind, Way};
use zones::{Contradiction, Op, Why, contradiction};

/// Violations that are told; further ones are counted.
pub const VIOLATIONS_MAX: usize = 10;

/// How a node ended that did not leave in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Death {
    /// When nothing of it could reach the store any more, in nanoseconds; `None` if that is not known.
    pub fenced: Option<u64>,
}

/// What a run recorded.
#[derive(Debug)]
pub struct History {
    /// Where registers lie.
    pub layout: Layout,
    /// All calls, in any order.
    pub calls: Vec<Call>,
    /// The nodes that died, by kill or by withdrawing.
    pub deaths: BTreeMap<u32, Death>,
    /// Whether a node's death loses what it had cached.
    pub volatile: bool,
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Wrong {
    /// A read returned what had been overwritten, or a write was lost to another.
    Stale,
    /// Reads, one after the other, returned a newer value and then an older one.
    Backwards,
    /// A value was read that nobody wrote.
    NeverWritten,
    /// One read of one register returned words of several writes.
    Torn,
    /// What an acknowledged sync had made durable was gone after its node died.
    LostSync,
    /// A write took effect after its node was fenced.
    LateWrite,
    /// The history has two writes of one value.
    BadHistory,
}

impl Wrong {
    /// Says it in words.
    #[must_use]
    pub const fn words(self) -> &'static str {
        match self {
            Self::Stale => "an old value was read after a newer one was there",
            Self::Backwards => "reads go backwards",
            Self::NeverWritten => "a value was read that nobody wrote",
            Self::Torn => "a read saw words of different writes in one page",
            Self::LostSync => "an acknowledged fsync was lost",
            Self::LateWrite => "a write took effect after its node was fenced",
            Self::BadHistory => "the history has two writes of one value",
        }
    }
}

/// Calls that cannot all be right.
#[derive(Debug, Clone)]
pub struct Violation {
    /// What is wrong.
    pub wrong: Wrong,
    /// The register, in words.
    pub place: String,
    /// The calls, in the order of their begins; as few as show it.
    pub calls: Vec<Call>,
}

/// What a check came to.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Answered calls that were looked at, syncs included.
    pub calls: usize,
    /// Calls without an answer.
    pub unanswered: usize,
    /// Registers that were used.
    pub registers: usize,
    /// Writes of dead nodes that may have been lost with them.
    pub doubtful: usize,
    /// The first violations.
    pub violations: Vec<Violation>,
    /// All of them; at most one a register and span between deaths, but every torn read.
    pub found: usize,
}

impl Verdict {
    /// Tells whether the history is as it should be.
    #[must_use]
    pub const fn is_good(&self) -> bool {
        self.found == 0
    }

    fn add(&mut self, violation: impl FnOnce() -> Violation) {
        self.found += 1;
        if self.violations.len() < VIOLATIONS_MAX {
            self.violations.push(violation());
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.place, self.wrong.words())?;
        let zero = self.calls.first().map_or(0, |call| call.start);
        let us = |time: u64| time.saturating_sub(zero) as f64 / 1e3;
        for call in &self.calls {
            let what = match call.kind {
                Kind::Write => "writes",
                Kind::Read => "reads",
                Kind::Sync => "syncs",
            };
            write!(
                f,
                "  node {:>3} {what} {:016x} {:<8} from {:>12.3} us",
                call.node,
                call.value,
                call.way.name(),
                us(call.start)
            )?;
            match call.end {
                End::At(end) => writeln!(f, " to {:>12.3} us", us(end))?,
                End::Never => writeln!(f, ", never answered")?,
            }
        }
        Ok(())
    }
}

/// What is known of all registers together.
struct Known {
    layout: Layout,
    volatile: bool,
    deaths: BTreeMap<u32, Death>,
    /// By node and file: when the last sync began that was acknowledged.
    synced: HashMap<(u32, u32), u64>,
    /// When a dead node began the last call that was answered: until then it was alive.
    alive: HashMap<u32, u64>,
}

/// Checks a history.
#[must_use]
pub fn check(history: History) -> Verdict {
    let History {
        layout,
        mut calls,
        deaths,
        volatile,
    } = history;
    let mut verdict = Verdict::default();
    let mut known = Known {
        layout,
        volatile,
        deaths,
        synced: HashMap::new(),
        alive: HashMap::new(),
    };
    calls.retain(|call| {
        let answered = matches!(call.end, End::At(_));
        verdict.calls += usize::from(answered);
        verdict.unanswered += usize::from(!answered);
        if answered {
            known.learn(call);
        }
        match call.kind {
            Kind::Sync => false,
            Kind::Read => answered,
            Kind::Write => true,
        }
    });
    calls.sort_unstable_by_key(|call| (call.register, call.value, call.kind));
    for register in calls.chunk_by(|a, b| a.register == b.register) {
        verdict.registers += 1;
        known.check_register(register, &mut verdict);
    }
    verdict
}

impl Known {
    fn learn(&mut self, call: &Call) {
        if !self.deaths.contains_key(&call.node) {
            return;
        }
        let alive = self.alive.entry(call.node).or_default();
        *alive = call.start.max(*alive);
        if call.kind == Kind::Sync {
            let synced = self.synced.entry((call.node, call.register)).or_default();
            *synced = call.start.max(*synced);
        }
    }

    /// Looks at one register's calls, sorted by value.
    fn check_register(&self, calls: &[Call], verdict: &mut Verdict) {
        let Some(register) = calls.first().map(|call| call.register) else {
            return;
        };
        let place = || self.layout.describe(register);
        let mut ops = Vec::with_capacity(calls.len());
        // The deaths that left doubtful writes, by when they came, and each such write's death.
        let mut doubts: BTreeMap<(u64, u32), Vec<u64>> = BTreeMap::new();
        let mut at = 0_u32;
        for same in calls.chunk_by(|a, b| a.value == b.value) {
            if let Some((write, death)) = self.doubtful(same) {
                verdict.doubtful += 1;
                let values = doubts.entry((death, write.node)).or_default();
                values.push(write.value);
            }
            for call in same {
                if call.torn {
                    verdict.add(|| Violation {
                        wrong: Wrong::Torn,
                        place: place(),
                        calls: vec![*call],
                    });
                } else {
                    ops.push(self.op(call, at));
                }
                at += 1;
            }
        }
        let mut gone: Vec<u64> = Vec::new();
        let mut from = 0;
        for (&(death, node), values) in &doubts {
            let of_the_dead = |op: &Op| {
                calls
                    .get(op.call as usize)
                    .is_some_and(|call| call.node == node)
            };
            let mut window = window(&ops, &gone, from..=death, of_the_dead);
            if let Some(found) = contradiction(&mut window) {
                verdict.add(|| self.violation(place(), calls, &found));
            }
            gone.extend(values);
            gone.sort_unstable();
            from = death;
        }
        ops.retain(|op| gone.binary_search(&op.value).is_err());
        if let Some(found) = contradiction(&mut ops) {
            verdict.add(|| self.violation(place(), calls, &found));
        }
    }

    fn op(&self, call: &Call, at: u32) -> Op {
        let (end, sure) = match call.end {
            End::At(end) => (end, true),
            End::Never => {
                let death = self.deaths.get(&call.node);
                let fenced = death.and_then(|death| death.fenced);
                // May lie before its begin: then it has no right to take effect at all.
                (fenced.unwrap_or(u64::MAX), false)
            }
        };
        Op {
            value: call.value,
            start: call.start,
            end,
            write: call.kind == Kind::Write,
            sure,
            call: at,
        }
    }

    /// The write of this value, if a death may have lost it, and that death.
    fn doubtful<'c>(&self, same: &'c [Call]) -> Option<(&'c Call, u64)> {
        let [write, reads @ ..] = same else {
            return None;
        };
        let mine = reads.iter().all(|read| read.node == write.node);
        if !mine || self.synced_since(write) {
            return None;
        }
        Some((write, self.lost_with(write)?))
    }

    /// The death of the writer, if what it had cached was lost with it.
    fn lost_with(&self, write: &Call) -> Option<u64> {
        let cached = write.kind == Kind::Write && write.way != Way::Direct;
        if !self.volatile || !cached || !self.deaths.contains_key(&write.node) {
            return None;
        }
        let alive = self.alive.get(&write.node).copied();
        Some(alive.unwrap_or(0).max(write.start))
    }

    fn synced_since(&self, write: &Call) -> bool {
        let End::At(end) = write.end else {
            return false;
        };
        let file = self.layout.file_of(write.register);
        let synced = self.synced.get(&(write.node, file));
        synced.is_some_and(|&begun| begun >= end)
    }

    fn violation(&self, place: String, calls: &[Call], found: &Contradiction) -> Violation {
        let call = |op: &Op| calls.get(op.call as usize).copied();
        let mut shown: Vec<Call> = found.ops.iter().filter_map(call).collect();
        shown.sort_by_key(|call| call.start);
        Violation {
            wrong: self.name(calls, found),
            place,
            calls: shown,
        }
    }

    /// Names what is wrong by what, if it were not asked for, would make it right.
    fn name(&self, calls: &[Call], found: &Contradiction) -> Wrong {
        match found.why {
            Why::NeverWritten => return Wrong::NeverWritten,
            Why::WrittenTwice => return Wrong::BadHistory,
            Why::Order => {}
        }
        let right_if = |ops: Vec<Op>| contradiction(&mut ops.clone()).is_none();
        let unfenced = found.ops.iter().map(|op| Op {
            end: if op.sure { op.end } else { u64::MAX },
            ..*op
        });
        if right_if(unfenced.collect()) {
            return Wrong::LateWrite;
        }
        let only_synced = |value: u64| {
            let same = || calls.iter().filter(|call| call.value == value);
            let write = same().find(|call| call.kind == Kind::Write);
            write.is_some_and(|write| {
                same().all(|call| call.node == write.node)
                    && self.synced_since(write)
                    && self.lost_with(write).is_some()
            })
        };
        let unsynced: Vec<Op> = found
            .ops
            .iter()
            .filter(|op| !only_synced(op.value))
            .copied()
            .collect();
        if unsynced.len() < found.ops.len() && right_if(unsynced) {
            return Wrong::LostSync;
        }
        // Writes that never end before anything else begins are there for their reads alone.
        let reads_only = found.ops.iter().map(|op| Op {
            start: if op.write { 0 } else { op.start },
            end: if op.write { u64::MAX } else { op.end },
            ..*op
        });
        if right_if(reads_only.collect()) {
            Wrong::Stale
        } else {
            Wrong::Backwards
        }
    }
}

/// What happened between two deaths, by calls that were begun then; with the writes, however old, of what was read.
fn window(
    ops: &[Op],
    gone: &[u64],
    span: RangeInclusive<u64>,
    of_the_dead: impl Fn(&Op) -> bool,
) -> Vec<Op> {
    let (&from, &to) = (span.start(), span.end());
    let mut window = Vec::new();
    for same in ops.chunk_by(|a, b| a.value == b.value) {
        let Some(first) = same.first() else {
            continue;
        };
        if gone.binary_search(&first.value).is_ok() {
            continue;
        }
        // Who returned after the death may have waited for it to be over.
        let before = window.len();
        let sure = |op: &Op| op.sure && (op.end <= to || of_the_dead(op));
        let reads = same
            .iter()
            .filter(|op| !op.write && op.start <= to && (op.start > from || from == 0) && sure(op));
        window.extend(reads.copied());
        let read = window.len() > before;
        let writes = same
            .iter()
            .filter(|op| op.write && (read || (op.start <= to && (op.start > from || from == 0))));
        window.extend(writes.map(|op| {
            let sure = sure(op);
            let end = if sure { op.end } else { u64::MAX };
            Op { end, sure, ..*op }
        }));
    }
    window
}
