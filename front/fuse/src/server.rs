//! FUSE requests, answered by the volume.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use pinfold::{
    AllocateMode, Caller, Kind, Metadata, Node, OpenOptions, Owner, Seek, SetAttributes, SetXattr,
};

use crate::attributes::{
    PERMISSIONS, VALID, absent, decode_device, errno, file_attr, file_type, kind_of, set_time,
};
use crate::inodes::{Inodes, ROOT};
use crate::invalidator::{Invalidator, Written};
use crate::opens::{Directories, Files, OpenFile};
use crate::reply::Device;

/// Bytes of one request's data at most.
pub(crate) const TRANSFER_MAX: u32 = 1 << 20;
/// Requests the kernel may have under way on its own account (read-ahead, write-back).
const BACKGROUND_MAX: u16 = 64;
/// Bytes one copy request moves before it answers, so that no request holds a thread for long.
const COPY_MAX: u64 = 16 << 20;
/// The strictest alignment that direct transfers need, in bytes.
const ALIGN: usize = 4096;

/// The kernel's abilities that are used where it has them.
///
/// Not among them: truncation as part of the open (`FUSE_ATOMIC_O_TRUNC`), which the kernel sends before it has looked
/// whether the file is a running program; write-back caching, which would tell errors late.
const WANTED: [InitFlags; 12] = [
    // Many direct transfers under way at once.
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
    // The store applies the umask, or a default ACL instead of it.
    InitFlags::FUSE_DONT_MASK,
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    // Saves a request for an attribute on every write.
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    // Our own writes move the times: that is no reason to drop what the kernel has cached.
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_MAX_PAGES,
    InitFlags::FUSE_BIG_WRITES,
];

thread_local! {
    /// Aligned memory for direct transfers: requests arrive behind a header, at no particular address.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

type Answer<T> = Result<T, Errno>;

/// The filesystem as the protocol library sees it.
#[derive(Debug)]
pub(crate) struct Server {
    inodes: Inodes,
    files: Files,
    directories: Directories,
    device: Arc<Device>,
    invalidator: Arc<Invalidator>,
}

fn refused(error: pinfold::Error) -> Errno {
    match error.errno() {
        number @ (pinfold::Errno::EIO | pinfold::Errno::ESTALE | pinfold::Errno::ENOMEM) => {
            tracing::warn!(%error, "request failed");
            errno(number)
        }
        number => {
            tracing::debug!(%error, "request refused");
            errno(number)
        }
    }
}

/// Runs `work` with `len` bytes of memory aligned for direct transfers.
fn with_aligned<T>(len: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|buf| {
        let room = len + ALIGN;
        if buf.len() < room {
            buf.resize(room, 0);
        }
        let start = buf.as_ptr().align_offset(ALIGN).min(ALIGN);
        work(&mut buf[start..start + len])
    })
}

impl Server {
    pub(crate) fn new(root: Node, device: Arc<Device>, invalidator: Arc<Invalidator>) -> Self {
        Self {
            inodes: Inodes::new(root),
            files: Files::default(),
            directories: Directories::default(),
            device,
            invalidator,
        }
    }

    fn node(&self, number: INodeNo) -> Answer<Node> {
        self.inodes.get(number.0).ok_or(Errno::ESTALE)
    }

    fn file(&self, handle: FileHandle) -> Answer<Arc<OpenFile>> {
        self.files.get(handle.0).ok_or(Errno::EBADF)
    }

    /// Tells the kernel of a node.
    fn enter(&self, node: &Node) -> Answer<(fuser::FileAttr, Generation)> {
        let metadata = node.attributes().map_err(refused)?;
        Ok(self.enter_with(node, &metadata))
    }

    fn enter_with(&self, node: &Node, metadata: &Metadata) -> (fuser::FileAttr, Generation) {
        let number = self.inodes.tell(node);
        (
            file_attr(number, metadata),
            Generation(node.id().generation),
        )
    }

    fn answer_entry(&self, made: Answer<Node>, reply: ReplyEntry) {
        match made.and_then(|node| self.enter(&node)) {
            Ok((attr, generation)) => reply.entry(&VALID, &attr, generation),
            Err(error) => reply.error(error),
        }
    }

    fn set(
        &self,
        request: &Request,
        number: INodeNo,
        handle: Option<FileHandle>,
        set: &SetAttributes,
    ) -> Answer<Metadata> {
        let node = self.node(number)?;
        let mut rest = *set;
        if let Some(len) = set.len {
            // Through the handle where there is one: it may be open for writing where the mode no longer allows it.
            let open = handle.and_then(|handle| self.files.get(handle.0));
            if let Some(open) = open.filter(|open| open.file().access().write) {
                open.file().set_len(len).map_err(refused)?;
                rest.len = None;
            }
            self.drop_set_id_bits(request.uid(), &node);
        }
        node.set_attributes(&rest).map_err(refused)
    }

    /// Clears the set-user-id bits as a change of contents by somebody unprivileged does. Whether the caller has
    /// CAP_FSETID the protocol does not say; user 0 is taken to.
    fn drop_set_id_bits(&self, uid: u32, node: &Node) {
        if uid != 0
            && let Err(error) = node.clear_set_id_bits()
        {
            tracing::debug!(%error, "cannot clear set-id bits");
        }
    }

    fn open_file(&self, number: INodeNo, flags: i32) -> Answer<(u64, FopenFlags)> {
        let node = self.node(number)?;
        let options = options(flags)?.create(false).create_new(false);
        let file = node.open(&options).map_err(refused)?;
        let version = node.content_version();
        let cached = self.inodes.still_cached(number.0, version);
        let handle = self.files.insert(OpenFile::new(file));
        Ok((handle, cache_flags(cached, flags)))
    }

    fn make(
        &self,
        request: &Request,
        (parent, name): (INodeNo, &OsStr),
        (mode, umask, flags): (u32, u32, i32),
    ) -> Answer<(fuser::FileAttr, Generation, u64, FopenFlags)> {
        let dir = self.node(parent)?;
        let options = options(flags)?.mode(mode & PERMISSIONS);
        let made = dir.create(name, &options, owner(request, umask));
        let (node, file) = made.map_err(refused)?;
        let (attr, generation) = self.enter(&node)?;
        let cached = self.inodes.still_cached(attr.ino.0, node.content_version());
        let handle = self.files.insert(OpenFile::new(file));
        Ok((attr, generation, handle, cache_flags(cached, flags)))
    }

    fn read_direct(&self, open: &OpenFile, offset: u64, size: u32, reply: ReplyData) {
        let file = match open.way(true) {
            Ok(file) => file,
            Err(error) => return reply.error(refused(error)),
        };
        with_aligned(size as usize, |buf| match file.read_at(buf, offset) {
            Ok(done) => reply.data(&buf[..done]),
            Err(error) => reply.error(refused(error)),
        });
    }

    fn write_data(
        &self,
        open: &OpenFile,
        offset: u64,
        data: &[u8],
        direct: bool,
        whole: bool,
    ) -> pinfold::Result<usize> {
        let file = open.way(direct)?;
        if direct {
            return with_aligned(data.len(), |buf| {
                buf.copy_from_slice(data);
                file.write_at(buf, offset)
            });
        }
        let mut done = file.write_at(data, offset)?;
        // Page write-back has no caller who could go on where it stopped: the rest, or the error.
        while whole && done < data.len() {
            match file.write_at(&data[done..], offset + done as u64)? {
                0 => break,
                more => done += more,
            }
        }
        Ok(done)
    }

    fn copy(
        &self,
        from: &OpenFile,
        to: &OpenFile,
        at: (u64, u64),
        len: u64,
    ) -> pinfold::Result<u32> {
        let (from, to) = (from.way(false)?, to.way(false)?);
        let len = len.min(COPY_MAX);
        let mut buf = vec![0; len.min(u64::from(TRANSFER_MAX)) as usize];
        let mut done = 0;
        while done < len {
            let want = (len - done).min(buf.len() as u64) as usize;
            let moved = from
                .read_at(&mut buf[..want], at.0 + done)
                .and_then(|got| to.write_at(&buf[..got], at.1 + done));
            match moved {
                Ok(0) => break,
                Ok(n) => done += n as u64,
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        // At most COPY_MAX.
        Ok(done as u32)
    }

    /// Lists a directory; `add` takes an entry and tells whether the reply is full.
    fn list(
        &self,
        handle: FileHandle,
        offset: u64,
        mut add: impl FnMut(&Node, &pinfold::DirEntry) -> bool,
    ) -> Answer<()> {
        let open = self.directories.get(handle.0).ok_or(Errno::EBADF)?;
        let mut directory = open.lock();
        let node = directory.node().clone();
        directory.seek(offset).map_err(refused)?;
        while let Some(entry) = directory.peek().map_err(refused)? {
            if add(&node, entry) {
                break;
            }
            directory.advance();
        }
        Ok(())
    }

    /// Adds an entry with its attributes; tells whether the reply is full.
    fn add_plus(
        &self,
        dir: &Node,
        entry: &pinfold::DirEntry,
        reply: &mut ReplyDirectoryPlus,
    ) -> bool {
        if entry.name == "." || entry.name == ".." {
            // The kernel takes the number and the kind only, and counts no telling.
            let Ok(metadata) = dir.attributes() else {
                return false;
            };
            let attr = file_attr(entry.inode, &metadata);
            return reply.add(
                attr.ino,
                entry.next,
                &entry.name,
                &VALID,
                &attr,
                Generation(0),
            );
        }
        // An entry that is gone since the listing was read is left out, as if it had gone before.
        let Ok((node, metadata)) = dir.lookup_attributes(&entry.name) else {
            return false;
        };
        let (attr, generation) = self.enter_with(&node, &metadata);
        let full = reply.add(attr.ino, entry.next, &entry.name, &VALID, &attr, generation);
        if full {
            self.inodes.forget(attr.ino.0, 1);
        }
        full
    }
}

/// Translates the flags of an open. The kernel decides where an append goes and syncs by a request of its own.
fn options(flags: i32) -> Answer<OpenOptions> {
    let options = OpenOptions::from_flags(flags).map_err(refused)?;
    Ok(options.append(false).dsync(false).nofollow(false))
}

fn cache_flags(cached: bool, flags: i32) -> FopenFlags {
    if flags & libc::O_DIRECT != 0 {
        FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            | FopenFlags::FOPEN_KEEP_CACHE
    } else if cached {
        FopenFlags::FOPEN_KEEP_CACHE
    } else {
        FopenFlags::empty()
    }
}

fn owner(request: &Request, umask: u32) -> Owner {
    Owner::Caller(Caller {
        uid: request.uid(),
        gid: request.gid(),
        umask,
    })
}

fn answer_empty(outcome: Answer<()>, reply: ReplyEmpty) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

/// Answers a question about an extended attribute: its size if `size` is 0, else its value if that fits.
fn answer_xattr(value: Answer<Vec<u8>>, size: u32, reply: ReplyXattr) {
    match value {
        // At most 64 KiB.
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for Server {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in WANTED {
            if config.add_capabilities(wanted).is_err() {
                tracing::debug!(?wanted, "the kernel cannot");
            }
        }
        // Refusals name the nearest value that would do; what stands then is a default that works.
        let _ = config.set_max_write(TRANSFER_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        if let Err(nearest) = config.set_max_readahead(TRANSFER_MAX) {
            let _ = config.set_max_readahead(nearest);
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let dir = match self.node(parent) {
            Ok(dir) => dir,
            Err(error) => return reply.error(error),
        };
        match dir.lookup_attributes(name) {
            Ok((node, metadata)) => {
                let (attr, generation) = self.enter_with(&node, &metadata);
                reply.entry(&VALID, &attr, generation);
            }
            // The kernel remembers for a moment that there is no such name.
            Err(error) if error.errno() == pinfold::Errno::ENOENT => {
                reply.entry(&VALID, &absent(), Generation(0));
            }
            Err(error) => reply.error(refused(error)),
        }
    }

    fn forget(&self, _request: &Request, number: INodeNo, lookups: u64) {
        self.inodes.forget(number.0, lookups);
    }

    fn getattr(
        &self,
        _request: &Request,
        number: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let node = self.node(number);
        match node.and_then(|node| node.attributes().map_err(refused)) {
            Ok(metadata) => reply.attr(&VALID, &file_attr(shown(number, &metadata), &metadata)),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _changed: Option<SystemTime>,
        handle: Option<FileHandle>,
        _created: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _backup: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttributes {
            permissions: mode.map(|mode| mode & PERMISSIONS),
            uid,
            gid,
            len: size,
            accessed: set_time(accessed),
            modified: set_time(modified),
        };
        match self.set(request, number, handle, &set) {
            Ok(metadata) => reply.attr(&VALID, &file_attr(shown(number, &metadata), &metadata)),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _request: &Request, number: INodeNo, reply: ReplyData) {
        let node = self.node(number);
        match node.and_then(|node| node.read_link().map_err(refused)) {
            Ok(target) => reply.data(target.as_encoded_bytes()),
            Err(error) => reply.error(error),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let made = self.node(parent).and_then(|dir| {
            let kind = kind_of(mode).ok_or(Errno::EINVAL)?;
            let (mode, rdev) = (mode & PERMISSIONS, decode_device(rdev));
            dir.make_node(name, kind, mode, rdev, owner(request, umask))
                .map_err(refused)
        });
        self.answer_entry(made, reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.node(parent).and_then(|dir| {
            dir.make_dir(name, mode & PERMISSIONS, owner(request, umask))
                .map_err(refused)
        });
        self.answer_entry(made, reply);
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let dir = self.node(parent);
        answer_empty(dir.and_then(|dir| dir.unlink(name).map_err(refused)), reply);
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let dir = self.node(parent);
        answer_empty(
            dir.and_then(|dir| dir.remove_dir(name).map_err(refused)),
            reply,
        );
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let made = self.node(parent).and_then(|dir| {
            dir.symlink(name, target.as_os_str(), owner(request, 0))
                .map_err(refused)
        });
        self.answer_entry(made, reply);
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        let outcome = self.node(parent).and_then(|dir| {
            let new_dir = self.node(new_parent)?;
            let flags = pinfold::RenameFlags::from_bits_retain(flags.bits());
            dir.rename(name, &new_dir, new_name, flags).map_err(refused)
        });
        answer_empty(outcome, reply);
    }

    fn link(
        &self,
        _request: &Request,
        number: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        let linked = self.node(number).and_then(|node| {
            let dir = self.node(new_parent)?;
            dir.link(&node, new_name).map_err(refused)?;
            Ok(node)
        });
        self.answer_entry(linked, reply);
    }

    fn open(&self, _request: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.open_file(number, flags.0) {
            Ok((handle, how)) => reply.opened(FileHandle(handle), how),
            Err(error) => reply.error(error),
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let flags = flags | libc::O_CREAT;
        match self.make(request, (parent, name), (mode, umask, flags)) {
            Ok((attr, generation, handle, how)) => {
                reply.created(&VALID, &attr, generation, FileHandle(handle), how);
            }
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let open = match self.file(handle) {
            Ok(open) => open,
            Err(error) => return reply.error(error),
        };
        // Only reads that a program waits for carry an owner: the others fill the kernel's pages.
        if lock_owner.is_none() {
            self.inodes.note_paged(number.0);
        } else if flags.0 & libc::O_DIRECT != 0 {
            return self.read_direct(&open, offset, size, reply);
        }
        match open
            .way(false)
            .and_then(|file| file.lend(offset, size as usize))
        {
            Ok(lease) => self.device.send(request, &lease, reply),
            Err(error) => reply.error(refused(error)),
        }
    }

    fn write(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let open = match self.file(handle) {
            Ok(open) => open,
            Err(error) => return reply.error(error),
        };
        // Write-back of mapped pages borrows any handle; a direct one would refuse a tail. What passes the kernel's
        // pages carries the owner of a program that waits.
        let write_back = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let past_pages = lock_owner.is_some() && !write_back;
        if !past_pages {
            self.inodes.note_paged(number.0);
        }
        if write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID)
            && let Ok(node) = self.node(number)
            && let Err(error) = node.clear_set_id_bits()
        {
            tracing::debug!(%error, uid = request.uid(), "cannot clear set-id bits");
        }
        let direct = past_pages && flags.0 & libc::O_DIRECT != 0;
        let outcome = self
            .write_data(&open, offset, data, direct, write_back)
            // At most TRANSFER_MAX.
            .map(|done| done as u32)
            .map_err(refused);
        if past_pages && self.inodes.is_paged(number.0) {
            let len = data.len();
            return self.invalidator.answer_after(Written {
                number,
                offset,
                len,
                outcome,
                reply,
            });
        }
        match outcome {
            Ok(done) => reply.written(done),
            Err(error) => reply.error(error),
        }
    }

    fn flush(
        &self,
        _request: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // Nothing to do at a close that is not the last: writes have been told their errors. The kernel asks no more.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let closed = self.files.remove(handle.0);
        drop(closed);
        reply.ok();
    }

    fn fsync(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        let outcome = self.file(handle).and_then(|open| {
            let file = open.file();
            let synced = if data_only {
                file.sync_data()
            } else {
                file.sync_all()
            };
            synced.map_err(refused)
        });
        answer_empty(outcome, reply);
    }

    fn opendir(&self, _request: &Request, number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let opened = self
            .node(number)
            .and_then(|node| node.open_dir().map_err(refused));
        match opened {
            Ok(directory) => {
                let handle = self.directories.insert(parking_lot::Mutex::new(directory));
                reply.opened(FileHandle(handle), FopenFlags::empty());
            }
            Err(error) => reply.error(error),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = self.list(handle, offset, |_, entry| {
            // Where the directory does not tell the kind, a wrong one would be worse than a guess that lstat corrects.
            let kind = file_type(entry.kind.unwrap_or(Kind::File));
            reply.add(INodeNo(entry.inode), entry.next, kind, &entry.name)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = self.list(handle, offset, |dir, entry| {
            self.add_plus(dir, entry, &mut reply)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn releasedir(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.directories.remove(handle.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        number: INodeNo,
        _handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        let node = self.node(number);
        answer_empty(
            node.and_then(|node| node.sync_dir().map_err(refused)),
            reply,
        );
    }

    fn statfs(&self, _request: &Request, number: INodeNo, reply: ReplyStatfs) {
        let node = self.node(number);
        match node.and_then(|node| node.statfs().map_err(refused)) {
            Ok(space) => reply.statfs(
                space.blocks,
                space.blocks_free,
                space.blocks_available,
                space.files,
                space.files_free,
                space.block_size,
                space.name_max,
                space.fragment_size,
            ),
            Err(error) => reply.error(error),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        number: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let flags = SetXattr::from_bits_retain(flags.cast_unsigned());
        let outcome = self.node(number).and_then(|node| {
            node.set_xattr(name, value, flags, owner(request, 0))
                .map_err(refused)
        });
        answer_empty(outcome, reply);
    }

    fn getxattr(
        &self,
        _request: &Request,
        number: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let node = self.node(number);
        let value = node.and_then(|node| node.xattr(name).map_err(refused));
        answer_xattr(value, size, reply);
    }

    fn listxattr(&self, _request: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        let node = self.node(number);
        let names = node.and_then(|node| node.xattr_names().map_err(refused));
        answer_xattr(names, size, reply);
    }

    fn removexattr(&self, _request: &Request, number: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let node = self.node(number);
        answer_empty(
            node.and_then(|node| node.remove_xattr(name).map_err(refused)),
            reply,
        );
    }

    fn ioctl(
        &self,
        _request: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let outcome = self.file(handle).and_then(|open| {
            let how = allocate_mode(mode).ok_or(Errno::EOPNOTSUPP)?;
            let end = offset.checked_add(length).ok_or(Errno::EFBIG)?;
            open.file().allocate(how, offset..end).map_err(refused)
        });
        answer_empty(outcome, reply);
    }

    fn lseek(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = self.file(handle).and_then(|open| {
            let what = match whence {
                libc::SEEK_DATA => Seek::Data,
                libc::SEEK_HOLE => Seek::Hole,
                _ => return Err(Errno::EINVAL),
            };
            let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
            open.file()
                .seek_to(what, offset)
                .map_err(refused)?
                .and_then(|found| i64::try_from(found).ok())
                .ok_or(Errno::ENXIO)
        });
        match found {
            Ok(offset) => reply.offset(offset),
            Err(error) => reply.error(error),
        }
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _number_in: INodeNo,
        handle_in: FileHandle,
        offset_in: u64,
        _number_out: INodeNo,
        handle_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let copied = self.file(handle_in).and_then(|from| {
            let to = self.file(handle_out)?;
            self.copy(&from, &to, (offset_in, offset_out), len)
                .map_err(refused)
        });
        match copied {
            Ok(done) => reply.written(done),
            Err(error) => reply.error(error),
        }
    }

    fn access(
        &self,
        _request: &Request,
        _number: INodeNo,
        _mask: fuser::AccessFlags,
        reply: ReplyEmpty,
    ) {
        // The kernel checks by the modes it knows; it asks no more after this.
        reply.error(Errno::ENOSYS);
    }
}

/// The inode number that stat(2) shows: the store's for the mounted directory, which the protocol calls 1.
fn shown(number: INodeNo, metadata: &Metadata) -> u64 {
    if number.0 == ROOT {
        metadata.id.inode
    } else {
        number.0
    }
}

fn allocate_mode(mode: i32) -> Option<AllocateMode> {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    const ZERO_KEEP: i32 = libc::FALLOC_FL_ZERO_RANGE | KEEP;
    match mode {
        0 => Some(AllocateMode::Extend),
        KEEP => Some(AllocateMode::KeepSize),
        PUNCH => Some(AllocateMode::Punch),
        ZERO => Some(AllocateMode::ZeroExtend),
        ZERO_KEEP => Some(AllocateMode::ZeroKeepSize),
        libc::FALLOC_FL_COLLAPSE_RANGE => Some(AllocateMode::Collapse),
        libc::FALLOC_FL_INSERT_RANGE => Some(AllocateMode::Insert),
        _ => None,
    }
}
