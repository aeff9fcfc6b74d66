//! Options as the lock service takes them.

use anyhow::{Context, Result};
use pinfold::glocks::service::etcd::{Etcd, Fence, Survey, Tls};
use pinfold::glocks::{Options, Space};

use super::{Access, Membership};

fn service(access: Access, identity: String) -> Etcd {
    let tls = access.secure.then_some(Tls {
        authority: access.authority,
        identity: access.identity,
        domain: None,
    });
    Etcd {
        endpoints: access.endpoints,
        user: access.user,
        tls,
        ..Etcd::new(&[], &access.prefix, &identity)
    }
}

pub(super) fn connect(
    access: Access,
    membership: &Membership,
    name: &str,
    identity: String,
) -> Result<Space> {
    let fence = membership.fence.as_ref().map(|command| Fence {
        command: command.into(),
        limit: membership.fence_limit,
    });
    let service = Etcd {
        lease: membership.lease,
        grace: membership.grace,
        fence,
        ..service(access, identity)
    };
    let options = Options {
        hold: membership.hold,
        ..Options::default()
    };
    Space::join(&service, name, options).context("cannot join the cluster")
}

/// Reads what etcd knows of the volume.
pub(crate) fn survey(access: Access) -> Result<Survey> {
    let service = service(access, String::new());
    service.survey().context("cannot read the cluster")
}
