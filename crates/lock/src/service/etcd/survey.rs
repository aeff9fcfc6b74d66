//! What etcd knows of a volume's nodes and locks, for people.
//!
//! *Owns*: one reading of all keys at one revision, and what follows from their order.
//!
//! *Does not own*: what only a node itself knows: its threads, what it is busy with ([`crate::Space::report`]).

use std::collections::BTreeMap;
use std::time::Duration;

use etcd_client::{Client, GetOptions, KeyValue};
use pinfold_base::Errno;

use super::Etcd;
use super::keys::{Claim, Key, Keys, Owner};
use super::process::Process;
use super::start::volume_of;
use super::wire::{PAGE, prefix_end};
use crate::mode::Mode;
use crate::service::{JoinError, Name, Wait};

/// Leases that are asked for how long they last; of more members it is not told.
const LEASES_MAX: usize = 1024;

/// A volume at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// What the first node said which volume it is.
    pub volume: String,
    /// Of which revision of etcd all this is.
    pub revision: i64,
    /// By name; of one name the living first.
    pub nodes: Vec<NodeReport>,
    /// By name.
    pub locks: Vec<LockReport>,
    /// Keys under the prefix that are none of ours, or whose values make no sense: nodes withdraw when they see them.
    pub strange: Vec<String>,
}

/// One life of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeReport {
    /// Its name.
    pub name: String,
    /// Its lease: a member of that name in another life has another.
    pub lease_id: i64,
    /// Whether its lease goes on. If not, it is dead, and its claims wait for a survivor to take them away.
    pub alive: bool,
    /// The lease, where it could be asked for.
    pub lease: Option<LeaseReport>,
    /// On which host it said it runs.
    pub host: Option<String>,
    /// As which process.
    pub pid: Option<u32>,
    /// Since when it is a member, by its host's clock, in seconds since 1970.
    pub since: Option<u64>,
    /// Locks that it holds.
    pub holds: usize,
    /// Locks that it waits for.
    pub waits: usize,
    /// Who runs a fence command for it.
    pub fenced_by: Option<String>,
}

/// How long a lease lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseReport {
    /// From one renewal on.
    pub granted: Duration,
    /// From now on.
    pub left: Duration,
}

/// One lock and its queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockReport {
    /// Which.
    pub name: Name,
    /// In their order.
    pub claims: Vec<ClaimReport>,
}

/// A place in a lock's queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimReport {
    /// Whose.
    pub node: String,
    /// In which of its lives.
    pub lease_id: i64,
    /// The mode that it has or wants.
    pub mode: Mode,
    /// What if it had to wait.
    pub wait: Wait,
    /// The fencing token that it has or will have.
    pub token: u64,
    /// Whether the owner is alive.
    pub alive: bool,
    /// The places, from 0, of those that keep it from being granted; empty if it is granted.
    pub behind: Vec<usize>,
}

impl ClaimReport {
    /// Tells whether the owner has the lock.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.behind.is_empty()
    }
}

pub(super) fn survey(etcd: &Etcd) -> Result<Survey, JoinError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| JoinError::new(Errno::from(&error), format!("no event loop: {error}")))?;
    runtime.block_on(async {
        let mut client = etcd.connect().await?;
        let keys = Keys::new(&etcd.prefix);
        let (revision, pairs) = read_all(etcd, &mut client, &keys).await?;
        let mut survey = sort_out(etcd, &keys, revision, &pairs)?;
        ask_leases(etcd, &mut client, &mut survey.nodes).await;
        Ok(survey)
    })
}

/// Reads all keys of the volume as they were at one revision.
async fn read_all(
    etcd: &Etcd,
    client: &mut Client,
    keys: &Keys,
) -> Result<(i64, Vec<KeyValue>), JoinError> {
    let end = prefix_end(&keys.root);
    let mut from = keys.root.clone().into_bytes();
    let mut pairs = Vec::new();
    let mut revision = 0;
    loop {
        let options = GetOptions::new()
            .with_range(end.clone())
            .with_revision(revision)
            .with_limit(PAGE);
        let get = client.get(from.clone(), Some(options));
        let mut get = match tokio::time::timeout(etcd.patience_at_start(), get).await {
            Ok(Ok(get)) => get,
            Ok(Err(error)) => return Err(etcd.unreachable(&error)),
            Err(_late) => return Err(etcd.silent()),
        };
        if revision == 0 {
            revision = get.header().map_or(0, |header| header.revision());
        }
        let more = get.more();
        pairs.extend(get.take_kvs());
        match pairs.last() {
            Some(last) if more => {
                from = last.key().to_vec();
                from.push(0);
            }
            _ => return Ok((revision, pairs)),
        }
    }
}

fn sort_out(
    etcd: &Etcd,
    keys: &Keys,
    revision: i64,
    pairs: &[KeyValue],
) -> Result<Survey, JoinError> {
    let prefix = &etcd.prefix;
    if pairs.is_empty() {
        let why = format!("nothing is kept in etcd under {prefix}: no node ever served it there");
        return Err(JoinError::new(Errno::ENOENT, why));
    }
    let mut volume = None;
    let mut nodes: BTreeMap<(String, bool, i64), NodeReport> = BTreeMap::new();
    let mut fences = BTreeMap::new();
    let mut locks: BTreeMap<Name, Vec<(i64, Owner, Claim)>> = BTreeMap::new();
    let mut strange = Vec::new();
    let mut members = BTreeMap::new();
    let mut processes = Vec::new();
    for pair in pairs {
        match keys.parse(pair.key()) {
            Some(Key::Volume) => {
                let kept = String::from_utf8_lossy(pair.value());
                volume = Some(volume_of(keys, &kept)?.to_owned());
            }
            Some(Key::Member(member)) => {
                members.insert(member, pair.lease());
            }
            Some(Key::Fence(member)) => {
                let by = String::from_utf8_lossy(pair.value());
                let by = by.rsplit_once('.').map_or(&*by, |(name, _)| name);
                fences.insert(member, by.to_owned());
            }
            Some(Key::Node(owner)) => match Process::parse(pair.value()) {
                Some(process) => processes.push((owner, process)),
                None => strange.push(String::from_utf8_lossy(pair.key()).into_owned()),
            },
            Some(Key::Lock(name, owner)) => match Claim::parse(pair.value()) {
                Some(claim) => {
                    let queue = locks.entry(name).or_default();
                    queue.push((pair.create_revision(), owner, claim));
                }
                None => strange.push(String::from_utf8_lossy(pair.key()).into_owned()),
            },
            None => strange.push(String::from_utf8_lossy(pair.key()).into_owned()),
        }
    }
    let Some(volume) = volume else {
        let why = format!("something else is kept in etcd under {prefix}: is the prefix right?");
        return Err(JoinError::new(Errno::EUCLEAN, why));
    };
    let mut node = |owner: &Owner| {
        let alive = members.get(&owner.member) == Some(&owner.lease);
        let key = (owner.member.clone(), !alive, owner.lease);
        nodes.entry(key).or_insert_with(|| NodeReport {
            name: owner.member.clone(),
            lease_id: owner.lease,
            alive,
            lease: None,
            host: None,
            pid: None,
            since: None,
            holds: 0,
            waits: 0,
            fenced_by: fences.get(&owner.member).filter(|_| !alive).cloned(),
        });
        (owner.member.clone(), !alive, owner.lease)
    };
    for (member, &lease) in &members {
        node(&Owner {
            member: member.clone(),
            lease,
        });
    }
    let processes: Vec<_> = processes
        .into_iter()
        .map(|(owner, process)| (node(&owner), process))
        .collect();
    let mut reports = Vec::with_capacity(locks.len());
    let mut owners = Vec::new();
    for (name, mut queue) in locks {
        queue.sort_by_key(|&(created, ..)| created);
        let mut claims: Vec<ClaimReport> = Vec::with_capacity(queue.len());
        for (place, (created, owner, claim)) in queue.iter().enumerate() {
            let behind: Vec<usize> = (0..place)
                .filter(|&earlier| !queue[earlier].2.mode.compatible(claim.mode))
                .collect();
            owners.push((node(owner), behind.is_empty()));
            claims.push(ClaimReport {
                node: owner.member.clone(),
                lease_id: owner.lease,
                mode: claim.mode,
                wait: claim.wait,
                token: created.unsigned_abs(),
                alive: members.get(&owner.member) == Some(&owner.lease),
                behind,
            });
        }
        reports.push(LockReport { name, claims });
    }
    for (key, process) in processes {
        if let Some(node) = nodes.get_mut(&key) {
            node.host = Some(process.host);
            node.pid = Some(process.pid);
            node.since = Some(process.since);
        }
    }
    for (key, holds) in owners {
        if let Some(node) = nodes.get_mut(&key) {
            *(if holds {
                &mut node.holds
            } else {
                &mut node.waits
            }) += 1;
        }
    }
    Ok(Survey {
        volume,
        revision,
        nodes: nodes.into_values().collect(),
        locks: reports,
        strange,
    })
}

/// Asks how long the members' leases last. What is not answered is not told.
async fn ask_leases(etcd: &Etcd, client: &mut Client, nodes: &mut [NodeReport]) {
    let living = nodes.iter_mut().filter(|node| node.alive).take(LEASES_MAX);
    for node in living {
        let ask = client.lease_time_to_live(node.lease_id, None);
        let Ok(Ok(lease)) = tokio::time::timeout(etcd.patience_at_start(), ask).await else {
            return;
        };
        // It ended meanwhile: it is told with less than nothing.
        let seconds = |count: i64| Duration::from_secs(u64::try_from(count).unwrap_or(0));
        node.lease = Some(LeaseReport {
            granted: seconds(lease.granted_ttl()),
            left: seconds(lease.ttl()),
        });
    }
}
