//! How a node becomes a member: whether the prefix is this volume's, whether its name is free, what it missed.

use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Weak};
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, Error, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse,
};
use pinfold_base::Errno;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use super::actor::{Actor, Message, Recovery};
use super::fence::Tally;
use super::keys::{Keys, Owner, PROTOCOL, VERSION};
use super::process::Process;
use super::wire::{Exchanged, Lost, Wire, judge};
use super::{Etcd, GoodUntil};
use crate::clock::Time;
use crate::service::{Events, JoinError};

/// What the actor's thread begins with.
pub(super) struct Start {
    pub etcd: Etcd,
    pub member: String,
    pub events: Weak<dyn Events>,
    pub sender: UnboundedSender<Message>,
    pub good_until: Arc<GoodUntil>,
    pub tally: Arc<Tally>,
    pub exchanged: Arc<Exchanged>,
}

impl Start {
    /// Joins, says how that went, and serves until the session ends.
    pub fn run(
        self,
        receiver: UnboundedReceiver<Message>,
        started: &SyncSender<Result<(), JoinError>>,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => {
                let why = format!("no event loop: {error}");
                let _ = started.send(Err(JoinError::new(Errno::from(&error), why)));
                return;
            }
        };
        runtime.block_on(async {
            match self.join().await {
                Ok(actor) => {
                    if started.send(Ok(())).is_ok() {
                        actor.run(receiver).await;
                    }
                }
                Err(why) => {
                    let _ = started.send(Err(why));
                }
            }
        });
        // Tasks that wait for etcd end here.
        runtime.shutdown_background();
    }

    async fn join(self) -> Result<Actor, JoinError> {
        let keys = Keys::new(&self.etcd.prefix);
        let mut client = self.etcd.connect().await?;
        self.claim_prefix(&mut client, &keys).await?;
        let (lease, ttl, asked) = self.lease(&mut client).await?;
        let me = Owner {
            member: self.member.clone(),
            lease,
        };
        if let Err(why) = self.enlist(&mut client, &keys, &me).await {
            // Or it is there for a lease's time without anybody in it.
            let _ = client.lease_revoke(lease).await;
            return Err(why);
        }
        self.good_until.renewed(asked, ttl);
        let wire = Wire {
            client,
            keys,
            me,
            patience: self.etcd.patience(),
            said_anew: Arc::default(),
            exchanged: self.exchanged,
        };
        // Whoever died unseen, and whatever else is kept here that is not ours, is found now.
        if let Err(lost) = wire.all_claims().await {
            let _ = wire.strike_off().await;
            let _ = wire.client.clone().lease_revoke(wire.me.lease).await;
            return Err(refused(lost));
        }
        Ok(Actor::new(
            wire,
            self.events,
            self.sender,
            self.good_until,
            ttl,
            Recovery {
                grace: self.etcd.grace,
                fence: self.etcd.fence,
                tally: self.tally,
            },
        ))
    }

    /// Makes the prefix this volume's, or finds that it is.
    async fn claim_prefix(&self, client: &mut Client, keys: &Keys) -> Result<(), JoinError> {
        let ours = format!("{PROTOCOL} {VERSION} {}", self.etcd.volume);
        let volume = keys.volume();
        let nothing = Compare::version(keys.root.clone(), CompareOp::Equal, 0).with_prefix();
        let txn = Txn::new()
            .when([nothing])
            .and_then([TxnOp::put(volume.clone(), ours.clone(), None)])
            .or_else([TxnOp::get(volume, None::<GetOptions>)]);
        let response = self.etcd.once(client, txn).await?;
        if response.succeeded() {
            return Ok(());
        }
        let kept = first_value(&response.op_responses());
        let prefix = &self.etcd.prefix;
        let Some(kept) = kept else {
            let why =
                format!("something else is kept in etcd under {prefix}: choose another prefix");
            return Err(JoinError::new(Errno::EUCLEAN, why));
        };
        if kept == ours {
            return Ok(());
        }
        let other = volume_of(keys, &kept)?;
        let why = format!(
            "the prefix {prefix} belongs to the volume {other}, not to {}: give each volume its own",
            self.etcd.volume
        );
        Err(JoinError::new(Errno::EXDEV, why))
    }

    async fn lease(&self, client: &mut Client) -> Result<(i64, Duration, Time), JoinError> {
        let asked = Time::now();
        let seconds = i64::try_from(self.etcd.lease.as_secs()).unwrap_or(i64::MAX);
        let grant = client.lease_grant(seconds, None);
        match tokio::time::timeout(self.etcd.patience_at_start(), grant).await {
            Ok(Ok(lease)) => {
                let ttl = Duration::from_secs(u64::try_from(lease.ttl()).unwrap_or(0));
                Ok((lease.id(), ttl, asked))
            }
            Ok(Err(error)) => Err(self.etcd.unreachable(&error)),
            Err(_late) => Err(self.etcd.silent()),
        }
    }

    async fn enlist(&self, client: &mut Client, keys: &Keys, me: &Owner) -> Result<(), JoinError> {
        let key = keys.member(&me.member);
        let process = Process::own();
        let value = format!("{} {} {}", me.lease, process.host, process.pid);
        let free = Compare::version(key.clone(), CompareOp::Equal, 0);
        let with_lease = PutOptions::new().with_lease(me.lease);
        let txn = Txn::new()
            .when([free])
            .and_then([
                TxnOp::put(key.clone(), value, Some(with_lease)),
                // Outlives the lease: who takes over has to know who it was.
                TxnOp::put(keys.node(me), process.text(), None),
            ])
            .or_else([TxnOp::get(key, None::<GetOptions>)]);
        let response = self.etcd.once(client, txn).await?;
        if response.succeeded() {
            return Ok(());
        }
        let taken = first_value(&response.op_responses()).unwrap_or_default();
        let mut words = taken.split(' ').skip(1);
        let host = words.next().unwrap_or("?");
        let pid = words.next().unwrap_or("?");
        let why = format!(
            "a node called {} is a member already: process {pid} on {host}. If it died, its name is free when its lease \
             has ended",
            me.member
        );
        Err(JoinError::new(Errno::EEXIST, why))
    }
}

impl Etcd {
    pub(super) async fn connect(&self) -> Result<Client, JoinError> {
        let options = self.connect_options();
        let patience = self.patience_at_start();
        let connect = Client::connect(self.endpoints.clone(), Some(options));
        match tokio::time::timeout(patience, connect).await {
            Ok(Ok(client)) => Ok(client),
            Ok(Err(error)) => Err(self.unreachable(&error)),
            Err(_late) => Err(self.silent()),
        }
    }

    pub(super) fn silent(&self) -> JoinError {
        let servers = self.endpoints.join(", ");
        JoinError::new(
            Errno::ENOTCONN,
            format!("no etcd server answers at {servers}"),
        )
    }

    pub(super) fn unreachable(&self, error: &Error) -> JoinError {
        match judge(error) {
            Some(lost) => refused(lost),
            None => {
                let silent = self.silent();
                let mut why = format!("{silent}: {error}");
                // What it is about, such as a certificate, is said further down.
                let mut below = std::error::Error::source(error);
                while let Some(cause) = below {
                    why += &format!(": {cause}");
                    below = cause.source();
                }
                if self.tls.is_some() {
                    why += " (a server that refuses our certificate, as one whose time is over, just ends the connection)";
                }
                JoinError::new(silent.errno, why)
            }
        }
    }

    /// One try of one transaction: at the start an error is told instead of waited for.
    pub(super) async fn once(
        &self,
        client: &mut Client,
        txn: Txn,
    ) -> Result<etcd_client::TxnResponse, JoinError> {
        match tokio::time::timeout(self.patience_at_start(), client.txn(txn)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(self.unreachable(&error)),
            Err(_late) => Err(self.silent()),
        }
    }
}

/// Reads what a prefix says of itself: the volume's name.
pub(super) fn volume_of<'a>(keys: &Keys, kept: &'a str) -> Result<&'a str, JoinError> {
    let mut words = kept.split(' ');
    if words.next() != Some(PROTOCOL) {
        let why = format!("{} in etcd is not ours to use: {kept:?}", keys.volume());
        return Err(JoinError::new(Errno::EUCLEAN, why));
    }
    let version = words.next().unwrap_or_default();
    if version != VERSION.to_string() {
        let why = format!(
            "the volume under {} is served by nodes of protocol {version}, this one has {VERSION}: stop them all first",
            keys.root
        );
        return Err(JoinError::new(Errno::EOPNOTSUPP, why));
    }
    Ok(words.next().unwrap_or_default())
}

pub(super) fn refused(lost: Lost) -> JoinError {
    JoinError::new(lost.errno(), lost.to_string())
}

pub(super) fn first_value(responses: &[TxnOpResponse]) -> Option<String> {
    responses.iter().find_map(|response| match response {
        TxnOpResponse::Get(get) => get
            .kvs()
            .first()
            .map(|pair| String::from_utf8_lossy(pair.value()).into_owned()),
        _ => None,
    })
}
