//! Requests on their way from the protocol library to the server.
//!
//! On a shared mount most requests may wait for a glock, which other nodes give up at their leisure, and not before *their* kernel
//! has stored its pages through *their* daemon. So that there is always a thread for the requests that this one's kernel fills and
//! stores pages with, which wait for no glock, the others use all of the session's threads but a few; those for which none
//! is left are handed to threads of their own (H-6).
//!
//! *Owns*: how many of the session's threads may wait, the queue of requests for which none is left.
//!
//! *Does not own*: what a request does.
//!
//! *Locking*: one leaf.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, INodeNo, IoctlFlags, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use parking_lot::{Condvar, Mutex};

use super::{Asker, Server};

/// Threads of the session that wait for no glock.
const FREE: usize = 2;
/// Threads for requests that found none of the session's.
const EXTRA: usize = 8;

type Later = Box<dyn FnOnce(&Arc<Server>) + Send>;

/// The server, and who may wait in it.
pub(crate) struct Lanes {
    server: Arc<Server>,
    /// Where there are glocks to wait for.
    shared: Option<Arc<Shared>>,
}

struct Shared {
    /// Of the session's threads, those that may still begin to wait.
    left: AtomicUsize,
    /// As many as programs wait for.
    queue: Mutex<Queue>,
    filled: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Later>,
    ended: bool,
}

impl fmt::Debug for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.server.fmt(f)
    }
}

/// A place among the session's threads that may wait.
struct Place<'a>(Option<&'a Shared>);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.0 {
            shared.left.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Asker {
    fn of(request: &Request) -> Self {
        Self {
            unique: request.unique().0,
            uid: request.uid(),
            gid: request.gid(),
            pid: request.pid(),
        }
    }
}

impl Lanes {
    /// Makes the lanes of a session with so many threads.
    pub(crate) fn new(server: Arc<Server>, threads: usize, is_shared: bool) -> io::Result<Self> {
        let shared = is_shared.then(|| {
            Arc::new(Shared {
                left: AtomicUsize::new(threads.saturating_sub(FREE)),
                queue: Mutex::default(),
                filled: Condvar::new(),
            })
        });
        let lanes = Self { server, shared };
        if let Some(shared) = &lanes.shared {
            for _ in 0..EXTRA {
                let (shared, server) = (Arc::clone(shared), Arc::clone(&lanes.server));
                std::thread::Builder::new()
                    .name("pinfold-lane".into())
                    .spawn(move || shared.run(&server))?;
            }
        }
        Ok(lanes)
    }

    fn is_shared(&self) -> bool {
        self.shared.is_some()
    }

    /// Finds a place in this thread; `None` if it is one of those that must not wait.
    fn place(&self) -> Option<Place<'_>> {
        let Some(shared) = &self.shared else {
            return Some(Place(None));
        };
        let taken = shared
            .left
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| {
                left.checked_sub(1)
            });
        taken.is_ok().then(|| Place(Some(shared)))
    }

    fn later(&self, work: Later) {
        let Some(shared) = &self.shared else {
            return work(&self.server);
        };
        shared.queue.lock().waiting.push_back(work);
        shared.filled.notify_one();
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            shared.queue.lock().ended = true;
            shared.filled.notify_all();
        }
    }
}

impl Shared {
    fn run(&self, server: &Arc<Server>) {
        loop {
            let next = {
                let mut queue = self.queue.lock();
                loop {
                    if let Some(next) = queue.waiting.pop_front() {
                        break next;
                    }
                    if queue.ended {
                        return;
                    }
                    self.filled.wait(&mut queue);
                }
            };
            next(server);
        }
    }
}

/// Has a request served here, or, if this thread must not wait, by another; what it borrows is copied then.
macro_rules! lane {
    ($lanes:ident, $request:ident, [$($borrowed:ident),*], |$server:ident, $asker:ident| $call:expr) => {{
        let $asker = Asker::of($request);
        if let Some(_place) = $lanes.place() {
            let $server = &$lanes.server;
            $call
        } else {
            $(let $borrowed = $borrowed.to_owned();)*
            $lanes.later(Box::new(move |$server: &Arc<Server>| {
                $(let $borrowed = &*$borrowed;)*
                $call
            }));
        }
    }};
}

impl Filesystem for Lanes {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.server.init(config);
        Ok(())
    }

    fn forget(&self, request: &Request, number: INodeNo, lookups: u64) {
        self.server.forget(Asker::of(request), number, lookups);
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        lane!(self, request, [name], |server, asker| server
            .lookup(asker, parent, name, reply));
    }

    fn getattr(
        &self,
        request: &Request,
        number: INodeNo,
        handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        lane!(self, request, [], |server, asker| server
            .getattr(asker, number, handle, reply));
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
        changed: Option<SystemTime>,
        handle: Option<FileHandle>,
        created: Option<SystemTime>,
        chgtime: Option<SystemTime>,
        backup: Option<SystemTime>,
        flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if size.is_some() && self.is_shared() {
            // What a demotion may wait for takes no lane.
            let asker = Asker::of(request);
            return self.server.setattr(
                asker, number, mode, uid, gid, size, accessed, modified, changed, handle, created,
                chgtime, backup, flags, reply,
            );
        }
        lane!(self, request, [], |server, asker| server.setattr(
            asker, number, mode, uid, gid, size, accessed, modified, changed, handle, created,
            chgtime, backup, flags, reply
        ));
    }

    fn readlink(&self, request: &Request, number: INodeNo, reply: ReplyData) {
        lane!(self, request, [], |server, asker| server
            .readlink(asker, number, reply));
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
        lane!(self, request, [name], |server, asker| server
            .mknod(asker, parent, name, mode, umask, rdev, reply));
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
        lane!(self, request, [name], |server, asker| server
            .mkdir(asker, parent, name, mode, umask, reply));
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        lane!(self, request, [name], |server, asker| server
            .unlink(asker, parent, name, reply));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        lane!(self, request, [name], |server, asker| server
            .rmdir(asker, parent, name, reply));
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        lane!(self, request, [name, target], |server, asker| server
            .symlink(asker, parent, name, target, reply));
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        lane!(self, request, [name, new_name], |server, asker| server
            .rename(
                asker, parent, name, new_parent, new_name, flags, reply
            ));
    }

    fn link(
        &self,
        request: &Request,
        number: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        lane!(self, request, [new_name], |server, asker| server
            .link(asker, number, new_parent, new_name, reply));
    }

    fn open(&self, request: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        lane!(self, request, [], |server, asker| server
            .open(asker, number, flags, reply));
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
        lane!(self, request, [name], |server, asker| server
            .create(asker, parent, name, mode, umask, flags, reply));
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
        if lock_owner.is_none() {
            // Pages of the kernel's.
            let asker = Asker::of(request);
            return self.server.read(
                asker, number, handle, offset, size, flags, lock_owner, reply,
            );
        }
        lane!(self, request, [], |server, asker| server.read(
            asker, number, handle, offset, size, flags, lock_owner, reply
        ));
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
        if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            // Pages of the kernel's.
            let asker = Asker::of(request);
            return self.server.write(
                asker,
                number,
                handle,
                offset,
                data,
                write_flags,
                flags,
                lock_owner,
                reply,
            );
        }
        lane!(self, request, [data], |server, asker| server.write(
            asker,
            number,
            handle,
            offset,
            data,
            write_flags,
            flags,
            lock_owner,
            reply
        ));
    }

    fn flush(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        lane!(self, request, [], |server, asker| server
            .flush(asker, number, handle, lock_owner, reply));
    }

    fn release(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        flush: bool,
        reply: ReplyEmpty,
    ) {
        lane!(self, request, [], |server, asker| server.release(
            asker, number, handle, flags, lock_owner, flush, reply
        ));
    }

    fn getlk(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        lane!(self, request, [], |server, asker| server.getlk(
            asker, number, handle, owner, start, end, kind, pid, reply
        ));
    }

    fn setlk(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        kind: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        lane!(self, request, [], |server, asker| server.setlk(
            asker, number, handle, owner, start, end, kind, pid, sleep, reply
        ));
    }

    fn fsync(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        lane!(self, request, [], |server, asker| server
            .fsync(asker, number, handle, data_only, reply));
    }

    fn opendir(&self, request: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        lane!(self, request, [], |server, asker| server
            .opendir(asker, number, flags, reply));
    }

    fn readdir(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        lane!(self, request, [], |server, asker| server
            .readdir(asker, number, handle, offset, reply));
    }

    fn readdirplus(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        lane!(self, request, [], |server, asker| server
            .readdirplus(asker, number, handle, offset, reply));
    }

    fn releasedir(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        lane!(self, request, [], |server, asker| server
            .releasedir(asker, number, handle, flags, reply));
    }

    fn fsyncdir(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        lane!(self, request, [], |server, asker| server
            .fsyncdir(asker, number, handle, data_only, reply));
    }

    fn statfs(&self, request: &Request, number: INodeNo, reply: ReplyStatfs) {
        lane!(self, request, [], |server, asker| server
            .statfs(asker, number, reply));
    }

    fn setxattr(
        &self,
        request: &Request,
        number: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        position: u32,
        reply: ReplyEmpty,
    ) {
        lane!(self, request, [name, value], |server, asker| server
            .setxattr(asker, number, name, value, flags, position, reply));
    }

    fn getxattr(
        &self,
        request: &Request,
        number: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        lane!(self, request, [name], |server, asker| server
            .getxattr(asker, number, name, size, reply));
    }

    fn listxattr(&self, request: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        lane!(self, request, [], |server, asker| server
            .listxattr(asker, number, size, reply));
    }

    fn removexattr(&self, request: &Request, number: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        lane!(self, request, [name], |server, asker| server
            .removexattr(asker, number, name, reply));
    }

    fn ioctl(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        flags: IoctlFlags,
        command: u32,
        input: &[u8],
        output_size: u32,
        reply: ReplyIoctl,
    ) {
        lane!(self, request, [input], |server, asker| server.ioctl(
            asker,
            number,
            handle,
            flags,
            command,
            input,
            output_size,
            reply
        ));
    }

    fn fallocate(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        lane!(self, request, [], |server, asker| server
            .fallocate(asker, number, handle, offset, length, mode, reply));
    }

    fn lseek(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        lane!(self, request, [], |server, asker| server
            .lseek(asker, number, handle, offset, whence, reply));
    }

    fn copy_file_range(
        &self,
        request: &Request,
        number_in: INodeNo,
        handle_in: FileHandle,
        offset_in: u64,
        number_out: INodeNo,
        handle_out: FileHandle,
        offset_out: u64,
        len: u64,
        flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        lane!(self, request, [], |server, asker| server.copy_file_range(
            asker, number_in, handle_in, offset_in, number_out, handle_out, offset_out, len, flags,
            reply
        ));
    }

    fn access(
        &self,
        request: &Request,
        number: INodeNo,
        mask: fuser::AccessFlags,
        reply: ReplyEmpty,
    ) {
        lane!(self, request, [], |server, asker| server
            .access(asker, number, mask, reply));
    }
}
