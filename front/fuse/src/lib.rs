//! A volume as a mounted filesystem: any program, no tricks, through FUSE.
//!
//! *Owns*: the translation between FUSE requests and the volume's nodes and files, inode numbers, file handles, the
//! mount itself.
//!
//! *Does not own*: names, data, caching, rights: the volume's, and the kernel's (`default_permissions`).
//!
//! *Locking*: tables of inodes and handles, never held across a call into the volume. Threads that serve requests wait
//! for the volume only; what waits for the kernel does so on threads of its own (`invalidator`, `growth`, `paging`). On a mount of
//! several nodes calls that change a mapped file wait for those; what the kernel's pages need is served meanwhile (`server::lanes`).
//!
//! What the kernel caches and why is docs/decisions/0003-fuse-kernel-cache.md. In short: ordinary opens go through the
//! kernel's page cache, written through, so that mappings and reads agree and an error comes from the write it belongs
//! to; direct opens by-pass that cache, and what it holds of a written range is invalidated before *and* after; the cache
//! survives an open unless the stored file was changed by somebody else.
//!
//! FUSE carries no request for `O_TMPFILE` that the protocol library knows: it is `EOPNOTSUPP` on the mount.
//! Collapsing and inserting ranges is refused by the kernel's FUSE itself. Record locks and flock(2) are the kernel's
//! own, among all processes that use the mount; on a mount of several nodes the store's (`locks`).

mod attributes;
mod growth;
mod inodes;
mod invalidator;
mod locks;
mod mount;
mod opens;
mod pages;
mod paging;
mod reply;
mod revoker;
mod server;

pub use mount::{
    MountError, MountOptions, Mounted, THREADS_MAX, Unmounted, detach_stale, is_mount_point, mount,
};
pub use revoker::Revoker;
