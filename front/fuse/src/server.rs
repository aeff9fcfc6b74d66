//! FUSE requests, answered by the volume.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{
    Errno, FileHandle, FopenFlags, Generation, INodeNo, InitFlags, ReplyAttr, ReplyData,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyWrite, ReplyXattr,
};
use pinfold::{AllocateMode, Caller, File, Metadata, Node, OpenOptions, Owner, SetAttributes};

use crate::attributes::{PERMISSIONS, VALID, errno, file_attr};
use crate::growth::{Grower, Settler};
use crate::inodes::{Inodes, ROOT};
use crate::invalidator::Invalidator;
use crate::locks::Locks;
use crate::opens::{Directories, Files, OpenFile};
use crate::pages::Pages;
use crate::paging::Paging;
use crate::reply::Device;

mod lanes;
mod requests;

pub(crate) use lanes::Lanes;

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
    inodes: Arc<Inodes>,
    files: Files,
    directories: Directories,
    device: Arc<Device>,
    invalidator: Arc<Invalidator>,
    settler: Arc<Settler>,
    /// Where other nodes change the files too: the locks of programs here.
    shared: Option<Arc<Locks>>,
    /// There too, once the session's kernel is known: who deals with it about pages.
    paging: OnceLock<Arc<Paging>>,
}

/// Who makes a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asker {
    unique: u64,
    uid: u32,
    gid: u32,
    pid: u32,
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
    pub(crate) fn new(
        inodes: Arc<Inodes>,
        device: Arc<Device>,
        invalidator: Arc<Invalidator>,
        settler: Arc<Settler>,
        shared: Option<Arc<Locks>>,
    ) -> Self {
        Self {
            inodes,
            files: Files::default(),
            directories: Directories::default(),
            device,
            invalidator,
            settler,
            shared,
            paging: OnceLock::new(),
        }
    }

    /// Takes who deals with the kernel about shared files' pages, before the first request.
    pub(crate) fn set_paging(&self, paging: Arc<Paging>) {
        // A server has one session.
        let _ = self.paging.set(paging);
    }

    /// Returns what the kernel may have of a file that other nodes use too; `None` on other mounts.
    fn pages(&self, number: INodeNo) -> Option<(&Arc<Paging>, Arc<Pages>)> {
        let paging = self.paging.get()?;
        Some((paging, self.inodes.pages(number.0)?))
    }

    /// Carries out a call that changes `bytes` past the kernel's pages, of which none are there meanwhile on a shared mount.
    fn past<T>(&self, number: INodeNo, bytes: Range<u64>, work: impl FnOnce() -> T) -> T {
        match self.pages(number) {
            Some((paging, pages)) => pages.past(paging, bytes, work),
            None => work(),
        }
    }

    /// Returns how long the kernel may use names and attributes without asking. Of what other nodes change it may not: nobody
    /// tells it in time.
    fn valid(&self) -> Duration {
        if self.shared.is_some() {
            Duration::ZERO
        } else {
            VALID
        }
    }

    fn node(&self, number: INodeNo) -> Answer<Node> {
        self.inodes.get(number.0).ok_or(Errno::ESTALE)
    }

    fn locks(&self) -> Answer<&Arc<Locks>> {
        self.shared.as_ref().ok_or(Errno::ENOSYS)
    }

    fn file(&self, handle: FileHandle) -> Answer<Arc<OpenFile>> {
        self.files.get(handle.0).ok_or(Errno::EBADF)
    }

    /// Carries out a request that may make a file grow from `len` bytes to `end`. `work` tells how far it reaches then.
    fn growing<T, E>(
        &self,
        (request, number, handle): (Asker, INodeNo, Option<FileHandle>),
        (len, end): (impl FnOnce() -> Result<u64, E>, u64),
        work: impl FnOnce() -> Result<T, E>,
        reached: impl FnOnce(&T) -> u64,
    ) -> Result<T, E> {
        if self.shared.is_some() {
            // Reads of shared files pass the kernel's idea of a size by. Nor is one asked for: that would take the glock in
            // SH, and `work` in EX right after, a second hand-over for each write of a contended file.
            return work();
        }
        let len = len()?;
        let growth = (end > len).then(|| self.inodes.growth(number.0)).flatten();
        let Some(growth) = growth else {
            return work();
        };
        let by = Grower {
            thread: request.pid,
            handle: handle.map(|handle| handle.0),
        };
        growth.begin(by, len);
        let outcome = work();
        growth.end(outcome.as_ref().map_or(0, reached));
        outcome
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
            Ok((attr, generation)) => reply.entry(&self.valid(), &attr, generation),
            Err(error) => reply.error(error),
        }
    }

    fn set(
        &self,
        request: Asker,
        number: INodeNo,
        handle: Option<FileHandle>,
        set: &SetAttributes,
    ) -> Answer<Metadata> {
        let node = self.node(number)?;
        let mut rest = *set;
        if let Some(len) = set.len {
            // It comes under the inode's lock: no call that grows the file is under way.
            if let Some(growth) = self.inodes.growth(number.0) {
                growth.settle();
            }
            // Through the handle where there is one: it may be open for writing where the mode no longer allows it.
            let open = handle.and_then(|handle| self.files.get(handle.0));
            let open = open.filter(|open| open.file().access().write);
            let old = || match &open {
                _ if len == 0 => Ok(0),
                Some(open) => Ok(open.file().len()),
                None => node.attributes().map(|metadata| metadata.len),
            };
            let resize = SetAttributes {
                len: Some(len),
                ..SetAttributes::default()
            };
            self.growing(
                (request, number, handle),
                (old, len),
                || match &open {
                    Some(open) => open.file().set_len(len),
                    None => node.set_attributes(&resize).map(drop),
                },
                |()| len,
            )
            .map_err(refused)?;
            rest.len = None;
            self.drop_set_id_bits(request.uid, &node);
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
        let handle = self.opened(number, file);
        Ok((handle, self.cache_flags(cached, flags)))
    }

    /// Takes an open file up and returns its handle. The kernel may map it from the answer on.
    fn opened(&self, number: INodeNo, file: File) -> u64 {
        let open = OpenFile::new(file);
        if open.may_store()
            && let Some((paging, pages)) = self.pages(number)
        {
            pages.begin_writer(paging);
        }
        self.files.insert(open)
    }

    fn answer_set(
        &self,
        (request, number, handle): (Asker, INodeNo, Option<FileHandle>),
        set: &SetAttributes,
        reply: ReplyAttr,
    ) {
        match self.set(request, number, handle, set) {
            Ok(metadata) => reply.attr(
                &self.valid(),
                &file_attr(shown(number, &metadata), &metadata),
            ),
            Err(error) => reply.error(error),
        }
    }

    fn make(
        &self,
        request: Asker,
        (parent, name): (INodeNo, &OsStr),
        (mode, umask, flags): (u32, u32, i32),
    ) -> Answer<(fuser::FileAttr, Generation, u64, FopenFlags)> {
        let dir = self.node(parent)?;
        let options = options(flags)?.mode(mode & PERMISSIONS);
        let made = dir.create(name, &options, owner(request, umask));
        let (node, file) = made.map_err(refused)?;
        let (attr, generation) = self.enter(&node)?;
        let cached = self.inodes.still_cached(attr.ino.0, node.content_version());
        let handle = self.opened(attr.ino, file);
        Ok((attr, generation, handle, self.cache_flags(cached, flags)))
    }

    fn cache_flags(&self, cached: bool, flags: i32) -> FopenFlags {
        if self.shared.is_some() {
            // Every read and write comes here. The kernel has pages for mappings alone. Not parallel: mmap(2) would wait for
            // such writes with the address space locked, in which the kernel may have to find the memory that is written.
            FopenFlags::FOPEN_DIRECT_IO
        } else if flags & libc::O_DIRECT != 0 {
            FopenFlags::FOPEN_DIRECT_IO
                | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
                | FopenFlags::FOPEN_KEEP_CACHE
        } else if cached {
            FopenFlags::FOPEN_KEEP_CACHE
        } else {
            FopenFlags::empty()
        }
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
        (offset, data): (u64, &[u8]),
        (direct, whole, append): (bool, bool, bool),
    ) -> pinfold::Result<usize> {
        if append {
            // Where the end is, other nodes change it; the kernel's idea of it is not asked for.
            let file = open.way(false)?;
            return file.append(data).map(|(_, done)| done);
        }
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

    fn copy(&self, from: &File, to: &File, at: (u64, u64), len: u64) -> pinfold::Result<u32> {
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

    /// Lists a directory; `add` takes an entry.
    ///
    /// What could be listed before an error is told, and the error by the next request: the kernel has counted what it was told
    /// of, and that request asks for names alone, as a rule, which may be had where attributes are not.
    fn list(
        &self,
        handle: FileHandle,
        offset: u64,
        mut add: impl FnMut(&Node, &pinfold::DirEntry) -> Answer<Added>,
    ) -> Answer<()> {
        let open = self.directories.get(handle.0).ok_or(Errno::EBADF)?;
        let mut directory = open.lock();
        let node = directory.node().clone();
        directory.seek(offset).map_err(refused)?;
        let mut told = false;
        loop {
            let added = match directory.peek() {
                Ok(None) => return Ok(()),
                Ok(Some(entry)) => add(&node, entry),
                Err(error) => Err(refused(error)),
            };
            match added {
                Ok(Added::Yes) => told = true,
                Ok(Added::Gone) => {}
                Ok(Added::Full) => return Ok(()),
                // An answer without any entry would be the end of the directory.
                Err(_) if told => return Ok(()),
                Err(error) => return Err(error),
            }
            directory.advance();
        }
    }

    /// Adds an entry with its attributes.
    fn add_plus(
        &self,
        dir: &Node,
        entry: &pinfold::DirEntry,
        reply: &mut ReplyDirectoryPlus,
    ) -> Answer<Added> {
        if entry.name == "." || entry.name == ".." {
            // The kernel takes the number and the kind only, and counts no telling.
            let metadata = dir.attributes().map_err(refused)?;
            let attr = file_attr(entry.inode, &metadata);
            return Ok(Added::of(reply.add(
                attr.ino,
                entry.next,
                &entry.name,
                &self.valid(),
                &attr,
                Generation(0),
            )));
        }
        let (node, metadata) = match dir.lookup_attributes(&entry.name) {
            Ok(found) => found,
            // An entry that is gone since the listing was read is left out, as if it had gone before. Any other is there, and
            // a listing without it would be wrong.
            Err(error) if error.errno() == pinfold::Errno::ENOENT => return Ok(Added::Gone),
            Err(error) => return Err(refused(error)),
        };
        let (attr, generation) = self.enter_with(&node, &metadata);
        let full = reply.add(
            attr.ino,
            entry.next,
            &entry.name,
            &self.valid(),
            &attr,
            generation,
        );
        if full {
            self.inodes.forget(attr.ino.0, 1);
        }
        Ok(Added::of(full))
    }
}

/// What became of an entry of a listing.
enum Added {
    Yes,
    /// It is no entry any more.
    Gone,
    /// There was no room for it in the reply.
    Full,
}

impl Added {
    fn of(full: bool) -> Self {
        if full { Self::Full } else { Self::Yes }
    }
}

/// Translates the flags of an open. The kernel decides where an append goes and syncs by a request of its own.
fn options(flags: i32) -> Answer<OpenOptions> {
    let options = OpenOptions::from_flags(flags).map_err(refused)?;
    Ok(options.append(false).dsync(false).nofollow(false))
}

fn owner(request: Asker, umask: u32) -> Owner {
    Owner::Caller(Caller {
        uid: request.uid,
        gid: request.gid,
        umask,
    })
}

/// Fills pages of the kernel's, or says why not: then whoever touches them gets SIGBUS.
fn fill(
    right: Answer<()>,
    device: &Device,
    open: &OpenFile,
    (request, offset, size): (Asker, u64, u32),
    reply: ReplyData,
) {
    let lent = right.and_then(|()| {
        let file = open.way(false).map_err(refused)?;
        file.lend(offset, size as usize).map_err(refused)
    });
    match lent {
        // All of it is behind the end, which another node has moved. Empty, it would be a page of zeros to some kernels.
        Ok(lease) if lease.is_empty() => reply.error(Errno::EIO),
        Ok(lease) => device.send(request.unique, &lease, reply),
        Err(error) => reply.error(error),
    }
}

fn answer_write(outcome: Answer<usize>, reply: ReplyWrite) {
    match outcome {
        // At most TRANSFER_MAX.
        Ok(done) => reply.written(done as u32),
        Err(error) => reply.error(error),
    }
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
