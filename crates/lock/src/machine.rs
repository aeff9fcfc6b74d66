//! One glock of one node as a pure transition function: no threads, no clock, no service.
//!
//! ```text
//!              demote wanted, or the head of the queue needs another mode
//!            +---------------------------------------------------------+
//!            |                                                         v
//!          Rest                                            Leaving (write back, drop)
//!            ^                                                         |
//!            |  reply                                                  v
//!            +-------------------------------- Asking <----------------+
//!                                              (the service; from UN directly)
//! ```
//!
//! *Owns*: the mode, the queue, the pending demotion, the hold time. Events go in by method; what is to be done comes out
//! of [`Machine::run`], which every event is followed by, and is done by the shell ([`crate::glock`]) with nothing held.
//!
//! *Does not own*: threads, timers, messages. Time is a parameter.
//!
//! *Locking*: none; the shell's spinlock is around each call. Holders exist in `Rest` only: a demotion runs with no holders.

use std::collections::VecDeque;
use std::time::Duration;

use pinfold_base::Errno;

use crate::clock::Time;
use crate::mode::{Flags, Mode, Request, may_grant};
use crate::report::{Counts, DemoteReport, Doing, HolderReport, Report};
use crate::service::{Name, Reply, Token, Wait};

#[cfg(all(test, not(loom)))]
mod explore;
#[cfg(all(test, not(loom)))]
mod keeping;
mod may_demote;

/// Holders and waiters of one glock on one node at once; one more is told ENOLCK.
pub const QUEUE_MAX: usize = 1 << 12;

/// What the minimum hold loses when the service changed the mode otherwise than asked.
const HOLD_SHORTER: Duration = Duration::from_millis(25);
/// What it gains when a waiter waited longer than [`LONG_WAIT`].
const HOLD_LONGER: Duration = Duration::from_millis(50);
/// The shortest minimum hold.
const HOLD_MIN: Duration = Duration::from_millis(10);
/// A wait that says the lock changes nodes too often.
const LONG_WAIT: Duration = Duration::from_secs(1);

/// A place in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HolderId(pub u64);

/// A holder, or one that waits to be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Holder {
    pub id: HolderId,
    pub request: Request,
    /// Whoever must not ask twice: a thread, or an operation.
    pub owner: u64,
    granted: bool,
    /// MAY_DEMOTE: holds until somebody else wants what it excludes.
    weak: bool,
    since: Time,
}

/// Why a request was not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// TRYFAILED: it would have had to wait.
    TryFailed,
    /// An error, EIO after a withdrawal.
    Failed(Errno),
}

/// Where a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Waiting,
    Granted,
    Refused(Refusal),
}

/// What [`Machine::enqueue`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    Granted,
    /// [`Machine::run`] is due.
    Queued,
    Refused(Refusal),
}

/// What is to be done outside of the lock, by exactly one thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Work {
    /// Write back and drop for the fall from one mode to another, then [`Machine::left`].
    Leave { from: Mode, to: Mode },
    /// Ask the service; it answers with [`Machine::reply`].
    Ask { from: Mode, to: Mode, wait: Wait },
}

/// What one run brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Somebody who waits has an answer.
    pub wake: bool,
    pub work: Option<Work>,
    /// [`Machine::run`] is due again at this time.
    pub alarm: Option<Time>,
    /// The node has to withdraw.
    pub withdraw: Option<Errno>,
}

/// Who has to read the inode again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refresh {
    /// Nobody: what is known is of this hold.
    Fresh,
    /// The one that asked.
    Yours,
    /// Another holder does it already.
    Others,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stage {
    Rest,
    Leaving {
        to: Mode,
    },
    Asking {
        /// What the service knows of.
        from: Mode,
        to: Mode,
        /// On whose behalf; nobody for a fall.
        asker: Option<HolderId>,
    },
}

/// When a wanted demotion may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Due {
    Now,
    /// The minimum hold ends.
    At(Time),
    /// The mode that it is about is in a reply under way: the hold counts from there.
    AfterReply,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Demote {
    to: Mode,
    due: Due,
    since: Time,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Known {
    Fresh,
    Stale,
    Reading,
}

/// One glock.
#[derive(Debug, Clone)]
pub struct Machine {
    mode: Mode,
    token: Token,
    stage: Stage,
    demote: Option<Demote>,
    /// Holders first, then waiters, each in order of arrival.
    queue: VecDeque<Holder>,
    /// How many of the queue hold.
    holders: usize,
    /// Answers that were not collected yet; at most one for each that waits.
    refused: Vec<(HolderId, Refusal)>,
    known: Known,
    granted_at: Time,
    /// A fault was served under the mode: its instruction has to get to run.
    faulted: bool,
    /// Who keeps the mode beyond any holder: it must serve SH, or be EX.
    kept_shared: usize,
    kept_exclusive: usize,
    hold: Duration,
    hold_max: Duration,
    /// The recovery that keeps replies back, by generation.
    frozen: Option<u64>,
    kept: Option<Reply>,
    withdrawn: Option<Errno>,
    withdraw: Option<Errno>,
    woken: bool,
    /// The alarm that was asked for last.
    armed: Option<Time>,
    pub counts: Counts,
}

impl Machine {
    /// An unlocked glock whose mode is kept for `hold` once somebody queued for it.
    pub fn new(hold: Duration, frozen: Option<u64>) -> Self {
        Self {
            mode: Mode::Unlocked,
            token: Token(0),
            stage: Stage::Rest,
            demote: None,
            queue: VecDeque::new(),
            holders: 0,
            refused: Vec::new(),
            known: Known::Stale,
            granted_at: Time::ZERO,
            faulted: false,
            kept_shared: 0,
            kept_exclusive: 0,
            hold,
            hold_max: hold,
            frozen,
            kept: None,
            withdrawn: None,
            withdraw: None,
            woken: false,
            armed: None,
            counts: Counts::default(),
        }
    }

    /// The mode that the node has.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The fencing token of the mode that the node has.
    pub fn token(&self) -> Token {
        self.token
    }

    /// The shortest time for which a queued-for mode is kept.
    pub fn hold(&self) -> Duration {
        self.hold
    }

    /// Tells whether nothing is held, queued, or under way, and the mode is UN.
    pub fn is_idle(&self) -> bool {
        self.mode == Mode::Unlocked && self.stage == Stage::Rest && self.queue.is_empty()
    }

    /// Puts a request into the queue, or answers it at once. Reads no clock: this is the path of a cached lock.
    #[inline]
    pub fn enqueue(&mut self, id: HolderId, owner: u64, request: Request) -> Enqueued {
        self.counts.queued += 1;
        if let Some(errno) = self.withdrawn {
            return Enqueued::Refused(Refusal::Failed(errno));
        }
        if request.mode == Mode::Unlocked {
            return Enqueued::Refused(Refusal::Failed(Errno::EINVAL));
        }
        // gfs2 stops the machine here: whoever holds a lock and waits for it again waits for itself. A weak hold of its own
        // goes on beside it, or away.
        if self
            .queue
            .iter()
            .any(|other| other.owner == owner && !other.weak)
        {
            return Enqueued::Refused(Refusal::Failed(Errno::EDEADLK));
        }
        let waiters = self.queue.len() > self.holders;
        let rest = self.stage == Stage::Rest && !self.must_fall();
        let granted = rest && !waiters && self.grants(request);
        if !granted {
            let waits = !rest || self.queue.iter().any(|other| !other.weak);
            if request.flags.tries() && waits {
                self.counts.tries_failed += 1;
                return Enqueued::Refused(Refusal::TryFailed);
            }
            if self.queue.len() >= QUEUE_MAX {
                return Enqueued::Refused(Refusal::Failed(Errno::ENOLCK));
            }
        }
        self.holders += usize::from(granted);
        self.faulted |= granted && request.flags.has(Flags::FAULT);
        self.queue.push_back(Holder {
            id,
            request,
            owner,
            granted,
            weak: false,
            since: Time::ZERO,
        });
        if granted {
            Enqueued::Granted
        } else {
            self.counts.waits += 1;
            Enqueued::Queued
        }
    }

    /// Notes since when `id` waits.
    pub fn waits_since(&mut self, id: HolderId, now: Time) {
        if let Some(waiter) = self.queue.iter_mut().find(|holder| holder.id == id) {
            waiter.since = now;
        }
    }

    /// Tells where a request stands. A refusal is told once.
    pub fn standing(&mut self, id: HolderId) -> Standing {
        if let Some(place) = self.refused.iter().position(|&(refused, _)| refused == id) {
            return Standing::Refused(self.refused.swap_remove(place).1);
        }
        match self.queue.iter().find(|holder| holder.id == id) {
            Some(holder) if holder.granted => Standing::Granted,
            Some(_) => Standing::Waiting,
            // Only after the caller took it out itself.
            None => Standing::Refused(Refusal::Failed(Errno::ECANCELED)),
        }
    }

    /// Takes a holder, or a waiter, out. Returns whether [`Machine::run`] is due.
    #[inline]
    pub fn dequeue(&mut self, id: HolderId) -> bool {
        let Some(place) = self.queue.iter().position(|holder| holder.id == id) else {
            self.refused.retain(|&(refused, _)| refused != id);
            return false;
        };
        let Some(holder) = self.queue.remove(place) else {
            return false;
        };
        self.holders -= usize::from(holder.granted);
        if holder.granted && holder.request.flags.has(Flags::NOCACHE) {
            self.want(Mode::Unlocked, Due::Now, Time::ZERO);
        }
        !self.queue.is_empty() || self.demote.is_some()
    }

    /// Notes that another node wants the lock in mode `wanted`.
    pub fn remote(&mut self, wanted: Mode, now: Time) {
        let rising = matches!(self.stage, Stage::Asking { asker: Some(_), .. });
        if self.mode == Mode::Unlocked && !rising {
            // A call that crossed our own release.
            return;
        }
        self.counts.callbacks += 1;
        let end = self.granted_at.after(self.hold);
        let due = if rising {
            Due::AfterReply
        } else if self.is_wanted_here() && now < end {
            self.counts.deferred += 1;
            Due::At(end)
        } else {
            Due::Now
        };
        self.want(Mode::left_for(wanted), due, now);
    }

    /// Notes that a holder wants the mode kept, at least `mode`, after it lets go: no demotion below that begins before
    /// [`Machine::unkeep`]. Holders are served meanwhile as far as the mode serves them; others are refused (EBUSY), for
    /// who keeps it may be the one that waits.
    pub fn keep(&mut self, mode: Mode) {
        *self.keepers(mode) += 1;
    }

    /// Ends what [`Machine::keep`] began; [`Machine::run`] is due.
    pub fn unkeep(&mut self, mode: Mode) {
        let keepers = self.keepers(mode);
        *keepers = keepers.saturating_sub(1);
    }

    fn keepers(&mut self, mode: Mode) -> &mut usize {
        match mode {
            Mode::Exclusive => &mut self.kept_exclusive,
            Mode::Unlocked | Mode::Shared | Mode::Deferred => &mut self.kept_shared,
        }
    }

    /// Tells whether somebody keeps a mode that falling to `to` would end.
    fn is_kept_from(&self, to: Mode) -> bool {
        self.kept_exclusive > 0 || (self.kept_shared > 0 && to != Mode::Shared)
    }

    /// Tells whether a demotion would take away what has not been used yet.
    fn is_wanted_here(&self) -> bool {
        !self.queue.is_empty() || self.faulted
    }

    /// Asks to give the lock up as soon as nobody holds it.
    pub fn give_up(&mut self, now: Time) {
        self.want(Mode::Unlocked, Due::Now, now);
    }

    /// Notes that the duties of [`Work::Leave`] are done, or could not be.
    pub fn left(&mut self, result: Result<(), Errno>) {
        let Stage::Leaving { to } = self.stage else {
            return;
        };
        match result {
            Ok(()) => {
                // Nothing known under the old mode survives, whatever the service will say.
                if to == Mode::Unlocked {
                    self.known = Known::Stale;
                }
                // The rights end here, whenever the service hears of it.
                let from = std::mem::replace(&mut self.mode, to);
                self.stage = Stage::Asking {
                    from,
                    to,
                    asker: None,
                };
            }
            Err(errno) => {
                // What is dirty here is nowhere else: the lock is not handed over.
                self.stage = Stage::Rest;
                self.withdraw = Some(errno);
            }
        }
    }

    /// What follows [`Machine::left`] when it went well.
    pub fn tell(&self) -> Option<Work> {
        match self.stage {
            Stage::Asking {
                from,
                to,
                asker: None,
            } => Some(Work::Ask {
                from,
                to,
                wait: Wait::Queue,
            }),
            _ => None,
        }
    }

    /// Notes what the service answered. During a recovery it is kept for later, unless it cannot give anything away.
    pub fn reply(&mut self, reply: Reply, now: Time) {
        if !matches!(self.stage, Stage::Asking { .. }) || self.withdrawn.is_some() {
            self.counts.surprises += 1;
            return;
        }
        if self.frozen.is_some() && !self.passes(reply) {
            self.kept = Some(reply);
            return;
        }
        self.take(reply, now);
    }

    /// Begins a recovery: replies are kept back until [`Machine::thaw`] of the same generation.
    pub fn freeze(&mut self, generation: u64) {
        self.frozen = self.frozen.max(Some(generation));
    }

    /// Ends the recovery `generation`, unless a later one began meanwhile (H-15).
    pub fn thaw(&mut self, generation: u64, now: Time) {
        if self.frozen == Some(generation) {
            self.frozen = None;
            if let Some(reply) = self.kept.take() {
                self.take(reply, now);
            }
        }
    }

    /// Refuses everything from now on; nothing is handed over any more.
    pub fn withdraw(&mut self, errno: Errno) {
        if self.withdrawn.is_some() {
            return;
        }
        self.withdrawn = Some(errno);
        // The node is at it already.
        self.withdraw = None;
        self.demote = None;
        self.kept = None;
        self.refuse(self.holders, |_| true, Refusal::Failed(errno));
        self.take_weak_away();
    }

    /// Tells whether a holder need not ask [`Machine::begin_refresh`].
    #[inline]
    pub fn is_fresh(&self, request: Request) -> bool {
        self.known == Known::Fresh || request.flags.has(Flags::SKIP)
    }

    /// Asks on behalf of a holder whether the inode has to be read again first; SKIP never reads, and leaves the duty to
    /// the next.
    #[inline]
    pub fn begin_refresh(&mut self, request: Request) -> Refresh {
        if request.flags.has(Flags::SKIP) {
            return Refresh::Fresh;
        }
        match self.known {
            Known::Fresh => Refresh::Fresh,
            Known::Reading => Refresh::Others,
            Known::Stale => {
                self.known = Known::Reading;
                self.counts.refreshes += 1;
                Refresh::Yours
            }
        }
    }

    /// Ends what [`Refresh::Yours`] began.
    pub fn end_refresh(&mut self, done: bool) {
        self.known = if done { Known::Fresh } else { Known::Stale };
        self.woken = true;
    }

    /// Describes the glock for the dump.
    pub fn report(&self, name: Name, now: Time) -> Report {
        let holders = self.queue.iter().map(|holder| HolderReport {
            request: holder.request,
            owner: holder.owner,
            holds: holder.granted,
            may_demote: holder.weak,
            waits: (!holder.granted).then(|| now.since(holder.since)),
        });
        Report {
            name,
            mode: self.mode,
            target: match self.stage {
                Stage::Rest => self.mode,
                Stage::Leaving { to } | Stage::Asking { to, .. } => to,
            },
            token: self.token,
            doing: match self.stage {
                _ if self.withdrawn.is_some() => Doing::Withdrawn,
                Stage::Rest => Doing::Nothing,
                Stage::Leaving { .. } => Doing::Leaving,
                Stage::Asking { .. } if self.kept.is_some() => Doing::Frozen,
                Stage::Asking { .. } => Doing::Asking,
            },
            demote: self.demote.as_ref().map(|demote| DemoteReport {
                to: demote.to,
                wanted_for: now.since(demote.since),
                deferred: demote.due != Due::Now,
            }),
            stale: self.known != Known::Fresh,
            hold: self.hold,
            pins: self.kept_shared + self.kept_exclusive,
            counts: self.counts,
            holders: holders.collect(),
        }
    }

    /// Goes as far as can be gone, and says what is to be done for the rest.
    pub fn run(&mut self, now: Time) -> Effects {
        let work = self.step(now);
        let due = match self.demote {
            Some(Demote {
                due: Due::At(at), ..
            }) => Some(at),
            _ => None,
        };
        let alarm = if due == self.armed { None } else { due };
        self.armed = due;
        Effects {
            wake: std::mem::take(&mut self.woken),
            work,
            alarm,
            withdraw: self.withdraw.take(),
        }
    }

    fn step(&mut self, now: Time) -> Option<Work> {
        // A request that may not wait for the recovery takes the reply along.
        if let Some(reply) = self.kept
            && self.passes(reply)
        {
            self.kept = None;
            self.take(reply, now);
        }
        if self.stage != Stage::Rest || self.withdrawn.is_some() || self.withdraw.is_some() {
            return None;
        }
        if let Some(demote) = &mut self.demote
            && matches!(demote.due, Due::At(at) if at <= now)
        {
            demote.due = Due::Now;
        }
        self.strip(now);
        if let Some(demote) = &self.demote {
            let to = demote.to;
            if self.mode == Mode::Unlocked || self.mode == to {
                self.demote = None;
                self.counts.demotions += 1;
            } else if self.must_fall() {
                if self.holders > 0 {
                    self.refuse(
                        self.holders,
                        |request| request.flags.tries(),
                        Refusal::TryFailed,
                    );
                    return None;
                }
                return Some(self.leave(to));
            }
        }
        let (id, head) = loop {
            let (id, head) = self.promote(now)?;
            if self.mode == Mode::Unlocked {
                break (id, head);
            }
            if self.is_kept_from(Mode::Unlocked) {
                // It might wait for itself.
                self.refuse_one(id, Refusal::Failed(Errno::EBUSY));
                continue;
            }
            let end = self.granted_at.after(self.hold.min(HOLD_MIN));
            if !self.faulted || end <= now {
                break (id, head);
            }
            // The same for who waits here as for other nodes: one who asks again and again would keep a fault's instruction
            // from running. But it is soon enough: nothing has to travel.
            if head.flags.tries() {
                self.refuse_one(id, Refusal::TryFailed);
                continue;
            }
            self.want(Mode::left_for(head.mode), Due::At(end), now);
            return None;
        };
        if self.mode == Mode::Unlocked {
            self.stage = Stage::Asking {
                from: Mode::Unlocked,
                to: head.mode,
                asker: Some(id),
            };
            self.counts.asked += 1;
            return Some(Work::Ask {
                from: Mode::Unlocked,
                to: head.mode,
                wait: Wait::of(head.flags),
            });
        }
        Some(self.leave(head.mode))
    }

    /// Grants in order until one has to wait; returns that one if nobody holds, so that only the service can help it.
    fn promote(&mut self, now: Time) -> Option<(HolderId, Request)> {
        while let Some(waiter) = self.queue.get(self.holders) {
            if !self.grants(waiter.request) {
                let head = (waiter.id, waiter.request);
                let alone = self.holders == 0;
                // What tries does not wait behind another.
                self.refuse(
                    self.holders + usize::from(alone),
                    |request| request.flags.tries(),
                    Refusal::TryFailed,
                );
                return alone.then_some(head);
            }
            let waited = now.since(waiter.since);
            self.faulted |= waiter.request.flags.has(Flags::FAULT);
            if waited > LONG_WAIT {
                self.hold = (self.hold + HOLD_LONGER).min(self.hold_max);
            }
            self.counts.waited(waited);
            self.queue[self.holders].granted = true;
            self.holders += 1;
            self.woken = true;
        }
        None
    }

    fn grants(&self, request: Request) -> bool {
        let beside = (self.holders > 0).then(|| self.queue[0].request);
        may_grant(self.mode, beside, request)
    }

    /// A demotion is wanted now, and nobody keeps the mode: no local waiter is promoted before it (H-7).
    fn must_fall(&self) -> bool {
        matches!(self.demote, Some(Demote { to, due: Due::Now, .. }) if !self.is_kept_from(to))
    }

    fn leave(&mut self, wanted: Mode) -> Work {
        let to = if self.mode.falls_to(wanted) {
            wanted
        } else {
            Mode::Unlocked
        };
        self.stage = Stage::Leaving { to };
        Work::Leave {
            from: self.mode,
            to,
        }
    }

    /// Notes a wanted mode; two different ones merge to UN, and the earlier time counts.
    fn want(&mut self, to: Mode, due: Due, now: Time) {
        let Some(demote) = &mut self.demote else {
            self.demote = Some(Demote {
                to,
                due,
                since: now,
            });
            return;
        };
        if demote.to != to {
            demote.to = Mode::Unlocked;
        }
        demote.due = match (demote.due, due) {
            (Due::Now, _) | (_, Due::Now) => Due::Now,
            (Due::At(a), Due::At(b)) => Due::At(a.min(b)),
            (kept @ Due::At(_), Due::AfterReply) => kept,
            (Due::AfterReply, new) => new,
        };
    }

    /// Tells whether a reply may pass during a recovery: errors and unlocks give nothing away, NOEXP must not wait.
    fn passes(&self, reply: Reply) -> bool {
        let gives = matches!(reply, Reply::Granted { mode, .. } if mode != Mode::Unlocked);
        !gives
            || self
                .queue
                .range(self.holders..)
                .any(|waiter| waiter.request.flags.has(Flags::NOEXP))
    }

    fn take(&mut self, reply: Reply, now: Time) {
        let Stage::Asking { to, asker, .. } = self.stage else {
            return;
        };
        self.stage = Stage::Rest;
        match reply {
            Reply::Granted { mode, token } => {
                if mode != to {
                    self.counts.surprises += 1;
                    self.hold = self.hold.saturating_sub(HOLD_SHORTER).max(HOLD_MIN);
                }
                if asker.is_none() && mode != to {
                    // What is cached here was made ready for another mode.
                    self.withdraw = Some(Errno::EIO);
                }
                self.mode = mode;
                self.token = token;
                self.granted_at = now;
                self.faulted = false;
            }
            Reply::Refused => match asker {
                Some(id) => self.refuse_one(id, Refusal::TryFailed),
                None => self.withdraw = Some(Errno::EIO),
            },
            Reply::Failed(errno) => match asker {
                Some(id) => self.refuse_one(id, Refusal::Failed(errno)),
                // Whether the service took it back is not known: nothing may be done under the lock any more.
                None => self.withdraw = Some(errno),
            },
        }
        if let Some(demote) = &mut self.demote
            && demote.due == Due::AfterReply
        {
            demote.due = if self.queue.is_empty() {
                Due::Now
            } else {
                self.counts.deferred += 1;
                Due::At(now.after(self.hold))
            };
        }
    }

    fn refuse_one(&mut self, id: HolderId, why: Refusal) {
        // It may have left the queue meanwhile.
        if let Some(place) = self.queue.iter().position(|holder| holder.id == id) {
            self.queue.remove(place);
            self.note_refusal(id, why);
        }
    }

    fn refuse(&mut self, from: usize, which: impl Fn(Request) -> bool, why: Refusal) {
        let mut place = from;
        while let Some(waiter) = self.queue.get(place) {
            if which(waiter.request) {
                let id = waiter.id;
                self.queue.remove(place);
                self.note_refusal(id, why);
            } else {
                place += 1;
            }
        }
    }

    fn note_refusal(&mut self, id: HolderId, why: Refusal) {
        self.counts.tries_failed += u64::from(why == Refusal::TryFailed);
        self.refused.push((id, why));
        self.woken = true;
    }
}
