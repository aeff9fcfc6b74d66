//! Transactions on etcd: what is sent, what an answer says, and when to try again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, Error, GetOptions, GetResponse, KeyValue,
    PutOptions, Txn, TxnOp, TxnOpResponse,
};
use pinfold_base::Errno;
use tokio::sync::Mutex;

use super::board::{Change, Entry};
use super::keys::{Claim, Key, Keys, Owner};
use super::process::Process;
use crate::service::{Name, Traffic};

/// Keys read in one go.
pub(super) const PAGE: i64 = 1000;
/// Keys deleted in one transaction; etcd takes 128 operations.
const DELETE_MAX: usize = 64;
/// The longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Why a transaction came to nothing for good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Lost {
    #[error("the membership is over")]
    Membership,
    #[error("etcd refuses us: {0}")]
    Denied(String),
    #[error("the key {0} is not ours")]
    Garbage(String),
    #[error("etcd: {0}")]
    Broken(String),
}

impl Lost {
    pub fn errno(&self) -> Errno {
        match self {
            Self::Membership => Errno::ENOTCONN,
            Self::Denied(_) => Errno::EACCES,
            Self::Garbage(_) => Errno::EUCLEAN,
            Self::Broken(_) => Errno::EIO,
        }
    }
}

/// A member's way to its volume's keys.
#[derive(Clone)]
pub(super) struct Wire {
    pub client: Client,
    pub keys: Keys,
    pub me: Owner,
    pub patience: Duration,
    /// How often this node has said anew who it is. Held while it does: etcd makes that dear, and each call under way may find
    /// that it is due.
    pub said_anew: Arc<Mutex<u64>>,
    pub exchanged: Arc<Exchanged>,
}

/// Counts what is sent and told.
#[derive(Debug, Default)]
pub(super) struct Exchanged {
    changes: AtomicU64,
    reads: AtomicU64,
    told: AtomicU64,
}

impl Exchanged {
    pub fn note_told(&self, changes: usize) {
        self.told.fetch_add(changes as u64, Ordering::Relaxed);
    }

    pub fn traffic(&self) -> Traffic {
        Traffic {
            changes: self.changes.load(Ordering::Relaxed),
            reads: self.reads.load(Ordering::Relaxed),
            told: self.told.load(Ordering::Relaxed),
        }
    }
}

// Codes of gRPC; their names are not exported.
const INVALID_ARGUMENT: i32 = 3;

/// Tells whether etcd has changed what users may do since it gave us our token: one that says of which state it is (JWT) is
/// refused from then on, whatever was changed.
fn is_outdated(error: &Error) -> bool {
    let Error::GRpcStatus(status) = error else {
        return false;
    };
    i32::from(status.code()) == INVALID_ARGUMENT
        && status.message().contains("revision of auth store is old")
}

/// A failed try: is there a point in another one?
pub(super) fn judge(error: &Error) -> Option<Lost> {
    const PERMISSION_DENIED: i32 = 7;
    const UNIMPLEMENTED: i32 = 12;
    const UNAUTHENTICATED: i32 = 16;
    let Error::GRpcStatus(status) = error else {
        return None;
    };
    if is_outdated(error) {
        return None;
    }
    let why = status.message().to_owned();
    match i32::from(status.code()) {
        PERMISSION_DENIED | UNAUTHENTICATED => Some(Lost::Denied(why)),
        INVALID_ARGUMENT if why.contains("authentication") || why.contains("user") => {
            Some(Lost::Denied(why))
        }
        INVALID_ARGUMENT | UNIMPLEMENTED => Some(Lost::Broken(why)),
        _ => None,
    }
}

/// Waits a little longer before each try.
pub(super) struct Pause(Duration);

impl Pause {
    pub fn new() -> Self {
        Self(Duration::from_millis(10))
    }

    pub async fn rest(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(PAUSE_MAX);
    }
}

/// Claims as they were at a revision.
pub(super) struct Claims {
    pub revision: i64,
    pub entries: Vec<Entry>,
}

impl Wire {
    fn still_member(&self) -> Compare {
        let key = self.keys.member(&self.me.member);
        Compare::lease(key, CompareOp::Equal, self.me.lease)
    }

    /// Goes on after a failed try that began when this node had said `said` times anew who it is.
    async fn after(&self, error: &Error, said: u64) -> Result<(), Lost> {
        if let Some(lost) = judge(error) {
            return Err(lost);
        }
        if is_outdated(error) {
            let mut times = self.said_anew.lock().await;
            if *times == said {
                let refresh = self.client.refresh_token();
                if let Ok(Err(error)) = tokio::time::timeout(self.patience, refresh).await
                    && let Some(lost) = judge(&error)
                {
                    return Err(lost);
                }
                *times += 1;
            }
        }
        Ok(())
    }

    /// Sends until there is an answer. All our transactions may be sent twice: the second finds what the first did.
    async fn send(&self, txn: Txn) -> Result<etcd_client::TxnResponse, Lost> {
        let mut pause = Pause::new();
        loop {
            let mut client = self.client.clone();
            let said = *self.said_anew.lock().await;
            self.exchanged.changes.fetch_add(1, Ordering::Relaxed);
            match tokio::time::timeout(self.patience, client.txn(txn.clone())).await {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) => self.after(&error, said).await?,
                Err(_late) => {}
            }
            // For as long as the lease lasts: then the node withdraws, and the actor and its tasks end.
            pause.rest().await;
        }
    }

    /// Makes a claim and reads all claims of that lock in the same moment.
    ///
    /// If it is made already, an earlier sending of the same request has done it. One that an older request left, by a
    /// sending that was given up, does not count: whoever takes it back might do so while we rely on it.
    pub async fn claim(&self, name: Name, claim: Claim) -> Result<Claims, Lost> {
        loop {
            let claims = self.claim_once(name, claim).await?;
            let mine = claims.entries.iter().find(|entry| entry.owner == self.me);
            match mine {
                Some(mine) if mine.claim.serial != claim.serial => {
                    self.change(name, mine.created, None).await?;
                }
                _ => return Ok(claims),
            }
        }
    }

    async fn claim_once(&self, name: Name, claim: Claim) -> Result<Claims, Lost> {
        let key = self.keys.claim(name, &self.me);
        let all = TxnOp::get(self.keys.lock(name), Some(GetOptions::new().with_prefix()));
        let put = TxnOp::put(key.clone(), claim.text(), None);
        let new = Compare::version(key, CompareOp::Equal, 0);
        let make = Txn::new()
            .when([new])
            .and_then([put, all.clone()])
            .or_else([all]);
        let txn = Txn::new()
            .when([self.still_member()])
            .and_then([TxnOp::txn(make)]);
        let response = self.send(txn).await?;
        if !response.succeeded() {
            return Err(Lost::Membership);
        }
        let revision = response.header().map_or(0, |header| header.revision());
        for response in response.op_responses() {
            if let TxnOpResponse::Txn(inner) = response {
                for response in inner.op_responses() {
                    if let TxnOpResponse::Get(get) = response {
                        return self.claims(&get, revision);
                    }
                }
            }
        }
        Err(Lost::Broken("an answer without what was asked".to_owned()))
    }

    /// Makes the claim that was made at `created` weaker, or takes it back.
    ///
    /// A sending that was given up may arrive late. It then finds another claim of ours, or none, and leaves that alone.
    pub async fn change(&self, name: Name, created: i64, claim: Option<Claim>) -> Result<(), Lost> {
        let key = self.keys.claim(name, &self.me);
        let same = Compare::create_revision(key.clone(), CompareOp::Equal, created);
        let weaker = claim.is_some();
        let op = match claim {
            Some(claim) => TxnOp::put(key, claim.text(), None),
            None => TxnOp::delete(key, None),
        };
        let change = Txn::new().when([same]).and_then([op]);
        let txn = Txn::new()
            .when([self.still_member()])
            .and_then([TxnOp::txn(change)]);
        let response = self.send(txn).await?;
        let changed = response
            .op_responses()
            .iter()
            .any(|inner| matches!(inner, TxnOpResponse::Txn(inner) if inner.succeeded()));
        // What was to be taken back and is not there was taken back by an earlier sending.
        if response.succeeded() && (changed || !weaker) {
            Ok(())
        } else {
            Err(Lost::Membership)
        }
    }

    /// Reads all claims of a lock.
    pub async fn load(&self, name: Name) -> Result<Claims, Lost> {
        let options = GetOptions::new().with_prefix();
        let get = self.get(self.keys.lock(name), options).await?;
        let revision = get.header().map_or(0, |header| header.revision());
        self.claims(&get, revision)
    }

    /// Reads until there is an answer.
    pub async fn get(&self, key: String, options: GetOptions) -> Result<GetResponse, Lost> {
        let mut pause = Pause::new();
        loop {
            let mut client = self.client.clone();
            let said = *self.said_anew.lock().await;
            let get = client.get(key.clone(), Some(options.clone()));
            self.exchanged.reads.fetch_add(1, Ordering::Relaxed);
            match tokio::time::timeout(self.patience, get).await {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) => self.after(&error, said).await?,
                Err(_late) => {}
            }
            pause.rest().await;
        }
    }

    /// Every member that is alive.
    pub async fn members(&self) -> Result<Vec<Owner>, Lost> {
        let options = GetOptions::new().with_prefix();
        let get = self.get(self.keys.members(), options).await?;
        let owner = |pair: &KeyValue| match self.keys.parse(pair.key()) {
            Some(Key::Member(member)) => Ok(Owner {
                member,
                lease: pair.lease(),
            }),
            _ => Err(garbage(pair)),
        };
        get.kvs().iter().map(owner).collect()
    }

    /// Every claim, by who made it.
    pub async fn all_claims(&self) -> Result<Vec<(Name, Owner, i64)>, Lost> {
        let mut found = Vec::new();
        let mut from = self.keys.locks();
        let end = prefix_end(&from);
        loop {
            let options = GetOptions::new()
                .with_range(end.clone())
                .with_keys_only()
                .with_limit(PAGE);
            let get = self.get(from.clone(), options).await?;
            for pair in get.kvs() {
                match self.keys.parse(pair.key()) {
                    Some(Key::Lock(name, owner)) => {
                        found.push((name, owner, pair.create_revision()));
                    }
                    _ => return Err(garbage(pair)),
                }
            }
            match get.kvs().last() {
                Some(last) if get.more() => {
                    from = format!("{}\0", String::from_utf8_lossy(last.key()));
                }
                _ => return Ok(found),
            }
        }
    }

    /// What a member said of its process; `None` if it left in good order, or its claims were taken away.
    pub async fn process_of(&self, owner: &Owner) -> Result<Option<Process>, Lost> {
        let get = self.get(self.keys.node(owner), GetOptions::new()).await?;
        let found = get.kvs().first();
        Ok(found.and_then(|pair| Process::parse(pair.value())))
    }

    /// Makes it this node's turn to run the fence command for a dead member. It is nobody's while another has it, and
    /// none is needed once its claims were taken away.
    pub async fn begin_fence(&self, dead: &Owner) -> Result<bool, Lost> {
        let key = self.keys.fence(&dead.member);
        let free = Compare::version(key.clone(), CompareOp::Equal, 0);
        let needed = Compare::version(self.keys.node(dead), CompareOp::Greater, 0);
        let with_lease = PutOptions::new().with_lease(self.me.lease);
        let mine = TxnOp::put(key.clone(), self.me.text(), Some(with_lease));
        let take = Txn::new()
            .when([free, needed])
            .and_then([mine])
            // A sending of ours that was given up may have done it.
            .or_else([TxnOp::get(key, None::<GetOptions>)]);
        let txn = Txn::new()
            .when([self.still_member()])
            .and_then([TxnOp::txn(take)]);
        let response = self.send(txn).await?;
        if !response.succeeded() {
            return Err(Lost::Membership);
        }
        let is_mine = |pair: &KeyValue| pair.value() == self.me.text().as_bytes();
        Ok(response.op_responses().iter().any(|inner| match inner {
            TxnOpResponse::Txn(inner) if inner.succeeded() => true,
            TxnOpResponse::Txn(inner) => inner.op_responses().iter().any(
                |response| matches!(response, TxnOpResponse::Get(get) if get.kvs().iter().any(is_mine)),
            ),
            _ => false,
        }))
    }

    /// Ends the turn. Another's is left alone.
    pub async fn end_fence(&self, dead: &Owner) -> Result<(), Lost> {
        let key = self.keys.fence(&dead.member);
        let mine = Compare::value(key.clone(), CompareOp::Equal, self.me.text());
        let delete = TxnOp::delete(key, None::<DeleteOptions>);
        self.send(Txn::new().when([mine]).and_then([delete]))
            .await?;
        Ok(())
    }

    /// Leaves: no survivor has to wonder what became of this process.
    pub async fn strike_off(&self) -> Result<(), Lost> {
        let delete = TxnOp::delete(self.keys.node(&self.me), None::<DeleteOptions>);
        self.send(Txn::new().and_then([delete])).await?;
        Ok(())
    }

    /// Takes the claims of a member away whose lease has ended.
    pub async fn bury(&self, dead: &Owner) -> Result<usize, Lost> {
        let claims = self.all_claims().await?;
        let theirs: Vec<Name> = claims
            .into_iter()
            .filter_map(|(name, owner, _)| (owner == *dead).then_some(name))
            .collect();
        let mut keys: Vec<String> = theirs
            .iter()
            .map(|&name| self.keys.claim(name, dead))
            .collect();
        // The last: as long as it is there, something is left to do.
        keys.push(self.keys.node(dead));
        for some in keys.chunks(DELETE_MAX) {
            let key = self.keys.member(&dead.member);
            // Its name may be another's by now, its lease is not; and we must be alive ourselves.
            let is_dead = Compare::lease(key, CompareOp::NotEqual, dead.lease);
            let deletes: Vec<TxnOp> = some
                .iter()
                .map(|key| TxnOp::delete(key.as_str(), None::<DeleteOptions>))
                .collect();
            let txn = Txn::new()
                .when([is_dead, self.still_member()])
                .and_then(deletes);
            if !self.send(txn).await?.succeeded() {
                return Err(Lost::Membership);
            }
        }
        Ok(theirs.len())
    }

    fn claims(&self, get: &GetResponse, revision: i64) -> Result<Claims, Lost> {
        let entry = |pair: &KeyValue| {
            let Some(Key::Lock(_, owner)) = self.keys.parse(pair.key()) else {
                return Err(garbage(pair));
            };
            let claim = Claim::parse(pair.value()).ok_or_else(|| garbage(pair))?;
            Ok(Entry {
                owner,
                claim,
                created: pair.create_revision(),
            })
        };
        let entries = get.kvs().iter().map(entry).collect::<Result<_, _>>()?;
        Ok(Claims { revision, entries })
    }
}

/// Reads a change of a claim out of an event.
pub(super) fn change_of(
    pair: &KeyValue,
    name: Name,
    owner: Owner,
    put: bool,
) -> Result<Change, Lost> {
    let claim = if put {
        let claim = Claim::parse(pair.value()).ok_or_else(|| garbage(pair))?;
        Some((claim, pair.create_revision()))
    } else {
        None
    };
    Ok(Change {
        name,
        owner,
        revision: pair.mod_revision(),
        claim,
    })
}

pub(super) fn garbage(pair: &KeyValue) -> Lost {
    Lost::Garbage(String::from_utf8_lossy(pair.key()).into_owned())
}

/// The first key that does not begin with `prefix`, which ends in a slash.
pub(super) fn prefix_end(prefix: &str) -> String {
    format!("{}0", prefix.trim_end_matches('/'))
}
