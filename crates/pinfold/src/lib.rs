//! Files served by a page cache in this process: buffered and direct I/O over a directory, any buffer safe.
//!
//! *Owns*: the public door ([`Volume`], [`Node`], [`File`]), the order of locks on every path, sizes, times, and
//! what a call does when its buffer is not there.
//!
//! *Does not own*: raw system calls, page states, how bytes are stored.
//!
//! *Locking*: an inode's lock (class 1), in a volume with glocks its glock (2), then the gate (4), then folios (5); SEMANTICS.md section I has the table. User
//! memory is brought in with nothing held (rule zero, INV9).
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let scratch = tempfile::tempdir()?;
//! # let dir = scratch.path();
//! use pinfold::{OpenOptions, Volume};
//!
//! let volume = Volume::builder().memory(16 << 20).open_dir(dir)?;
//! let options = OpenOptions::new().read(true).write(true).create(true);
//! let file = volume.open("notes.txt", &options)?;
//! file.write_at(b"served from memory, kept in the directory", 0)?;
//! let mut buf = [0; 6];
//! assert_eq!(file.read_at(&mut buf, 12)?, 6);
//! assert_eq!(&buf, b"memory");
//! file.sync_all()?;
//! # drop(file);
//! volume.close()?;
//! # Ok(())
//! # }
//! ```

mod buffered;
mod direct;
mod directory;
mod engine;
mod error;
mod extents;
mod file;
mod inode;
mod io;
mod lent;
mod mapping;
mod metadata;
mod node;
mod open_options;
mod pending;
mod record_locks;
mod resize;
mod shared;
mod volume;

pub use directory::Directory;
pub use error::{Error, ErrorKind, Result};
pub use extents::{EXTENT_RECORD, Extents};
pub use file::{Access, File};
pub use io::{CALL_BYTES_MAX, Cancel, IoOptions};
pub use mapping::{Advice, MapAccess, MapOptions, Mapping, Pinned, Tracking};
pub use metadata::{Caller, Kind, Metadata, NodeId, Owner, SetAttributes, SetTime, Statfs};
pub use node::{Node, ObjectLayer, RenameFlags, SetXattr};
pub use open_options::OpenOptions;
pub use pending::{Completed, Pending};
pub use pinfold_base::{ByteOffset, Errno, PAGE_SIZE, PageIndex, Progress};
pub use pinfold_cache::{CacheSnapshot, Lease, MEMORY_MIN, PinKind, PinSite};
pub use pinfold_fault::FaultSnapshot;
pub use pinfold_mem::copy::install as install_fault_handler;
pub use pinfold_mem::forked::Process;
pub use pinfold_mem::sys::{write_unreadable, writev_spans};
pub use pinfold_mem::{
    AlignedBuf, Delivery, Direction, IoSpan, IovCursor, Privilege, RawSpan, faultin,
};
pub use pinfold_store::dir::namespace::DirEntry;
pub use pinfold_store::{Object, Seek, StoreError, TimeLimitSnapshot, testing};
pub use record_locks::{RecordLock, RecordLocks};
pub use resize::AllocateMode;
pub use shared::Demoted;

/// Glocks: what makes several nodes see one file ([`VolumeBuilder::glocks`]).
pub use pinfold_lock as glocks;

/// The engine's own locks and pins, for who measures them. Nothing is promised of any of it.
#[doc(hidden)]
pub mod protocols {
    pub use pinfold_cache::{Gate, schemes};
    pub use pinfold_mem::Segments;
    pub use pinfold_mem::lend::Limits;
}

pub use volume::{Capabilities, Statistics, Volume, VolumeBuilder};
