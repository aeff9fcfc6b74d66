//! `pinfold torture`: runs the scenario suite on directories and says what it found.
//!
//! *Owns*: the command line, the progress line, the exit status.
//!
//! *Does not own*: the scenarios and their watchdog (`pinfold-scenarios`).
//!
//! *Locking*: none.

use std::fs::File;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pinfold_scenarios::fs::mutant::Mutation;
use pinfold_scenarios::report::matrix::Matrix;
use pinfold_scenarios::report::{Document, Extent, html};
use pinfold_scenarios::{
    Backend, ChildCommand, Event, Plan, Record, Scenario, Tally, Target, child, report, runner,
    suite,
};

/// Exit status when something was found.
const FOUND: u8 = 1;
/// Exit status when it could not be run as asked.
const USAGE: u8 = 2;
/// Exit status after SIGINT, as shells have it.
const INTERRUPTED: u8 = 130;
/// Most that limits of time are multiplied by.
const PATIENCE_MAX: i64 = 1000;
/// Most results kept of repeated rounds that were not plain successes.
const KEPT_MAX: usize = 10_000;

/// Torture the file systems of directories, this library on directories, or both side by side.
///
/// Each scenario runs in a process of its own, in a fresh subdirectory that is removed again; one that falls silent for
/// ten seconds (times --patience) is killed and reported with the stacks of its threads. Exit status 0: nothing bad was found (known
/// divergences and skipped scenarios included); 1: something was; 2: it could not be run; 130: it was interrupted before
/// anything bad was found.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Directories whose file systems to torture
    #[arg(value_name = "DIR", required_unless_present_any = ["pinfold", "list", "child"])]
    dirs: Vec<PathBuf>,
    /// Torture this library on a directory, with 256 KiB and with 64 MiB of memory and faults served both ways; can be
    /// repeated
    #[arg(long, value_name = "DIR")]
    pinfold: Vec<PathBuf>,
    /// Run only these scenarios, by number or name
    #[arg(long, value_name = "T01,T13", value_delimiter = ',')]
    only: Vec<String>,
    /// Seed of all randomness; the default is another one each time
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the results to this file as a page for a browser
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Repeat the scenarios that draw numbers or race, each round with the next seed, until so many minutes have passed
    #[arg(long, value_name = "M")]
    minutes: Option<u64>,
    /// Multiply all limits of time, for a machine that others keep busy
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=PATIENCE_MAX))]
    patience: u32,
    /// Break a promise on purpose, to see what a failure looks like
    #[arg(long, value_name = "FAULT", value_parser = fault)]
    plant: Option<Mutation>,
    /// List the scenarios and what they claim
    #[arg(long)]
    list: bool,
    /// Run one scenario in this very process: what the command starts itself with
    #[arg(long, hide = true, value_name = "JOB")]
    child: Option<String>,
}

/// Reads a fault's name; the message for a wrong one lists them.
fn fault(name: &str) -> Result<Mutation, String> {
    serde_json::from_value(name.into()).map_err(|error| error.to_string())
}

/// Runs the command.
#[must_use]
pub fn run(args: &Arguments) -> ExitCode {
    if let Some(job) = &args.child {
        return child::run(job);
    }
    if args.list {
        for scenario in suite::all() {
            println!(
                "{}  {:<20} {}",
                scenario.number, scenario.name, scenario.claim
            );
        }
        return ExitCode::SUCCESS;
    }
    match torture(args) {
        Ok(code) => code,
        Err(reason) => {
            eprintln!("pinfold torture: {reason}");
            ExitCode::from(USAGE)
        }
    }
}

fn torture(args: &Arguments) -> Result<ExitCode, String> {
    let mut plan = plan(args)?;
    // Opened before the work: a misspelt path is not found out about half an hour later.
    let json = args.json.as_deref().map(Output::create).transpose()?;
    let page = args.html.as_deref().map(Output::create).transpose()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .map_err(|error| format!("signal handlers: {error}"))?;
    }
    println!("seed {}", plan.seed);
    let (records, extent) = rounds(args, &mut plan, &interrupted)?;
    if plan.targets.len() > 1 {
        println!("\n{}", Matrix::new(&records));
    } else {
        println!();
    }
    let document = Document::new(records, extent);
    println!("{}", document.tally);
    if extent.rounds > 1 {
        println!(
            "{} scenarios run in {} rounds, the last with seed {}",
            extent.runs, extent.rounds, plan.seed
        );
    }
    if let Some(json) = json {
        let text = document.json().map_err(|error| error.to_string())?;
        json.write(&(text + "\n"))?;
    }
    if let Some(page) = page {
        page.write(&html::page(&document))?;
    }
    Ok(status(document.tally, extent.interrupted))
}

/// What the results come to for whoever started this.
fn status(tally: Tally, interrupted: bool) -> ExitCode {
    if !tally.is_good() {
        ExitCode::from(FOUND)
    } else if interrupted {
        ExitCode::from(INTERRUPTED)
    } else {
        ExitCode::SUCCESS
    }
}

/// Runs the plan once, and then what may come out differently until the time is up.
fn rounds(
    args: &Arguments,
    plan: &mut Plan,
    interrupted: &AtomicBool,
) -> Result<(Vec<Record>, Extent), String> {
    let until = args
        .minutes
        .map(|minutes| Duration::from_secs(minutes.saturating_mul(60)))
        .and_then(|time| Instant::now().checked_add(time));
    let mut screen = Screen::new(plan);
    let mut extent = Extent {
        seed: plan.seed,
        rounds: 1,
        runs: 0,
        interrupted: false,
    };
    let mut records = runner::run(plan, interrupted, &mut |event| screen.show(&event, true))?;
    extent.runs = records.len() as u64;
    plan.scenarios.retain(|scenario| {
        let mut own = records.iter().filter(|own| own.scenario == scenario.number);
        own.any(|record| record.varies)
    });
    plan.until = until;
    let time_left = || until.is_some_and(|until| Instant::now() < until);
    while time_left() && !interrupted.load(Ordering::Relaxed) && !plan.scenarios.is_empty() {
        plan.seed = plan.seed.wrapping_add(1);
        extent.rounds += 1;
        screen.expect(plan);
        let round = runner::run(plan, interrupted, &mut |event| screen.show(&event, false))?;
        extent.runs += round.len() as u64;
        let kept = KEPT_MAX.saturating_sub(records.len());
        let bad = |record: &Record| record.outcome.is_bad();
        records.extend(round.into_iter().filter(bad).take(kept));
    }
    screen.end();
    extent.interrupted = interrupted.load(Ordering::Relaxed);
    Ok((records, extent))
}

/// A file that a report goes to.
struct Output<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> Output<'a> {
    fn create(path: &'a Path) -> Result<Self, String> {
        match File::create(path) {
            Ok(file) => Ok(Self { path, file }),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    fn write(mut self, text: &str) -> Result<(), String> {
        self.file
            .write_all(text.as_bytes())
            .map_err(|error| format!("{}: {error}", self.path.display()))
    }
}

fn plan(args: &Arguments) -> Result<Plan, String> {
    let kernel = args.dirs.iter().map(|dir| Target::kernel(dir));
    let library = args.pinfold.iter().flat_map(|dir| {
        [
            Backend::SMALL,
            Backend::SMALL.inline(),
            Backend::ROOMY,
            Backend::ROOMY.inline(),
        ]
        .map(|backend| Target::pinfold(dir, backend))
    });
    let targets = kernel.chain(library).map(|target| match args.plant {
        Some(fault) => target.with(fault),
        None => target,
    });
    let program = std::env::current_exe().map_err(|error| format!("this program: {error}"))?;
    Ok(Plan {
        targets: targets.collect(),
        scenarios: chosen(&args.only)?,
        seed: args.seed.unwrap_or_else(seed_of_now),
        race: Plan::RACE,
        silence_max: Plan::SILENCE_MAX,
        patience: args.patience,
        child: ChildCommand {
            program,
            args: vec!["torture".into(), "--child".into()],
        },
        until: None,
    })
}

fn chosen(only: &[String]) -> Result<Vec<&'static Scenario>, String> {
    if only.is_empty() {
        return Ok(suite::all());
    }
    only.iter()
        .map(|name| {
            suite::find(name.trim())
                .ok_or_else(|| format!("no scenario is called {name:?}; see --list"))
        })
        .collect()
}

/// Small enough to be typed again.
fn seed_of_now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(1, |since| u64::from(since.subsec_nanos()))
}

/// What is shown while it runs: results as they come, and a line that says what is running.
struct Screen {
    line: ProgressBar,
    heading: String,
}

impl Screen {
    fn new(plan: &Plan) -> Self {
        let line = ProgressBar::new(0);
        if !std::io::stderr().is_terminal() {
            line.set_draw_target(ProgressDrawTarget::hidden());
        }
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {wide_msg} {elapsed}")
        {
            line.set_style(style);
        }
        let screen = Self {
            line,
            heading: String::new(),
        };
        screen.expect(plan);
        screen
    }

    /// Counts one more round of the plan in.
    fn expect(&self, plan: &Plan) {
        let count = plan.targets.len() * plan.scenarios.len();
        self.line.inc_length(count as u64);
    }

    /// Later rounds repeat the first: of those only what is bad is shown.
    fn show(&mut self, event: &Event<'_>, first: bool) {
        match event {
            Event::Started { scenario, target } => {
                self.line
                    .set_message(format!("{} {} on {target}", scenario.number, scenario.name));
            }
            Event::Beat => self.line.tick(),
            Event::Ended(record) => {
                self.line.inc(1);
                if first || record.outcome.is_bad() {
                    self.line
                        .suspend(|| self.heading = row(record, &self.heading));
                }
            }
        }
    }

    fn end(&self) {
        self.line.finish_and_clear();
    }
}

/// Prints a result, under a heading when the target is another one than before; returns the heading.
fn row(record: &Record, before: &str) -> String {
    let heading = format!(
        "{} on {} ({})",
        record.target,
        record.dir.display(),
        record.file_system
    );
    if heading != before {
        println!("\n{heading}");
    }
    println!("{}", report::row(record));
    heading
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scenarios_are_chosen_by_number_or_name() {
        let only = ["t13".to_owned(), " rlimit".to_owned()];
        let numbers: Vec<_> = chosen(&only)
            .unwrap()
            .iter()
            .map(|found| found.number)
            .collect();
        assert_eq!(numbers, ["T13", "T16"]);
        assert_eq!(chosen(&[]).unwrap().len(), suite::all().len());
        assert!(chosen(&["T999".to_owned()]).unwrap_err().contains("--list"));
    }
}
