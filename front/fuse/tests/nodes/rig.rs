//! Two nodes of this process, each with a mount of the same directory, and programs that use the mounts.

use std::io::{BufRead, BufReader, Write};
use std::num::NonZeroUsize;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use pinfold::Volume;
use pinfold::glocks::Options;
use pinfold::glocks::service::local::Local;
use pinfold_fuse::{MountOptions, Mounted, Revoker};
use rustix::mount::UnmountFlags;

/// How long a test may take before it counts as hung, however busy the machine.
const LIMIT: Duration = Duration::from_secs(240);
/// How long an unmount waits for programs that have just ended.
const PATIENCE: Duration = Duration::from_secs(30);

/// A node and its mount.
pub struct Node {
    pub volume: Volume,
    pub mnt: PathBuf,
    mounted: Option<Mounted>,
}

/// The nodes, and the directory they serve.
pub struct Rig {
    pub nodes: Vec<Node>,
    /// The directory itself, beside all nodes.
    pub data: PathBuf,
    _watchdog: Sender<()>,
    _base: tempfile::TempDir,
}

impl Rig {
    /// Two nodes; `None`, and says why, where FUSE or Python cannot be had.
    pub fn new() -> Option<Self> {
        Self::with(Duration::from_millis(5), None)
    }

    pub fn with(hold: Duration, threads: Option<usize>) -> Option<Self> {
        if Command::new("python3").arg("--version").output().is_err() {
            println!("skipped: python3 is not installed");
            return None;
        }
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_env("PINFOLD_LOG"))
            .with_writer(std::io::stderr)
            .try_init();
        let base = tempfile::tempdir().unwrap();
        let at = |name: &str| {
            let path = base.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        let data = at("data");
        let service = Local::new();
        let mut nodes = Vec::new();
        for name in ["one", "two"] {
            let mnt = at(name);
            let revoker = Revoker::default();
            let options = Options {
                hold,
                ..Options::default()
            };
            let builder = Volume::builder().memory(16 << 20).file_size_limit(false);
            let builder = builder.join(&service, name, options).unwrap();
            let volume = builder.demoted(revoker.demoted()).open_dir(&data).unwrap();
            let options = MountOptions {
                shared: Some(revoker),
                threads: threads.and_then(NonZeroUsize::new),
                ..MountOptions::default()
            };
            match pinfold_fuse::mount(volume.root(), &mnt, &options, || {}) {
                Ok(mounted) => nodes.push(Node {
                    volume,
                    mnt,
                    mounted: Some(mounted),
                }),
                Err(error) => {
                    println!("skipped: {error}");
                    return None;
                }
            }
        }
        let mounts = nodes.iter().map(|node| node.mnt.clone()).collect();
        Some(Self {
            nodes,
            data,
            _watchdog: watch(mounts),
            _base: base,
        })
    }

    /// A program on each mount.
    pub fn programs(&self) -> [Program; 2] {
        [0, 1].map(|node| Program::start(&self.nodes[node].mnt))
    }
}

fn watch(mounts: Vec<PathBuf>) -> Sender<()> {
    let (alive, ended) = channel::<()>();
    std::thread::spawn(move || {
        if ended.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("hung: {mounts:?} after {LIMIT:?}");
            for mnt in mounts {
                let _ = rustix::mount::unmount(&mnt, UnmountFlags::DETACH);
            }
            std::process::abort();
        }
    });
    alive
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mounted) = self.mounted.take() {
            let outcome = mounted.unmount(PATIENCE);
            if !std::thread::panicking() {
                outcome.unwrap();
            }
        }
    }
}

/// What every program can do.
const PRELUDE: &str = "
import fcntl, mmap, os, signal, struct, sys, threading

def opened(name, flags=os.O_RDWR | os.O_CREAT):
    return os.open(name, flags, 0o644)

def mapped(fd, length, prot=mmap.PROT_READ | mmap.PROT_WRITE):
    return mmap.mmap(fd, length, mmap.MAP_SHARED, prot)

def get(m, at=0):
    return struct.unpack_from('<Q', m, at)[0]

def put(m, value, at=0):
    struct.pack_into('<Q', m, at, value)

for line in sys.stdin:
    try:
        code = compile(line, 'told', 'eval')
        value = eval(code, globals())
    except SyntaxError:
        value = exec(line.replace(';;', chr(10)), globals())
    print(repr(value), flush=True)
";

/// A Python that does what it is told, in a process of its own: one that served a mount and had pages of it mapped would
/// wait for itself.
pub struct Program {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    pub fn start(at: &Path) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", PRELUDE])
            .current_dir(at)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            input: child.stdin.take().unwrap(),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Tells it to do something and does not wait. Lines of code are separated by `;;`.
    pub fn begin(&mut self, code: &str) {
        let line = code.trim().replace('\n', ";;");
        writeln!(self.input, "{line}").unwrap();
    }

    /// Waits for it and returns what came out.
    pub fn end(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        if line.is_empty() {
            panic!("the program ended: {}", self.child.wait().unwrap());
        }
        line.trim_end().to_owned()
    }

    pub fn run(&mut self, code: &str) -> String {
        self.begin(code);
        self.end()
    }

    /// Has a file opened as `fd` and its first `len` bytes mapped as `m`.
    pub fn map(&mut self, name: &str, len: usize) {
        self.run(&format!("fd = opened({name:?})\nm = mapped(fd, {len})"));
    }

    pub fn get(&mut self, at: usize) -> u64 {
        self.run(&format!("get(m, {at})")).parse().unwrap()
    }

    pub fn put(&mut self, value: u64, at: usize) {
        self.run(&format!("put(m, {value}, {at})"));
    }

    /// Tells it to do what kills it; returns by which signal.
    pub fn dies(mut self, code: &str) -> Option<i32> {
        self.begin(code);
        self.child.wait().unwrap().signal()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
