//! Taking pages of shared files away from the kernel before another node may change them.
//!
//! *Owns*: the way from a volume's demotions to a mount.
//!
//! *Does not own*: glocks, how pages are dropped ([`crate::pages`]).
//!
//! *Locking*: none. A demotion is waited with until the pages are gone; what that waits for takes no glock.

use std::sync::{Arc, OnceLock, Weak};

use pinfold::Demoted;

use crate::inodes::Inodes;
use crate::paging::Paging;

/// The way from a volume's demotions to the kernel. Made before the volume is opened, and given to the mount.
#[derive(Debug, Clone, Default)]
pub struct Revoker(Arc<OnceLock<Mount>>);

#[derive(Debug)]
struct Mount {
    inodes: Weak<Inodes>,
    paging: Weak<Paging>,
}

impl Revoker {
    /// What [`pinfold::VolumeBuilder::demoted`] is to call.
    #[must_use]
    pub fn demoted(&self) -> Demoted {
        let mount = Arc::clone(&self.0);
        Arc::new(move |id, to| {
            let Some(mount) = mount.get() else {
                return;
            };
            // Without a mount the kernel has nothing.
            let (inodes, paging) = (mount.inodes.upgrade(), mount.paging.upgrade());
            if let (Some(inodes), Some(paging)) = (inodes, paging)
                && let Some(pages) = inodes.pages_of(id)
            {
                drop(inodes);
                pages.demote(&paging, to);
            }
        })
    }

    /// Takes the mount, whose end is this one's.
    pub(crate) fn attach(&self, inodes: &Arc<Inodes>, paging: &Arc<Paging>) {
        // A second mount would have a revoker of its own.
        let _ = self.0.set(Mount {
            inodes: Arc::downgrade(inodes),
            paging: Arc::downgrade(paging),
        });
    }
}
