//! How far an operation came, and why it stopped.

/// The outcome of an operation that moves bytes: how many it moved, and what stopped it, if anything did.
///
/// Both matter at once: the caller advances by `done` even when `stop` is set. The POSIX rule
/// (bytes if any moved, else the error) is [`Progress::posix`] and stands nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "the caller has to advance by `done` even when the operation stopped"]
pub struct Progress<E> {
    /// Bytes moved, lowest first.
    pub done: u64,
    /// Why it came no further; `None` when it did all it was asked for, or met the end of the file.
    pub stop: Option<E>,
}

impl<E> Progress<E> {
    /// Describes an operation that ended of itself after `done` bytes.
    pub const fn complete(done: u64) -> Self {
        Self { done, stop: None }
    }

    /// Describes an operation that was stopped after `done` bytes.
    pub const fn stopped(done: u64, stop: E) -> Self {
        Self {
            done,
            stop: Some(stop),
        }
    }

    /// Applies the POSIX rule: the bytes if any moved, else the error.
    ///
    /// # Errors
    /// Returns `stop` when not a single byte moved.
    pub fn posix(self) -> Result<u64, E> {
        match self {
            Self {
                done: 0,
                stop: Some(stop),
            } => Err(stop),
            Self { done, .. } => Ok(done),
        }
    }

    /// Translates the reason.
    pub fn map_stop<F>(self, translate: impl FnOnce(E) -> F) -> Progress<F> {
        Progress {
            done: self.done,
            stop: self.stop.map(translate),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_win_over_the_error() {
        assert_eq!(Progress::stopped(5, "bad").posix(), Ok(5));
        assert_eq!(Progress::stopped(0, "bad").posix(), Err("bad"));
        assert_eq!(Progress::<&str>::complete(0).posix(), Ok(0));
    }
}
