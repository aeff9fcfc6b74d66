//! The libraries under test, the compiler, and running what it makes under a watchdog.

use std::ffi::OsStr;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A program that takes longer hangs.
const RUN_MAX: Duration = Duration::from_secs(240);

/// Where cargo put libpinfold.so and libpinfold.a.
///
/// A test does not make cargo build a library it cannot link, so the build is asked for here; it is a look at time stamps
/// when nothing changed.
pub fn libraries() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([
            "build",
            "-p",
            "pinfold-capi",
            "--message-format=json",
            "--quiet",
        ]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        let output = cargo.stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success(), "the library does not build");
        let text = String::from_utf8(output.stdout).unwrap();
        let path = text
            .split('"')
            .rfind(|word| word.ends_with("/libpinfold.so"))
            .expect("cargo names what it built");
        Path::new(path).parent().unwrap().to_owned()
    })
}

/// Says why programs cannot be compiled here, if they cannot.
pub fn no_compiler() -> bool {
    let missing = Command::new("gcc").arg("--version").output().is_err();
    if missing {
        eprintln!("skipped: there is no gcc");
    }
    missing
}

/// How a program reaches its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// The system's calls.
    Libc,
    /// Pinfold's shared library, behind POSIX's names.
    Posix,
    /// Pinfold's static library, behind POSIX's names.
    PosixStatic,
    /// Pinfold's shared library by its own names.
    Pinfold,
}

/// Compiles sources into `program`; every warning is an error in ours.
pub fn compile(program: &Path, sources: &[PathBuf], against: Against, flags: &[&str]) {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=gnu11", "-O1", "-g", "-pthread", "-o"])
        .arg(program)
        .args(flags);
    if matches!(against, Against::Posix | Against::PosixStatic) {
        gcc.arg("-include").arg(include.join("pinfold_posix.h"));
    }
    gcc.arg("-I").arg(&include).args(sources);
    match against {
        Against::Libc => {}
        Against::PosixStatic => {
            gcc.arg(libraries().join("libpinfold.a"))
                .args(["-ldl", "-lm"]);
        }
        Against::Posix | Against::Pinfold => {
            gcc.arg("-L").arg(libraries()).arg("-lpinfold");
        }
    }
    let output = gcc.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{gcc:?}\n{errors}");
}

/// Runs a program in `dir`; a hang is a failure.
pub fn run(program: &Path, args: &[&OsStr], dir: &Path, env: &[(&str, &OsStr)]) -> Output {
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir(dir)
        .envs(env.iter().copied())
        .env("LD_LIBRARY_PATH", soname_dir())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut pipes = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (out, err) = std::thread::scope(|scope| {
        let err = scope.spawn(move || {
            let mut bytes = Vec::new();
            pipes.1.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let out = scope.spawn(move || {
            let mut bytes = Vec::new();
            pipes.0.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let began = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if began.elapsed() > RUN_MAX {
                child.kill().unwrap();
                panic!("{command:?} hangs");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        (out.join().unwrap(), err.join().unwrap())
    });
    Output {
        status: child.wait().unwrap(),
        stdout: out,
        stderr: err,
    }
}

/// A directory with the library under the name that programs ask for at run time.
fn soname_dir() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let library = libraries().join("libpinfold.so");
        std::os::unix::fs::symlink(library, dir.path().join("libpinfold.so.0")).unwrap();
        dir
    })
    .path()
}

/// The text a program wrote, after checking that it ended well.
pub fn text(output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    out.into_owned()
}
