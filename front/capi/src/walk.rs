//! Paths as POSIX resolves them, over the nodes of one volume.
//!
//! The engine's own look-up by path serves programs that name files plainly. A ported program relies on more: a trailing
//! slash asks for a directory, `..` means the parent of what a symbolic link led to, a missing directory on the way is
//! ENOENT even before a `..`. A symbolic link to an absolute path means what it means outside: it is followed if it leads
//! back into the volume, and is EXDEV otherwise.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use pinfold::{Errno, Kind, Node};

use crate::errors::{Failure, Outcome, refuse};
use crate::volume::Served;

/// Symbolic links followed in one path at most, as in Linux.
const LINKS_MAX: u32 = 40;

/// A directory and the way to it from the volume's root: what `..` needs.
#[derive(Debug, Clone)]
pub(crate) struct Place(Vec<Node>);

/// Where a path led.
#[derive(Debug)]
pub(crate) struct Walked {
    /// The directory of the last component.
    pub dir: Place,
    /// The last component; `None` if the path ended in `.`, `..` or the root, which `dir` is then.
    pub name: Option<OsString>,
    /// What the path names; `None` if the last component does not exist.
    pub node: Option<Node>,
    /// The path ended in a slash, or `.` or `..`: only a directory will do.
    pub wants_dir: bool,
}

impl Place {
    pub(crate) fn root(served: &Served) -> Self {
        Self(vec![served.volume().root()])
    }

    pub(crate) fn node(&self) -> &Node {
        self.0.last().expect("a place has at least the root")
    }

    /// Adds a directory below.
    pub(crate) fn below(&self, dir: Node) -> Self {
        let mut way = self.0.clone();
        way.push(dir);
        Self(way)
    }

    fn up(&mut self) -> Outcome<()> {
        if self.0.len() == 1 {
            return refuse(Errno::EXDEV, "the path leaves the volume");
        }
        self.0.pop();
        Ok(())
    }
}

impl Walked {
    /// Returns what the path names.
    ///
    /// # Errors
    /// `ENOENT`; `ENOTDIR` if it had to be a directory.
    pub(crate) fn found(self) -> Outcome<Node> {
        match self.node {
            Some(node) if self.wants_dir && node.kind() != Kind::Directory => {
                refuse(Errno::ENOTDIR, "the path")
            }
            Some(node) => Ok(node),
            None => refuse(Errno::ENOENT, "the path"),
        }
    }
}

/// What is still to be walked.
struct Ahead {
    names: VecDeque<OsString>,
    wants_dir: bool,
}

impl Ahead {
    fn of(path: &OsStr) -> Self {
        let bytes = path.as_bytes();
        let names = bytes.split(|&byte| byte == b'/');
        Self {
            names: names
                .filter(|name| !name.is_empty())
                .map(|name| OsString::from_vec(name.to_vec()))
                .collect(),
            wants_dir: bytes.ends_with(b"/"),
        }
    }

    /// Puts a symbolic link's target before the rest.
    fn splice(&mut self, target: &OsStr) {
        let mut onward = Self::of(target);
        // At the end of a path, a slash in the target counts too.
        self.wants_dir |= self.names.is_empty() && onward.wants_dir;
        onward.names.append(&mut self.names);
        self.names = onward.names;
    }
}

/// Walks `path` from `start`, or from the root if it is absolute. `follow` says what becomes of a symbolic link at the end.
///
/// # Errors
/// `ENOENT` for an empty path or a missing directory on the way, `ENOTDIR`, `ELOOP`, `EXDEV`; look-up's.
pub(crate) fn walk(served: &Served, start: Place, path: &Path, follow: bool) -> Outcome<Walked> {
    let walked = walk_from(served, start, path.as_os_str(), follow);
    walked.map_err(|failure| match failure {
        Failure::Engine(error) => Failure::Engine(error.at_path(path)),
        other => other,
    })
}

fn walk_from(served: &Served, start: Place, path: &OsStr, follow: bool) -> Outcome<Walked> {
    if path.is_empty() {
        return refuse(Errno::ENOENT, "the path is empty");
    }
    let mut here = match path.as_bytes().starts_with(b"/") {
        true => Place::root(served),
        false => start,
    };
    let mut ahead = Ahead::of(path);
    let mut links = 0;
    while let Some(name) = ahead.names.pop_front() {
        let last = ahead.names.is_empty();
        match name.as_bytes() {
            b"." => continue,
            b".." => {
                here.up()?;
                continue;
            }
            _ => {}
        }
        let node = match here.node().lookup(&name) {
            Ok(node) => node,
            Err(error) if last && error.errno() == Errno::ENOENT => {
                return Ok(Walked {
                    dir: here,
                    name: Some(name),
                    node: None,
                    wants_dir: ahead.wants_dir,
                });
            }
            Err(error) => return Err(error.into()),
        };
        match node.kind() {
            Kind::Symlink if !last || follow || ahead.wants_dir => {
                links += 1;
                if links > LINKS_MAX {
                    return refuse(Errno::ELOOP, "the path");
                }
                let target = node.read_link()?;
                let target = if target.as_bytes().starts_with(b"/") {
                    here = Place::root(served);
                    from_root(served, &target)?
                } else {
                    target
                };
                ahead.splice(&target);
            }
            Kind::Directory if !last => here = here.below(node),
            _ if !last => return refuse(Errno::ENOTDIR, "a component of the path"),
            _ => {
                return Ok(Walked {
                    dir: here,
                    name: Some(name),
                    node: Some(node),
                    wants_dir: ahead.wants_dir,
                });
            }
        }
    }
    let node = here.node().clone();
    Ok(Walked {
        dir: here,
        name: None,
        node: Some(node),
        wants_dir: true,
    })
}

/// Translates the absolute target of a symbolic link into a path from the volume's root.
fn from_root(served: &Served, target: &OsStr) -> Outcome<OsString> {
    match Path::new(target).strip_prefix(served.path()) {
        Ok(inside) => {
            let mut inside = inside.as_os_str().to_owned();
            if target.as_bytes().ends_with(b"/") {
                inside.push("/");
            }
            Ok(inside)
        }
        Err(_) => refuse(Errno::EXDEV, "a symbolic link leaves the volume"),
    }
}
