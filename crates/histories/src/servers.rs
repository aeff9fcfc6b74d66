//! The etcd servers of a run, and lines to them that can be cut.
//!
//! *Owns*: one server or three, on loopback, in a directory; ports that lead to them.
//!
//! *Does not own*: what is kept there.
//!
//! *Locking*: leaves.
//!
//! Needs the program `etcd` (Debian: etcd-server).

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use parking_lot::Mutex;

/// How long servers may take to begin on a busy machine.
const START_MAX: Duration = Duration::from_secs(90);

/// How often ports are looked for.
const ATTEMPTS_MAX: usize = 5;

/// Connections that a line carries at once.
const STREAMS_MAX: usize = 256;

/// Servers that form one etcd; they end with the value.
#[derive(Debug)]
pub struct Servers {
    dir: PathBuf,
    host: Ipv4Addr,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    child: Option<Child>,
    client: u16,
    peer: u16,
}

/// An address of loopback that no other run has: what one of them finds free stays free.
fn own_host() -> Ipv4Addr {
    static LAST: AtomicU32 = AtomicU32::new(0);
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let turn = LAST.fetch_add(1, Ordering::Relaxed) % 2;
    let side = if turn == 1 { 0x20 } else { 0 };
    // 127.128 and above are the lock service's own tests'.
    Ipv4Addr::new(127, 0x40 | side | (high & 0x1f), middle, low)
}

impl Servers {
    /// Starts `members` servers that keep their data below `dir`, and waits until they answer.
    ///
    /// # Errors
    /// Servers that cannot be started, or do not answer.
    pub fn start(dir: &Path, members: usize) -> anyhow::Result<Self> {
        // A connection of the machine's may take a port between the look at it and the server's: then others are taken.
        for attempt in 0..ATTEMPTS_MAX {
            let dir = dir.join(format!("etcd{attempt}"));
            std::fs::create_dir_all(&dir)?;
            let mut servers = Self::on_free_ports(dir, members)?;
            for member in 0..servers.members.len() {
                servers.start_again(member)?;
            }
            if servers.begin()? {
                return Ok(servers);
            }
        }
        bail!("etcd ends as soon as it is started")
    }

    fn on_free_ports(dir: PathBuf, members: usize) -> anyhow::Result<Self> {
        let host = own_host();
        let mut held = Vec::new();
        let mut port = || -> anyhow::Result<u16> {
            // Kept until all are found, so that they differ.
            let listener = TcpListener::bind((host, 0))?;
            let port = listener.local_addr()?.port();
            held.push(listener);
            Ok(port)
        };
        let members = (0..members.max(1)).map(|_| {
            Ok(Member {
                child: None,
                client: port()?,
                peer: port()?,
            })
        });
        let members = members.collect::<anyhow::Result<_>>()?;
        Ok(Self { dir, host, members })
    }

    /// Waits until all answer; false if one has ended.
    fn begin(&mut self) -> anyhow::Result<bool> {
        let end = Instant::now() + START_MAX;
        while !(0..self.members.len()).all(|member| self.answers(member)) {
            for member in &mut self.members {
                if let Some(child) = &mut member.child
                    && child.try_wait()?.is_some()
                {
                    return Ok(false);
                }
            }
            if Instant::now() > end {
                bail!("etcd does not answer");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(true)
    }

    /// Their number.
    #[must_use]
    pub fn count(&self) -> usize {
        self.members.len()
    }

    /// Where clients reach a member.
    #[must_use]
    pub fn endpoint(&self, member: usize) -> String {
        let port = self.members.get(member).map_or(0, |member| member.client);
        format!("{}:{port}", self.host)
    }

    /// Kills a member.
    pub fn kill(&mut self, member: usize) {
        if let Some(member) = self.members.get_mut(member) {
            member.end();
        }
    }

    /// Starts a member on the data that it has; does not wait for it.
    ///
    /// # Errors
    /// What keeps the program from being started.
    pub fn start_again(&mut self, member: usize) -> anyhow::Result<()> {
        let peers = (0..).zip(&self.members);
        let peers: Vec<String> = peers
            .map(|(number, member)| format!("m{number}=http://{}:{}", self.host, member.peer))
            .collect();
        let host = self.host;
        let data = self.dir.join(format!("m{member}"));
        let Some(one) = self.members.get_mut(member) else {
            bail!("there is no member {member}");
        };
        if one.child.is_some() {
            return Ok(());
        }
        let client = format!("http://{host}:{}", one.client);
        let peer = format!("http://{host}:{}", one.peer);
        let child = Command::new("etcd")
            .args(["--name", &format!("m{member}")])
            .arg("--data-dir")
            .arg(data)
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &peers.join(",")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("etcd is not installed (Debian: etcd-server)")?;
        one.child = Some(child);
        Ok(())
    }

    fn answers(&self, member: usize) -> bool {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(self.endpoint(member))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        ask().is_ok_and(|answer| answer.contains("true"))
    }
}

impl Member {
    fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for member in &mut self.members {
            member.end();
        }
    }
}

/// A port that leads to a server until it is cut.
#[derive(Debug)]
pub struct Cut {
    near: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    cut: bool,
    streams: Vec<TcpStream>,
}

impl Cut {
    /// Makes one before `to`, on an address of ours.
    ///
    /// # Errors
    /// What keeps it from being made.
    pub fn before(to: String, address: Ipv4Addr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((address, 0))?;
        let near = listener.local_addr()?;
        let state = Arc::new(Mutex::new(State::default()));
        let weak = Arc::downgrade(&state);
        // Ends with the process: nothing is lost if it waits in accept(2) until then.
        std::thread::Builder::new()
            .name("line".to_owned())
            .spawn(move || {
                for near in listener.incoming().flatten() {
                    let Some(state) = weak.upgrade() else {
                        return;
                    };
                    let mut state = state.lock();
                    if !state.cut && state.streams.len() < STREAMS_MAX {
                        // Who is refused a connection tries again.
                        let _ = state.carry(&near, &to);
                    }
                }
            })?;
        Ok(Self { near, state })
    }

    /// Where it is.
    #[must_use]
    pub fn endpoint(&self) -> String {
        self.near.to_string()
    }

    /// Ends all connections and takes no new ones.
    pub fn cut(&self) {
        let mut state = self.state.lock();
        state.cut = true;
        for stream in state.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Takes connections again.
    pub fn mend(&self) {
        self.state.lock().cut = false;
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.cut();
    }
}

impl State {
    fn carry(&mut self, near: &TcpStream, to: &str) -> std::io::Result<()> {
        let far = TcpStream::connect(to)?;
        for (from, to) in [(near, &far), (&far, near)] {
            let (from, to) = (from.try_clone()?, to.try_clone()?);
            self.streams.push(from.try_clone()?);
            std::thread::Builder::new()
                .name("line".to_owned())
                .spawn(move || pump(from, to))?;
        }
        // Those that ended by themselves have no peer any more.
        self.streams.retain(|stream| stream.peer_addr().is_ok());
        Ok(())
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 16384];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let Some(bytes) = buffer.get(..count) else {
            break;
        };
        if to.write_all(bytes).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}
