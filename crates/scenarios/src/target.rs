//! What is to be tortured: a back end on a directory.
//!
//! *Owns*: [`Target`], which travels to the child process as JSON.
//!
//! *Does not own*: the back ends themselves ([`crate::fs`]).
//!
//! *Locking*: none.

use std::fmt;
use std::path::{Path, PathBuf};

use pinfold::{Delivery, Volume};
use serde::{Deserialize, Serialize};

use crate::fs::Fs;
use crate::fs::kernel::Kernel;
use crate::fs::mutant::{Mutant, Mutation};
use crate::fs::pinfold::Library;

/// Who answers the calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The kernel.
    Kernel,
    /// This library, with a volume on the directory and so many bytes of memory.
    Pinfold {
        /// The volume's budget, in bytes.
        memory: u64,
        /// Who serves faults in its mappings.
        #[serde(default)]
        faults: Faults,
        /// Whether direct writes bring cold sources in with the gate blocked.
        #[serde(default)]
        faults_disabled_mapping: bool,
    },
}

/// Who serves the faults of mappings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Faults {
    /// A thread of the library's.
    #[default]
    Handler,
    /// The faulting thread, in its signal handler.
    Inline,
}

impl Backend {
    /// The smallest budget that scenarios use: 64 pages.
    pub const SMALL: Self = Self::Pinfold {
        memory: 64 * 4096,
        faults: Faults::Handler,
        faults_disabled_mapping: false,
    };
    /// A comfortable budget: 64 MiB.
    pub const ROOMY: Self = Self::Pinfold {
        memory: 64 << 20,
        faults: Faults::Handler,
        faults_disabled_mapping: false,
    };

    /// The same, with faults served by the faulting thread.
    #[must_use]
    pub const fn inline(mut self) -> Self {
        if let Self::Pinfold { faults, .. } = &mut self {
            *faults = Faults::Inline;
        }
        self
    }

    /// The same, in the volume's `faults_disabled_mapping` mode.
    #[must_use]
    pub const fn faults_disabled_mapping(mut self) -> Self {
        if let Self::Pinfold {
            faults_disabled_mapping,
            ..
        } = &mut self
        {
            *faults_disabled_mapping = true;
        }
        self
    }
}

/// A back end on a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Who answers.
    pub backend: Backend,
    /// Where.
    pub dir: PathBuf,
    /// What is made wrong on purpose, to see a scenario fail.
    #[serde(default)]
    pub mutation: Option<Mutation>,
}

impl Target {
    /// The kernel on `dir`.
    #[must_use]
    pub fn kernel(dir: &Path) -> Self {
        Self {
            backend: Backend::Kernel,
            dir: dir.to_path_buf(),
            mutation: None,
        }
    }

    /// This library on `dir`.
    #[must_use]
    pub fn pinfold(dir: &Path, backend: Backend) -> Self {
        Self {
            backend,
            ..Self::kernel(dir)
        }
    }

    /// The same, wrong on purpose.
    #[must_use]
    pub fn with(self, mutation: Mutation) -> Self {
        Self {
            mutation: Some(mutation),
            ..self
        }
    }

    /// The same on another directory.
    #[must_use]
    pub fn moved(&self, dir: &Path) -> Self {
        Self {
            dir: dir.to_path_buf(),
            ..self.clone()
        }
    }

    /// Opens it, for the process that leads a scenario or for one that plays another part in it: a directory is served by
    /// one process at a time, so that each part has a volume of its own beside the others'.
    ///
    /// # Errors
    /// A sentence saying what is wrong with the directory.
    pub fn open(&self, part: Option<&str>) -> Result<Box<dyn Fs>, String> {
        let dir = self.dir.display();
        let fs: Box<dyn Fs> = match self.backend {
            Backend::Kernel => {
                Box::new(Kernel::new(&self.dir).map_err(|errno| format!("{dir}: {errno}"))?)
            }
            Backend::Pinfold {
                memory,
                faults,
                faults_disabled_mapping,
            } => {
                let delivery = match faults {
                    Faults::Handler => Delivery::Handler,
                    Faults::Inline => Delivery::Inline,
                };
                let dir = &self.dir;
                let builder = Volume::builder()
                    .memory(memory)
                    .faults_disabled_mapping(faults_disabled_mapping);
                let part = part.unwrap_or("volume");
                Box::new(Library::new(dir, part, memory, delivery, builder)?)
            }
        };
        Ok(match self.mutation {
            Some(mutation) => Box::new(Mutant::new(fs, mutation)),
            None => fs,
        })
    }

    /// Returns a short name: the back end, without the directory.
    #[must_use]
    pub fn label(&self) -> String {
        match self.backend {
            Backend::Kernel => "kernel".into(),
            Backend::Pinfold {
                memory,
                faults,
                faults_disabled_mapping,
            } => {
                let (amount, unit) = if memory < 1 << 20 {
                    (memory >> 10, "KiB")
                } else {
                    (memory >> 20, "MiB")
                };
                let inline = match faults {
                    Faults::Handler => "",
                    Faults::Inline => ", inline",
                };
                let fdm = if faults_disabled_mapping { ", fdm" } else { "" };
                format!("pinfold {amount} {unit}{inline}{fdm}")
            }
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.label(), self.dir.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_survives_the_way_to_the_child() {
        let target = Target::pinfold(Path::new("/a b"), Backend::SMALL);
        let json = serde_json::to_string(&target).unwrap();
        assert_eq!(serde_json::from_str::<Target>(&json).unwrap(), target);
        assert_eq!(target.to_string(), "pinfold 256 KiB:/a b");
        let inline = Target::pinfold(Path::new("/d"), Backend::ROOMY.inline());
        assert_eq!(inline.to_string(), "pinfold 64 MiB, inline:/d");
        let other = Backend::SMALL.faults_disabled_mapping();
        let other = Target::pinfold(Path::new("/d"), other);
        assert_eq!(other.to_string(), "pinfold 256 KiB, fdm:/d");
    }
}
