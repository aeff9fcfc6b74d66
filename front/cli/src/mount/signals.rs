//! Signals as events.

use std::sync::mpsc::Sender;

use anyhow::{Context, Result};
use rustix::process::Signal;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::SignalsInfo;
use signal_hook::iterator::exfiltrator::WithOrigin;
use signal_hook::iterator::exfiltrator::origin::Origin;

use super::Event;

/// Signals that are taken; the others keep what they do.
const TAKEN: [i32; 7] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGCONT];

/// A signal that arrived.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrived {
    number: i32,
    /// Sent by a process, as opposed to a terminal.
    by_process: bool,
}

impl Arrived {
    /// Tells whether a server without a command ends at it.
    pub(super) fn ends(self) -> bool {
        matches!(self.number, SIGTERM | SIGINT | SIGHUP | SIGQUIT)
    }

    /// Returns the signal if the command has to be sent it: what a terminal sends, the command got itself.
    pub(super) fn to_pass_on(self) -> Option<Signal> {
        self.by_process
            .then(|| Signal::from_named_raw(self.number))
            .flatten()
    }
}

/// Starts telling about signals.
pub(super) fn watch(tell: &Sender<Event>) -> Result<()> {
    let mut signals = SignalsInfo::<WithOrigin>::new(TAKEN).context("cannot take signals")?;
    let tell = tell.clone();
    std::thread::Builder::new()
        .name("pinfold-signals".into())
        .spawn(move || {
            for Origin {
                signal, process, ..
            } in &mut signals
            {
                let arrived = Arrived {
                    number: signal,
                    by_process: process.is_some_and(|process| process.pid != 0),
                };
                if tell.send(Event::Signal(arrived)).is_err() {
                    return;
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}
