//! A run: node processes at work, faults by seed, and what the checker says of what they recorded.
//!
//! *Owns*: the processes, when which fault comes, the list of deaths.
//!
//! *Does not own*: what a node does ([`crate::node`]); the servers ([`crate::servers`]).
//!
//! *Locking*: none; one thread.
//!
//! A node that ends, however, is begun anew with another number. When it could do nothing any more is known for sure
//! once its process is gone; of one that stood still past its lease, when it was let go on.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use serde::Serialize;

use crate::check::{self, Death, History, Verdict};
use crate::life::{Ended, Life, Worker};
use crate::namespace::{ELSEWHERE, Namespace};
use crate::node::{self, Control};
use crate::record::{self, Call, End, Kind};
use crate::servers::{Cut, Servers};
use crate::{Layout, PAGE, now, place};

/// How long nodes may take to end when they are told to, and to begin.
const PATIENCE: Duration = Duration::from_secs(180);

/// How many times its time a run may take for each fault to come.
const LONGER_MAX: u32 = 4;

/// Calls that one thread's log has room for.
const CALLS_MAX: u64 = 16 << 20;

/// What is done to nodes and servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Fault {
    /// SIGKILL; the node is started again.
    Kill,
    /// SIGSTOP, in turn for less than the lease and past it, then SIGCONT.
    Pause,
    /// No way to etcd for a while, in turn for less than the lease and past it.
    Cut,
    /// etcd is killed and started again; all members at once.
    Restart,
    /// One member of etcd is killed, and started again later.
    Member,
}

/// What is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// On what.
    pub place: place::Spec,
    /// Where.
    pub dir: PathBuf,
    /// Files and pages.
    pub layout: Layout,
    /// Node processes.
    pub nodes: usize,
    /// Threads of each.
    pub threads: u32,
    /// Calls in sum, after which the run ends.
    pub calls: u64,
    /// Time, after which it ends too.
    pub time: Duration,
    /// Of everything drawn.
    pub seed: u64,
    /// Which faults.
    pub faults: Vec<Fault>,
    /// The mean time between two.
    pub every: Duration,
    /// etcd's members.
    pub members: usize,
    /// Which calls.
    pub mix: node::Mix,
    /// Whether each node has a network of its own, so that packets vanish when it is cut off; otherwise its connections are
    /// ended and refused. Needs root.
    pub namespaces: bool,
    /// Whether nodes pass for processes of different machines: who stands still is not killed by the others. Needs root.
    pub elsewhere: bool,
    /// Where else the nodes find the files, in turn: mounts of the directory. They are made in the directory itself.
    pub mounts: Vec<PathBuf>,
    /// Where logs are kept; nowhere if not given.
    pub logs: Option<PathBuf>,
    /// The program that does a node's work when called with `node` and its [`node::Spec`] on standard input.
    pub program: PathBuf,
    /// The program `pinfold`, for nodes that are mounts.
    pub pinfold: PathBuf,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// What the checker says.
    pub verdict: Verdict,
    /// Calls answered, by what they did and how.
    pub calls: BTreeMap<(Kind, record::Way), u64>,
    /// Faults injected.
    pub faults: BTreeMap<&'static str, u64>,
    /// Nodes that were killed.
    pub killed: u64,
    /// Nodes that stopped because a call failed.
    pub withdrawn: u64,
    /// What they said, and how often.
    pub reasons: BTreeMap<String, u64>,
    /// Nodes that could not begin, and were begun again.
    pub not_begun: u64,
    /// How long the nodes worked, and how long the check took.
    pub took: (Duration, Duration),
}

/// The node of one place in the run, life after life.
struct Slot {
    life: Option<Life>,
    lines: Vec<Cut>,
    // After the lines that it carries.
    network: Option<Namespace>,
    not_before: Instant,
}

impl Slot {
    fn cut(&self) -> anyhow::Result<()> {
        if let Some(network) = &self.network {
            return network.cut();
        }
        self.lines.iter().for_each(Cut::cut);
        Ok(())
    }

    fn mend(&self) -> anyhow::Result<()> {
        if let Some(network) = &self.network {
            return network.mend();
        }
        self.lines.iter().for_each(Cut::mend);
        Ok(())
    }
}

/// What has to be undone, and when.
enum Undo {
    Resume { slot: usize, node: u32, past: bool },
    Mend { slot: usize, past: bool },
    Start { member: usize },
}

struct Run<'a> {
    options: &'a Options,
    logs: PathBuf,
    control: Control,
    servers: Option<Servers>,
    slots: Vec<Slot>,
    undo: Vec<(Instant, Undo)>,
    random: SmallRng,
    last: u32,
    /// Every life that did not end in good order, with the time it was gone and the time it was let go on.
    dead: Vec<(u32, u64, Option<u64>)>,
    /// Whether the last pause, and the last cut, was for longer than the lease.
    past: bool,
    injected: BTreeSet<Fault>,
    long_cut: bool,
    report: Report,
}

/// Runs nodes, checks what they did.
///
/// # Errors
/// What keeps the run from being made, or a node that hangs. A history that is wrong is no error, but in the report.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    let scratch = tempfile::tempdir()?;
    let logs = options
        .logs
        .clone()
        .unwrap_or_else(|| scratch.path().to_path_buf());
    std::fs::create_dir_all(&logs)?;
    prepare(&options.dir, options.layout)?;
    let servers = match options.place.service() {
        Some(_) => Some(Servers::start(scratch.path(), options.members)?),
        None => None,
    };
    let mut run = Run {
        options,
        control: Control::create(&logs)?,
        logs,
        servers,
        slots: Vec::new(),
        undo: Vec::new(),
        random: SmallRng::seed_from_u64(options.seed),
        last: 0,
        dead: Vec::new(),
        past: false,
        injected: BTreeSet::new(),
        long_cut: false,
        report: Report::default(),
    };
    run.make_slots()?;
    let begun = Instant::now();
    run.work()?;
    run.end()?;
    run.report.took.0 = begun.elapsed();
    run.check()
}

/// Makes the files, all zeros.
fn prepare(dir: &Path, layout: Layout) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)?;
    for file in 0..layout.files {
        let path = place::path_of(dir, file);
        let made = std::fs::File::create(&path).with_context(|| path.display().to_string())?;
        made.set_len(u64::from(layout.pages) * PAGE as u64)?;
        // Of an earlier run on this directory.
        let _ = std::fs::remove_file(path.with_extension("token"));
    }
    Ok(())
}

impl Run<'_> {
    fn make_slots(&mut self) -> anyhow::Result<()> {
        for _ in 0..self.options.nodes {
            let mut lines = Vec::new();
            let network = self.options.namespaces.then(Namespace::new).transpose()?;
            let near = network.as_ref().map(Namespace::address);
            let near = near.unwrap_or(Ipv4Addr::LOCALHOST);
            if let Some(servers) = &self.servers {
                for member in 0..servers.count() {
                    lines.push(Cut::before(servers.endpoint(member), near)?);
                }
            }
            self.slots.push(Slot {
                life: None,
                lines,
                network,
                not_before: Instant::now(),
            });
        }
        Ok(())
    }

    fn work(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        let mut faults = self.options.faults.clone();
        faults.shuffle(&mut self.random);
        let mut faults = faults.into_iter().cycle();
        let mut next = Instant::now() + self.options.every;
        while !self.is_over(begun.elapsed()) {
            self.tend()?;
            self.undo_what_is_due(Instant::now())?;
            if Instant::now() >= next
                && let Some(fault) = faults.next()
            {
                self.inject(fault)?;
                next = Instant::now()
                    + self
                        .options
                        .every
                        .mul_f64(self.random.random_range(0.5..1.5));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Tells whether it is time to end: not before each fault has come, unless that takes far too long.
    fn is_over(&self, elapsed: Duration) -> bool {
        let time = self.options.time;
        let done = elapsed >= time || self.control.calls() >= self.options.calls;
        let faults = &self.options.faults;
        let all = faults.iter().all(|fault| self.injected.contains(fault));
        (done && all) || elapsed >= time * LONGER_MAX
    }

    /// Starts nodes that are not there, and notes how others ended.
    fn tend(&mut self) -> anyhow::Result<()> {
        for at in 0..self.slots.len() {
            self.bury(at)?;
            let slot = &self.slots[at];
            if slot.life.is_none() && Instant::now() >= slot.not_before {
                let life = self.give_birth(at)?;
                self.slots[at].life = Some(life);
            }
        }
        Ok(())
    }

    fn give_birth(&mut self, at: usize) -> anyhow::Result<Life> {
        self.last += 1;
        let options = self.options;
        let mut place = options.place.clone();
        if let Some(service) = place.service_mut() {
            service.endpoints = self.slots[at].lines.iter().map(Cut::endpoint).collect();
        }
        let mut mounts = options.mounts.iter().cycle();
        let spec = node::Spec {
            place,
            dir: mounts.nth(at).unwrap_or(&options.dir).clone(),
            layout: options.layout,
            node: self.last,
            threads: options.threads,
            seed: options.seed,
            calls: options.calls.min(CALLS_MAX) as usize,
            logs: self.logs.clone(),
            mix: options.mix,
        };
        let said = File::create(self.logs.join(format!("{}.said", self.last)))?;
        let place::Spec::Mounted { service, memory } = &spec.place else {
            let mut command = self.command(at, &options.program);
            command.arg("node");
            let spec = serde_json::to_vec(&spec)?;
            let worker = Worker {
                command,
                spec,
                said,
            };
            return Life::begin(self.last, worker);
        };
        let mount = self.logs.join(format!("mount{}", self.last));
        let mut daemon = self.command(at, &options.pinfold);
        // Where daemons are asked what they do; a run of its own.
        daemon.env("PINFOLD_RUN_DIR", self.logs.join("run"));
        daemon.args(mount_arguments(self.last, service, *memory));
        daemon.args([&options.dir, &mount]);
        let mut command = Command::new(&options.program);
        command.arg("node");
        let spec = serde_json::to_vec(&node::Spec {
            dir: mount.clone(),
            ..spec
        })?;
        let worker = Worker {
            command,
            spec,
            said,
        };
        Life::mount(self.last, daemon, &mount, worker)
    }

    /// The command that runs a node's program, with what gives it a place of its own.
    fn command(&self, at: usize, program: &Path) -> Command {
        let network = self.slots[at].network.as_ref();
        let mut words: Vec<OsString> = Vec::new();
        words.extend(
            network
                .iter()
                .flat_map(|network| network.enter())
                .map(Into::into),
        );
        if self.options.elsewhere {
            words.extend(ELSEWHERE.map(Into::into));
        }
        words.push(program.into());
        let mut command = Command::new(words.remove(0));
        command.args(words);
        command
    }

    /// Notes how a node ended, if it did.
    fn bury(&mut self, at: usize) -> anyhow::Result<()> {
        let Some(life) = &mut self.slots[at].life else {
            return Ok(());
        };
        let ended = life.ended();
        let (node, resumed) = (life.node, life.resumed);
        let Some(ended) = ended.with_context(|| self.said(node))? else {
            return Ok(());
        };
        let gone = now();
        self.slots[at].life = None;
        match ended {
            Ended::Well => return Ok(()),
            Ended::Withdrew => {
                self.report.withdrawn += 1;
                self.note_reason(node);
                // Only one that never came to again is known to have been fenced while it stood still.
                self.dead.push((node, gone, resumed));
            }
            Ended::NotBegun => {
                self.report.not_begun += 1;
                self.note_reason(node);
                self.slots[at].not_before = Instant::now() + Duration::from_millis(300);
                self.dead.push((node, gone, None));
            }
            Ended::Killed => {
                self.report.killed += 1;
                self.dead.push((node, gone, None));
            }
        }
        Ok(())
    }

    fn said(&self, node: u32) -> String {
        std::fs::read_to_string(self.logs.join(format!("{node}.said"))).unwrap_or_default()
    }

    fn note_reason(&mut self, node: u32) {
        let said = self.said(node);
        let line = said.lines().last().unwrap_or("nothing").to_owned();
        *self.report.reasons.entry(line).or_default() += 1;
    }

    fn inject(&mut self, fault: Fault) -> anyhow::Result<()> {
        let mut alive: Vec<usize> = (0..self.slots.len())
            .filter(|&at| {
                let life = self.slots[at].life.as_ref();
                life.is_some_and(|life| {
                    life.works() && !life.paused && life.begun.elapsed() > self.settled()
                })
            })
            .collect();
        alive.shuffle(&mut self.random);
        let Some(&at) = alive.first() else {
            return Ok(());
        };
        let service = self.options.place.service().cloned().unwrap_or_default();
        let lease = Duration::from_millis(service.lease_ms.max(1000));
        let past = lease + Duration::from_millis(service.grace_ms) + Duration::from_secs(2);
        match fault {
            Fault::Kill => {
                if let Some(life) = &mut self.slots[at].life {
                    // It may have ended by itself.
                    life.signal(Signal::KILL);
                    self.injected.insert(fault);
                    self.count("kill");
                }
            }
            Fault::Pause => {
                self.past = !self.past;
                let time = if self.past { past } else { lease / 4 };
                if let Some(life) = &mut self.slots[at].life
                    && life.signal(Signal::STOP)
                {
                    life.paused = true;
                    let resume = Undo::Resume {
                        slot: at,
                        node: life.node,
                        past: self.past,
                    };
                    self.undo.push((Instant::now() + time, resume));
                }
            }
            Fault::Cut => {
                let is_cut =
                    |(_, undo): &(_, Undo)| matches!(undo, Undo::Mend { slot, .. } if *slot == at);
                if self.undo.iter().any(is_cut) {
                    return Ok(());
                }
                self.long_cut = !self.long_cut;
                let long = self.long_cut;
                self.slots[at].cut()?;
                let time = if long { past } else { lease / 4 };
                let mend = Undo::Mend {
                    slot: at,
                    past: long,
                };
                self.undo.push((Instant::now() + time, mend));
            }
            Fault::Restart | Fault::Member => {
                let busy = self
                    .undo
                    .iter()
                    .any(|(_, undo)| matches!(undo, Undo::Start { .. }));
                let Some(servers) = self.servers.as_mut().filter(|_| !busy) else {
                    return Ok(());
                };
                let one = self.random.random_range(0..servers.count());
                let members = if fault == Fault::Member {
                    one..one + 1
                } else {
                    0..servers.count()
                };
                let away = if fault == Fault::Member {
                    lease / 2
                } else {
                    lease / 8
                };
                for member in members {
                    servers.kill(member);
                    self.undo
                        .push((Instant::now() + away, Undo::Start { member }));
                }
                self.injected.insert(fault);
                self.count(if fault == Fault::Member {
                    "member of etcd lost"
                } else {
                    "etcd restarted"
                });
            }
        }
        Ok(())
    }

    /// How long a node is left alone after it was begun, so that each comes to do something.
    fn settled(&self) -> Duration {
        self.options.every / 2
    }

    /// Counts what is undone when its time has come, or earlier.
    fn finished(&mut self, fault: Fault, past: bool, names: [&'static str; 2]) {
        let [short, long] = names;
        if past {
            self.injected.insert(fault);
        }
        self.count(if past { long } else { short });
    }

    fn count(&mut self, fault: &'static str) {
        *self.report.faults.entry(fault).or_default() += 1;
    }

    fn undo_what_is_due(&mut self, at: Instant) -> anyhow::Result<()> {
        let (due, later) = std::mem::take(&mut self.undo)
            .into_iter()
            .partition(|&(when, _)| when <= at);
        self.undo = later;
        for (_, undo) in due {
            match undo {
                Undo::Resume { slot, node, past } => {
                    if let Some(life) = &mut self.slots[slot].life
                        && life.node == node
                    {
                        if past {
                            life.resumed = Some(now());
                        }
                        life.paused = false;
                        life.signal(Signal::CONT);
                    }
                    self.finished(Fault::Pause, past, ["short pause", "pause past the lease"]);
                }
                Undo::Mend { slot, past } => {
                    self.slots[slot].mend()?;
                    self.finished(Fault::Cut, past, ["short cut", "cut past the lease"]);
                }
                Undo::Start { member } => {
                    if let Some(servers) = &mut self.servers {
                        servers.start_again(member)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Undoes all faults, and lets the nodes end.
    fn end(&mut self) -> anyhow::Result<()> {
        self.undo_early()?;
        self.control.stop();
        let end = Instant::now() + PATIENCE;
        for at in 0..self.slots.len() {
            while self.slots[at].life.is_some() {
                self.bury(at)?;
                if Instant::now() > end {
                    let node = self.slots[at].life.as_ref().map_or(0, |life| life.node);
                    bail!("node {node} hangs: {}", self.said(node));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// Lets what is paused go on, at once; it was not paused for as long as was meant.
    fn undo_early(&mut self) -> anyhow::Result<()> {
        for (_, undo) in &mut self.undo {
            if let Undo::Resume { past, .. } | Undo::Mend { past, .. } = undo {
                *past = false;
            }
        }
        let all = self.undo.iter().map(|&(when, _)| when).max();
        all.map_or(Ok(()), |last| self.undo_what_is_due(last))
    }

    fn check(mut self) -> anyhow::Result<Report> {
        let mut calls = Vec::new();
        for entry in std::fs::read_dir(&self.logs)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                record::read(&path, &mut calls)?;
            }
        }
        for call in &calls {
            if call.end != End::Never {
                *self.report.calls.entry((call.kind, call.way)).or_default() += 1;
            }
        }
        let deaths: BTreeMap<u32, Death> = self
            .dead
            .iter()
            .map(|&(node, gone, resumed)| {
                let slept = resumed.filter(|&at| !came_to(&calls, node, at));
                let fenced = Some(slept.unwrap_or(gone));
                (node, Death { fenced })
            })
            .collect();
        let begun = Instant::now();
        self.report.verdict = check::check(History {
            layout: self.options.layout,
            calls,
            deaths,
            volatile: self.options.place.is_volatile(),
        });
        self.report.took.1 = begun.elapsed();
        Ok(self.report)
    }
}

/// Tells whether a node began a call after `at` that was answered: then its lease had not ended.
fn came_to(calls: &[Call], node: u32, at: u64) -> bool {
    let answered = |call: &&Call| call.node == node && call.end != End::Never;
    calls.iter().filter(answered).any(|call| call.start > at)
}

/// What `pinfold` is told to become the node.
fn mount_arguments(node: u32, service: &place::Service, memory: place::Memory) -> Vec<OsString> {
    let seconds = |ms: u64| ms.div_ceil(1000).to_string();
    let cluster = format!("etcd://{}/histories", service.endpoints.join(","));
    let words = [
        ("--memory", memory.bytes.to_string()),
        ("--cluster", cluster),
        ("--node", format!("node{node}")),
        ("--lease", seconds(service.lease_ms)),
        ("--grace", seconds(service.grace_ms)),
        ("--hold", service.hold_ms.to_string()),
    ];
    let words = words.map(|(name, value)| [name.into(), value.into()]);
    std::iter::once("mount".into())
        .chain(words.into_iter().flatten())
        .collect()
}
