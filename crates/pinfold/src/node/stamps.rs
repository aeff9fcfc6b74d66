//! Sizes and times: the store's, the live ones of cached changes, and telling our own changes from somebody else's.
//!
//! *Locking*: `stamps` is held while the stored times are changed or read together with what is recorded of them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pinfold_base::Errno;
use pinfold_store::dir::namespace::{Change, Handle, Stat, TimeChange, Timestamp};

use super::watch::Quiet;
use super::{Data, Vnode, failed};
use crate::error::{Error, ErrorKind, Result};
use crate::inode::{Backing, Reload};
use crate::metadata::Metadata;

/// Times, and what the stored file said when nothing of ours was under way.
#[derive(Debug, Default)]
pub(super) struct Stamps {
    /// What somebody else's change would alter.
    seen: Option<Seen>,
    /// The time of change to report while the stored one is `seen`'s: write-back moves that, but is no change.
    changed: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    size: u64,
    modified: Timestamp,
    changed: Timestamp,
}

impl Seen {
    fn of(stat: &Stat) -> Self {
        Self {
            size: stat.size,
            modified: stat.modified,
            changed: stat.changed,
        }
    }
}

impl Vnode {
    /// Records what the store says after a change of ours that is no change of the contents.
    pub(super) fn record(&self, stat: &Stat) {
        self.record_in(&mut self.stamps.lock(), Some(stat));
    }

    pub(super) fn record_in(&self, stamps: &mut Stamps, stat: Option<&Stat>) {
        if let Some(stat) = stat {
            stamps.seen = Some(Seen::of(stat));
            stamps.changed = stat.changed;
        }
    }

    pub(super) fn change(
        self: &Arc<Self>,
        change: &Change,
        sets_modified: bool,
    ) -> std::result::Result<Metadata, Errno> {
        let mut stamps = self.stamps.lock();
        let stat = self.with(|handle| handle.change(change))?;
        if let Some(data) = self.data.get()
            && sets_modified
        {
            data.inode.forget_modified();
        }
        self.record_in(&mut stamps, Some(&stat));
        Ok(self.merge(&stamps, &stat, None))
    }

    pub(super) fn attributes(self: &Arc<Self>) -> std::result::Result<Metadata, Errno> {
        let mut quiet = self.data.get().and_then(|data| data.watch.quiet());
        let mut stat = self.with(Handle::stat)?;
        // Of a file that nobody has open the store knows best; of others the size is what their users made it. Where other
        // nodes may change it, they do so under its glock.
        if let (Some(data), Some(moment)) = (self.data.get(), quiet)
            && self.tree.space().is_none()
            && !data.inode.is_open()
            && data.watch.is_settled(moment)
            && self
                .stamps
                .lock()
                .seen
                .is_some_and(|seen| seen != Seen::of(&stat))
        {
            // Refused where newer data is cached: then that is what the file is, until somebody opens it.
            let _ = self.notice_strangers(data);
            quiet = data.watch.quiet();
            stat = self.handle.stat()?;
        }
        Ok(self.merge(&self.stamps.lock(), &stat, quiet))
    }

    /// Puts the live size and times over what the store said; `quiet` was asked before the store.
    fn merge(&self, stamps: &Stamps, stat: &Stat, quiet: Option<Quiet>) -> Metadata {
        let mut metadata = Metadata::from(stat);
        let Some(data) = self.data.get() else {
            return metadata;
        };
        metadata.len = data.inode.len();
        if data.inode.is_dirty() && metadata.len > 0 {
            // Some programs take a file without blocks for one that is all hole, and do not read it.
            metadata.blocks = metadata.blocks.max(8);
        }
        let settled = quiet.is_some_and(|quiet| data.watch.is_settled(quiet));
        let as_recorded = stamps.seen.is_some_and(|seen| seen.changed == stat.changed);
        let shared_and_clean = self.tree.space().is_some() && data.inode.modified().is_none();
        if (as_recorded || !settled) && !shared_and_clean {
            metadata.changed = stamps.changed.into();
        }
        if let Some(modified) = data.inode.modified() {
            metadata.modified = modified;
            metadata.changed = metadata.changed.max(modified);
        }
        metadata
    }

    /// Drops clean pages of a file that somebody else changed; refuses one that has newer data cached.
    pub(super) fn notice_strangers(self: &Arc<Self>, data: &Data) -> Result<()> {
        let Some(quiet) = data.watch.quiet().filter(|_| self.tree.space().is_none()) else {
            return Ok(());
        };
        let stamps = self.stamps.lock();
        // Under the lock: the end of a pass that puts the times right must not come between this look and the next.
        let stat = self.handle.stat().map_err(failed("open"))?;
        let now = Seen::of(&stat);
        let Some(seen) = stamps.seen.filter(|seen| *seen != now) else {
            return Ok(());
        };
        if !data.watch.is_settled(quiet) {
            return Ok(());
        }
        // Outside the lock: dropping pages may wait for transfers, whose end puts times right under it.
        let is_current = || data.watch.is_settled(quiet);
        drop(stamps);
        let reload = data.inode.reload(stat.size, is_current);
        let mut stamps = self.stamps.lock();
        let contents_same = seen.size == now.size && seen.modified == now.modified;
        match reload {
            Reload::NewerCached if !contents_same => {
                return Err(Error::new("open", ErrorKind::Stale));
            }
            // Looked at again when the file is opened next.
            Reload::Overtaken => return Ok(()),
            Reload::NewerCached => {}
            Reload::Done => {
                self.strangers.fetch_add(1, Ordering::AcqRel);
            }
        }
        if stamps.seen == Some(seen) {
            // Where only the time of change differs, an attribute was changed: that harms no cached data.
            self.record_in(&mut stamps, Some(&stat));
        }
        Ok(())
    }
}

impl Vnode {
    /// Stores what is dirty and the times, and forgets the live ones: a pass that ends later must not put them back. Called
    /// before the glock falls.
    pub(super) fn hand_over(&self) -> std::result::Result<(), Errno> {
        let Some(data) = self.data.get() else {
            return Ok(());
        };
        data.inode.hand_over()?;
        // Under the lock a pass sets times with.
        let _stamps = self.stamps.lock();
        data.inode.forget_modified();
        Ok(())
    }

    /// Reads size and times again, after other nodes may have changed them.
    pub(super) fn refresh(&self) -> std::result::Result<(), Errno> {
        let Some(data) = self.data.get() else {
            return Ok(());
        };
        if let Some(shared) = self.shared() {
            // Before anything is read: what another node still has under way must not come after that.
            let taken = data.inode.object().take_up(shared.glock.token().0);
            taken.map_err(|error| error.errno)?;
        }
        let quiet = data.watch.quiet();
        let stat = self.with(Handle::stat)?;
        data.inode.take_over(stat.size);
        self.record(&stat);
        if let Some(quiet) = quiet {
            data.watch.settle(quiet);
        }
        Ok(())
    }
}

impl Backing for Vnode {
    fn stored(&self) {
        let Some(data) = self.data.get() else {
            return;
        };
        if self.tree.check().is_err() {
            // They are another node's to set.
            return;
        }
        let mut stamps = self.stamps.lock();
        // Asked under the lock: a time that somebody set while this pass ended must not be moved back.
        let Some(modified) = data.inode.modified() else {
            return;
        };
        let quiet = data.watch.quiet();
        let in_place = stamps
            .seen
            .is_some_and(|seen| seen.modified == modified.into());
        if in_place && quiet.is_some_and(|quiet| data.watch.is_settled(quiet)) {
            return;
        }
        let change = Change {
            modified: TimeChange::At(modified.into()),
            ..Change::default()
        };
        // A store that does not let us set times (a file of somebody else's that we may write) has its own.
        let Ok(stat) = self.handle.change(&change).or_else(|_| self.handle.stat()) else {
            return;
        };
        stamps.changed = stamps.changed.max(modified.into());
        if let Some(quiet) = quiet.filter(|&quiet| data.watch.quiet() == Some(quiet)) {
            stamps.seen = Some(Seen::of(&stat));
            data.watch.settle(quiet);
        }
    }
}
