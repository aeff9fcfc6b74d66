//! Runs scenarios, each in a child process under a watchdog, and cleans up after them.
//!
//! *Owns*: [`Plan`] and its execution: fresh directories (`place`), children, the verdict on those that hang or die.
//!
//! *Does not own*: what a scenario checks ([`crate::suite`]), how results are shown ([`crate::report`]).
//!
//! *Locking*: none; a reader thread per pipe, joined through channels.

pub(crate) mod place;

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use crate::child::{Job, Message, Order, ROLE};
use crate::report::Record;
use crate::scenario::{Failure, Outcome, Scenario};
use crate::stacks;
use crate::target::Target;
use place::Place;

/// How a child is started: this program, with these arguments and the job behind them, calls [`crate::child::run`].
#[derive(Debug, Clone)]
pub struct ChildCommand {
    /// The program.
    pub program: PathBuf,
    /// Arguments before the job.
    pub args: Vec<String>,
}

/// What is to be run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// On what.
    pub targets: Vec<Target>,
    /// Which scenarios.
    pub scenarios: Vec<&'static Scenario>,
    /// Where randomness comes from.
    pub seed: u64,
    /// How long each race may go on.
    pub race: Duration,
    /// A child that is silent for so long hangs.
    pub silence_max: Duration,
    /// By how much all limits of time are multiplied, for a machine that others keep busy.
    pub patience: u32,
    /// How children are started.
    pub child: ChildCommand,
    /// When no further scenario is begun.
    pub until: Option<Instant>,
}

impl Plan {
    /// What section J calls a hang.
    pub const SILENCE_MAX: Duration = Duration::from_secs(10);
    /// How long a race usually goes on.
    pub const RACE: Duration = Duration::from_secs(2);
}

/// What happens while a plan is carried out.
#[derive(Debug)]
pub enum Event<'a> {
    /// A scenario begins.
    Started {
        /// Which.
        scenario: &'static Scenario,
        /// On what.
        target: &'a Target,
    },
    /// The running scenario is alive.
    Beat,
    /// A scenario has ended.
    Ended(&'a Record),
}

/// Runs every scenario of the plan on every target, in turn, until `interrupted` is set.
///
/// # Errors
/// A sentence saying which directory cannot be used and why.
pub fn run(
    plan: &Plan,
    interrupted: &AtomicBool,
    on: &mut dyn FnMut(Event<'_>),
) -> Result<Vec<Record>, String> {
    let mut records = Vec::new();
    for target in &plan.targets {
        let place = Place::new(&target.dir, &plan.child)?;
        for &scenario in &plan.scenarios {
            let late = plan.until.is_some_and(|until| Instant::now() >= until);
            if late || interrupted.load(Ordering::Relaxed) {
                return Ok(records);
            }
            on(Event::Started { scenario, target });
            let record = run_one(plan, target, scenario, &place, interrupted, on)?;
            on(Event::Ended(&record));
            records.push(record);
        }
    }
    Ok(records)
}

fn run_one(
    plan: &Plan,
    target: &Target,
    scenario: &'static Scenario,
    place: &Place,
    interrupted: &AtomicBool,
    on: &mut dyn FnMut(Event<'_>),
) -> Result<Record, String> {
    let began = Instant::now();
    let room = place.room(scenario.number)?;
    let job = Job {
        scenario: scenario.number.into(),
        target: target.moved(&room.path),
        seed: plan.seed,
        race_ms: u64::try_from(plan.race.as_millis()).unwrap_or(u64::MAX),
        patience: plan.patience,
    };
    let verdict = match Supervised::start(plan, job) {
        Ok(child) => child.watch(plan, scenario, interrupted, on),
        Err(reason) => failed("start a process", reason).into(),
    };
    drop(room);
    Ok(Record {
        target: target.label(),
        dir: target.dir.clone(),
        file_system: place.kind.name().into(),
        scenario: scenario.number.into(),
        name: scenario.name.into(),
        claim: scenario.claim.into(),
        seed: plan.seed,
        seconds: began.elapsed().as_secs_f64(),
        varies: verdict.varies,
        outcome: verdict.outcome,
        notes: verdict.notes,
    })
}

/// What is known of a scenario that has ended.
struct Verdict {
    outcome: Outcome,
    notes: Vec<String>,
    varies: bool,
}

impl From<Outcome> for Verdict {
    /// Of one that did not come to its own end: the next time it may.
    fn from(outcome: Outcome) -> Self {
        Self {
            outcome,
            notes: Vec::new(),
            varies: true,
        }
    }
}

/// Most of what a child says on standard error that is kept, in bytes.
const SAID_MAX: u64 = 16 << 10;
/// How often the watchdog looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a killed child may take to die. One in an uninterruptible sleep does not die at all.
const DEATH_MAX: Duration = Duration::from_secs(10);

/// A child, its messages, and what it said besides.
struct Supervised {
    child: Child,
    messages: Receiver<Message>,
    said: Receiver<String>,
}

impl Supervised {
    fn start(plan: &Plan, job: Job) -> Result<Self, String> {
        let json = serde_json::to_string(&Order::Run(job)).map_err(|error| error.to_string())?;
        let mut child = Command::new(&plan.child.program)
            .args(&plan.child.args)
            .arg(json)
            .env_remove(ROLE)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{}: {error}", plan.child.program.display()))?;
        let (tell, messages) = channel();
        if let Some(out) = child.stdout.take() {
            std::thread::spawn(move || read_messages(out, &tell));
        }
        let (tell, said) = channel();
        if let Some(err) = child.stderr.take() {
            std::thread::spawn(move || read_said(err, &tell));
        }
        Ok(Self {
            child,
            messages,
            said,
        })
    }

    /// Waits for the child's result, or for its silence.
    fn watch(
        mut self,
        plan: &Plan,
        scenario: &Scenario,
        interrupted: &AtomicBool,
        on: &mut dyn FnMut(Event<'_>),
    ) -> Verdict {
        let began = Instant::now();
        let mut heard = began;
        let silence_max = plan.silence_max * plan.patience;
        let longest = Duration::from_secs(scenario.seconds_max) * plan.patience + plan.race;
        let ended = loop {
            match self.messages.recv_timeout(LOOK_EVERY) {
                Ok(Message::Beat(_)) => {
                    heard = Instant::now();
                    on(Event::Beat);
                }
                Ok(Message::Done {
                    outcome,
                    notes,
                    varies,
                }) => {
                    break Some(Verdict {
                        outcome,
                        notes,
                        varies,
                    });
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break None,
            }
            if interrupted.load(Ordering::Relaxed) {
                self.kill();
                let reason = "interrupted".into();
                return Outcome::Skipped { reason }.into();
            }
            if heard.elapsed() > silence_max {
                return self.hung(format!("silent for {silence_max:?}"));
            }
            if began.elapsed() > longest {
                return self.hung(format!("not done after {longest:?}"));
            }
        };
        // A process that has its result may still hang in its destructors.
        let Some(status) = self.wait(silence_max) else {
            return self.hung("done, but it does not end".into());
        };
        match ended {
            Some(verdict) if verdict.outcome.is_bad() || status.success() => verdict,
            _ => self.died(status).into(),
        }
    }

    fn wait(&mut self, longest: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + longest;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(status);
            }
            if Instant::now() > until {
                return None;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn kill(&mut self) -> bool {
        let _ = self.child.kill();
        self.wait(DEATH_MAX).is_some()
    }

    fn hung(mut self, why: String) -> Verdict {
        let stacks = stacks::of(self.child.id());
        let mut notes = Vec::new();
        if !self.kill() {
            notes.push(format!("process {} cannot be killed", self.child.id()));
        }
        Verdict {
            notes,
            ..Outcome::Hung { why, stacks }.into()
        }
    }

    fn died(&self, status: ExitStatus) -> Outcome {
        let said = self
            .said
            .recv_timeout(Duration::from_secs(1))
            .unwrap_or_default();
        let how = match (status.signal(), status.code()) {
            (Some(signal), _) => format!("killed by signal {signal}"),
            (None, Some(code)) => format!("exit status {code}"),
            (None, None) => status.to_string(),
        };
        failed(
            "end with a result",
            format!("{how}; it said: {}", said.trim()),
        )
    }
}

fn failed(check: &str, saw: String) -> Outcome {
    Outcome::Failed {
        failures: vec![Failure {
            check: check.into(),
            saw,
        }],
    }
}

fn read_messages(out: impl std::io::Read, tell: &Sender<Message>) {
    for line in BufReader::new(out).lines().map_while(Result::ok) {
        if let Ok(message) = serde_json::from_str(&line)
            && tell.send(message).is_err()
        {
            break;
        }
    }
}

fn read_said(mut err: impl std::io::Read, tell: &Sender<String>) {
    let mut said = Vec::new();
    let _ = err.by_ref().take(SAID_MAX).read_to_end(&mut said);
    // Drained, so that a talkative child does not wait for us.
    let _ = std::io::copy(&mut err, &mut std::io::sink());
    let _ = tell.send(String::from_utf8_lossy(&said).into_owned());
}
