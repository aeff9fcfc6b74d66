//! MAY_DEMOTE: a holder that lets others have the lock while it brings memory in, and asks afterwards whether it was left it.
//!
//! *Owns*: what makes a holder weak, what takes it away, and what it finds when it is back.
//!
//! *Does not own*: the queue and who is granted what (the parent).
//!
//! A weak holder excludes nobody. It stays in the queue, so that a mode it waited for is kept for the minimum hold against other
//! nodes, and goes away when a demotion is due or a waiter of this node needs what it excludes.

use super::{Due, HolderId, Machine};
use crate::clock::Time;
use crate::mode::{Flags, Mode};

impl Machine {
    /// Makes a holder weak. Returns whether [`Machine::run`] is due.
    pub fn allow_demote(&mut self, id: HolderId) -> bool {
        if let Some(holder) = self.queue.iter_mut().find(|holder| holder.id == id) {
            holder.weak = holder.granted;
        }
        self.queue.len() > self.holders || self.demote.is_some()
    }

    /// Makes a holder strong again, if it was not taken away meanwhile; tells whether it holds. All that it knew is as it was
    /// then: there was no demotion, and nobody of this node held what it excludes.
    pub fn disallow_demote(&mut self, id: HolderId) -> bool {
        let found = self.queue.iter_mut().find(|holder| holder.id == id);
        found.is_some_and(|holder| {
            holder.weak = false;
            holder.granted
        })
    }

    /// Takes weak holders away that are in somebody's way. Beside a strong one they are in nobody's: he is.
    pub(super) fn strip(&mut self, now: Time) {
        if self.holders == 0 || self.queue.range(..self.holders).any(|holder| !holder.weak) {
            return;
        }
        let to = self.demote.as_ref().map(|demote| demote.to);
        let falls = self.must_fall() && to != Some(self.mode);
        let waiter = self.queue.get(self.holders);
        let excluded = waiter.is_some_and(|waiter| !self.grants(waiter.request));
        if !falls && !excluded {
            return;
        }
        let mut weak = self.queue.range(..self.holders);
        if weak.any(|holder| holder.request.flags.has(Flags::NOCACHE)) {
            self.want(Mode::Unlocked, Due::Now, now);
        }
        self.take_weak_away();
    }

    /// Takes all weak holders away.
    pub(super) fn take_weak_away(&mut self) {
        let before = self.queue.len();
        self.queue.retain(|holder| !holder.weak);
        let gone = before - self.queue.len();
        self.holders -= gone;
        self.counts.stripped += gone as u64;
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::machine::{Enqueued, Refusal, Standing, Work};
    use crate::mode::Request;
    use crate::service::{Reply, Token};

    const HOLD: Duration = Duration::from_millis(200);
    const START: Time = Time::ZERO;
    const WRITER: HolderId = HolderId(1);
    const OTHER: HolderId = HolderId(2);

    /// A glock that was granted at [`START`] to a holder, who is weak now.
    fn weak(request: Request) -> Machine {
        let mut machine = Machine::new(HOLD, None);
        machine.enqueue(WRITER, 1, request);
        assert!(matches!(machine.run(START).work, Some(Work::Ask { .. })));
        let (mode, token) = (request.mode, Token(1));
        machine.reply(Reply::Granted { mode, token }, START);
        machine.run(START);
        assert_eq!(machine.standing(WRITER), Standing::Granted);
        assert!(!machine.allow_demote(WRITER), "nobody wants anything");
        machine
    }

    fn leaves(machine: &mut Machine, now: Time) -> Option<Mode> {
        match machine.run(now).work {
            Some(Work::Leave { to, .. }) => Some(to),
            Some(work) => panic!("{work:?}"),
            None => None,
        }
    }

    #[test]
    fn t61_may_demote_holders_stay_while_nobody_is_excluded() {
        let mut machine = weak(Request::new(Mode::Shared));
        // Another reader here, and one elsewhere.
        let read = Request::new(Mode::Shared);
        assert_eq!(machine.enqueue(OTHER, 2, read), Enqueued::Granted);
        machine.remote(Mode::Shared, START.after(HOLD));
        assert_eq!(leaves(&mut machine, START.after(HOLD)), None);
        machine.dequeue(OTHER);
        assert_eq!(leaves(&mut machine, START.after(HOLD)), None);
        assert_eq!(machine.counts.stripped, 0);
        assert!(machine.disallow_demote(WRITER));
        // Strong again: who is excluded waits.
        let write = Request::new(Mode::Exclusive);
        assert_eq!(machine.enqueue(OTHER, 2, write), Enqueued::Queued);
        assert_eq!(leaves(&mut machine, START.after(HOLD)), None);
        assert_eq!(machine.standing(OTHER), Standing::Waiting);
    }

    #[test]
    fn t61_may_demote_holders_are_stripped_by_another_node_after_the_minimum_hold() {
        let mut machine = weak(Request::new(Mode::Exclusive));
        machine.remote(Mode::Shared, START);
        let effects = machine.run(START);
        assert_eq!(
            (effects.work, effects.alarm),
            (None, Some(START.after(HOLD)))
        );
        assert_eq!(machine.counts.stripped, 0);
        assert_eq!(leaves(&mut machine, START.after(HOLD)), Some(Mode::Shared));
        assert_eq!(machine.counts.stripped, 1);
        assert!(!machine.disallow_demote(WRITER));
        // It lets go of nothing, and can ask again.
        assert!(!machine.dequeue(WRITER) || machine.holders == 0);
        let write = Request::new(Mode::Exclusive);
        assert_eq!(machine.enqueue(HolderId(3), 1, write), Enqueued::Queued);
    }

    #[test]
    fn t61_a_demotion_that_a_strong_holder_keeps_waiting_strips_nobody() {
        let scope = |mode| Request::new(mode).with(Flags::NODE_SCOPE);
        let mut machine = weak(scope(Mode::Exclusive));
        let strong = machine.enqueue(OTHER, 2, scope(Mode::Exclusive));
        assert_eq!(strong, Enqueued::Granted);
        machine.remote(Mode::Exclusive, START.after(HOLD));
        assert_eq!(leaves(&mut machine, START.after(HOLD)), None);
        assert_eq!(machine.counts.stripped, 0);
        machine.dequeue(OTHER);
        let left = leaves(&mut machine, START.after(HOLD));
        assert_eq!(left, Some(Mode::Unlocked));
        assert_eq!(machine.counts.stripped, 1);
    }

    #[test]
    fn t61_may_demote_holders_are_stripped_by_a_local_request_that_they_exclude() {
        for flags in [Flags::NONE, Flags::TRY] {
            let mut machine = weak(Request::new(Mode::Exclusive));
            let read = Request::new(Mode::Shared).with(flags);
            assert_eq!(machine.enqueue(OTHER, 2, read), Enqueued::Queued);
            assert_eq!(leaves(&mut machine, START), None);
            assert_eq!(machine.standing(OTHER), Standing::Granted);
            assert!(!machine.disallow_demote(WRITER));
        }
    }

    #[test]
    fn t61_a_weak_holder_may_ask_again_and_a_strong_one_may_not() {
        // H-2: the memory that it brings in is of the same file.
        let mut machine = weak(Request::new(Mode::Exclusive));
        let fault = Request::new(Mode::Shared).with(Flags::FAULT);
        assert_eq!(machine.enqueue(OTHER, 1, fault), Enqueued::Queued);
        machine.run(START);
        assert_eq!(machine.standing(OTHER), Standing::Granted);
        machine.dequeue(OTHER);
        assert!(!machine.disallow_demote(WRITER));
        let mut machine = weak(Request::new(Mode::Exclusive));
        assert!(machine.disallow_demote(WRITER));
        let refused = machine.enqueue(OTHER, 1, fault);
        assert_eq!(
            refused,
            Enqueued::Refused(Refusal::Failed(pinfold_base::Errno::EDEADLK))
        );
    }

    #[test]
    fn t61_a_weak_holder_that_was_not_to_be_cached_takes_the_mode_along() {
        let mut machine = weak(Request::new(Mode::Exclusive).with(Flags::NOCACHE));
        machine.enqueue(OTHER, 2, Request::new(Mode::Shared));
        assert_eq!(leaves(&mut machine, START), Some(Mode::Unlocked));
    }

    #[test]
    fn t63_a_withdrawal_leaves_no_weak_holder() {
        let mut machine = weak(Request::new(Mode::Exclusive));
        machine.withdraw(pinfold_base::Errno::EIO);
        assert!(!machine.disallow_demote(WRITER));
    }
}
