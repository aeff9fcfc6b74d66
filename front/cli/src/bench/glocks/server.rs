//! An etcd of the benchmark's own, on loopback, with its data beside what is measured.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use etcd_client::{Client, Txn, TxnOp};
use pinfold::glocks::service::etcd::Etcd;
use tokio::runtime::Runtime;

/// How long it may take to answer.
const START: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(50);

/// A server; it ends with the value.
pub(in crate::bench) struct Server {
    child: Child,
    pub(in crate::bench) endpoint: String,
}

impl Server {
    /// Starts one; `None` where none is installed.
    pub(in crate::bench) fn start(dir: &Path) -> Result<Option<Self>> {
        let free = || -> Result<u16> {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            Ok(listener.local_addr()?.port())
        };
        let (endpoint, peer) = (free()?, free()?);
        let endpoint = format!("127.0.0.1:{endpoint}");
        let (client, peer) = (
            format!("http://{endpoint}"),
            format!("http://127.0.0.1:{peer}"),
        );
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(dir)
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("etcd does not start"),
        };
        Ok(Some(Self { child, endpoint }))
    }

    /// A volume's locks, kept under a prefix of its own.
    pub(in crate::bench) fn volume(&self, name: &str) -> Etcd {
        Etcd {
            // Whoever stands still on a busy machine is not dead.
            lease: Duration::from_secs(60),
            ..Etcd::new(&[&self.endpoint], &format!("/bench/{name}"), name)
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection that makes transactions and nothing else.
pub(in crate::bench) struct Bare {
    runtime: Runtime,
    client: Client,
}

impl Bare {
    /// Connects as soon as the server answers.
    pub(in crate::bench) fn to(server: &mut Server) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let end = Instant::now() + START;
        while Instant::now() < end {
            let connect = Client::connect([server.endpoint.as_str()], None);
            if let Ok(client) = runtime.block_on(connect) {
                let mut bare = Self { runtime, client };
                while Instant::now() < end {
                    if bare.transactions(1).is_ok() {
                        return Ok(bare);
                    }
                    std::thread::sleep(PAUSE);
                }
                break;
            }
            if let Some(status) = server.child.try_wait()? {
                bail!("etcd ended at once: {status}");
            }
            std::thread::sleep(PAUSE);
        }
        bail!("etcd does not answer")
    }

    /// Makes transactions one after the other; returns the time of one.
    pub(in crate::bench) fn transactions(&mut self, times: u32) -> Result<Duration> {
        let Self { runtime, client } = self;
        let start = Instant::now();
        runtime.block_on(async {
            for _ in 0..times {
                let put = TxnOp::put("/bare", "x", None);
                client.txn(Txn::new().and_then([put])).await?;
            }
            Ok::<_, etcd_client::Error>(())
        })?;
        Ok(start.elapsed() / times)
    }
}
