//! What a glock is doing and has done, for people: counters and a dump in the spirit of gfs2's.

use std::fmt;
use std::time::Duration;

use crate::mode::{Mode, Request};
use crate::service::{Name, Token};

/// What happened to a glock since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests put to it.
    pub queued: u64,
    /// Requests that were not answered at once.
    pub waits: u64,
    /// TRY requests that failed.
    pub tries_failed: u64,
    /// Requests to the service for more rights; a cached lock makes none.
    pub asked: u64,
    /// Other nodes that asked us to give way.
    pub callbacks: u64,
    /// Of these, put off by the minimum hold.
    pub deferred: u64,
    /// Wanted demotions that were brought about.
    pub demotions: u64,
    /// Times the inode was read again.
    pub refreshes: u64,
    /// Weak holders that were taken away, by a demotion or by a request of this node.
    pub stripped: u64,
    /// Replies that were not what was asked for.
    pub surprises: u64,
    /// The longest wait of a request that was granted.
    pub longest_wait: Duration,
}

impl Counts {
    pub(crate) fn waited(&mut self, wait: Duration) {
        self.longest_wait = self.longest_wait.max(wait);
    }
}

/// What a glock is busy with; whoever waits, waits for this or for the holders before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    /// Nothing.
    Nothing,
    /// Writing back and dropping what may not be cached any more.
    Leaving,
    /// Waiting for the service's answer.
    Asking,
    /// Keeping the service's answer until a recovery ends.
    Frozen,
    /// Refusing everything, for good.
    Withdrawn,
}

/// A demotion that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DemoteReport {
    /// The mode to fall to.
    pub to: Mode,
    /// Since when.
    pub wanted_for: Duration,
    /// Whether the minimum hold puts it off.
    pub deferred: bool,
}

/// A holder or waiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HolderReport {
    /// What it asked for.
    pub request: Request,
    /// Who: a number for each thread.
    pub owner: u64,
    /// Whether it holds.
    pub holds: bool,
    /// Whether it is weak: it goes away as soon as somebody wants what it excludes.
    pub may_demote: bool,
    /// How long it has waited, if it does.
    pub waits: Option<Duration>,
}

/// One glock at one moment. Its `Display` is a `G:` line and one ` H:` line for each of its queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Which.
    pub name: Name,
    /// The mode the node has.
    pub mode: Mode,
    /// The mode under way; the same if none is.
    pub target: Mode,
    /// The fencing token of the mode.
    pub token: Token,
    /// What it is busy with.
    pub doing: Doing,
    /// What other nodes want.
    pub demote: Option<DemoteReport>,
    /// Whether the inode has to be read again.
    pub stale: bool,
    /// The minimum hold at present.
    pub hold: Duration,
    /// Long-term pins that keep the mode: a wanted demotion waits for them.
    pub pins: usize,
    /// What happened so far.
    pub counts: Counts,
    /// Holders first, then waiters in order.
    pub holders: Vec<HolderReport>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "G:  s:{} n:{} f:", self.mode.letters(), self.name)?;
        let flags = [
            (
                self.doing != Doing::Nothing && self.doing != Doing::Withdrawn,
                'l',
            ),
            (self.demote.is_some_and(|demote| !demote.deferred), 'D'),
            (self.demote.is_some_and(|demote| demote.deferred), 'd'),
            (self.doing == Doing::Leaving, 'p'),
            (self.doing == Doing::Asking, 'r'),
            (self.doing == Doing::Frozen, 'F'),
            (self.doing == Doing::Withdrawn, 'W'),
            (self.stale, 'n'),
            (self.pins > 0, 'P'),
        ];
        for (_, letter) in flags.into_iter().filter(|&(set, _)| set) {
            write!(f, "{letter}")?;
        }
        write!(f, " t:{}", self.target.letters())?;
        if let Some(demote) = self.demote {
            write!(
                f,
                " d:{}/{}",
                demote.to.letters(),
                demote.wanted_for.as_millis()
            )?;
        }
        writeln!(
            f,
            " m:{} k:{} q:{} a:{} c:{}",
            self.hold.as_millis(),
            self.token.0,
            self.counts.queued,
            self.counts.asked,
            self.counts.callbacks
        )?;
        for holder in &self.holders {
            write!(f, " H: s:{} f:", holder.request.mode.letters())?;
            for letter in holder.request.flags.letters() {
                write!(f, "{letter}")?;
            }
            write!(
                f,
                "{}{} p:{}",
                if holder.holds { 'H' } else { 'W' },
                if holder.may_demote { "D" } else { "" },
                holder.owner
            )?;
            if let Some(waits) = holder.waits {
                write!(f, " w:{}", waits.as_millis())?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
