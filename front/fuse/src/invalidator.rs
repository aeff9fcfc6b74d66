//! Invalidating what the kernel has cached after a direct write, before the write is answered.
//!
//! The kernel drops its pages of a direct write's range before it sends the write. A read or a page fault in between
//! brings the old bytes back, and they would stay (SEMANTICS.md C-1, C-10); so the range is invalidated again when the bytes
//! are in the store, and only then the writer is told.
//!
//! An invalidation waits for pages that are locked by reads under way, and those wait for a thread of ours: so it must
//! never run on a thread that serves requests. One thread does nothing else. Its queue holds requests that the kernel
//! waits for, and is as short as the kernel's own list of those.

use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};

use fuser::{Errno, INodeNo, Notifier, ReplyWrite};

/// A write that has been carried out and not been answered.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) number: INodeNo,
    pub(crate) offset: u64,
    /// Bytes the write was to cover; the invalidation covers them whatever the outcome.
    pub(crate) len: usize,
    pub(crate) outcome: Result<u32, Errno>,
    pub(crate) reply: ReplyWrite,
}

impl Written {
    fn answer(self) {
        match self.outcome {
            Ok(done) => self.reply.written(done),
            Err(error) => self.reply.error(error),
        }
    }
}

/// The way to the thread that invalidates.
#[derive(Debug, Default)]
pub(crate) struct Invalidator(OnceLock<Sender<Written>>);

impl Invalidator {
    /// Starts the thread; it ends with this.
    pub(crate) fn start(&self, notifier: Notifier) -> std::io::Result<()> {
        let (sender, written) = channel();
        std::thread::Builder::new()
            .name("pinfold-inval".into())
            .spawn(move || run(&notifier, &written))?;
        // Started once for each session.
        let _ = self.0.set(sender);
        Ok(())
    }

    /// Invalidates what the write covered, then answers it.
    pub(crate) fn answer_after(&self, written: Written) {
        let Some(sender) = self.0.get() else {
            return written.answer();
        };
        if let Err(unsent) = sender.send(written) {
            unsent.0.answer();
        }
    }
}

fn run(notifier: &Notifier, written: &Receiver<Written>) {
    for write in written {
        // Offsets and lengths came from the kernel as numbers that fit.
        let offset = i64::try_from(write.offset).unwrap_or(0);
        let len = i64::try_from(write.len).unwrap_or(0);
        if let Err(error) = notifier.inval_inode(write.number, offset, len) {
            tracing::warn!(%error, "cannot invalidate the kernel's pages");
        }
        write.answer();
    }
}
