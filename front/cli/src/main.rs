//! `pinfold`: the volume on the command line.
//!
//! Exit statuses: that of the command that was run; 2 for a command line that makes no sense, 1 for anything else that
//! went wrong, each with one line on standard error that says what and where.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

mod bench;
mod cluster;
mod glocks;
mod mount;
mod nodes;
mod torture;

/// A file I/O stack in user space.
#[derive(Debug, Parser)]
#[command(name = "pinfold", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Bench(bench::Arguments),
    Glocks(glocks::Arguments),
    /// Serve a directory at a mount point, for as long as a command runs or until it is unmounted
    Mount(mount::Arguments),
    Nodes(nodes::Arguments),
    Torture(torture::Arguments),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("PINFOLD_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .init();
    let outcome = match cli.command {
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Glocks(arguments) => glocks::run(&arguments),
        Command::Mount(arguments) => mount::run(&arguments),
        Command::Nodes(arguments) => nodes::run(&arguments),
        Command::Torture(arguments) => Ok(torture::run(&arguments)),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("pinfold: {error:#}");
        ExitCode::FAILURE
    })
}
