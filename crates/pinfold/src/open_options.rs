//! How a file is to be opened.

use pinfold_base::Errno;

use crate::error::{Error, Result};
use crate::file::Access;

/// Options for opening a file, as the flags of open(2).
///
/// The default opens for nothing: ask for reading, writing, or both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenOptions {
    access: Access,
    truncate: bool,
    create: bool,
    create_new: bool,
    nofollow: bool,
    mode: u32,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl OpenOptions {
    /// Starts with nothing allowed, and mode 0666 for files that are created.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            access: Access {
                read: false,
                write: false,
                append: false,
                direct: false,
                dsync: false,
            },
            truncate: false,
            create: false,
            create_new: false,
            nofollow: false,
            mode: 0o666,
        }
    }

    /// Takes them from the flags of open(2).
    ///
    /// Flags that concern descriptors or paths alone (`O_CLOEXEC`, `O_NOCTTY`, `O_NONBLOCK` …) mean nothing here.
    ///
    /// # Errors
    /// `EINVAL` for access mode 3, which Linux reserves.
    pub fn from_flags(flags: i32) -> Result<Self> {
        let (read, write) = match flags & libc::O_ACCMODE {
            libc::O_RDONLY => (true, false),
            libc::O_WRONLY => (false, true),
            libc::O_RDWR => (true, true),
            _ => return Err(Error::invalid("open", Errno::EINVAL)),
        };
        let has = |flag| flags & flag == flag;
        Ok(Self::new()
            .read(read)
            .write(write)
            .append(has(libc::O_APPEND))
            .direct(has(libc::O_DIRECT))
            // O_SYNC contains O_DSYNC.
            .dsync(has(libc::O_DSYNC))
            .truncate(has(libc::O_TRUNC))
            .create(has(libc::O_CREAT))
            .create_new(has(libc::O_CREAT | libc::O_EXCL))
            .nofollow(has(libc::O_NOFOLLOW)))
    }

    /// Allows reading.
    #[must_use]
    pub const fn read(mut self, read: bool) -> Self {
        self.access.read = read;
        self
    }

    /// Allows writing.
    #[must_use]
    pub const fn write(mut self, write: bool) -> Self {
        self.access.write = write;
        self
    }

    /// Makes every write go to the end of the file; allows writing.
    #[must_use]
    pub const fn append(mut self, append: bool) -> Self {
        self.access.append = append;
        self.access.write |= append;
        self
    }

    /// Cuts the file to no bytes when it is opened; needs writing.
    #[must_use]
    pub const fn truncate(mut self, truncate: bool) -> Self {
        self.truncate = truncate;
        self
    }

    /// Creates the file if there is none.
    #[must_use]
    pub const fn create(mut self, create: bool) -> Self {
        self.create = create;
        self
    }

    /// Creates the file and fails if there is one.
    #[must_use]
    pub const fn create_new(mut self, create_new: bool) -> Self {
        self.create_new = create_new;
        self
    }

    /// Reads and writes past the cache (`O_DIRECT`): ranges and memory have to be aligned.
    #[must_use]
    pub const fn direct(mut self, direct: bool) -> Self {
        self.access.direct = direct;
        self
    }

    /// Makes every write return only when its data is durable (`O_DSYNC`).
    #[must_use]
    pub const fn dsync(mut self, dsync: bool) -> Self {
        self.access.dsync = dsync;
        self
    }

    /// As [`OpenOptions::dsync`]; the times are not waited for.
    #[must_use]
    pub const fn sync(self, sync: bool) -> Self {
        self.dsync(sync)
    }

    /// Fails with `ELOOP` if the path's last component is a symbolic link.
    #[must_use]
    pub const fn nofollow(mut self, nofollow: bool) -> Self {
        self.nofollow = nofollow;
        self
    }

    /// Sets the permission bits for a file that is created, before the umask.
    #[must_use]
    pub const fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub(crate) const fn access(&self) -> Access {
        self.access
    }

    pub(crate) const fn wants_truncate(&self) -> bool {
        self.truncate
    }

    pub(crate) const fn wants_create(&self) -> bool {
        self.create || self.create_new
    }

    pub(crate) const fn wants_new(&self) -> bool {
        self.create_new
    }

    pub(crate) const fn follows_links(&self) -> bool {
        !(self.nofollow || self.create_new)
    }

    pub(crate) const fn create_mode(&self) -> u32 {
        self.mode
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_of_open_mean_what_they_mean_there() {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_SYNC | libc::O_CLOEXEC;
        let options = OpenOptions::from_flags(flags).unwrap();
        let same = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .create_new(true)
            .sync(true);
        assert_eq!(options, same);
        let append = OpenOptions::from_flags(libc::O_WRONLY | libc::O_APPEND).unwrap();
        assert!(append.access().append && !append.access().read);
        assert_eq!(
            OpenOptions::from_flags(3).unwrap_err().errno(),
            Errno::EINVAL
        );
    }
}
