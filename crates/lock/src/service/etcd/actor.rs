//! The one thread that speaks with etcd: it keeps the board, and tasks of it wait for answers.
//!
//! *Owns*: the order in which answers, changes and requests are taken in; the lease's renewal; taking over from the dead.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use etcd_client::{EventType, GetOptions, KeyValue, WatchOptions};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use super::board::{Board, Out};
use super::fence::{Fence, Tally, count};
use super::keys::{Claim, Key, Owner};
use super::process::Fate;
use super::wire::{Claims, Lost, Pause, Wire, change_of, garbage, judge};
use super::{Ask, GoodUntil};
use crate::clock::Time;
use crate::mode::Mode;
use crate::service::{Events, Name, Wait};

/// Transactions on their way at once.
const FLIGHT_MAX: usize = 256;
/// Fence commands that run at once.
const COMMANDS_MAX: usize = 8;
/// How long a killed process may take to end.
const KILL_MAX: Duration = Duration::from_secs(30);
/// How long the end of fence commands is waited for when this node ends.
const COMMAND_END: Duration = Duration::from_secs(2);

/// What the actor takes in, one after the other.
pub(super) enum Message {
    Ask(Ask),
    /// Our claim was made, beside these.
    Claimed(Name, Claims),
    /// Claims were read.
    Loaded(Name, Claims),
    /// A claim was made weaker or taken back.
    Fallen(Name, Mode),
    /// A new watch tells what comes after this revision.
    Told(i64),
    /// What it told.
    Changed(Vec<Told>),
    /// Who is alive, and all claims, read in this order.
    Census(Vec<Owner>, Vec<(Name, Owner, i64)>),
    /// The claims of a dead member are gone.
    Buried(Owner),
    /// Nothing can be relied on any more.
    Lost(Lost),
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Message")
    }
}

/// One event of the watch.
pub(super) struct Told {
    put: bool,
    pair: KeyValue,
    /// The lease that a deleted member had.
    lease_before: i64,
}

/// What is done about the dead.
pub(super) struct Recovery {
    pub grace: Duration,
    pub fence: Option<Fence>,
    pub tally: Arc<Tally>,
}

/// The node's end of etcd.
pub(super) struct Actor {
    wire: Wire,
    board: Board,
    events: Weak<dyn Events>,
    sender: UnboundedSender<Message>,
    good_until: Arc<GoodUntil>,
    ttl: Duration,
    recovery: Arc<Recovery>,
    flight: Arc<Semaphore>,
    /// A permit for each fence command that runs.
    commands: Arc<Semaphore>,
    /// Fence commands are to end: the node does.
    ending: Arc<AtomicBool>,
    /// The dead whose claims a task of ours takes away.
    burying: HashSet<Owner>,
    /// Requests made so far.
    serial: u64,
}

impl Actor {
    pub fn new(
        wire: Wire,
        events: Weak<dyn Events>,
        sender: UnboundedSender<Message>,
        good_until: Arc<GoodUntil>,
        ttl: Duration,
        recovery: Recovery,
    ) -> Self {
        Self {
            board: Board::new(wire.me.clone()),
            wire,
            events,
            sender,
            good_until,
            ttl,
            recovery: Arc::new(recovery),
            flight: Arc::new(Semaphore::new(FLIGHT_MAX)),
            commands: Arc::new(Semaphore::new(COMMANDS_MAX)),
            ending: Arc::new(AtomicBool::new(false)),
            burying: HashSet::new(),
            serial: 0,
        }
    }

    /// Serves until the session ends or nothing can be relied on.
    pub async fn run(mut self, mut receiver: UnboundedReceiver<Message>) {
        let renewal = tokio::spawn(renew(
            self.wire.clone(),
            Arc::clone(&self.good_until),
            self.ttl,
            self.sender.clone(),
        ));
        let watching = tokio::spawn(watch(self.wire.clone(), self.sender.clone()));
        while let Some(message) = receiver.recv().await {
            match self.take(message).await {
                Ok(true) => {}
                Ok(false) => break,
                Err(lost) => {
                    if let Some(events) = self.events.upgrade() {
                        events.lost(lost.errno());
                    }
                    break;
                }
            }
        }
        renewal.abort();
        watching.abort();
        self.end_commands().await;
    }

    /// Has the fence commands end that run, so that none is left when another node may begin one.
    async fn end_commands(&self) {
        self.ending.store(true, Ordering::Relaxed);
        // All of them; as long as any runs, there are fewer.
        let all = self.commands.acquire_many(COMMANDS_MAX as u32);
        let _ = tokio::time::timeout(COMMAND_END, all).await;
    }

    async fn take(&mut self, message: Message) -> Result<bool, Lost> {
        match message {
            Message::Ask(Ask::Change {
                name,
                from,
                to,
                wait,
            }) => self.change(name, from, to, wait)?,
            Message::Ask(Ask::Leave(done)) => {
                self.end_commands().await;
                let patience = self.wire.patience;
                let _ = tokio::time::timeout(patience, self.wire.strike_off()).await;
                let mut client = self.wire.client.clone();
                // Takes the member's key along. Every claim was given up.
                let revoke = client.lease_revoke(self.wire.me.lease);
                let _ = tokio::time::timeout(self.wire.patience, revoke).await;
                let _ = done.send(());
                return Ok(false);
            }
            Message::Ask(Ask::Abandon) => return Ok(false),
            Message::Claimed(name, claims) => {
                let outs = self.board.claimed(name, claims.revision, claims.entries);
                self.bring(outs)?;
            }
            Message::Loaded(name, claims) => {
                let outs = self.board.loaded(name, claims.revision, claims.entries);
                self.bring(outs)?;
            }
            Message::Fallen(name, to) => {
                let outs = self.board.fallen(name, to);
                self.bring(outs)?;
            }
            Message::Told(revision) => {
                let outs = self.board.told_since(revision);
                self.bring(outs)?;
                self.count();
            }
            Message::Changed(told) => {
                for one in told {
                    self.told(one)?;
                }
            }
            Message::Census(alive, claims) => self.census(&alive, claims)?,
            Message::Buried(dead) => {
                self.burying.remove(&dead);
            }
            Message::Lost(lost) => return Err(lost),
        }
        Ok(true)
    }

    fn change(&mut self, name: Name, from: Mode, to: Mode, wait: Wait) -> Result<(), Lost> {
        if from.falls_to(to) {
            let Some(created) = self.board.created(name) else {
                return Err(Lost::Membership);
            };
            self.board.fall(name);
            self.weaken(name, created, to);
        } else {
            self.board.rise(name, wait);
            self.serial += 1;
            let claim = Claim {
                mode: to,
                wait,
                serial: self.serial,
            };
            self.spawn(move |wire| async move {
                let claims = wire.claim(name, claim).await?;
                Ok(Some(Message::Claimed(name, claims)))
            });
        }
        Ok(())
    }

    fn weaken(&self, name: Name, created: i64, to: Mode) {
        let claim = (to != Mode::Unlocked).then_some(Claim {
            mode: to,
            wait: Wait::Queue,
            serial: self.serial,
        });
        self.spawn(move |wire| async move {
            wire.change(name, created, claim).await?;
            Ok(Some(Message::Fallen(name, to)))
        });
    }

    fn bring(&mut self, outs: Vec<Out>) -> Result<(), Lost> {
        for out in outs {
            match out {
                Out::Reply(name, reply) => {
                    if let Some(events) = self.events.upgrade() {
                        events.reply(name, reply);
                    }
                }
                Out::Demote(name, wanted) => {
                    if let Some(events) = self.events.upgrade() {
                        events.demote(name, wanted);
                    }
                }
                Out::TakeBack(name) => {
                    let created = self.board.created(name).ok_or(Lost::Membership)?;
                    self.weaken(name, created, Mode::Unlocked);
                }
                Out::Load(name) => self.spawn(move |wire| async move {
                    let claims = wire.load(name).await?;
                    Ok(Some(Message::Loaded(name, claims)))
                }),
                Out::Stray(name, created) => self.spawn(move |wire| async move {
                    wire.change(name, created, None).await?;
                    Ok(None)
                }),
                Out::Robbed(_) => return Err(Lost::Membership),
            }
        }
        Ok(())
    }

    fn told(&mut self, told: Told) -> Result<(), Lost> {
        match self.wire.keys.parse(told.pair.key()) {
            Some(Key::Lock(name, owner)) => {
                let change = change_of(&told.pair, name, owner, told.put)?;
                let outs = self.board.changed(change);
                self.bring(outs)
            }
            Some(Key::Member(member)) if !told.put => {
                let dead = Owner {
                    member,
                    lease: told.lease_before,
                };
                if dead == self.wire.me {
                    return Err(Lost::Membership);
                }
                if dead.lease == 0 {
                    // It is not said who it was.
                    self.count();
                } else {
                    self.take_over(dead);
                }
                Ok(())
            }
            Some(Key::Member(_) | Key::Node(_) | Key::Fence(_)) => Ok(()),
            // Nobody changes what the volume is while it is served.
            Some(Key::Volume) => Err(Lost::Garbage(self.wire.keys.volume())),
            None => Err(garbage(&told.pair)),
        }
    }

    /// Finds out who is alive and whose claims there are.
    fn count(&self) {
        self.spawn(move |wire| async move {
            // In this order: a claim that is read belongs to a member that was there before it, so one that is not among
            // the living has died.
            let claims = wire.all_claims().await?;
            let alive = wire.members().await?;
            Ok(Some(Message::Census(alive, claims)))
        });
    }

    fn census(&mut self, alive: &[Owner], claims: Vec<(Name, Owner, i64)>) -> Result<(), Lost> {
        if !alive.contains(&self.wire.me) {
            return Err(Lost::Membership);
        }
        for (name, owner, created) in claims {
            if owner == self.wire.me {
                if !self.board.has(name) {
                    self.bring(vec![Out::Stray(name, created)])?;
                }
            } else if !alive.contains(&owner) {
                self.take_over(owner);
            }
        }
        Ok(())
    }

    /// Takes the claims of a dead member away after the grace, or when it is sure to write no more. Every survivor does:
    /// whoever comes first has done it, and none depends on another's life (H-15).
    fn take_over(&mut self, dead: Owner) {
        if !self.burying.insert(dead.clone()) {
            return;
        }
        let task = Fencing {
            recovery: Arc::clone(&self.recovery),
            commands: Arc::clone(&self.commands),
            ending: Arc::clone(&self.ending),
        };
        self.spawn(move |wire| async move {
            // Counted from here: the lease has ended by now, by etcd's own clock. The machine may sleep meanwhile, which only
            // makes it longer.
            let grace = tokio::time::sleep(task.recovery.grace);
            let (theirs, whose) = (wire.clone(), dead.clone());
            let recovery = Arc::clone(&task.recovery);
            let mut fenced = tokio::spawn(async move { task.run(&theirs, &whose).await });
            tokio::pin!(grace);
            let first = tokio::select! {
                fenced = &mut fenced => Some(fenced),
                () = &mut grace => None,
            };
            let ended = first.is_some();
            let sure = matches!(first, Some(Ok(Ok(true))));
            if ended && !sure {
                grace.await;
            }
            // One that left in good order has no claims any more.
            if wire.bury(&dead).await? > 0 && !sure {
                count(&recovery.tally.waited);
            }
            if !ended {
                // A command that runs is left to its end: its turn is not over before.
                let _ = fenced.await;
            }
            wire.end_fence(&dead).await?;
            Ok(Some(Message::Buried(dead)))
        });
    }

    /// Runs a task that ends in a message or in the end of everything.
    fn spawn<T, F>(&self, task: T)
    where
        T: FnOnce(Wire) -> F + Send + 'static,
        F: Future<Output = Result<Option<Message>, Lost>> + Send,
    {
        let (wire, sender) = (self.wire.clone(), self.sender.clone());
        let flight = Arc::clone(&self.flight);
        tokio::spawn(async move {
            let _permit = flight.acquire().await;
            let message = match task(wire).await {
                Ok(None) => return,
                Ok(Some(message)) => message,
                Err(lost) => Message::Lost(lost),
            };
            let _ = sender.send(message);
        });
    }
}

/// Making sure that one dead member writes no more.
struct Fencing {
    recovery: Arc<Recovery>,
    commands: Arc<Semaphore>,
    ending: Arc<AtomicBool>,
}

impl Fencing {
    /// Tells whether that is sure now.
    async fn run(self, wire: &Wire, dead: &Owner) -> Result<bool, Lost> {
        let name = &dead.member;
        let tally = &self.recovery.tally;
        let process = wire.process_of(dead).await?;
        if let Some(process) = process.clone() {
            let fate = blocking(move || process.end_if_stopped(KILL_MAX)).await;
            match fate {
                Some(Fate::Gone) => {
                    count(&tally.gone);
                    tracing::info!(node = %name, "the process of a dead node has ended");
                    return Ok(true);
                }
                Some(Fate::Killed) => {
                    count(&tally.killed);
                    tracing::warn!(node = %name, "a node stood still past its lease; its process was killed");
                    return Ok(true);
                }
                Some(Fate::Unknown) | None => {}
            }
        }
        let Some(fence) = self.recovery.fence.clone() else {
            return Ok(false);
        };
        let Ok(permit) = self.commands.acquire_owned().await else {
            return Ok(false);
        };
        if self.ending.load(Ordering::Relaxed) || !wire.begin_fence(dead).await? {
            return Ok(false);
        }
        let (told, ending) = (name.clone(), self.ending);
        let outcome = blocking(move || {
            let outcome = fence.run(&told, process.as_ref(), &ending);
            // Not before: who waits for it may end then.
            drop(permit);
            outcome
        })
        .await;
        match outcome {
            Some(Ok(())) => {
                count(&tally.fenced);
                tracing::warn!(node = %name, "a dead node was fenced");
                Ok(true)
            }
            failed => {
                count(&tally.failed);
                let why = failed.and_then(Result::err).unwrap_or_default();
                tracing::error!(node = %name, %why, "a dead node could not be fenced: its locks are taken after the grace");
                Ok(false)
            }
        }
    }
}

/// Runs what blocks on a thread of its own.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

/// Renews the lease and says until when it is good. The node itself looks at its clock.
async fn renew(
    wire: Wire,
    good_until: Arc<GoodUntil>,
    ttl: Duration,
    out: UnboundedSender<Message>,
) {
    let every = ttl / 4;
    let mut pause = Pause::new();
    loop {
        let mut client = wire.client.clone();
        let asked = Time::now();
        let opened = tokio::time::timeout(every, client.lease_keep_alive(wire.me.lease)).await;
        let (mut keeper, mut answers) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(etcd_client::Error::LeaseKeepAliveError(_))) => {
                let _ = out.send(Message::Lost(Lost::Membership));
                return;
            }
            Ok(Err(error)) => {
                if let Some(lost) = judge(&error) {
                    let _ = out.send(Message::Lost(lost));
                    return;
                }
                pause.rest().await;
                continue;
            }
            Err(_late) => continue,
        };
        // Opening asks once, and was answered.
        good_until.renewed(asked, ttl);
        pause = Pause::new();
        loop {
            tokio::time::sleep(every).await;
            let asked = Time::now();
            if keeper.keep_alive().await.is_err() {
                break;
            }
            match tokio::time::timeout(every, answers.message()).await {
                Ok(Ok(Some(answer))) if answer.ttl() > 0 => {
                    let ttl = Duration::from_secs(answer.ttl().unsigned_abs());
                    good_until.renewed(asked, ttl);
                }
                Ok(Ok(Some(_ended))) => {
                    let _ = out.send(Message::Lost(Lost::Membership));
                    return;
                }
                // An answer that comes late belongs to an earlier question: begin anew.
                _ => break,
            }
        }
    }
}

/// Watches all keys of the volume, over and over.
async fn watch(wire: Wire, out: UnboundedSender<Message>) {
    let mut pause = Pause::new();
    loop {
        // From here on everything will be told; what was before is read.
        let revision = match wire.get(wire.keys.volume(), GetOptions::new()).await {
            Ok(get) if get.kvs().is_empty() => {
                let _ = out.send(Message::Lost(Lost::Garbage(wire.keys.volume())));
                return;
            }
            Ok(get) => get.header().map_or(0, |header| header.revision()),
            Err(lost) => {
                let _ = out.send(Message::Lost(lost));
                return;
            }
        };
        let options = WatchOptions::new()
            .with_prefix()
            .with_prev_key()
            .with_start_revision(revision + 1);
        let mut client = wire.client.clone();
        let opened = client.watch(wire.keys.root.clone(), Some(options));
        if let Ok(Ok(mut stream)) = tokio::time::timeout(wire.patience, opened).await {
            if out.send(Message::Told(revision)).is_err() {
                return;
            }
            while let Ok(Some(response)) = stream.message().await {
                if response.canceled() {
                    break;
                }
                pause = Pause::new();
                let told: Vec<Told> = response.events().iter().filter_map(read).collect();
                wire.exchanged.note_told(told.len());
                if !told.is_empty() && out.send(Message::Changed(told)).is_err() {
                    return;
                }
            }
        }
        pause.rest().await;
    }
}

fn read(event: &etcd_client::Event) -> Option<Told> {
    Some(Told {
        put: event.event_type() == EventType::Put,
        pair: event.kv()?.clone(),
        lease_before: event.prev_kv().map_or(0, KeyValue::lease),
    })
}
