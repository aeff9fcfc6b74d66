//! Runs one scenario in a process of its own: the child that the tests of this crate start.

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1) {
        Some(job) => pinfold_scenarios::child::run(&job),
        None => {
            eprintln!("started by the scenario runner, with a job; see `pinfold torture`");
            ExitCode::from(2)
        }
    }
}
