//! A node's lock space: its glocks, its membership, and the threads that do a holder's duties.
//!
//! *Owns*: the table of glocks, the worker and timer threads, withdrawal, the check of the lease.
//!
//! *Does not own*: what a duty does; who holds what elsewhere.
//!
//! *Locking*: the table and the agenda are leaves, never both; no call out of here is made under them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pinfold_base::Errno;

use crate::clock::{Clock, Time};
use crate::glock::{Duties, Glock, Host};
use crate::machine::{Machine, Work};
use crate::mode::Mode;
use crate::report::Report;
use crate::service::{
    Events, FenceCounts, JoinError, LockService, Name, Reply, Session, Traffic, Wait,
};

/// Threads that do duties.
pub const WORKERS_MAX: usize = 64;

/// How a node behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// For how long a mode that somebody queued for is kept although another node wants it: a faulting instruction must
    /// get to run before its page is taken away again.
    pub hold: Duration,
    /// Threads that do duties, at most [`WORKERS_MAX`]; each may be busy with one glock's write-back.
    pub workers: usize,
    /// The clock.
    pub clock: Clock,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hold: Duration::from_millis(200),
            workers: 4,
            clock: Clock::Machine,
        }
    }
}

/// One node's glocks.
pub struct Space {
    node: Arc<Node>,
    threads: Vec<JoinHandle<()>>,
    left: bool,
    /// Who joined: a forked child is no member, and has none of the threads.
    process: u32,
}

struct Node {
    options: Options,
    session: OnceLock<Box<dyn Session>>,
    table: Mutex<Table>,
    /// Held while the node withdraws, before any leaf: who is told so is told when no glock grants any more.
    withdrawal: Mutex<()>,
    /// Set with `table.withdrawn`: for those who only want to know.
    stopped: AtomicBool,
    agenda: Mutex<Agenda>,
    work: Condvar,
    time: Condvar,
    me: Weak<Self>,
}

#[derive(Default)]
struct Table {
    glocks: HashMap<Name, Arc<Glock>>,
    frozen: Option<u64>,
    withdrawn: Option<Errno>,
}

/// What a worker is to do about a glock.
enum Job {
    Work(Work),
    /// Tell who caches that the node has withdrawn.
    Withdrawn,
}

/// What threads are to do. Each glock has at most one piece of work and one alarm of its own in it, and once it hears of a
/// withdrawal.
#[derive(Default)]
struct Agenda {
    work: VecDeque<(Name, Job)>,
    alarms: BinaryHeap<Reverse<(Time, Option<Name>)>>,
    stop: bool,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space")
            .field("session", &self.node.session)
            .finish_non_exhaustive()
    }
}

impl Space {
    /// Makes this process a node called `member`.
    ///
    /// # Errors
    /// What the service refuses with; what keeps threads from starting.
    pub fn join(
        service: &dyn LockService,
        member: &str,
        options: Options,
    ) -> Result<Self, JoinError> {
        let workers = options.workers.clamp(1, WORKERS_MAX);
        let node = Arc::new_cyclic(|me: &Weak<Node>| Node {
            options,
            session: OnceLock::new(),
            table: Mutex::default(),
            withdrawal: Mutex::new(()),
            stopped: AtomicBool::new(false),
            agenda: Mutex::default(),
            work: Condvar::new(),
            time: Condvar::new(),
            me: Weak::clone(me),
        });
        node.options.clock.subscribe(Weak::<Node>::clone(&node.me));
        let weak: Weak<Node> = Weak::clone(&node.me);
        let session = service.join(member, weak)?;
        let good_until = session.good_until();
        // Set once, here.
        let _ = node.session.set(session);
        let mut space = Self {
            node,
            threads: Vec::new(),
            left: false,
            process: std::process::id(),
        };
        // The service may have told us so before there was a session to abandon.
        let lost = |errno| JoinError::new(errno, "the membership was lost at once");
        space.check().map_err(lost)?;
        space.start("glock-time", Node::keep_time)?;
        for _ in 0..workers {
            space.start("glock-work", Node::do_work)?;
        }
        if let Some(end) = good_until {
            space.node.alarm(end, None);
        }
        Ok(space)
    }

    fn start(&mut self, name: &str, run: fn(&Node)) -> Result<(), JoinError> {
        let node = Arc::clone(&self.node);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&node))
            .map_err(|error| JoinError::new(Errno::from(&error), format!("no thread: {error}")))?;
        self.threads.push(thread);
        Ok(())
    }

    /// The glock of that name; made, unlocked, if there is none. `duties` is asked for only then.
    pub fn glock(&self, name: Name, duties: impl FnOnce() -> Arc<dyn Duties>) -> Arc<Glock> {
        let mut table = self.node.table.lock();
        let (frozen, withdrawn) = (table.frozen, table.withdrawn);
        let glock = table.glocks.entry(name).or_insert_with(|| {
            let mut machine = Machine::new(self.node.options.hold, frozen);
            if let Some(errno) = withdrawn {
                machine.withdraw(errno);
            }
            let host: Arc<Node> = Arc::clone(&self.node);
            Arc::new(Glock::new(name, machine, duties(), host))
        });
        Arc::clone(glock)
    }

    /// Gives a glock up for an inode that leaves memory: falls to UN as soon as nobody holds it. Its duties are done by
    /// then and, once it is idle, [`Space::reap`] forgets it.
    pub fn retire(&self, glock: &Glock) {
        glock.give_up();
    }

    /// Forgets the glocks that are unlocked and that nobody else keeps; returns how many.
    pub fn reap(&self) -> usize {
        let mut table = self.node.table.lock();
        let before = table.glocks.len();
        table
            .glocks
            .retain(|_, glock| Arc::strong_count(glock) > 1 || !glock.is_idle());
        before - table.glocks.len()
    }

    /// Tells whether this node may still use its locks, by its own clock. To be asked before each transfer to a store.
    ///
    /// # Errors
    /// EIO, or what the node withdrew with.
    pub fn check(&self) -> Result<(), Errno> {
        self.node.check()
    }

    /// Stops: no lock is granted or handed over any more, and others get this node's after fencing.
    pub fn withdraw(&self, errno: Errno) {
        Host::withdraw(&*self.node, errno);
    }

    /// Describes every glock, by name.
    #[must_use]
    pub fn report(&self) -> Vec<Report> {
        let glocks = self.node.glocks();
        let mut reports: Vec<Report> = glocks.iter().map(|glock| glock.report()).collect();
        reports.sort_by_key(|report| report.name);
        reports
    }

    /// Tells what this node did about others' deaths.
    #[must_use]
    pub fn fencing(&self) -> FenceCounts {
        let session = self.node.session.get();
        session.map(|session| session.fencing()).unwrap_or_default()
    }

    /// Tells what this node and its service said to each other about locks.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let session = self.node.session.get();
        session.map(|session| session.traffic()).unwrap_or_default()
    }

    /// Gives every lock up, for at most `patience`. Those that are asked for meanwhile are given up again.
    ///
    /// # Errors
    /// EBUSY if a lock is still held or under way by then, or what the node withdrew with.
    pub fn give_all_up(&self, patience: Duration) -> Result<(), Errno> {
        let end = Instant::now() + patience;
        loop {
            self.node.check()?;
            let mut busy = self.node.glocks();
            busy.retain(|glock| !glock.is_idle());
            if busy.is_empty() {
                return Ok(());
            }
            for glock in busy {
                glock.give_up();
            }
            if Instant::now() >= end {
                return Err(Errno::EBUSY);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Gives every lock up and leaves, for at most `patience`.
    ///
    /// # Errors
    /// As [`Space::give_all_up`]: the node then is dead for the others, and they take its locks after fencing.
    pub fn leave(mut self, patience: Duration) -> Result<(), Errno> {
        let result = self.give_all_up(patience);
        self.end(result.is_ok());
        result
    }

    /// Ends the membership, in good order if nothing is held.
    fn end(&mut self, in_order: bool) {
        if self.left {
            return;
        }
        self.left = true;
        if let Some(session) = self.node.session.get() {
            if in_order {
                session.leave();
            } else {
                session.abandon();
            }
        }
    }
}

/// Leaves in good order if every lock was given up ([`Space::give_all_up`]); otherwise the node is dead for the others.
impl Drop for Space {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            return;
        }
        // A worker that has a duty may be the last to let go of what keeps the space: it cannot wait for itself.
        let this = thread::current().id();
        let idle = self.node.glocks().iter().all(|glock| glock.is_idle());
        self.end(idle && self.check().is_ok());
        self.node.agenda.lock().stop = true;
        self.node.work.notify_all();
        self.node.time.notify_all();
        for thread in self.threads.drain(..) {
            if thread.thread().id() != this {
                // A worker that panicked has said so; its glock withdrew.
                let _ = thread.join();
            }
        }
        // Glocks keep the node, and the node its glocks.
        let glocks = std::mem::take(&mut self.node.table.lock().glocks);
        for glock in glocks.values() {
            glock.withdraw(Errno::ESHUTDOWN);
        }
    }
}

impl Node {
    fn good_until(&self) -> Option<Time> {
        self.session.get().and_then(|session| session.good_until())
    }

    fn glocks(&self) -> Vec<Arc<Glock>> {
        self.table.lock().glocks.values().map(Arc::clone).collect()
    }

    fn find(&self, name: Name) -> Option<Arc<Glock>> {
        self.table.lock().glocks.get(&name).map(Arc::clone)
    }

    fn check(&self) -> Result<(), Errno> {
        if self.stopped.load(Ordering::Acquire) {
            drop(self.withdrawal.lock());
            return Err(self.table.lock().withdrawn.unwrap_or(Errno::EIO));
        }
        let end = self.good_until();
        if end.is_some_and(|end| end <= self.options.clock.now()) {
            Host::withdraw(self, Errno::EIO);
            return Err(Errno::EIO);
        }
        Ok(())
    }

    fn alarm(&self, at: Time, name: Option<Name>) {
        self.agenda.lock().alarms.push(Reverse((at, name)));
        self.time.notify_one();
    }

    fn do_work(&self) {
        loop {
            let (name, work) = {
                let mut agenda = self.agenda.lock();
                loop {
                    if agenda.stop {
                        return;
                    }
                    if let Some(next) = agenda.work.pop_front() {
                        break next;
                    }
                    self.work.wait(&mut agenda);
                }
            };
            if let Some(glock) = self.find(name) {
                match work {
                    Job::Work(work) => glock.work(work),
                    Job::Withdrawn => glock.tell_withdrawn(),
                }
            }
        }
    }

    fn keep_time(&self) {
        loop {
            let name = {
                let mut agenda = self.agenda.lock();
                loop {
                    if agenda.stop {
                        return;
                    }
                    let now = self.options.clock.now();
                    match agenda.alarms.peek() {
                        Some(&Reverse((at, name))) if at <= now => {
                            agenda.alarms.pop();
                            break name;
                        }
                        Some(&Reverse((at, _))) if self.options.clock.goes() => {
                            // The machine may sleep meanwhile, and this wait would not notice: look now and then.
                            let nap = at.since(now).min(Duration::from_millis(500));
                            self.time.wait_for(&mut agenda, nap);
                        }
                        _ => self.time.wait(&mut agenda),
                    }
                }
            };
            match name {
                Some(name) => {
                    if let Some(glock) = self.find(name) {
                        glock.rouse();
                    }
                }
                None => self.check_lease(),
            }
        }
    }

    /// Withdraws at the end of the lease, or looks again at its new end.
    fn check_lease(&self) {
        if self.check().is_ok()
            && let Some(end) = self.good_until()
        {
            self.alarm(end, None);
        }
    }
}

impl crate::clock::Ticked for Node {
    fn ticked(&self) {
        // Under the lock, so that a thread between its look at the clock and its wait is not missed.
        let _agenda = self.agenda.lock();
        self.time.notify_all();
    }
}

impl Host for Node {
    fn now(&self) -> Time {
        self.options.clock.now()
    }

    fn ask(&self, name: Name, from: Mode, to: Mode, wait: Wait) {
        // After the lease's end nothing is given away either: what was written back may have come too late.
        if self.check().is_ok()
            && let Some(session) = self.session.get()
        {
            session.request(name, from, to, wait);
        }
    }

    fn work(&self, name: Name, work: Work) {
        self.agenda.lock().work.push_back((name, Job::Work(work)));
        self.work.notify_one();
    }

    fn rouse_at(&self, name: Name, at: Time) {
        self.alarm(at, Some(name));
    }

    fn withdraw(&self, errno: Errno) {
        let _withdrawal = self.withdrawal.lock();
        let glocks: Vec<Arc<Glock>> = {
            let mut table = self.table.lock();
            if table.withdrawn.is_some() {
                return;
            }
            table.withdrawn = Some(errno);
            self.stopped.store(true, Ordering::Release);
            table.glocks.values().map(Arc::clone).collect()
        };
        for glock in &glocks {
            glock.withdraw(Errno::EIO);
        }
        let told = glocks.iter().map(|glock| (glock.name(), Job::Withdrawn));
        self.agenda.lock().work.extend(told);
        self.work.notify_all();
        if let Some(session) = self.session.get() {
            session.abandon();
        }
    }
}

impl Events for Node {
    fn reply(&self, name: Name, reply: Reply) {
        if let Some(glock) = self.find(name) {
            glock.reply(reply);
        }
    }

    fn demote(&self, name: Name, wanted: Mode) {
        if let Some(glock) = self.find(name) {
            glock.demote(wanted);
        }
    }

    fn freeze(&self, generation: u64) {
        let glocks: Vec<Arc<Glock>> = {
            let mut table = self.table.lock();
            table.frozen = table.frozen.max(Some(generation));
            table.glocks.values().map(Arc::clone).collect()
        };
        for glock in glocks {
            glock.freeze(generation);
        }
    }

    fn thaw(&self, generation: u64) {
        let glocks: Vec<Arc<Glock>> = {
            let mut table = self.table.lock();
            if table.frozen != Some(generation) {
                return;
            }
            table.frozen = None;
            table.glocks.values().map(Arc::clone).collect()
        };
        for glock in glocks {
            glock.thaw(generation);
        }
    }

    fn lost(&self, errno: Errno) {
        Host::withdraw(self, errno);
    }
}
