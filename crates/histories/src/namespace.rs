//! A network of a node's own, whose only way out can be taken away: packets then vanish, as they do when a cable is cut.
//!
//! *Owns*: a network namespace, and a pair of virtual interfaces between it and ours.
//!
//! *Does not own*: what runs in it.
//!
//! *Locking*: none.
//!
//! Needs root and the program `ip` (Debian: iproute2).

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, ensure};

/// A network namespace; it goes with the value.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    ours: String,
    address: Ipv4Addr,
}

impl Namespace {
    /// Makes one that reaches us, and nobody else.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn new() -> anyhow::Result<Self> {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        // Of 198.18.0.0/15, which is for tests of networks: four addresses each.
        let block = (process.wrapping_mul(8).wrapping_add(number) & 0x7fff) * 4;
        let address = |host: u32| Ipv4Addr::from(0xc612_0000 | block | host);
        let one = Self {
            name: format!("pfh{process}n{number}"),
            ours: format!("pf{process}n{number}"),
            address: address(1),
        };
        let (name, ours) = (&one.name, &one.ours);
        ip(&["netns", "add", name])?;
        ip(&[
            "link", "add", ours, "type", "veth", "peer", "name", "way", "netns", name,
        ])?;
        ip(&["addr", "add", &format!("{}/30", address(1)), "dev", ours])?;
        ip(&["link", "set", ours, "up"])?;
        let theirs = format!("{}/30", address(2));
        ip(&["-n", name, "addr", "add", &theirs, "dev", "way"])?;
        ip(&["-n", name, "link", "set", "way", "up"])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        Ok(one)
    }

    /// Our address, as seen from there.
    #[must_use]
    pub const fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The words before a command that have it run there, as the process that is started.
    #[must_use]
    pub fn enter(&self) -> [String; 2] {
        // Not `ip netns exec`, which takes the process away from our mounts too.
        let network = format!("--net=/run/netns/{}", self.name);
        ["nsenter".to_owned(), network]
    }

    /// Has all packets vanish.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn cut(&self) -> anyhow::Result<()> {
        ip(&["link", "set", &self.ours, "down"])
    }

    /// Lets them pass again.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn mend(&self) -> anyhow::Result<()> {
        ip(&["link", "set", &self.ours, "up"])
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Takes the interfaces along; what was never made need not go.
        let _ = ip(&["link", "del", &self.ours]);
        let _ = ip(&["netns", "del", &self.name]);
    }
}

/// The words before a command that have its process pass for one of another machine: its clocks are ours, but in a time
/// namespace of their own, so that nobody takes its number for one of ours.
pub const ELSEWHERE: [&str; 2] = ["unshare", "--time"];

/// Tells whether a process may pass for one of another machine.
#[must_use]
pub fn may_be_elsewhere() -> bool {
    let [program, argument] = ELSEWHERE;
    let status = Command::new(program)
        .args([argument, "true"])
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("ip is not installed (Debian: iproute2)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "ip {}: {}",
        arguments.join(" "),
        said.trim()
    );
    Ok(())
}
