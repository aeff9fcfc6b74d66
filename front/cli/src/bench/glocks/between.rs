//! Nodes that share through an etcd of the benchmark's own: hand-overs beside bare transactions, private and shared files, the
//! minimum hold, and how long the locks of the dead are waited for.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use pinfold::Volume;
use pinfold::glocks::service::etcd::Etcd;
use pinfold::glocks::{Glock, Mode, Space, Traffic};
use serde::{Deserialize, Serialize};

use super::server::{Bare, Server};
use super::{PAGES, at_once, count, file_of, glock_of, node, options, take};
use crate::bench::Plan;
use crate::bench::job::{Job, Report};
use crate::bench::rounds::{Sample, Side, take_turns};
use crate::bench::row::{Row, Target, Unit};
use crate::bench::scratch::PAGE;

/// Hand-overs, and bare transactions, in a turn.
const HANDED: u32 = 30;
/// What a hand-over may take, in bare transactions.
const ROUND_TRIPS: f64 = 2.0;
const NODES: [usize; 5] = [1, 2, 4, 8, 16];
const HOLDS_MS: [u64; 4] = [0, 10, 50, 200];
/// Rounds of those that take a while.
const ROUNDS_FEW: usize = 3;
/// The lease of a node that is killed, and for how long survivors wait after it.
const LEASE: Duration = Duration::from_secs(4);
const GRACE: Duration = Duration::from_secs(2);
/// How long anything may take that is under way.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn run(plan: &Plan) -> Result<Vec<Row>> {
    let Some(mut server) = Server::start(&plan.scratch.path().join("etcd"))? else {
        let why = "etcd is not installed (Debian: etcd-server)";
        return Ok(vec![Row::skipped("between nodes", why)]);
    };
    let mut bare = Bare::to(&mut server)?;
    let mut rows = hand_overs(plan, &server, &mut bare)?;
    for nodes in NODES {
        rows.extend(private_files(plan, &server, nodes)?);
    }
    for nodes in NODES {
        rows.push(shared_file(plan, &server, nodes)?);
    }
    for hold in HOLDS_MS {
        rows.push(minimum_hold(plan, &server, Duration::from_millis(hold))?);
    }
    rows.extend(recovery(plan, &server)?);
    Ok(rows)
}

/// Two nodes that take one lock in turns, nothing cached: beside transactions of a client that has nothing else to do.
fn hand_overs(plan: &Plan, server: &Server, bare: &mut Bare) -> Result<Vec<Row>> {
    let service = server.volume("hand-over");
    let join = |name| -> Result<(Space, Arc<Glock>)> {
        let space = Space::join(&service, name, options(Duration::ZERO))?;
        let glock = glock_of(&space, 1);
        Ok((space, glock))
    };
    let nodes = [join("one")?, join("two")?];
    let said = || sum(nodes.iter().map(|(space, _)| space.traffic()));
    let mut handed = Vec::new();
    let mut turn = 0;
    let mut hand_over = || -> Result<[f64; 1]> {
        let before = said();
        let start = Instant::now();
        for _ in 0..HANDED {
            turn += 1;
            drop(take(&nodes[turn % 2].1, Mode::Exclusive)?);
        }
        let spent = start.elapsed() / HANDED;
        let after = said();
        let each = |after: u64, before: u64| (after - before) as f64 / f64::from(HANDED);
        handed.push([
            each(after.changes, before.changes),
            each(after.reads, before.reads),
        ]);
        Ok([spent.as_secs_f64() * 1e6])
    };
    // What each finds out at first is over then.
    hand_over()?;
    let about = "hand-over between two nodes";
    let sides: Vec<Side<'_, 1>> = vec![
        Box::new(&mut hand_over),
        Box::new(|| Ok([bare.transactions(HANDED)?.as_secs_f64() * 1e6])),
    ];
    let found = take_turns(&plan.screen, about, plan.rounds, sides)?;
    let of = |which: usize| Sample::of(handed[1..].iter().map(|each| each[which]).collect());
    let row = Row::new(
        about,
        Unit::Microseconds,
        found[0][0],
        "a bare transaction",
        found[1][0],
    );
    Ok(vec![
        row.held_to(Target::TimesAsGood(ROUND_TRIPS.recip())),
        Row::alone("transactions of a hand-over", Unit::Times, of(0))
            .held_to(Target::AtMost(ROUND_TRIPS)),
        Row::alone("reads of a hand-over", Unit::Times, of(1)).held_to(Target::AtMost(0.0)),
    ])
}

fn sum(parts: impl Iterator<Item = Traffic>) -> Traffic {
    parts.fold(Traffic::default(), |sum, one| Traffic {
        changes: sum.changes + one.changes,
        reads: sum.reads + one.reads,
        told: sum.told + one.told,
    })
}

fn volumes(plan: &Plan, service: &Etcd, count: usize, hold: Duration) -> Result<Vec<Volume>> {
    let open = |which: usize| {
        let (dir, name) = (&service.volume, format!("node{which}"));
        node(plan, dir, service, &name, hold, false)
    };
    (0..count).map(open).collect()
}

fn said(volumes: &[Volume]) -> Traffic {
    let spaces = volumes.iter().filter_map(|volume| volume.glocks());
    sum(spaces.map(|space| space.traffic()))
}

/// Each node writes pages of a file of its own.
fn private_files(plan: &Plan, server: &Server, nodes: usize) -> Result<[Row; 2]> {
    let about = format!("overwrites of 4 KiB, {nodes} nodes, a file each");
    let service = server.volume(&format!("private{nodes}"));
    let volumes = volumes(plan, &service, nodes, Duration::from_millis(200))?;
    let mut files = Vec::new();
    for (which, volume) in volumes.iter().enumerate() {
        let file = file_of(volume, &format!("f{which}"))?;
        file.write_at(&[1; PAGES * PAGE], 0)?;
        files.push(file);
    }
    let before = said(&volumes);
    let side: Side<'_, 1> = Box::new(|| {
        let write = |file: &pinfold::File, at: u64| file.write_at(&[2; PAGE], at);
        let pages = (PAGES * PAGE) as u64;
        Ok([at_once(&files, |file, offsets| {
            write(file, offsets.next() % pages)?;
            Ok(())
        })?])
    });
    let found = take_turns(&plan.screen, &about, plan.rounds, vec![side])?;
    let after = said(&volumes);
    let messages = after.changes + after.reads - before.changes - before.reads;
    Ok([
        Row::alone(about, Unit::PerSecond, found[0][0]),
        count("messages for that", messages as f64).held_to(Target::AtMost(0.0)),
    ])
}

/// All nodes write the same page.
fn shared_file(plan: &Plan, server: &Server, nodes: usize) -> Result<Row> {
    let about = format!("overwrites of 4 KiB, {nodes} nodes, one file");
    let service = server.volume(&format!("shared{nodes}"));
    one_file(plan, &service, nodes, Duration::from_millis(10), &about)
}

/// Two nodes write the same page, each mode kept so long although the other waits.
fn minimum_hold(plan: &Plan, server: &Server, hold: Duration) -> Result<Row> {
    let about = format!("the same by two nodes, minimum hold {hold:?}");
    let service = server.volume(&format!("hold{}", hold.as_millis()));
    one_file(plan, &service, 2, hold, &about)
}

fn one_file(plan: &Plan, service: &Etcd, nodes: usize, hold: Duration, about: &str) -> Result<Row> {
    let volumes = volumes(plan, service, nodes, hold)?;
    let files: Vec<_> = volumes
        .iter()
        .map(|volume| file_of(volume, "f"))
        .collect::<Result<_>>()?;
    let before = said(&volumes);
    let (mut calls, mut seconds) = (0.0, 0.0);
    let side: Side<'_, 1> = Box::new(|| {
        let start = Instant::now();
        let rate = at_once(&files, |file, _| {
            file.write_at(&[2; PAGE], 0)?;
            Ok(())
        })?;
        let spent = start.elapsed().as_secs_f64();
        seconds += spent;
        calls += rate * spent;
        Ok([rate])
    });
    let rounds = plan.rounds.min(ROUNDS_FEW);
    let found = take_turns(&plan.screen, about, rounds, vec![side])?;
    let changes = (said(&volumes).changes - before.changes) as f64;
    let row = Row::alone(about, Unit::PerSecond, found[0][0]);
    Ok(row.note(format!(
        "{:.1} transactions a second, {:.0} calls to each",
        changes / seconds,
        calls / changes.max(1.0)
    )))
}

/// How long a survivor waits for the lock of a node that was killed, and of one that just fell silent, in leases.
fn recovery(plan: &Plan, server: &Server) -> Result<Vec<Row>> {
    let rounds = plan.rounds.min(ROUNDS_FEW);
    let mortal = |name: &str| Etcd {
        lease: LEASE,
        grace: GRACE,
        ..server.volume(name)
    };
    let waits = |survivor: &Space, dies: &mut dyn FnMut() -> Result<()>| -> Result<[f64; 1]> {
        let glock = glock_of(survivor, 1);
        let start = Instant::now();
        dies()?;
        drop(take(&glock, Mode::Exclusive)?);
        Ok([start.elapsed().as_secs_f64() / LEASE.as_secs_f64()])
    };
    let mut turn = 0;
    let killed: Side<'_, 1> = Box::new(|| {
        turn += 1;
        let name = format!("killed{turn}");
        let survivor = Space::join(&server.volume(&name), "survivor", options(Duration::ZERO))?;
        let holder = HoldJob {
            endpoint: server.endpoint.clone(),
            volume: name,
        };
        let mut holder = Holder::start(holder)?;
        waits(&survivor, &mut || holder.kill())
    });
    let mut silence = 0;
    let silent: Side<'_, 1> = Box::new(|| {
        silence += 1;
        let service = mortal(&format!("silent{silence}"));
        let survivor = Space::join(&service, "survivor", options(Duration::ZERO))?;
        let holder = Space::join(&service, "holder", options(Duration::ZERO))?;
        drop(take(&glock_of(&holder, 1), Mode::Exclusive)?);
        let mut holder = Some(holder);
        // Without giving anything up, by a process that lives on.
        waits(&survivor, &mut || {
            drop(holder.take());
            Ok(())
        })
    });
    let about = "wait for the lock of a dead node, in leases";
    let found = take_turns(&plan.screen, about, rounds, vec![killed, silent])?;
    let grace = GRACE.as_secs_f64() / LEASE.as_secs_f64();
    let row = Row::alone(format!("{about}: killed"), Unit::Times, found[0][0]);
    let silent = Row::alone(format!("{about}: silent"), Unit::Times, found[1][0]);
    Ok(vec![
        row.note("on the same machine: its process is seen to have ended"),
        silent.note(format!("the grace of {grace:.2} leases is waited for")),
    ])
}

/// A node that takes a lock and keeps it.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::bench) struct HoldJob {
    endpoint: String,
    volume: String,
}

/// Its process; it ends with the value.
struct Holder {
    child: Child,
    /// It ends when this does.
    _alive: ChildStdin,
}

impl Holder {
    fn start(job: HoldJob) -> Result<Self> {
        let program = std::env::current_exe().context("this program")?;
        let job = serde_json::to_string(&Job::HoldGlock(job))?;
        let mut child = Command::new(program)
            .args(["bench", "--child", &job])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run this program again")?;
        let (alive, said) = (child.stdin.take(), child.stdout.take());
        let mut holder = Self {
            child,
            _alive: alive.context("a pipe")?,
        };
        let mut line = String::new();
        BufReader::new(said.context("a pipe")?).read_line(&mut line)?;
        if line.is_empty() {
            holder.kill()?;
        }
        ensure!(!line.is_empty(), "a node that was to be killed ended");
        Ok(holder)
    }

    fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It was, unless something failed before.
        let _ = self.kill();
    }
}

/// Takes the lock, says so, and waits for its end.
pub(in crate::bench) fn hold(job: &HoldJob) -> Result<Report> {
    let service = Etcd {
        lease: LEASE,
        grace: GRACE,
        ..Etcd::new(
            &[&job.endpoint],
            &format!("/bench/{}", job.volume),
            &job.volume,
        )
    };
    let space = Space::join(&service, "holder", options(Duration::ZERO))?;
    let glock = glock_of(&space, 1);
    let guard = take(&glock, Mode::Exclusive)?;
    println!("held");
    std::io::stdout().flush()?;
    // Until it is killed, or its parent is.
    let _ = std::io::stdin().read(&mut [0]);
    drop(guard);
    let _ = space.leave(PATIENCE);
    Ok(Report::default())
}
