//! One glock of one node: the pure machine under a lock, those who wait for it, and the duties of a holder.
//!
//! *Owns*: waking, guards, reading the inode again, waits for several glocks.
//!
//! *Does not own*: transitions ([`crate::machine`]), threads ([`crate::space`]).
//!
//! *Locking*: a [`Guard`] is class 2; the mutex inside is a leaf, let go before a service, a duty or a host is called.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pinfold_base::Errno;
use pinfold_base::rank::{self, Rank};
use pinfold_base::sync::{Condvar, Mutex, MutexGuard};

use crate::clock::Time;
use crate::machine::{Enqueued, HolderId, Machine, Refresh, Refusal, Standing, Work};
use crate::mode::{Mode, Request};
use crate::report::Report;
use crate::service::{Name, Reply, Token, Wait};

/// What a node must do before it gives a lock up, and after it got one; implemented by the room that caches.
///
/// Called with no lock of this crate held. None may wait for a glock.
pub trait Duties: Send + Sync {
    /// Unmaps for writing, lets direct I/O come to its end, and writes back what is dirty. Called before the node falls
    /// to `to`, with no holder left.
    ///
    /// # Errors
    /// Whatever kept a byte from being stored. The lock is then not handed over and the node withdraws.
    fn sync(&self, to: Mode) -> Result<(), Errno>;

    /// Drops what may not be cached in the new mode: data for DF, everything for UN.
    fn invalidate(&self, to: Mode);

    /// Reads the inode again; called for the first holder after UN.
    ///
    /// # Errors
    /// What kept it from being read; the holder gets it, and the next one tries again.
    fn refresh(&self) -> Result<(), Errno> {
        Ok(())
    }

    /// Waits for this node's direct I/O to end; called before a holder in any mode but DF goes on.
    fn drain_direct(&self) {}

    /// The node withdrew: what it has cached, dirty or not, is nobody's any more. Called once, by a thread that may block.
    fn withdrawn(&self) {}
}

/// What a glock needs of the node around it.
pub(crate) trait Host: Send + Sync {
    fn now(&self) -> Time;
    /// Asks the service; the answer may come from within.
    fn ask(&self, name: Name, from: Mode, to: Mode, wait: Wait);
    /// Has [`Glock::work`] called by a thread that may block.
    fn work(&self, name: Name, work: Work);
    /// Has [`Glock::rouse`] called at `at` or soon after.
    fn rouse_at(&self, name: Name, at: Time);
    /// Stops the node.
    fn withdraw(&self, errno: Errno);
}

/// A lock on one file, shared with other nodes.
pub struct Glock {
    name: Name,
    state: Mutex<State>,
    changed: Condvar,
    duties: Arc<dyn Duties>,
    host: Arc<dyn Host>,
}

struct State {
    machine: Machine,
    last: u64,
}

/// Whether the calling thread may enter the service: not if it is the service that called.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Caller {
    Node,
    Service,
}

impl fmt::Debug for Glock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Glock({})", self.name)
    }
}

/// A held glock; dropping it lets go, and the node keeps the mode until another wants it.
#[derive(Debug)]
pub struct Guard<'a> {
    // Left before the order of locks hears of it.
    place: Place<'a>,
    request: Request,
    _held: rank::Held,
}

/// A holder's place in the queue; dropping it leaves it.
#[derive(Debug)]
struct Place<'a> {
    glock: &'a Glock,
    id: HolderId,
}

/// A mode that stays although nobody holds it: no demotion below it begins before this is dropped.
#[derive(Debug)]
pub struct Kept<'a> {
    glock: &'a Glock,
    mode: Mode,
}

/// A weak hold (MAY_DEMOTE): it excludes nobody, and goes away when another node or another call wants what it would exclude.
/// For as long as its owner brings memory in; nothing may be done under it. Dropping it lets go.
#[derive(Debug)]
pub struct MayDemote<'a> {
    place: Place<'a>,
    request: Request,
}

/// An ASYNC request: in the queue, perhaps granted, not waited for. Dropping it takes it back.
#[derive(Debug)]
pub struct Queued<'a> {
    glock: &'a Glock,
    id: HolderId,
    request: Request,
    owned: bool,
}

/// A number for the calling thread.
fn this_thread() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    thread_local! {
        static OWNER: u64 = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    }
    OWNER.with(|&owner| owner)
}

impl Glock {
    pub(crate) fn new(
        name: Name,
        machine: Machine,
        duties: Arc<dyn Duties>,
        host: Arc<dyn Host>,
    ) -> Self {
        Self {
            name,
            state: Mutex::new(State { machine, last: 0 }),
            changed: Condvar::default(),
            duties,
            host,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> Name {
        self.name
    }

    /// The mode that the node has, which may be more than any holder asked for.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.state.lock().machine.mode()
    }

    /// The fencing token of the node's mode.
    #[must_use]
    pub fn token(&self) -> Token {
        self.state.lock().machine.token()
    }

    /// Takes the glock. Class 2: what the thread holds already must be of class 1, or glocks before this one.
    ///
    /// # Errors
    /// [`Refusal::TryFailed`] for a request that was not to wait; EIO after the node withdrew; EDEADLK if this thread
    /// holds or waits for it already; what the service or [`Duties::refresh`] failed with.
    #[inline]
    #[track_caller]
    pub fn lock(&self, request: Request) -> Result<Guard<'_>, Refusal> {
        self.lock_as(this_thread(), request)
    }

    #[inline]
    #[track_caller]
    pub(crate) fn lock_as(&self, owner: u64, request: Request) -> Result<Guard<'_>, Refusal> {
        let held = rank::enter(Rank::Glock);
        let (id, good) = self.enqueue(owner, request)?;
        if good {
            self.drain_for(request);
        } else {
            self.finish(id, request, None)?;
        }
        Ok(Guard {
            place: Place { glock: self, id },
            request,
            _held: held,
        })
    }

    /// Puts a request into the queue and returns at once (ASYNC).
    ///
    /// # Errors
    /// As [`Glock::lock`], where that is known at once.
    pub fn begin(&self, request: Request) -> Result<Queued<'_>, Refusal> {
        let (id, _) = self.enqueue(this_thread(), request)?;
        Ok(Queued {
            glock: self,
            id,
            request,
            owned: true,
        })
    }

    /// Describes what it is doing.
    #[must_use]
    pub fn report(&self) -> Report {
        let now = self.host.now();
        self.state.lock().machine.report(self.name, now)
    }

    /// Returns with the place in the queue whether the grant is there and good already, as it is for a cached lock.
    #[inline]
    fn enqueue(&self, owner: u64, request: Request) -> Result<(HolderId, bool), Refusal> {
        let mut state = self.state.lock();
        state.last += 1;
        let id = HolderId(state.last);
        match state.machine.enqueue(id, owner, request) {
            Enqueued::Granted => Ok((id, state.machine.is_fresh(request))),
            Enqueued::Refused(why) => Err(why),
            Enqueued::Queued => {
                let now = self.host.now();
                state.machine.waits_since(id, now);
                self.settle(state, now, Caller::Node);
                Ok((id, false))
            }
        }
    }

    /// Waits for the grant and makes it good: the inode is known, and direct I/O has ended.
    #[inline]
    fn finish(&self, id: HolderId, request: Request, end: Option<Time>) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        loop {
            match state.machine.standing(id) {
                Standing::Granted => {}
                Standing::Refused(why) => return Err(why),
                Standing::Waiting => {
                    if end.is_some_and(|end| end <= self.host.now()) {
                        drop(state);
                        self.dequeue(id);
                        return Err(Refusal::Failed(Errno::ESTALE));
                    }
                    state = self.changed.wait(state);
                    continue;
                }
            }
            match state.machine.begin_refresh(request) {
                Refresh::Fresh => break,
                Refresh::Others => state = self.changed.wait(state),
                Refresh::Yours => {
                    drop(state);
                    if let Err(errno) = self.refresh() {
                        self.dequeue(id);
                        return Err(Refusal::Failed(errno));
                    }
                    state = self.state.lock();
                }
            }
        }
        drop(state);
        self.drain_for(request);
        Ok(())
    }

    #[inline]
    fn drain_for(&self, request: Request) {
        if request.mode != Mode::Deferred {
            self.duties.drain_direct();
        }
    }

    fn refresh(&self) -> Result<(), Errno> {
        /// Others wait for this reading: it ends even if it panics.
        struct Reading<'a>(&'a Glock, bool);
        impl Drop for Reading<'_> {
            fn drop(&mut self) {
                let mut state = self.0.state.lock();
                state.machine.end_refresh(self.1);
                drop(state);
                self.0.changed.notify_all();
            }
        }
        let mut reading = Reading(self, false);
        let result = self.duties.refresh();
        reading.1 = result.is_ok();
        result
    }

    #[inline]
    fn dequeue(&self, id: HolderId) {
        let mut state = self.state.lock();
        if state.machine.dequeue(id) {
            let now = self.host.now();
            self.settle(state, now, Caller::Node);
        }
    }

    /// Runs the machine and has done what it wants.
    fn settle(&self, mut state: MutexGuard<'_, State>, now: Time, caller: Caller) {
        let effects = state.machine.run(now);
        drop(state);
        if effects.wake {
            self.changed.notify_all();
        }
        if let Some(at) = effects.alarm {
            self.host.rouse_at(self.name, at);
        }
        match effects.work {
            Some(Work::Ask { from, to, wait }) if caller == Caller::Node => {
                self.host.ask(self.name, from, to, wait);
            }
            Some(work) => self.host.work(self.name, work),
            None => {}
        }
        if let Some(errno) = effects.withdraw {
            self.host.withdraw(errno);
        }
    }

    /// Does what [`Host::work`] was given.
    pub(crate) fn work(&self, work: Work) {
        match work {
            Work::Ask { from, to, wait } => self.host.ask(self.name, from, to, wait),
            Work::Leave { to, .. } => {
                let result = self.leave(to);
                let mut state = self.state.lock();
                state.machine.left(result);
                match state.machine.tell() {
                    Some(Work::Ask { from, to, wait }) => {
                        drop(state);
                        self.host.ask(self.name, from, to, wait);
                    }
                    _ => self.settle(state, self.host.now(), Caller::Node),
                }
            }
        }
    }

    fn leave(&self, to: Mode) -> Result<(), Errno> {
        // A panic under a duty must not leave the glock in a change that nobody ends.
        let duties = std::panic::AssertUnwindSafe(|| {
            self.duties.sync(to)?;
            if matches!(to, Mode::Unlocked | Mode::Deferred) {
                self.duties.invalidate(to);
            }
            Ok(())
        });
        std::panic::catch_unwind(duties).unwrap_or(Err(Errno::EIO))
    }

    /// Looks again whether something is due, and has waiters look at the clock.
    pub(crate) fn rouse(&self) {
        let state = self.state.lock();
        self.settle(state, self.host.now(), Caller::Node);
        self.changed.notify_all();
    }

    pub(crate) fn reply(&self, reply: Reply) {
        let now = self.host.now();
        let mut state = self.state.lock();
        state.machine.reply(reply, now);
        self.settle(state, now, Caller::Service);
    }

    pub(crate) fn demote(&self, wanted: Mode) {
        let now = self.host.now();
        let mut state = self.state.lock();
        state.machine.remote(wanted, now);
        self.settle(state, now, Caller::Service);
    }

    pub(crate) fn freeze(&self, generation: u64) {
        self.state.lock().machine.freeze(generation);
    }

    pub(crate) fn thaw(&self, generation: u64) {
        let now = self.host.now();
        let mut state = self.state.lock();
        state.machine.thaw(generation, now);
        self.settle(state, now, Caller::Service);
    }

    pub(crate) fn withdraw(&self, errno: Errno) {
        let now = self.host.now();
        let mut state = self.state.lock();
        state.machine.withdraw(errno);
        self.settle(state, now, Caller::Service);
        self.changed.notify_all();
    }

    /// Tells who caches that the node has withdrawn.
    pub(crate) fn tell_withdrawn(&self) {
        // A panic is this file's loss: the others are told all the same.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.duties.withdrawn()));
    }

    /// Has the mode given up as soon as nobody holds it.
    pub(crate) fn give_up(&self) {
        let now = self.host.now();
        let mut state = self.state.lock();
        state.machine.give_up(now);
        self.settle(state, now, Caller::Node);
    }

    /// Waits until the mode is UN and nothing is under way, or `end`.
    pub(crate) fn is_idle(&self) -> bool {
        self.state.lock().machine.is_idle()
    }
}

impl<'a> Guard<'a> {
    /// Keeps what was asked for beyond this holder: for memory that a program has pinned for as long as it likes. The node
    /// goes on to use the lock as far as the mode serves; a local request that it does not serve is refused with EBUSY.
    #[must_use]
    pub fn keep(&self) -> Kept<'a> {
        let mode = self.request.mode;
        let glock = self.place.glock;
        glock.state.lock().machine.keep(mode);
        Kept { glock, mode }
    }

    /// Makes the hold weak while its owner brings memory in. To the order of locks nothing is held then.
    #[must_use]
    pub fn allow_demote(self) -> MayDemote<'a> {
        let Self {
            place,
            request,
            _held,
        } = self;
        let glock = place.glock;
        let mut state = glock.state.lock();
        if state.machine.allow_demote(place.id) {
            glock.settle(state, glock.host.now(), Caller::Node);
        }
        MayDemote { place, request }
    }

    /// The mode that the node has, at least what was asked for.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.place.glock.mode()
    }

    /// What was asked for.
    #[must_use]
    pub fn request(&self) -> Request {
        self.request
    }

    /// The fencing token under which this holder stores.
    #[must_use]
    pub fn token(&self) -> Token {
        self.place.glock.token()
    }
}

impl<'a> MayDemote<'a> {
    /// Makes the hold strong again. What was known under it is as it was then. Class 2, as taking the glock is.
    ///
    /// Without waiting: `None` if it was taken away, and then everything has to be taken and looked at anew.
    #[must_use]
    #[track_caller]
    pub fn disallow_demote(self) -> Option<Guard<'a>> {
        let Self { place, request } = self;
        let held = rank::enter(Rank::Glock);
        let holds = place.glock.state.lock().machine.disallow_demote(place.id);
        holds.then_some(Guard {
            place,
            request,
            _held: held,
        })
    }
}

impl Drop for Place<'_> {
    #[inline]
    fn drop(&mut self) {
        self.glock.dequeue(self.id);
    }
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        let now = self.glock.host.now();
        let mut state = self.glock.state.lock();
        state.machine.unkeep(self.mode);
        self.glock.settle(state, now, Caller::Node);
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        if self.owned {
            self.glock.dequeue(self.id);
        }
    }
}

/// Waits for every one of `queued`, for at most twice the sum of their hold times.
///
/// # Errors
/// ESTALE when that time is over: two nodes may each have a part of what the other waits for. All are released then, and
/// the caller begins again. Otherwise as [`Glock::lock`].
pub fn wait_all(queued: Vec<Queued<'_>>) -> Result<Vec<Guard<'_>>, Refusal> {
    let Some(first) = queued.first() else {
        return Ok(Vec::new());
    };
    let hold = |one: &Queued<'_>| one.glock.state.lock().machine.hold();
    let patience: Duration = queued.iter().map(hold).sum::<Duration>() * 2;
    let end = first.glock.host.now().after(patience);
    for one in &queued {
        one.glock.host.rouse_at(one.glock.name, end);
    }
    let mut guards = Vec::with_capacity(queued.len());
    // Those not reached after an error are dropped, which takes them out of their queues.
    for mut one in queued {
        let held = rank::enter(Rank::Glock);
        one.owned = false;
        match one.glock.finish(one.id, one.request, Some(end)) {
            Ok(()) => guards.push(Guard {
                place: Place {
                    glock: one.glock,
                    id: one.id,
                },
                request: one.request,
                _held: held,
            }),
            Err(why) => return Err(why),
        }
    }
    Ok(guards)
}

/// Takes several glocks in the order of their names, whatever the order they are given in (H-10). The guards come in the
/// order of names.
///
/// # Errors
/// As [`Glock::lock`]; what was taken is let go. EDEADLK if one is given twice.
pub fn lock_all<'a>(requests: &[(&'a Glock, Request)]) -> Result<Vec<Guard<'a>>, Refusal> {
    let mut requests = requests.to_vec();
    requests.sort_by_key(|(glock, _)| glock.name);
    requests
        .into_iter()
        .map(|(glock, request)| glock.lock(request))
        .collect()
}

#[cfg(all(test, loom))]
mod models {
    //! Every interleaving of a few threads: no wake-up is lost between those who wait, those who let go, the service's
    //! answers and calls, and who does the duties.

    use std::collections::VecDeque;
    use std::sync::Weak;

    use loom::thread;

    use super::*;

    const NAME: Name = Name {
        number: 1,
        generation: 0,
    };

    struct Nothing;
    impl Duties for Nothing {
        fn sync(&self, _to: Mode) -> Result<(), Errno> {
            Ok(())
        }
        fn invalidate(&self, _to: Mode) {}
    }

    /// A node with one thread for duties and service, which grants whatever is asked.
    #[derive(Default)]
    struct Alone {
        glock: std::sync::Mutex<Weak<Glock>>,
        agenda: Mutex<(VecDeque<Work>, bool)>,
        changed: Condvar,
    }

    impl Alone {
        fn glock(&self) -> Arc<Glock> {
            let glock = self.glock.lock().expect("no poison").upgrade();
            glock.expect("the model keeps it")
        }

        fn put(&self, work: Work) {
            self.agenda.lock().0.push_back(work);
            self.changed.notify_one();
        }

        /// Does what there is to be done until it is stopped and nothing is left.
        fn serve(&self) {
            loop {
                let work = {
                    let mut agenda = self.agenda.lock();
                    loop {
                        if let Some(work) = agenda.0.pop_front() {
                            break work;
                        }
                        if agenda.1 {
                            return;
                        }
                        agenda = self.changed.wait(agenda);
                    }
                };
                match work {
                    Work::Ask { to: mode, .. } => self.glock().reply(Reply::Granted {
                        mode,
                        token: Token(1),
                    }),
                    leave @ Work::Leave { .. } => self.glock().work(leave),
                }
            }
        }

        fn stop(&self) {
            self.agenda.lock().1 = true;
            self.changed.notify_one();
        }
    }

    impl Host for Alone {
        fn now(&self) -> Time {
            Time::ZERO
        }
        fn ask(&self, _name: Name, from: Mode, to: Mode, wait: Wait) {
            self.put(Work::Ask { from, to, wait });
        }
        fn work(&self, _name: Name, work: Work) {
            self.put(work);
        }
        fn rouse_at(&self, _name: Name, _at: Time) {}
        fn withdraw(&self, _errno: Errno) {
            unreachable!("nothing fails")
        }
    }

    fn node() -> (Arc<Alone>, Arc<Glock>) {
        let host = Arc::new(Alone::default());
        let machine = Machine::new(Duration::ZERO, None);
        let as_host: Arc<dyn Host> = Arc::<Alone>::clone(&host);
        let glock = Arc::new(Glock::new(NAME, machine, Arc::new(Nothing), as_host));
        *host.glock.lock().expect("no poison") = Arc::downgrade(&glock);
        (host, glock)
    }

    /// Preemptions within one run; the races of interest need two.
    fn model(run: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.check(run);
    }

    fn clients(first: Mode, second: Mode, called_for: Option<Mode>) {
        model(move || {
            let (host, glock) = node();
            let serving = Arc::clone(&host);
            let server = thread::spawn(move || serving.serve());
            let theirs = Arc::clone(&glock);
            let client = thread::spawn(move || {
                drop(theirs.lock_as(1, Request::new(first)).expect("granted"));
            });
            if let Some(wanted) = called_for {
                glock.demote(wanted);
            }
            drop(glock.lock_as(2, Request::new(second)).expect("granted"));
            client.join().expect("no panic");
            host.stop();
            server.join().expect("no panic");
            let report = glock.report();
            assert!(report.holders.is_empty() && report.demote.is_none());
            assert_eq!(report.doing, crate::report::Doing::Nothing);
        });
    }

    #[test]
    fn two_that_exclude_each_other_are_both_served() {
        clients(Mode::Exclusive, Mode::Exclusive, None);
    }

    #[test]
    fn two_that_share_are_both_served() {
        clients(Mode::Shared, Mode::Shared, None);
    }

    #[test]
    fn two_of_different_modes_are_both_served() {
        clients(Mode::Shared, Mode::Deferred, None);
    }

    /// MAY_DEMOTE: stripped or not, whoever waits is served, and the weak holder knows whether it holds.
    fn beside_a_weak_holder(called_for: Option<Mode>) {
        model(move || {
            let (host, glock) = node();
            let serving = Arc::clone(&host);
            let server = thread::spawn(move || serving.serve());
            let theirs = Arc::clone(&glock);
            let client = thread::spawn(move || {
                let guard = theirs.lock_as(1, Request::new(Mode::Exclusive));
                let weak = guard.expect("granted").allow_demote();
                if let Some(guard) = weak.disallow_demote() {
                    assert_eq!(guard.mode(), Mode::Exclusive);
                }
            });
            match called_for {
                Some(wanted) => glock.demote(wanted),
                None => drop(
                    glock
                        .lock_as(2, Request::new(Mode::Shared))
                        .expect("granted"),
                ),
            }
            client.join().expect("no panic");
            host.stop();
            server.join().expect("no panic");
            let report = glock.report();
            assert!(report.holders.is_empty() && report.demote.is_none());
            assert_eq!(report.doing, crate::report::Doing::Nothing);
        });
    }

    #[test]
    fn a_weak_holder_keeps_no_other_waiting() {
        beside_a_weak_holder(None);
    }

    #[test]
    fn a_weak_holder_keeps_no_call_waiting() {
        beside_a_weak_holder(Some(Mode::Exclusive));
    }

    #[test]
    fn a_call_meanwhile_is_followed_and_loses_no_waiter() {
        clients(Mode::Shared, Mode::Shared, Some(Mode::Exclusive));
    }
}
