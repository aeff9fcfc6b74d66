//! `--cluster`: which etcd and which volume in it, and as which node a mount joins.
//!
//! *Owns*: the options, secrets kept out of the command line, what identifies a directory on all machines.
//!
//! *Does not own*: glocks (`pinfold::glocks`), what is told of them ([`crate::nodes`], [`crate::glocks`]).
//!
//! A program built without the feature `etcd` knows the options, so that it can say what it lacks.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use pinfold::glocks::Space;

#[cfg(feature = "etcd")]
mod etcd;
mod identity;

/// Where the password is looked for if no file is named.
const PASSWORD: &str = "PINFOLD_ETCD_PASSWORD";
/// The port of etcd's that IANA registered.
const PORT: u16 = 2379;
/// What a volume's keys begin with unless it is said.
const PREFIX: &str = "/pinfold";

/// Which etcd, and how to get in.
#[derive(Debug, Clone, Args)]
pub(crate) struct Where {
    /// The etcd that keeps the locks, and the volume's name in it: etcd://HOST:PORT/VOLUME. Several servers are separated by
    /// commas, a user's name ends in @, a port may be left out, and etcds:// asks for TLS
    #[arg(long, value_name = "URL")]
    cluster: Option<Url>,

    /// What the volume's keys in etcd begin with [default: /pinfold/VOLUME]
    #[arg(long, value_name = "PREFIX", requires = "cluster")]
    cluster_prefix: Option<String>,

    /// A file that holds the password of USER [default: the environment's PINFOLD_ETCD_PASSWORD]
    #[arg(long, value_name = "FILE", requires = "cluster")]
    cluster_password: Option<PathBuf>,

    /// The certificate of whoever signed the servers' ones (PEM)
    #[arg(long, value_name = "FILE", requires = "cluster")]
    cluster_ca: Option<PathBuf>,

    /// Our certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "cluster_key")]
    cluster_cert: Option<PathBuf>,

    /// The key of our certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "cluster_cert")]
    cluster_key: Option<PathBuf>,
}

/// As which node, and what is done about dead ones.
#[derive(Debug, Clone, Args)]
pub(crate) struct Membership {
    /// This node's name, one for each node of the volume [default: the host's name and the process's number]
    #[arg(long, value_name = "NAME", requires = "cluster")]
    node: Option<String>,

    /// After so many seconds without a word of it a node counts as dead
    #[arg(long, value_name = "SECONDS", value_parser = parse_lease, default_value = "10", requires = "cluster")]
    lease: Duration,

    /// Others take a dead node's locks so many seconds after its lease
    #[arg(long, value_name = "SECONDS", value_parser = parse_grace, default_value = "5", requires = "cluster")]
    grace: Duration,

    /// A lock that somebody waited for is kept for so many milliseconds although another node wants it
    #[arg(long, value_name = "MS", value_parser = parse_hold, default_value = "200", requires = "cluster")]
    hold: Duration,

    /// A program that cuts a dead node off from the files, given its name; when it succeeds, its locks are taken at once
    #[arg(long, value_name = "COMMAND", requires = "cluster")]
    fence: Option<PathBuf>,

    /// For how many seconds it may run
    #[arg(long, value_name = "SECONDS", value_parser = parse_grace, default_value = "60", requires = "fence")]
    fence_limit: Duration,
}

fn parse_lease(text: &str) -> Result<Duration, String> {
    whole(text, 2..=3600, "seconds from 2 to 3600").map(Duration::from_secs)
}

fn parse_grace(text: &str) -> Result<Duration, String> {
    whole(text, 0..=86_400, "seconds from 0 to 86400").map(Duration::from_secs)
}

fn parse_hold(text: &str) -> Result<Duration, String> {
    whole(text, 0..=60_000, "milliseconds from 0 to 60000").map(Duration::from_millis)
}

fn whole(text: &str, range: std::ops::RangeInclusive<u64>, what: &str) -> Result<u64, String> {
    let number = text.parse().ok();
    number
        .filter(|number| range.contains(number))
        .ok_or_else(|| format!("a whole number of {what} is needed"))
}

/// `etcd://USER@HOST:PORT,…/VOLUME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Url {
    secure: bool,
    user: Option<String>,
    /// `HOST:PORT` each.
    servers: Vec<String>,
    volume: String,
}

impl FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (secure, rest) = if let Some(rest) = text.strip_prefix("etcd://") {
            (false, rest)
        } else if let Some(rest) = text.strip_prefix("etcds://") {
            (true, rest)
        } else {
            return Err("it begins with etcd:// or, for TLS, etcds://".to_owned());
        };
        let (servers, volume) = rest
            .split_once('/')
            .ok_or("behind the servers, /VOLUME is needed")?;
        let (user, servers) = match servers.rsplit_once('@') {
            Some((user, servers)) => (Some(user), servers),
            None => (None, servers),
        };
        if user.is_some_and(|user| user.contains(':')) {
            return Err(format!(
                "a password does not belong here, where every user of the machine can see it: use \
                 --cluster-password FILE or the environment's {PASSWORD}"
            ));
        }
        if user == Some("") {
            return Err("there is no user's name before @".to_owned());
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if volume.is_empty() || volume.len() > 64 || !volume.chars().all(plain) {
            return Err(format!(
                "{volume:?} cannot name a volume: letters, digits, - _ and ., at most 64"
            ));
        }
        let servers: Vec<String> = servers.split(',').map(server).collect::<Result<_, _>>()?;
        Ok(Self {
            secure,
            user: user.map(str::to_owned),
            servers,
            volume: volume.to_owned(),
        })
    }
}

/// Checks one `HOST[:PORT]`; an IPv6 address is in brackets.
fn server(text: &str) -> Result<String, String> {
    let bad = || format!("{text:?} is no server: HOST or HOST:PORT is needed");
    let (host, port) = match text.rfind(']') {
        Some(end) if text.starts_with('[') => (&text[..=end], text[end + 1..].strip_prefix(':')),
        Some(_) => return Err(bad()),
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    if host.is_empty() || !host.chars().all(plain) || text.ends_with(':') {
        return Err(bad());
    }
    let port = match port {
        Some(port) => port.parse::<u16>().map_err(|_| bad())?,
        None if host.len() < text.len() => return Err(bad()),
        None => PORT,
    };
    Ok(format!("{host}:{port}"))
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.secure { "etcds" } else { "etcd" };
        write!(f, "{scheme}://{}/{}", self.servers.join(","), self.volume)
    }
}

/// What the options come to, secrets included.
#[cfg_attr(
    not(feature = "etcd"),
    expect(dead_code, reason = "checked, and then nobody there to use them")
)]
pub(crate) struct Access {
    pub(crate) endpoints: Vec<String>,
    pub(crate) prefix: String,
    pub(crate) volume: String,
    pub(crate) user: Option<(String, String)>,
    pub(crate) authority: Option<Vec<u8>>,
    pub(crate) identity: Option<(Vec<u8>, Vec<u8>)>,
    pub(crate) secure: bool,
}

impl Where {
    /// Reads the files that the options name; `None` without `--cluster`.
    pub(crate) fn access(&self) -> Result<Option<Access>> {
        let Some(url) = &self.cluster else {
            return Ok(None);
        };
        let read = |path: &PathBuf| {
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
        };
        let secure = url.secure || self.cluster_ca.is_some() || self.cluster_cert.is_some();
        let scheme = if secure { "https" } else { "http" };
        let password = match &self.cluster_password {
            Some(path) => {
                let password = String::from_utf8(read(path)?);
                let password =
                    password.with_context(|| format!("{} is no text", path.display()))?;
                Some(password.trim_end_matches(['\r', '\n']).to_owned())
            }
            None => std::env::var(PASSWORD).ok(),
        };
        let user = match (&url.user, password) {
            (Some(user), Some(password)) => Some((user.clone(), password)),
            (Some(user), None) => bail!(
                "there is no password for {user}: use --cluster-password FILE or the environment's {PASSWORD}"
            ),
            // The environment's may be meant for others.
            (None, _) if self.cluster_password.is_none() => None,
            (None, _) => bail!("--cluster-password is for a user: {} names none", url),
        };
        let identity = match (&self.cluster_cert, &self.cluster_key) {
            (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
            _ => None,
        };
        let servers = url.servers.iter();
        Ok(Some(Access {
            endpoints: servers.map(|one| format!("{scheme}://{one}")).collect(),
            prefix: self
                .cluster_prefix
                .clone()
                .unwrap_or_else(|| format!("{PREFIX}/{}", url.volume)),
            volume: url.volume.clone(),
            user,
            authority: self.cluster_ca.as_ref().map(read).transpose()?,
            identity,
            secure,
        }))
    }
}

/// Makes this process a node of the volume in `dir`; `None` without `--cluster`.
pub(crate) fn join(
    place: &Where,
    membership: &Membership,
    dir: &Path,
) -> Result<Option<(String, Arc<Space>)>> {
    let Some(access) = place.access()? else {
        return Ok(None);
    };
    let name = membership.node.clone().unwrap_or_else(default_name);
    let identity = identity::of(dir, &access.volume)?;
    let space = connect(access, membership, &name, identity)?;
    Ok(Some((name, Arc::new(space))))
}

#[cfg(feature = "etcd")]
use etcd::connect;
#[cfg(feature = "etcd")]
pub(crate) use etcd::survey;

#[cfg(not(feature = "etcd"))]
fn connect(_: Access, _: &Membership, _: &str, _: String) -> Result<Space> {
    bail!(NOT_BUILT)
}

/// What a program without the feature says.
#[cfg(not(feature = "etcd"))]
pub(crate) const NOT_BUILT: &str = "this pinfold cannot speak with etcd: build it with --features etcd (needs protobuf-compiler and \
     libprotobuf-dev)";

/// The host's name and this process's number, as a node may be called.
fn default_name() -> String {
    const HOST_MAX: usize = 48;
    let system = rustix::system::uname();
    let host: String = system
        .nodename()
        .to_string_lossy()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(HOST_MAX)
        .collect();
    format!("{host}-{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_servers_and_a_volume() {
        let url: Url = "etcd://a,b:99,[::1]:7,[fe80::2]/v-1.x".parse().unwrap();
        assert_eq!(url.servers, ["a:2379", "b:99", "[::1]:7", "[fe80::2]:2379"]);
        assert_eq!((url.secure, url.user, &*url.volume), (false, None, "v-1.x"));
        let url: Url = "etcds://me@h:1/v".parse().unwrap();
        assert_eq!((url.secure, url.user.as_deref()), (true, Some("me")));
    }

    #[test]
    fn what_is_no_url_is_refused_and_says_why() {
        for (text, why) in [
            ("http://h/v", "etcd://"),
            ("etcd://h", "/VOLUME"),
            ("etcd://h/", "cannot name"),
            ("etcd://h/a/b", "cannot name"),
            ("etcd://h/a b", "cannot name"),
            ("etcd:///v", "no server"),
            ("etcd://h,/v", "no server"),
            ("etcd://h:x/v", "no server"),
            ("etcd://h:99999/v", "no server"),
            ("etcd://h:/v", "no server"),
            ("etcd://::1/v", "no server"),
            ("etcd://[::1]x/v", "no server"),
            ("etcd://x]/v", "no server"),
            ("etcd://me:secret@h/v", "password"),
            ("etcd://@h/v", "user"),
        ] {
            let error = text.parse::<Url>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
            assert!(!error.contains("secret"), "{text}: {error}");
        }
    }

    #[test]
    fn a_node_s_default_name_can_be_one() {
        let name = default_name();
        assert!(name.ends_with(&format!("-{}", std::process::id())));
        assert!(name.len() <= 64 && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'));
    }
}
