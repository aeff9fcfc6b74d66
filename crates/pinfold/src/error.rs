//! One error at the door: what was tried, on what, why it failed, and its number.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use pinfold_base::Errno;
use pinfold_cache::CacheError;
use pinfold_fault::SetupError;
use pinfold_mem::ArenaError;
use pinfold_mem::window::WindowError;
use pinfold_store::StoreError;

use crate::file::File;

/// Result of the public API.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, in kinds a caller may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A buffer is not accessible (`EFAULT`).
    BadBuffer,
    /// It would have to wait, and the caller asked not to (`EAGAIN`).
    WouldBlock,
    /// The caller's cancellation came first (`EINTR`).
    Interrupted,
    /// No page frame could be freed (`ENOMEM`).
    NoFrames,
    /// The process has as many mappings as vm.max_map_count allows (`ENOMEM`).
    MapCount {
        /// That many.
        limit: u64,
    },
    /// The program has pinned bytes that would have to go ([`Mapping::pin`](crate::Mapping::pin); `EBUSY`).
    Pinned,
    /// The file's glock was refused: the node has withdrawn (`EIO`), or the lock service failed.
    Glock(Errno),
    /// The store refused.
    Store(Errno),
    /// The name space refused: no such name, no permission, and the like.
    Name(Errno),
    /// Another engine serves this directory (`EBUSY`).
    AlreadyServed,
    /// An argument is not acceptable: a range, an alignment, a flag, a budget.
    Invalid(Errno),
    /// This process was forked from the one that opened the volume, and has no engine (`ENOTCONN`).
    Forked,
    /// The file was changed behind this engine's back while it held newer data (`ESTALE`).
    Stale,
}

/// An operation that failed.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    operation: &'static str,
    place: Option<Box<Place>>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

#[derive(Debug, Default)]
struct Place {
    path: Option<PathBuf>,
    range: Option<Range<u64>>,
}

impl Error {
    /// Describes a failed operation.
    #[must_use]
    pub fn new(operation: &'static str, kind: ErrorKind) -> Self {
        Self {
            kind,
            operation,
            place: None,
            source: None,
        }
    }

    /// Describes an unacceptable argument.
    #[must_use]
    pub fn invalid(operation: &'static str, errno: Errno) -> Self {
        Self::new(operation, ErrorKind::Invalid(errno))
    }

    /// Describes a refusal of the name space.
    #[must_use]
    pub fn name(operation: &'static str, errno: Errno) -> Self {
        Self::new(operation, ErrorKind::Name(errno))
    }

    /// Adds the path concerned.
    #[must_use]
    pub fn at_path(mut self, path: impl AsRef<Path>) -> Self {
        self.place.get_or_insert_default().path = Some(path.as_ref().to_owned());
        self
    }

    /// Adds the path that a file was opened by, where that is known.
    #[must_use]
    pub(crate) fn at_path_of(self, file: &File) -> Self {
        match file.path() {
            Some(path) => self.at_path(path),
            None => self,
        }
    }

    /// Adds the bytes concerned.
    #[must_use]
    pub fn at_range(mut self, range: Range<u64>) -> Self {
        self.place.get_or_insert_default().range = Some(range);
        self
    }

    /// Adds what caused it.
    #[must_use]
    pub fn caused_by(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }

    pub(crate) fn cache(operation: &'static str, error: CacheError) -> Self {
        match error {
            CacheError::Store(store) => Self::store(operation, store),
            CacheError::NoFrames => Self::new(operation, ErrorKind::NoFrames),
            CacheError::WouldBlock => Self::new(operation, ErrorKind::WouldBlock),
            CacheError::Interrupted => Self::new(operation, ErrorKind::Interrupted),
            CacheError::TooManyPins => Self::new(operation, ErrorKind::NoFrames).caused_by(error),
            CacheError::Refused(Errno::EBUSY) => Self::new(operation, ErrorKind::Pinned),
            CacheError::Refused(errno) => Self::new(operation, ErrorKind::Glock(errno)),
            CacheError::Window(errno) => Self::invalid(operation, errno).caused_by(error),
            CacheError::Unmappable(refused) => Self::window(operation, refused),
        }
    }

    fn window(operation: &'static str, error: WindowError) -> Self {
        let kind = match error {
            WindowError::MapCount { limit } => ErrorKind::MapCount { limit },
            other => ErrorKind::Invalid(other.errno()),
        };
        Self::new(operation, kind).caused_by(error)
    }

    pub(crate) fn setup(operation: &'static str, error: SetupError) -> Self {
        match error {
            SetupError::Window(refused) => Self::window(operation, refused),
            other => Self::invalid(operation, other.errno()).caused_by(other),
        }
    }

    pub(crate) fn store(operation: &'static str, error: StoreError) -> Self {
        let named = Self::new(operation, ErrorKind::Store(error.errno)).caused_by(error);
        if error.len == 0 {
            return named;
        }
        named.at_range(error.offset..error.offset.saturating_add(error.len))
    }

    pub(crate) fn arena(error: ArenaError) -> Self {
        Self::invalid("set up the frame arena", error.errno()).caused_by(error)
    }

    /// Returns the kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns what was tried.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        self.operation
    }

    /// Returns the path concerned, where one is known.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.place.as_ref()?.path.as_deref()
    }

    /// Returns the bytes concerned, where it is about some.
    #[must_use]
    pub fn range(&self) -> Option<Range<u64>> {
        self.place.as_ref()?.range.clone()
    }

    /// Returns the error number, as the system call of the same name would give it.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self.kind {
            ErrorKind::BadBuffer => Errno::EFAULT,
            ErrorKind::WouldBlock => Errno::EAGAIN,
            ErrorKind::Interrupted => Errno::EINTR,
            ErrorKind::NoFrames | ErrorKind::MapCount { .. } => Errno::ENOMEM,
            ErrorKind::Pinned => Errno::EBUSY,
            ErrorKind::AlreadyServed => Errno::EBUSY,
            ErrorKind::Stale => Errno::ESTALE,
            ErrorKind::Forked => Errno::ENOTCONN,
            ErrorKind::Glock(errno)
            | ErrorKind::Store(errno)
            | ErrorKind::Name(errno)
            | ErrorKind::Invalid(errno) => errno,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}", self.operation)?;
        if let Some(path) = self.path() {
            write!(f, " {}", path.display())?;
        }
        if let Some(range) = self.range() {
            write!(f, " (bytes {} to {})", range.start, range.end)?;
        }
        match self.kind {
            ErrorKind::BadBuffer => f.write_str(": the buffer is not accessible"),
            ErrorKind::WouldBlock => f.write_str(": it would have to wait"),
            ErrorKind::Interrupted => f.write_str(": it was cancelled"),
            ErrorKind::NoFrames => {
                f.write_str(": no page frame could be freed; all are dirty, pinned or in use")
            }
            ErrorKind::MapCount { limit } => write!(
                f,
                ": the process has as many mappings as vm.max_map_count allows: {limit}"
            ),
            ErrorKind::Pinned => f.write_str(": bytes that would go are pinned"),
            ErrorKind::AlreadyServed => {
                f.write_str(": another Pinfold serves this directory; stop it or serve another")
            }
            ErrorKind::Forked => f.write_str(
                ": this process was forked from the one that opened the volume; open it anew here",
            ),
            ErrorKind::Stale => {
                f.write_str(": it was changed by somebody else while newer data was cached here")
            }
            ErrorKind::Glock(errno) => write!(f, ": this node may not use it any more: {errno}"),
            ErrorKind::Store(errno) | ErrorKind::Name(errno) | ErrorKind::Invalid(errno) => {
                write!(f, ": {errno}")
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.source {
            Some(source) => Some(source.as_ref()),
            None => None,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        // The number is what callers of `io` interfaces look at; the text would be lost with it either way.
        io::Error::from_raw_os_error(error.errno().raw())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_names_operation_path_range_and_cause() {
        let error = Error::new("write", ErrorKind::BadBuffer)
            .at_path("a/b")
            .at_range(10..20);
        assert_eq!(
            error.to_string(),
            "cannot write a/b (bytes 10 to 20): the buffer is not accessible"
        );
        assert_eq!(error.errno(), Errno::EFAULT);
        assert_eq!(io::Error::from(error).raw_os_error(), Some(14));
    }
}
