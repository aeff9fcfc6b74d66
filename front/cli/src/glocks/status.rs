//! What a mount's own node tells of its glocks, to whoever may connect to its socket.
//!
//! *Owns*: the socket, one for each mount, in a directory that only its user can enter; what is said there.
//!
//! *Does not own*: the glocks. A question changes nothing.
//!
//! A client connects, reads one JSON object to its end, and is done.

use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pinfold::glocks::{Doing, Report, Space};
use rustix::fs::{AtFlags, CWD, StatxFlags};
use serde_json::{Value, json};

/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where sockets are put instead of the usual directory.
const PLACE: &str = "PINFOLD_RUN_DIR";
/// Bytes of an answer that are read at most.
const ANSWER_MAX: u64 = 1 << 30;

/// The socket of one mount; it goes with this.
#[derive(Debug)]
pub(crate) struct Desk {
    path: PathBuf,
}

impl Drop for Desk {
    fn drop(&mut self) {
        // The thread that listens ends with the process.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Answers questions about `space` until the returned value goes.
pub(crate) fn serve(mountpoint: &Path, node: &str, space: &Weak<Space>) -> Result<Desk> {
    let directory = directory()?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let path = directory.join(socket_of(mountpoint)?);
    // Mounts have numbers of their own while they last: one that is here already is of a server that was killed.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path)
        .with_context(|| format!("cannot listen at {}", path.display()))?;
    let (node, space) = (node.to_owned(), Weak::clone(space));
    let at = mountpoint.display().to_string();
    std::thread::Builder::new()
        .name("pinfold-status".into())
        .spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let Some(space) = space.upgrade() else { return };
                let told = tell(&at, &node, &space).to_string();
                drop(space);
                let _ = stream.set_write_timeout(Some(PATIENCE));
                // Who does not listen to the end has its reasons.
                let _ = stream.write_all(told.as_bytes());
            }
        })
        .context("cannot start a thread")?;
    Ok(Desk { path })
}

/// Asks the node that serves `mountpoint`.
pub(crate) fn ask(mountpoint: &Path) -> Result<Value> {
    let path = directory()?.join(socket_of(mountpoint)?);
    let stream = UnixStream::connect(&path).with_context(|| {
        format!(
            "no node of a cluster serves {} here (nobody answers at {})",
            mountpoint.display(),
            path.display()
        )
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut told = String::new();
    stream
        .take(ANSWER_MAX)
        .read_to_string(&mut told)
        .context("the node does not answer")?;
    serde_json::from_str(&told).context("the node's answer makes no sense")
}

/// What [`ask`] was told, as a dump of lines.
pub(crate) fn text(told: &Value) -> String {
    let word = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let mut text = format!(
        "node {} at {}",
        word(&told["node"]),
        word(&told["mountpoint"])
    );
    if let Some(why) = told["withdrawn"].as_str() {
        text += &format!(", withdrawn ({why})");
    }
    text.push('\n');
    for glock in told["glocks"].as_array().into_iter().flatten() {
        text += glock["dump"].as_str().unwrap_or_default();
        if let Some(reason) = glock["waits_for"].as_str() {
            text += &format!(" W: {reason}\n");
        }
    }
    text
}

fn tell(mountpoint: &str, node: &str, space: &Space) -> Value {
    let counts = space.fencing();
    let glocks: Vec<Value> = space.report().iter().map(glock).collect();
    json!({
        "node": node,
        "mountpoint": mountpoint,
        "pid": std::process::id(),
        "withdrawn": space.check().err().map(|errno| errno.to_string()),
        "fencing": {
            "gone": counts.gone,
            "killed": counts.killed,
            "fenced": counts.fenced,
            "failed": counts.failed,
            "waited": counts.waited,
        },
        "glocks": glocks,
    })
}

fn glock(report: &Report) -> Value {
    let holders: Vec<Value> = report
        .holders
        .iter()
        .map(|holder| {
            json!({
                "mode": holder.request.mode.letters(),
                "holds": holder.holds,
                "may_demote": holder.may_demote,
                "owner": holder.owner,
                "waits_ms": holder.waits.map(milliseconds),
            })
        })
        .collect();
    json!({
        "name": report.name.to_string(),
        "inode": report.name.number,
        "mode": report.mode.letters(),
        "target": report.target.letters(),
        "token": report.token.0,
        "doing": format!("{:?}", report.doing).to_lowercase(),
        "demote": report.demote.map(|demote| json!({
            "to": demote.to.letters(),
            "wanted_ms": milliseconds(demote.wanted_for),
            "deferred": demote.deferred,
        })),
        "pins": report.pins,
        "holders": holders,
        "waits_for": reason(report),
        "dump": report.to_string(),
    })
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// What whoever waits for this glock waits for, here or on another node; `None` if nobody does.
fn reason(report: &Report) -> Option<&'static str> {
    let waits = report.holders.iter().any(|holder| !holder.holds);
    if !waits && report.demote.is_none() {
        return None;
    }
    Some(match report.doing {
        Doing::Withdrawn => "nothing: the node has withdrawn",
        Doing::Frozen => "the end of a recovery",
        Doing::Asking => "other nodes, or etcd's answer",
        Doing::Leaving => "what is dirty here to be written back and dropped",
        Doing::Nothing if report.holders.iter().any(|holder| holder.holds) => "its holders here",
        Doing::Nothing if report.pins > 0 => "memory that the program keeps pinned",
        Doing::Nothing if report.demote.is_some_and(|demote| demote.deferred) => {
            "the end of the minimum hold"
        }
        Doing::Nothing => "its turn",
    })
}

fn directory() -> Result<PathBuf> {
    if let Some(place) = std::env::var_os(PLACE) {
        return Ok(place.into());
    }
    if rustix::process::geteuid().is_root() {
        return Ok("/run/pinfold".into());
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(place) => Ok(PathBuf::from(place).join("pinfold")),
        None => bail!("neither {PLACE} nor XDG_RUNTIME_DIR says where sockets are kept"),
    }
}

/// The socket's name: the mounted filesystem's number. What the kernel knows by itself is asked for, so that a mount that
/// does not answer can be asked about.
fn socket_of(mountpoint: &Path) -> Result<String> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(CWD, mountpoint, flags, StatxFlags::TYPE)
        .with_context(|| format!("cannot look at {}", mountpoint.display()))?;
    Ok(format!(
        "{}.{}.socket",
        stat.stx_dev_major, stat.stx_dev_minor
    ))
}
