//! The keys that a volume has in etcd, and their values.
//!
//! ```text
//! ROOT volume                          pinfold-lock 2 IDENTITY
//! ROOT member/NAME                     LEASE HOST PID             goes with the member's lease
//! ROOT node/OWNER                      what its process is        until it leaves, or its claims were taken away
//! ROOT fence/NAME                      OWNER                      while its fence command runs; goes with the runner's lease
//! ROOT lock/NUMBER.GENERATION/OWNER    MODE HOW SERIAL            stays until it is deleted
//! ```
//!
//! OWNER is `NAME.LEASE`: a member of that name in another life is another owner. Numbers are hexadecimal.

use crate::mode::Mode;
use crate::service::{Name, Wait};

/// The first word and the version of what is kept.
pub(super) const PROTOCOL: &str = "pinfold-lock";
/// Which keys and values this library reads and writes.
pub(super) const VERSION: u32 = 2;

/// The longest name of a member.
pub const MEMBER_NAME_MAX: usize = 64;

/// Where a volume's keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Keys {
    /// Ends in a slash, so that no volume's keys begin as another's.
    pub root: String,
}

/// What a key names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Key {
    Volume,
    Member(String),
    Node(Owner),
    Fence(String),
    Lock(Name, Owner),
}

/// A member in one of its lives.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Owner {
    pub member: String,
    pub lease: i64,
}

/// What an owner has or wants; whether it has it follows from the order of the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Claim {
    pub mode: Mode,
    pub wait: Wait,
    /// Which of the owner's requests made it. One that was given up and arrives late is told from the one that counts.
    pub serial: u64,
}

/// Tells whether a member may be called so: what separates parts of keys and values is not in it.
pub(super) fn is_member_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    (1..=MEMBER_NAME_MAX).contains(&name.len()) && name.bytes().all(plain)
}

impl Keys {
    /// The keys under `prefix`, for one volume.
    pub fn new(prefix: &str) -> Self {
        Self {
            root: format!("{}/", prefix.trim_end_matches('/')),
        }
    }

    pub fn volume(&self) -> String {
        format!("{}volume", self.root)
    }

    pub fn members(&self) -> String {
        format!("{}member/", self.root)
    }

    pub fn member(&self, name: &str) -> String {
        format!("{}{name}", self.members())
    }

    pub fn node(&self, owner: &Owner) -> String {
        format!("{}node/{}", self.root, owner.text())
    }

    pub fn fence(&self, member: &str) -> String {
        format!("{}fence/{member}", self.root)
    }

    pub fn locks(&self) -> String {
        format!("{}lock/", self.root)
    }

    /// What the keys of one lock begin with.
    pub fn lock(&self, name: Name) -> String {
        format!("{}{:x}.{:x}/", self.locks(), name.number, name.generation)
    }

    pub fn claim(&self, name: Name, owner: &Owner) -> String {
        format!("{}{}", self.lock(name), owner.text())
    }

    /// Reads a key; `None` if it is none of ours.
    pub fn parse(&self, key: &[u8]) -> Option<Key> {
        let key = std::str::from_utf8(key).ok()?.strip_prefix(&self.root)?;
        if key == "volume" {
            return Some(Key::Volume);
        }
        if let Some(member) = key.strip_prefix("member/") {
            return is_member_name(member).then(|| Key::Member(member.to_owned()));
        }
        if let Some(member) = key.strip_prefix("fence/") {
            return is_member_name(member).then(|| Key::Fence(member.to_owned()));
        }
        if let Some(owner) = key.strip_prefix("node/") {
            return Some(Key::Node(Owner::parse(owner)?));
        }
        let (name, owner) = key.strip_prefix("lock/")?.split_once('/')?;
        let (number, generation) = name.split_once('.')?;
        let hex = |text: &str| {
            let number = u64::from_str_radix(text, 16).ok()?;
            // One number has one spelling, or one lock would have two places.
            (format!("{number:x}") == text).then_some(number)
        };
        let name = Name {
            number: hex(number)?,
            generation: hex(generation)?,
        };
        Some(Key::Lock(name, Owner::parse(owner)?))
    }
}

impl Owner {
    pub fn text(&self) -> String {
        format!("{}.{:x}", self.member, self.lease)
    }

    fn parse(text: &str) -> Option<Self> {
        let (member, lease) = text.split_once('.')?;
        let owner = Self {
            member: is_member_name(member).then(|| member.to_owned())?,
            lease: i64::from_str_radix(lease, 16).ok()?,
        };
        (owner.text() == text).then_some(owner)
    }
}

impl Claim {
    pub fn text(self) -> String {
        let how = match self.wait {
            Wait::Queue => "queue",
            Wait::Try => "try",
            Wait::TryAsking => "ask",
        };
        format!("{} {how} {}", self.mode.letters(), self.serial)
    }

    pub fn parse(value: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(value).ok()?.split(' ');
        let (mode, how, serial) = (words.next()?, words.next()?, words.next()?);
        if words.next().is_some() {
            return None;
        }
        let mode = Mode::from_letters(mode).filter(|&mode| mode != Mode::Unlocked)?;
        let wait = match how {
            "queue" => Wait::Queue,
            "try" => Wait::Try,
            "ask" => Wait::TryAsking,
            _ => return None,
        };
        let serial = serial.parse().ok()?;
        Some(Self { mode, wait, serial })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let keys = Keys::new("/p/v/");
        let owner = Owner {
            member: "n-1".to_owned(),
            lease: 0x1234,
        };
        let name = Name {
            number: 0xab,
            generation: 1,
        };
        let key = keys.claim(name, &owner);
        assert_eq!(key, "/p/v/lock/ab.1/n-1.1234");
        assert_eq!(
            keys.parse(key.as_bytes()),
            Some(Key::Lock(name, owner.clone()))
        );
        for (key, parsed) in [
            (keys.volume(), Key::Volume),
            (keys.member("n-1"), Key::Member("n-1".to_owned())),
            (keys.fence("n-1"), Key::Fence("n-1".to_owned())),
            (keys.node(&owner), Key::Node(owner.clone())),
        ] {
            assert_eq!(keys.parse(key.as_bytes()), Some(parsed), "{key}");
        }
        for mode in [Mode::Shared, Mode::Deferred, Mode::Exclusive] {
            for wait in [Wait::Queue, Wait::Try, Wait::TryAsking] {
                let claim = Claim {
                    mode,
                    wait,
                    serial: 7,
                };
                assert_eq!(Claim::parse(claim.text().as_bytes()), Some(claim));
            }
        }
    }

    #[test]
    fn what_is_not_ours_is_not_read() {
        let keys = Keys::new("/p/v");
        for key in [
            "/p/v",
            "/p/vx/volume",
            "/p/v/volumes",
            "/p/v/member/",
            "/p/v/member/a.b",
            "/p/v/member/a/b",
            "/p/v/node/a",
            "/p/v/node/a.1/b",
            "/p/v/fence/a.1",
            "/p/v/lock/ab.1",
            "/p/v/lock/ab/n.1",
            "/p/v/lock/0ab.1/n.1",
            "/p/v/lock/AB.1/n.1",
            "/p/v/lock/ab.1/n",
            "/p/v/lock/ab.1/n.01",
            "/p/v/lock/ab.1/n.1/x",
        ] {
            assert_eq!(keys.parse(key.as_bytes()), None, "{key}");
        }
        assert_eq!(keys.parse(b"/p/v/member/\xff"), None);
        for value in [
            "",
            "EX",
            "EX queue",
            "UN queue 1",
            "EX  queue 1",
            "ex queue 1",
            "EX wait 1",
            "EX queue x",
            "EX queue 1 1",
        ] {
            assert_eq!(Claim::parse(value.as_bytes()), None, "{value}");
        }
    }
}
