//! The least FUSE server there is: every read is a pread(2), every write a pwrite(2), and the kernel caches as it likes.
//!
//! It has the settings a good server would have, so that what is compared is the server's work and not its manners: large
//! requests, several threads, long lifetimes, the kernel's cache kept over opens, writes written through.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, WriteFlags,
};

const VALID: Duration = Duration::from_secs(3600);
/// Bytes of one request at most.
const TRANSFER_MAX: u32 = 1 << 20;
const BACKGROUND_MAX: u16 = 64;
const THREADS: usize = 4;
/// The one file's number.
const FILE: INodeNo = INodeNo(2);

/// One file of a directory, mounted.
#[derive(Debug)]
pub(super) struct Passthrough {
    name: String,
    file: File,
}

/// A running server; unmounts when dropped.
#[derive(Debug)]
pub(super) struct Serving {
    session: Option<fuser::BackgroundSession>,
}

impl Passthrough {
    /// Mounts a directory at `at` in which only the file `name` of `dir` is to be seen.
    pub(super) fn mount(dir: &Path, name: &str, at: &Path) -> io::Result<Serving> {
        let server = Self {
            name: name.to_owned(),
            file: File::options()
                .read(true)
                .write(true)
                .open(PathBuf::from(dir).join(name))?,
        };
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("passthrough".into()),
            MountOption::DefaultPermissions,
        ];
        config.n_threads = Some(THREADS);
        let session = Session::new(server, at, &config)?.spawn()?;
        Ok(Serving {
            session: Some(session),
        })
    }

    fn file_attr(&self) -> io::Result<FileAttr> {
        let metadata = self.file.metadata()?;
        Ok(attr(
            FILE,
            FileType::RegularFile,
            metadata.size(),
            metadata.blocks(),
        ))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(session) = self.session.take()
            && let Err(error) = session.umount_and_join()
        {
            eprintln!("pinfold: the passthrough mount: {error}");
        }
    }
}

fn attr(ino: INodeNo, kind: FileType, size: u64, blocks: u64) -> FileAttr {
    FileAttr {
        ino,
        size,
        blocks,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: if kind == FileType::Directory {
            0o755
        } else {
            0o644
        },
        nlink: 1,
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Passthrough {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // What the kernel does not have or allow stays as it is.
        let _ = config.set_max_write(TRANSFER_MAX);
        let _ = config.set_max_readahead(TRANSFER_MAX);
        let _ = config.set_max_background(BACKGROUND_MAX);
        for ability in [
            InitFlags::FUSE_MAX_PAGES,
            InitFlags::FUSE_BIG_WRITES,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
        ] {
            let _ = config.add_capabilities(ability);
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent != INodeNo::ROOT || name != OsStr::new(&self.name) {
            return reply.error(Errno::ENOENT);
        }
        match self.file_attr() {
            Ok(attr) => reply.entry(&VALID, &attr, Generation(0)),
            Err(error) => reply.error(error.into()),
        }
    }

    fn getattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        if ino == INodeNo::ROOT {
            return reply.attr(&VALID, &attr(ino, FileType::Directory, 0, 0));
        }
        match self.file_attr() {
            Ok(attr) => reply.attr(&VALID, &attr),
            Err(error) => reply.error(error.into()),
        }
    }

    fn open(&self, _request: &Request, _ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let direct = flags.0 & rustix::fs::OFlags::DIRECT.bits() as i32 != 0;
        let cache = if direct {
            FopenFlags::FOPEN_DIRECT_IO
        } else {
            FopenFlags::FOPEN_KEEP_CACHE
        };
        reply.opened(FileHandle(0), cache);
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        thread_local! {
            static BUF: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
        }
        BUF.with_borrow_mut(|buf| {
            buf.resize((size as usize).max(buf.len()), 0);
            match self.file.read_at(&mut buf[..size as usize], offset) {
                Ok(n) => reply.data(&buf[..n]),
                Err(error) => reply.error(error.into()),
            }
        });
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.file.write_at(data, offset) {
            // A request is at most TRANSFER_MAX long.
            Ok(n) => reply.written(n as u32),
            Err(error) => reply.error(error.into()),
        }
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        let synced = if data_only {
            self.file.sync_data()
        } else {
            self.file.sync_all()
        };
        match synced {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error.into()),
        }
    }
}
