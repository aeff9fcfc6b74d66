//! Locks between processes and machines: etcd keeps the claims, their order, and who is alive.
//!
//! ```text
//!   Session::request --> actor (one thread) --> transactions --> etcd
//!   Events::reply    <--   board (claims)   <-- watch        <--
//!                          lease  --> good_until: renewed, or the node stops
//! ```
//!
//! *Owns*: the keys (`keys`), what follows from their order (`board`), membership, recovery of the dead (`actor`, with
//! `fence` and `process`), what people want to know of all nodes (`survey`).
//!
//! *Does not own*: a lock table: what is granted follows from keys that every node reads for itself. Fencing at the store:
//! [`super::Token`] is what a store would compare.
//!
//! *Locking*: none; the actor owns all of it, and sessions send to it.
//!
//! A claim does not go with its owner's lease: when a member's lease ends, its claims stay, and nobody is granted what they
//! exclude, until a survivor has taken them away (H-13): after the grace, or as soon as it is sure that the dead node
//! writes no more, because its process ended or was killed, or because an operator's fence command succeeded. Every transaction names the lease of its
//! member, so that a node that was paused past its lease changes nothing any more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use pinfold_base::Errno;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::{Events, FenceCounts, JoinError, LockService, Name, Session, Traffic, Wait};
use crate::clock::Time;
use crate::mode::Mode;

mod actor;
mod board;
mod fence;
mod keys;
mod process;
mod start;
mod survey;
mod wire;

pub use fence::Fence;
pub use keys::MEMBER_NAME_MAX;
pub use survey::{ClaimReport, LeaseReport, LockReport, NodeReport, Survey};

/// The shortest lease: etcd grants none below two election timeouts.
const LEASE_MIN: Duration = Duration::from_secs(2);

/// The longest wait for an answer to a transaction before it is sent again.
const PATIENCE_MAX: Duration = Duration::from_secs(10);

/// The longest wait for an answer at the start.
const START_MAX: Duration = Duration::from_secs(30);

/// How often a quiet connection is tried. etcd closes those that are tried more often than every five seconds.
const PING: Duration = Duration::from_secs(6);

/// Where a volume's locks are kept, and how to get there.
#[derive(Debug, Clone)]
pub struct Etcd {
    /// The servers: `HOST:PORT`, or with `http://` or `https://` before it.
    pub endpoints: Vec<String>,
    /// What the volume's keys begin with. One volume has it alone.
    pub prefix: String,
    /// What tells this volume from others, such as its directory's file-system UUID and inode; checked against what the
    /// first node found.
    pub volume: String,
    /// How long a node that cannot be heard keeps its locks. etcd loses about two seconds when its leader dies.
    pub lease: Duration,
    /// How long survivors wait after a lease has ended before they take the locks: writes on their way arrive meanwhile.
    pub grace: Duration,
    /// What to run when a node's lease has ended. When it succeeds, the grace is not waited for.
    pub fence: Option<Fence>,
    /// User and password.
    pub user: Option<(String, String)>,
    /// Certificates, in PEM.
    pub tls: Option<Tls>,
}

/// What a secure connection needs, in PEM.
#[derive(Clone, Default)]
pub struct Tls {
    /// Who signed the servers' certificates.
    pub authority: Option<Vec<u8>>,
    /// Our certificate and its key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
    /// The name in the servers' certificates, if it is not the host's.
    pub domain: Option<String>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A key does not belong into a log.
        f.debug_struct("Tls")
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}

impl Etcd {
    /// The volume `volume`, kept under `prefix` on `endpoints`: a lease of 10 seconds, a grace of 5.
    #[must_use]
    pub fn new(endpoints: &[&str], prefix: &str, volume: &str) -> Self {
        Self {
            endpoints: endpoints.iter().map(|&one| one.to_owned()).collect(),
            prefix: prefix.to_owned(),
            volume: volume.to_owned(),
            lease: Duration::from_secs(10),
            grace: Duration::from_secs(5),
            fence: None,
            user: None,
            tls: None,
        }
    }

    /// How long one transaction may take before it is tried again.
    fn patience(&self) -> Duration {
        (self.lease / 3).min(PATIENCE_MAX)
    }

    /// How long each step of the start may take. No lock waits for it.
    fn patience_at_start(&self) -> Duration {
        self.lease.min(START_MAX)
    }

    fn connect_options(&self) -> ConnectOptions {
        let patience = self.patience();
        let mut options = ConnectOptions::new()
            .with_connect_timeout(self.lease / 2)
            .with_keep_alive(PING, patience)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some((name, password)) = &self.user {
            options = options.with_user(name, password);
        }
        if let Some(tls) = &self.tls {
            let mut ours = TlsOptions::new();
            if let Some(authority) = &tls.authority {
                ours = ours.ca_certificate(Certificate::from_pem(authority));
            }
            if let Some((certificate, key)) = &tls.identity {
                ours = ours.identity(Identity::from_pem(certificate, key));
            }
            if let Some(domain) = &tls.domain {
                ours = ours.domain_name(domain);
            }
            options = options.with_tls(ours);
        }
        options
    }

    fn check(&self, member: &str) -> Result<(), JoinError> {
        let bad = |why: String| Err(JoinError::new(Errno::EINVAL, why));
        if !keys::is_member_name(member) {
            return bad(format!(
                "{member:?} cannot be a node's name: letters, digits, - and _, at most {MEMBER_NAME_MAX}"
            ));
        }
        if self.endpoints.is_empty() {
            return bad("no etcd server is given".to_owned());
        }
        if self.volume.is_empty() || self.volume.chars().any(char::is_whitespace) {
            return bad(format!("{:?} cannot name a volume", self.volume));
        }
        if self.prefix.trim_matches('/').is_empty() {
            return bad("a volume needs a prefix of its own in etcd".to_owned());
        }
        if self.lease < LEASE_MIN {
            return bad(format!("a lease is at least {LEASE_MIN:?}"));
        }
        Ok(())
    }
}

impl Etcd {
    /// Reads what is kept for the volume under the prefix, without becoming a member. [`Etcd::volume`] is not compared.
    ///
    /// # Errors
    /// ENOENT if nothing is kept there; otherwise as [`Etcd::join`](LockService::join).
    pub fn survey(&self) -> Result<Survey, JoinError> {
        if self.endpoints.is_empty() || self.prefix.trim_matches('/').is_empty() {
            return Err(JoinError::new(
                Errno::EINVAL,
                "a server and a prefix are needed",
            ));
        }
        survey::survey(self)
    }
}

impl LockService for Etcd {
    /// Connects, checks that the prefix is this volume's, and becomes a member.
    ///
    /// # Errors
    /// EINVAL for what cannot be; ENOTCONN if no server answers; EACCES if it refuses us; EEXIST if a member of that name is
    /// alive; EXDEV if the prefix is another volume's; EUCLEAN if something else is kept
    /// there; EOPNOTSUPP if another version of this library keeps it.
    fn join(&self, member: &str, events: Weak<dyn Events>) -> Result<Box<dyn Session>, JoinError> {
        self.check(member)?;
        let (sender, receiver) = unbounded_channel();
        let (started, outcome) = sync_channel(1);
        let good_until = Arc::new(GoodUntil::default());
        let tally = Arc::new(fence::Tally::default());
        let exchanged = Arc::new(wire::Exchanged::default());
        let start = start::Start {
            etcd: self.clone(),
            member: member.to_owned(),
            events,
            sender: sender.clone(),
            good_until: Arc::clone(&good_until),
            tally: Arc::clone(&tally),
            exchanged: Arc::clone(&exchanged),
        };
        std::thread::Builder::new()
            .name("glock-etcd".to_owned())
            .spawn(move || start.run(receiver, &started))
            .map_err(|error| JoinError::new(Errno::from(&error), format!("no thread: {error}")))?;
        // The thread answers after a few steps of at most START_MAX; this only guards against more.
        match outcome.recv_timeout(START_MAX * 8) {
            Ok(Ok(())) => Ok(Box::new(EtcdSession {
                sender,
                good_until,
                tally,
                exchanged,
            })),
            Ok(Err(why)) => Err(why),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(JoinError::new(
                Errno::ENOTCONN,
                format!("no answer from etcd at {}", self.endpoints.join(", ")),
            )),
        }
    }
}

/// The end of the lease by this node's clock, with a quarter of it to spare.
#[derive(Debug, Default)]
struct GoodUntil(AtomicU64);

impl GoodUntil {
    /// Notes that etcd renewed the lease for `ttl` at some time after `asked`.
    fn renewed(&self, asked: Time, ttl: Duration) {
        let end = asked.after(ttl / 4 * 3).since(Time::ZERO);
        let nanoseconds = u64::try_from(end.as_nanos()).unwrap_or(u64::MAX);
        self.0.fetch_max(nanoseconds, Ordering::AcqRel);
    }

    fn get(&self) -> Time {
        Time::from_start(Duration::from_nanos(self.0.load(Ordering::Acquire)))
    }
}

/// What a session asks of the actor. At most one request is under way for each lock, so that this is bounded by them.
#[derive(Debug)]
enum Ask {
    Change {
        name: Name,
        from: Mode,
        to: Mode,
        wait: Wait,
    },
    Leave(std::sync::mpsc::SyncSender<()>),
    Abandon,
}

#[derive(Debug)]
struct EtcdSession {
    sender: UnboundedSender<actor::Message>,
    good_until: Arc<GoodUntil>,
    tally: Arc<fence::Tally>,
    exchanged: Arc<wire::Exchanged>,
}

impl EtcdSession {
    fn send(&self, ask: Ask) {
        // An actor that ended has said so: the node withdrew.
        let _ = self.sender.send(actor::Message::Ask(ask));
    }
}

impl Session for EtcdSession {
    fn request(&self, name: Name, from: Mode, to: Mode, wait: Wait) {
        self.send(Ask::Change {
            name,
            from,
            to,
            wait,
        });
    }

    fn good_until(&self) -> Option<Time> {
        Some(self.good_until.get())
    }

    fn fencing(&self) -> FenceCounts {
        self.tally.counts()
    }

    fn traffic(&self) -> Traffic {
        self.exchanged.traffic()
    }

    fn leave(&self) {
        let (done, left) = sync_channel(1);
        self.send(Ask::Leave(done));
        // If it does not come in time, the lease ends by itself.
        let _ = left.recv_timeout(Duration::from_secs(5));
    }

    fn abandon(&self) {
        self.send(Ask::Abandon);
    }
}

impl Drop for EtcdSession {
    fn drop(&mut self) {
        self.send(Ask::Abandon);
    }
}
