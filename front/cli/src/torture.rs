//! `pinfold torture`: runs the scenario suite on directories and says what it found.
//!
//! *Owns*: the command line, the progress line, the exit status.
//!
//! *Does not own*: the scenarios and their watchdog (`pinfold-scenarios`).
//!
//! *Locking*: none.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
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
/// Most results kept of repeated rounds that were not plain successes.
const KEPT_MAX: usize = 10_000;

/// Torture the file systems of directories, or this library on them.
///
/// Each scenario runs in a process of its own, in a fresh subdirectory that is removed again; one that falls silent for
/// ten seconds is killed and reported with the stacks of its threads. Exit status 0: nothing bad was found (known
/// divergences and skipped scenarios included); 1: something was; 2: it could not be run.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Directories to work in
    #[arg(value_name = "DIR", required_unless_present_any = ["list", "child"])]
    dirs: Vec<PathBuf>,
    /// Torture this library on the directories, with 256 KiB and with 64 MiB of memory and faults served both ways,
    /// instead of the kernel
    #[arg(long)]
    pinfold: bool,
    /// Run only these scenarios, by number or name
    #[arg(long, value_name = "T01,T13", value_delimiter = ',')]
    only: Vec<String>,
    /// Seed of all randomness; the default is another one each time
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Repeat with further seeds for so many minutes
    #[arg(long, value_name = "M")]
    minutes: Option<u64>,
    /// List the scenarios and what they claim
    #[arg(long)]
    list: bool,
    /// Run one scenario in this very process: what the command starts itself with
    #[arg(long, hide = true, value_name = "JOB")]
    child: Option<String>,
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
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))
            .map_err(|error| format!("signal handlers: {error}"))?;
    }
    println!("seed {}", plan.seed);
    let until = args
        .minutes
        .map(|minutes| Instant::now() + Duration::from_secs(minutes.saturating_mul(60)));
    let mut screen = Screen::new(&plan);
    let mut records = Vec::new();
    let mut first = true;
    loop {
        let round = runner::run(&plan, &interrupted, &mut |event| screen.show(&event, first))?;
        let kept = KEPT_MAX.saturating_sub(records.len());
        let worth = |record: &Record| first || record.outcome.is_bad();
        records.extend(round.into_iter().filter(worth).take(kept));
        let again = until.is_some_and(|until| Instant::now() < until);
        if !again || interrupted.load(Ordering::Relaxed) {
            break;
        }
        plan.seed = plan.seed.wrapping_add(1);
        first = false;
        screen.expect(&plan);
    }
    screen.end();
    println!("\n{}", Tally::of(&records));
    if let Some(file) = &args.json {
        let text = report::json(&records).map_err(|error| error.to_string())?;
        std::fs::write(file, text + "\n")
            .map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(if !Tally::of(&records).is_good() {
        ExitCode::from(FOUND)
    } else if interrupted.load(Ordering::Relaxed) {
        ExitCode::from(INTERRUPTED)
    } else {
        ExitCode::SUCCESS
    })
}

fn plan(args: &Arguments) -> Result<Plan, String> {
    let targets = args.dirs.iter().flat_map(|dir| {
        if args.pinfold {
            vec![
                Target::pinfold(dir, Backend::SMALL),
                Target::pinfold(dir, Backend::SMALL.inline()),
                Target::pinfold(dir, Backend::ROOMY),
                Target::pinfold(dir, Backend::ROOMY.inline()),
            ]
        } else {
            vec![Target::kernel(dir)]
        }
    });
    let program = std::env::current_exe().map_err(|error| format!("this program: {error}"))?;
    Ok(Plan {
        targets: targets.collect(),
        scenarios: chosen(&args.only)?,
        seed: args.seed.unwrap_or_else(seed_of_now),
        race: Plan::RACE,
        silence_max: Plan::SILENCE_MAX,
        child: ChildCommand {
            program,
            args: vec!["torture".into(), "--child".into()],
        },
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
        if let Ok(style) =
            ProgressStyle::with_template("{spinner} {pos}/{len} {wide_msg} {elapsed}")
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
