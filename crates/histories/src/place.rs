//! What nodes work on: files behind one seam, whoever serves them.
//!
//! *Owns*: the trait [`Place`]; how a place travels to a node's process ([`Spec`]).
//!
//! *Does not own*: the calls that are made ([`crate::node`]).
//!
//! *Locking*: none.

pub mod files;
pub mod locked;

use std::path::{Path, PathBuf};
use std::time::Duration;

use pinfold_base::Errno;
use pinfold_lock::{LockService, Options, Space};
use serde::{Deserialize, Serialize};

use crate::Layout;
use crate::record::Way;
use locked::Plant;

/// Files that one node reads and writes, from any of its threads.
pub trait Place: Send + Sync {
    /// The ways that lead to this file.
    fn ways(&self, file: u32) -> &[Way];

    /// Reads a slot or a page, which begins at byte `at`; by a mapping, registers alone.
    ///
    /// # Errors
    /// What the call returns; the node is then done for.
    fn get(&self, way: Way, file: u32, at: u64, into: &mut [u8]) -> Result<(), Errno>;

    /// Writes a slot or a page.
    ///
    /// # Errors
    /// As [`Place::get`].
    fn put(&self, way: Way, file: u32, at: u64, from: &[u8]) -> Result<(), Errno>;

    /// Makes durable what was written to the file.
    ///
    /// # Errors
    /// As [`Place::get`].
    fn sync(&self, file: u32) -> Result<(), Errno>;

    /// Ends the node's work in good order.
    ///
    /// # Errors
    /// What kept it from storing everything, or from giving its locks up.
    fn leave(self: Box<Self>) -> Result<(), Errno>;
}

/// A place, by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spec {
    /// A directory that the kernel serves: the oracle; a mount, too.
    Kernel,
    /// A volume of this library's, in one process.
    Volume(Memory),
    /// Volumes of this library's on one directory, each a node with its glocks.
    Shared {
        /// How to reach the locks.
        service: Service,
        /// How each is opened.
        memory: Memory,
    },
    /// A directory that daemons of ours mount, each a node: real programs' way in.
    Mounted {
        /// How to reach the locks.
        service: Service,
        /// How each is started; faults are always served by its handler.
        memory: Memory,
    },
    /// Plain files with a small cache, each under its glock: the lock service alone.
    Locked {
        /// How to reach the locks.
        service: Service,
        /// What is wrong on purpose.
        plant: Plant,
    },
}

/// How a volume is opened.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Memory {
    /// Its budget, in bytes.
    pub bytes: u64,
    /// Whether faults are served by the thread that takes them.
    pub inline: bool,
}

/// How to reach the lock service.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Service {
    /// etcd's servers, as `HOST:PORT`.
    pub endpoints: Vec<String>,
    /// How long a node that cannot be heard keeps its locks, in milliseconds.
    pub lease_ms: u64,
    /// How long others wait after that.
    pub grace_ms: u64,
    /// The minimum hold, in milliseconds.
    pub hold_ms: u64,
}

impl Spec {
    /// Whether a node's death loses what it had cached.
    #[must_use]
    pub const fn is_volatile(&self) -> bool {
        !matches!(self, Self::Kernel)
    }

    /// Whether nobody sees half of a page that another node writes.
    #[must_use]
    pub const fn has_whole_pages(&self) -> bool {
        matches!(self, Self::Locked { .. })
    }

    /// The service that the nodes share locks through, if they do.
    #[must_use]
    pub const fn service(&self) -> Option<&Service> {
        match self {
            Self::Locked { service, .. }
            | Self::Shared { service, .. }
            | Self::Mounted { service, .. } => Some(service),
            Self::Kernel | Self::Volume(_) => None,
        }
    }

    /// The same, to change it.
    pub const fn service_mut(&mut self) -> Option<&mut Service> {
        match self {
            Self::Locked { service, .. }
            | Self::Shared { service, .. }
            | Self::Mounted { service, .. } => Some(service),
            Self::Kernel | Self::Volume(_) => None,
        }
    }

    /// Opens the place as node `node`.
    ///
    /// # Errors
    /// What keeps it from being opened, in words.
    pub fn open(&self, dir: &Path, layout: Layout, node: u32) -> anyhow::Result<Box<dyn Place>> {
        match self {
            Self::Kernel => Ok(Box::new(files::kernel(dir, layout)?)),
            Self::Volume(memory) => Ok(Box::new(files::volume(dir, layout, *memory)?)),
            // The daemon has joined.
            Self::Mounted { .. } => Ok(Box::new(files::mounted(dir, layout)?)),
            Self::Shared { service, memory } => {
                let space = service.join(node)?;
                Ok(Box::new(files::shared(dir, layout, *memory, space)?))
            }
            Self::Locked { service, plant } => {
                let space = service.join(node)?;
                Ok(Box::new(locked::Locked::open(dir, layout, space, *plant)?))
            }
        }
    }
}

impl Service {
    /// Becomes a member of the lock space of the run.
    ///
    /// # Errors
    /// What the service refuses with; a build without the feature `etcd`.
    pub fn join(&self, node: u32) -> anyhow::Result<Space> {
        let service = self.service()?;
        Ok(Space::join(
            &*service,
            &format!("node{node}"),
            self.options(),
        )?)
    }

    fn options(&self) -> Options {
        Options {
            hold: Duration::from_millis(self.hold_ms),
            workers: 2,
            ..Options::default()
        }
    }

    #[cfg(feature = "etcd")]
    fn service(&self) -> anyhow::Result<Box<dyn LockService>> {
        use pinfold_lock::service::etcd::Etcd;
        let endpoints: Vec<&str> = self.endpoints.iter().map(String::as_str).collect();
        Ok(Box::new(Etcd {
            lease: Duration::from_millis(self.lease_ms),
            grace: Duration::from_millis(self.grace_ms),
            ..Etcd::new(&endpoints, "/histories", "histories")
        }))
    }

    #[cfg(not(feature = "etcd"))]
    fn service(&self) -> anyhow::Result<Box<dyn LockService>> {
        anyhow::bail!("built without the feature etcd")
    }
}

/// Where a file of the run lies.
#[must_use]
pub fn path_of(dir: &Path, file: u32) -> PathBuf {
    dir.join(name_of(file))
}

fn name_of(file: u32) -> String {
    format!("file{file}")
}
