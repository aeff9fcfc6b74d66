//! `pinfold-histories`: nodes at work on the same pages, with faults; and the check of what they did.
//!
//! *Owns*: the command line, the report in words.
//!
//! *Does not own*: the run ([`pinfold_histories::run`]).
//!
//! *Locking*: none.

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pinfold_histories::life::{NOT_BEGUN, WITHDRAWN};
use pinfold_histories::place::locked::Plant;
use pinfold_histories::place::{Memory, Service, Spec};
use pinfold_histories::record::Kind;
use pinfold_histories::run::{self, Fault, Options, Report};
use pinfold_histories::{Layout, node};

/// Records what nodes do to the same pages and checks that it is linearizable.
#[derive(Debug, Parser)]
#[command(version)]
struct Command {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Runs nodes and checks what they did.
    Run(Box<Run>),
    /// Does a node's work; what to do is read from standard input.
    #[command(hide = true)]
    Node,
}

/// Who serves the files.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Who {
    /// The kernel, or whoever serves a mount.
    Kernel,
    /// One volume of the library; one node.
    Volume,
    /// Volumes on one directory, each a node, over etcd.
    Shared,
    /// Mounts of one directory (`pinfold mount --cluster`), each a node, over etcd; needs root.
    Mounted,
    /// Plain files, each under its glock, over etcd.
    Locked,
}

#[derive(Debug, Args)]
struct Run {
    /// Who serves the files
    who: Who,
    /// Where; the files are made anew
    dir: PathBuf,
    /// Node processes; a volume has one
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// Threads of each
    #[arg(long, default_value_t = 2)]
    threads: u32,
    /// Files
    #[arg(long, default_value_t = 2)]
    files: u32,
    /// Pages of each
    #[arg(long, default_value_t = 8)]
    pages: u32,
    /// Calls in sum
    #[arg(long, default_value_t = 1_000_000)]
    calls: u64,
    /// Seconds at most
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Of everything drawn
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Which faults to inject, in turn
    #[arg(long, value_delimiter = ',')]
    faults: Vec<Fault>,
    /// Mean time between two of them
    #[arg(long, default_value_t = 2000)]
    every_ms: u64,
    /// Members of etcd
    #[arg(long, default_value_t = 1)]
    members: usize,
    /// Lease of a node
    #[arg(long, default_value_t = 4000)]
    lease_ms: u64,
    /// What others wait after a lease
    #[arg(long, default_value_t = 500)]
    grace_ms: u64,
    /// Minimum hold of a glock
    #[arg(long, default_value_t = 10)]
    hold_ms: u64,
    /// One call in so many is an fsync
    #[arg(long, default_value_t = 50)]
    sync_every: u32,
    /// Where there are other ways too, one call in so many is direct
    #[arg(long, default_value_t = 3)]
    direct_every: u32,
    /// So many calls of a thread go to one file before another is drawn
    #[arg(long, default_value_t = 1)]
    burst: u32,
    /// Memory of a volume
    #[arg(long, default_value_t = 1 << 20)]
    memory: u64,
    /// Serve the faults of mappings in the thread that takes them
    #[arg(long)]
    inline: bool,
    /// What to leave out on purpose, of the locked files
    #[arg(long, value_enum, default_value_t = Plant::Nothing)]
    plant: Plant,
    /// Give each node a network of its own, so that packets vanish when it is cut off; needs root
    #[arg(long)]
    namespaces: bool,
    /// Have nodes pass for processes of different machines, which are not killed when they stand still; needs root
    #[arg(long)]
    elsewhere: bool,
    /// Mounts of the directory that are there, which the nodes of `kernel` use in turn
    #[arg(long, value_delimiter = ',')]
    mounts: Vec<PathBuf>,
    /// The program `pinfold`, with the feature etcd, for nodes that are mounts [default: the one beside this]
    #[arg(long)]
    pinfold: Option<PathBuf>,
    /// Keep the logs here
    #[arg(long)]
    logs: Option<PathBuf>,
}

fn main() -> ExitCode {
    let done = match Command::parse().what {
        What::Run(asked) => start(*asked),
        What::Node => work(),
    };
    done.unwrap_or_else(|error| {
        eprintln!("pinfold-histories: {error:#}");
        ExitCode::from(2)
    })
}

fn start(asked: Run) -> anyhow::Result<ExitCode> {
    let service = Service {
        endpoints: Vec::new(),
        lease_ms: asked.lease_ms,
        grace_ms: asked.grace_ms,
        hold_ms: asked.hold_ms,
    };
    let memory = Memory {
        bytes: asked.memory,
        inline: asked.inline,
    };
    let place = match asked.who {
        Who::Kernel => Spec::Kernel,
        Who::Volume => Spec::Volume(memory),
        Who::Shared => Spec::Shared { service, memory },
        Who::Mounted => Spec::Mounted { service, memory },
        Who::Locked => Spec::Locked {
            service,
            plant: asked.plant,
        },
    };
    let layout = Layout {
        files: asked.files.max(1),
        pages: asked.pages.max(1),
        whole: place.has_whole_pages(),
    };
    let nodes = if let Spec::Volume(_) = place {
        1
    } else {
        asked.nodes
    };
    let program = std::env::current_exe()?;
    let report = run::run(&Options {
        place,
        dir: asked.dir,
        layout,
        nodes,
        threads: asked.threads,
        calls: asked.calls,
        time: Duration::from_secs(asked.seconds),
        seed: asked.seed,
        faults: asked.faults,
        every: Duration::from_millis(asked.every_ms),
        members: asked.members,
        mix: node::Mix {
            sync_every: asked.sync_every,
            direct_every: asked.direct_every,
            burst: asked.burst,
        },
        namespaces: asked.namespaces,
        elsewhere: asked.elsewhere,
        mounts: asked.mounts,
        logs: asked.logs,
        pinfold: asked
            .pinfold
            .unwrap_or_else(|| program.with_file_name("pinfold")),
        program,
    })?;
    print(&report);
    Ok(if report.verdict.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print(report: &Report) {
    let verdict = &report.verdict;
    println!(
        "{} calls answered, {} not; {} registers; {} writes may have died with their nodes",
        verdict.calls, verdict.unanswered, verdict.registers, verdict.doubtful
    );
    for ((kind, way), count) in &report.calls {
        let kind = match kind {
            Kind::Write => "write",
            Kind::Read => "read",
            Kind::Sync => "sync",
        };
        println!("  {kind} {}: {count}", way.name());
    }
    for (fault, count) in &report.faults {
        println!("fault: {fault}: {count}");
    }
    println!(
        "nodes killed {}, withdrawn {}, not begun {}",
        report.killed, report.withdrawn, report.not_begun
    );
    for (reason, count) in &report.reasons {
        println!("  {count}: {reason}");
    }
    println!(
        "worked for {:.1} s, checked in {:.1} s",
        report.took.0.as_secs_f64(),
        report.took.1.as_secs_f64()
    );
    if verdict.is_good() {
        println!("linearizable");
    }
    for violation in &verdict.violations {
        print!("WRONG {violation}");
    }
    if !verdict.is_good() {
        println!("{} violations", verdict.found);
    }
}

fn work() -> anyhow::Result<ExitCode> {
    // Before the library's own handler, which is to be asked first.
    pinfold_mem::region::touch::install();
    let mut spec = String::new();
    std::io::stdin().read_to_string(&mut spec)?;
    let spec: node::Spec = serde_json::from_str(&spec)?;
    let place = match spec.place.open(&spec.dir, spec.layout, spec.node) {
        Ok(place) => place,
        Err(error) => {
            eprintln!("cannot begin: {error:#}");
            return Ok(ExitCode::from(NOT_BEGUN as u8));
        }
    };
    let done = node::work(&spec, &*place);
    let left = done.and_then(|()| Ok(place.leave()?));
    match left {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if error.is::<pinfold::Errno>() => {
            eprintln!("{error:#}");
            // At once, as a program that gave up: what is cached has no way out any more.
            std::process::exit(WITHDRAWN)
        }
        Err(error) => Err(error),
    }
}
