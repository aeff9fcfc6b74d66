//! The requests one by one, as the protocol library hands them over ([`super::lanes`]): arguments in, one reply out.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, FopenFlags, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, TimeOrNow, WriteFlags,
};
use pinfold::{AllocateMode, Kind, Seek, SetAttributes, SetXattr};

use super::{
    Added, Asker, BACKGROUND_MAX, Server, TRANSFER_MAX, WANTED, allocate_mode, answer_empty,
    answer_write, answer_xattr, fill, owner, refused, shown,
};
use crate::attributes::{
    PERMISSIONS, absent, decode_device, file_attr, file_type, kind_of, set_time,
};
use crate::growth::Question;
use crate::invalidator::Written;
use crate::locks::Wish as LockWish;
use crate::pages::Wish;

#[allow(clippy::too_many_arguments, reason = "they are the protocol's")]
impl Server {
    pub(super) fn init(&self, config: &mut KernelConfig) {
        for wanted in WANTED {
            if config.add_capabilities(wanted).is_err() {
                tracing::debug!(?wanted, "the kernel cannot");
            }
        }
        if self.shared.is_some() {
            for (flag, whose) in [
                (InitFlags::FUSE_POSIX_LOCKS, "fcntl"),
                (InitFlags::FUSE_FLOCK_LOCKS, "flock"),
            ] {
                if config.add_capabilities(flag).is_err() {
                    tracing::warn!("locks of {whose} hold among the programs of this mount alone");
                }
            }
        }
        // Refusals name the nearest value that would do; what stands then is a default that works.
        let _ = config.set_max_write(TRANSFER_MAX);
        // Fills wait for glocks on shared mounts, and what is ahead counts: pages must be stored meanwhile.
        let background = if self.shared.is_some() {
            u16::MAX
        } else {
            BACKGROUND_MAX
        };
        let _ = config.set_max_background(background);
        if let Err(nearest) = config.set_max_readahead(TRANSFER_MAX) {
            let _ = config.set_max_readahead(nearest);
        }
    }

    pub(super) fn lookup(&self, _request: Asker, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let dir = match self.node(parent) {
            Ok(dir) => dir,
            Err(error) => return reply.error(error),
        };
        match dir.lookup_attributes(name) {
            Ok((node, metadata)) => {
                let (attr, generation) = self.enter_with(&node, &metadata);
                reply.entry(&self.valid(), &attr, generation);
            }
            // The kernel remembers for a moment that there is no such name.
            Err(error) if error.errno() == pinfold::Errno::ENOENT => {
                reply.entry(&self.valid(), &absent(), Generation(0));
            }
            Err(error) => reply.error(refused(error)),
        }
    }

    pub(super) fn forget(&self, _request: Asker, number: INodeNo, lookups: u64) {
        self.inodes.forget(number.0, lookups);
    }

    pub(super) fn getattr(
        &self,
        request: Asker,
        number: INodeNo,
        handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let node = self.node(number);
        let metadata = match node.and_then(|node| node.attributes().map_err(refused)) {
            Ok(metadata) => metadata,
            Err(error) => return reply.error(error),
        };
        let mut attr = file_attr(shown(number, &metadata), &metadata);
        // With a handle the kernel asks for itself, perhaps holding the inode's lock, and shows nobody the answer.
        // In this order: what begins to grow after the attributes were read is not in them.
        if handle.is_none()
            && let Some(growth) = self.inodes.growth(number.0)
            && let Some(seen) = growth.unsettled(request.pid, self.settler.wait_max())
        {
            attr.size = attr.size.min(seen.len);
            let question =
                Question::new(number, (growth, seen), attr, self.settler.wait_max(), reply);
            return self.settler.answer_settled(question);
        }
        reply.attr(&self.valid(), &attr);
    }

    pub(super) fn setattr(
        self: &Arc<Self>,
        request: Asker,
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
        let pages = size.and_then(|_| self.pages(number));
        let Some((paging, pages)) = pages else {
            return self.answer_set((request, number, handle), &set, reply);
        };
        // Until it is answered the kernel stores none of the file's pages, not for an invalidation either: a demotion waits
        // for this, which therefore must not wait for the glock.
        let server = Arc::clone(self);
        pages.ask(
            paging,
            Wish::Resize,
            Box::new(move |right| match right {
                Ok(()) => server.answer_set((request, number, handle), &set, reply),
                Err(error) => reply.error(error),
            }),
        );
    }

    pub(super) fn readlink(&self, _request: Asker, number: INodeNo, reply: ReplyData) {
        let node = self.node(number);
        match node.and_then(|node| node.read_link().map_err(refused)) {
            Ok(target) => reply.data(target.as_encoded_bytes()),
            Err(error) => reply.error(error),
        }
    }

    pub(super) fn mknod(
        &self,
        request: Asker,
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

    pub(super) fn mkdir(
        &self,
        request: Asker,
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

    pub(super) fn unlink(&self, _request: Asker, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let dir = self.node(parent);
        answer_empty(dir.and_then(|dir| dir.unlink(name).map_err(refused)), reply);
    }

    pub(super) fn rmdir(&self, _request: Asker, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let dir = self.node(parent);
        answer_empty(
            dir.and_then(|dir| dir.remove_dir(name).map_err(refused)),
            reply,
        );
    }

    pub(super) fn symlink(
        &self,
        request: Asker,
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

    pub(super) fn rename(
        &self,
        _request: Asker,
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

    pub(super) fn link(
        &self,
        _request: Asker,
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

    pub(super) fn open(
        &self,
        _request: Asker,
        number: INodeNo,
        flags: OpenFlags,
        reply: ReplyOpen,
    ) {
        match self.open_file(number, flags.0) {
            Ok((handle, how)) => reply.opened(FileHandle(handle), how),
            Err(error) => reply.error(error),
        }
    }

    pub(super) fn create(
        &self,
        request: Asker,
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
                reply.created(&self.valid(), &attr, generation, FileHandle(handle), how);
            }
            Err(error) => reply.error(error),
        }
    }

    pub(super) fn read(
        &self,
        request: Asker,
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
            if let Some((paging, pages)) = self.pages(number) {
                let bytes = offset..offset.saturating_add(u64::from(size));
                let device = Arc::clone(&self.device);
                let fill = move |right| fill(right, &device, &open, (request, offset, size), reply);
                return pages.ask(paging, Wish::Fill(bytes), Box::new(fill));
            }
        } else if flags.0 & libc::O_DIRECT != 0 {
            return self.read_direct(&open, offset, size, reply);
        }
        match open
            .way(false)
            .and_then(|file| file.lend(offset, size as usize))
        {
            Ok(lease) => self.device.send(request.unique, &lease, reply),
            Err(error) => reply.error(refused(error)),
        }
    }

    pub(super) fn write(
        &self,
        request: Asker,
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
            tracing::debug!(%error, uid = request.uid, "cannot clear set-id bits");
        }
        if let Some((paging, pages)) = self.pages(number) {
            return if past_pages {
                let end = offset.saturating_add(data.len() as u64);
                let append = flags.0 & libc::O_APPEND != 0;
                let bytes = if append {
                    // The end as it is while the kernel has pages; they are gone before others can move it.
                    open.file().node().known_len().unwrap_or(0)..u64::MAX
                } else {
                    offset..end
                };
                let how = (flags.0 & libc::O_DIRECT != 0, false, append);
                let done = pages.past(paging, bytes, || {
                    self.write_data(&open, (offset, data), how)
                });
                answer_write(done.map_err(refused), reply);
            } else {
                let done = pages.store(|| open.file().store_pages(data, offset).map_err(refused));
                // What is cut off lies behind the end, where other nodes have moved it.
                answer_write(done.map(|_| data.len()), reply);
            };
        }
        let direct = past_pages && flags.0 & libc::O_DIRECT != 0;
        let outcome = self
            .growing(
                (request, number, Some(handle)),
                (|| Ok(open.file().len()), offset + data.len() as u64),
                || self.write_data(&open, (offset, data), (direct, write_back, false)),
                |&done| offset + done as u64,
            )
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
        answer_write(outcome.map(|done| done as usize), reply);
    }

    pub(super) fn flush(
        &self,
        _request: Asker,
        number: INodeNo,
        _handle: FileHandle,
        lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        if let Some(locks) = &self.shared {
            locks.release(number, lock_owner);
            return reply.ok();
        }
        // Nothing to do at a close that is not the last: writes have been told their errors. The kernel asks no more.
        reply.error(Errno::ENOSYS);
    }

    pub(super) fn release(
        &self,
        _request: Asker,
        number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if let Some(growth) = self.inodes.growth(number.0) {
            growth.close(handle.0);
        }
        if let Some(locks) = &self.shared {
            locks.close(number, handle.0);
        }
        // The kernel sends this when nothing maps the file through this handle any more.
        if let Some(closed) = self.files.remove(handle.0)
            && closed.may_store()
            && let Some((_, pages)) = self.pages(number)
        {
            pages.end_writer();
        }
        reply.ok();
    }

    pub(super) fn getlk(
        &self,
        _request: Asker,
        number: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        _pid: u32,
        reply: ReplyLock,
    ) {
        let wish = LockWish {
            number,
            handle: handle.0,
            owner,
            kind,
            start,
            end,
        };
        let found = self.locks().and_then(|locks| {
            let node = self.node(number)?;
            locks.conflict(&node, &wish)
        });
        match found {
            // Who has it is another owner of ours at most: no number is one of a process here.
            Ok(Some((kind, range))) => {
                let last = range.end.checked_sub(1).filter(|_| range.end < u64::MAX);
                let last = last.unwrap_or(i64::MAX.unsigned_abs());
                reply.locked(range.start, last, kind, 0);
            }
            Ok(None) => reply.locked(0, 0, libc::F_UNLCK, 0),
            Err(error) => reply.error(error),
        }
    }

    pub(super) fn setlk(
        &self,
        request: Asker,
        number: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        _pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let wish = LockWish {
            number,
            handle: handle.0,
            owner,
            kind,
            start,
            end,
        };
        let found = self
            .locks()
            .and_then(|locks| Ok((locks, self.node(number)?)));
        match found {
            Ok((locks, node)) => locks.set(&node, wish, (request.pid, sleep), reply),
            Err(error) => reply.error(error),
        }
    }

    pub(super) fn fsync(
        &self,
        _request: Asker,
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

    pub(super) fn opendir(
        &self,
        _request: Asker,
        number: INodeNo,
        _flags: OpenFlags,
        reply: ReplyOpen,
    ) {
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

    pub(super) fn readdir(
        &self,
        _request: Asker,
        _number: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = self.list(handle, offset, |_, entry| {
            // Where the directory does not tell the kind, a wrong one would be worse than a guess that lstat corrects.
            let kind = file_type(entry.kind.unwrap_or(Kind::File));
            let full = reply.add(INodeNo(entry.inode), entry.next, kind, &entry.name);
            Ok(Added::of(full))
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    pub(super) fn readdirplus(
        &self,
        _request: Asker,
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

    pub(super) fn releasedir(
        &self,
        _request: Asker,
        _number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.directories.remove(handle.0);
        reply.ok();
    }

    pub(super) fn fsyncdir(
        &self,
        _request: Asker,
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

    pub(super) fn statfs(&self, _request: Asker, number: INodeNo, reply: ReplyStatfs) {
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

    pub(super) fn setxattr(
        &self,
        request: Asker,
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

    pub(super) fn getxattr(
        &self,
        _request: Asker,
        number: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let node = self.node(number);
        let value = node.and_then(|node| node.xattr(name).map_err(refused));
        answer_xattr(value, size, reply);
    }

    pub(super) fn listxattr(&self, _request: Asker, number: INodeNo, size: u32, reply: ReplyXattr) {
        let node = self.node(number);
        let names = node.and_then(|node| node.xattr_names().map_err(refused));
        answer_xattr(names, size, reply);
    }

    pub(super) fn removexattr(
        &self,
        _request: Asker,
        number: INodeNo,
        name: &OsStr,
        reply: ReplyEmpty,
    ) {
        let node = self.node(number);
        answer_empty(
            node.and_then(|node| node.remove_xattr(name).map_err(refused)),
            reply,
        );
    }

    pub(super) fn ioctl(
        &self,
        _request: Asker,
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

    pub(super) fn fallocate(
        &self,
        request: Asker,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let outcome = self.file(handle).and_then(|open| {
            let how = allocate_mode(mode).ok_or(Errno::EOPNOTSUPP)?;
            let end = offset.checked_add(length).ok_or(Errno::EFBIG)?;
            let reaches = match how {
                AllocateMode::Extend | AllocateMode::ZeroExtend => end,
                _ => 0,
            };
            self.growing(
                (request, number, Some(handle)),
                (|| Ok(open.file().len()), reaches),
                || {
                    self.past(number, offset..end, || {
                        open.file().allocate(how, offset..end)
                    })
                },
                |()| reaches,
            )
            .map_err(refused)
        });
        answer_empty(outcome, reply);
    }

    pub(super) fn lseek(
        &self,
        _request: Asker,
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

    pub(super) fn copy_file_range(
        &self,
        request: Asker,
        _number_in: INodeNo,
        handle_in: FileHandle,
        offset_in: u64,
        number_out: INodeNo,
        handle_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let copied = self.file(handle_in).and_then(|from| {
            let to = self.file(handle_out)?;
            let (from, to) = (
                from.way(false).map_err(refused)?,
                to.way(false).map_err(refused)?,
            );
            let end = offset_out.saturating_add(len);
            self.growing(
                (request, number_out, Some(handle_out)),
                (|| Ok(to.len()), end),
                || {
                    let copy = || self.copy(from, to, (offset_in, offset_out), len);
                    self.past(number_out, offset_out..end, copy)
                },
                |&done| offset_out + u64::from(done),
            )
            .map_err(refused)
        });
        match copied {
            Ok(done) => reply.written(done),
            Err(error) => reply.error(error),
        }
    }

    pub(super) fn access(
        &self,
        _request: Asker,
        _number: INodeNo,
        _mask: fuser::AccessFlags,
        reply: ReplyEmpty,
    ) {
        // The kernel checks by the modes it knows; it asks no more after this.
        reply.error(Errno::ENOSYS);
    }
}
