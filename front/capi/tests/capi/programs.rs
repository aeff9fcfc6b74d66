//! The same program against libc and against Pinfold: same output, same files left behind.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::built::{Against, compile, no_compiler, run, text};

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples")
        .join(name)
}

/// Lists what is below a directory: kind and mode, links, and contents or target.
fn tree(dir: &Path) -> BTreeMap<PathBuf, (u32, u64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut ahead = vec![dir.to_owned()];
    while let Some(at) = ahead.pop() {
        for entry in std::fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let data = if meta.is_dir() {
                ahead.push(path.clone());
                Vec::new()
            } else if meta.is_symlink() {
                path.read_link()
                    .unwrap()
                    .into_os_string()
                    .into_encoded_bytes()
            } else {
                std::fs::read(&path).unwrap()
            };
            let inside = path.strip_prefix(dir).unwrap().to_owned();
            found.insert(inside, (meta.mode(), meta.nlink(), data));
        }
    }
    found
}

/// Fails at the first line that differs, which says more than two long texts.
fn assert_same(libc: &str, ours: &str) {
    for (number, (a, b)) in libc.lines().zip(ours.lines()).enumerate() {
        assert_eq!(a, b, "line {} (left: libc, right: Pinfold)", number + 1);
    }
    assert_eq!(libc.lines().count(), ours.lines().count());
}

fn calls_agree(against: Against, faults: &str) {
    if no_compiler() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let path = scratch.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (theirs, ours) = (make("theirs"), make("ours"));
    let strict = [
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-nonnull",
        "-Wno-stringop-overflow",
        "-Wno-stringop-overread",
    ];
    let source = [example("calls.c")];
    let (plain, ported) = (scratch.path().join("plain"), scratch.path().join("ported"));
    compile(&plain, &source, Against::Libc, &strict);
    compile(&ported, &source, against, &strict);
    let expected = text(&run(&plain, &[theirs.as_os_str()], scratch.path(), &[]));
    let env = [
        ("PINFOLD_VOLUMES", ours.as_os_str()),
        ("PINFOLD_MEMORY", OsStr::new("1M")),
        ("PINFOLD_FAULTS", OsStr::new(faults)),
    ];
    let got = text(&run(&ported, &[ours.as_os_str()], scratch.path(), &env));
    assert_same(&expected, &got);
    assert_eq!(tree(&theirs), tree(&ours));
}

#[test]
fn every_call_answers_as_the_kernels_through_the_shared_library() {
    calls_agree(Against::Posix, "handler");
}

#[test]
fn every_call_answers_as_the_kernels_through_the_static_library_with_inline_faults() {
    calls_agree(Against::PosixStatic, "inline");
}

#[test]
fn the_example_of_the_readme_works() {
    if no_compiler() {
        return;
    }
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let text_of = std::fs::read_to_string(readme).unwrap();
    let code = text_of.split("```c\n").nth(1).unwrap();
    let code = code.split("```").next().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let (source, program) = (scratch.path().join("a.c"), scratch.path().join("a"));
    std::fs::write(&source, code).unwrap();
    compile(
        &program,
        &[source],
        Against::Pinfold,
        &["-Wall", "-Wextra", "-Werror"],
    );
    let dir = scratch.path().join("data");
    std::fs::create_dir(&dir).unwrap();
    let output = run(&program, &[dir.as_os_str()], scratch.path(), &[]);
    assert_eq!(text(&output), "memory\n");
    let stored = std::fs::read_to_string(dir.join("notes.txt")).unwrap();
    assert_eq!(stored, "served from memory, kept in the directory");
    let missing = run(&program, &[OsStr::new("/nowhere")], scratch.path(), &[]);
    assert_eq!(missing.status.code(), Some(1));
    let said = String::from_utf8_lossy(&missing.stderr);
    assert!(said.contains("cannot serve directory /nowhere"), "{said}");
}

#[test]
fn volumes_handles_pins_and_forks_are_as_the_header_says() {
    if no_compiler() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().canonicalize().unwrap();
    let program = root.join("volumes");
    let strict = ["-Wall", "-Wextra", "-Werror"];
    compile(&program, &[example("volumes.c")], Against::Pinfold, &strict);
    let (one, two) = (root.join("one"), root.join("two"));
    std::fs::create_dir(&one).unwrap();
    std::fs::create_dir(&two).unwrap();
    let output = run(&program, &[one.as_os_str(), two.as_os_str()], &root, &[]);
    let expected = "options\nhandles\nlinks\nlocations\nstatistics\nmappings\nmappings\nfork\n";
    assert_eq!(text(&output), expected);
    assert_eq!(std::fs::read(two.join("of two")).unwrap(), b"x");
}

#[test]
fn a_volume_of_the_environment_that_cannot_be_opened_is_not_gone_around() {
    if no_compiler() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let source = scratch.path().join("a.c");
    std::fs::write(
        &source,
        "int main(int c, char **v) { return open(v[c - 1], O_WRONLY | O_CREAT, 0644) < 0 ? errno : 0; }\n",
    )
    .unwrap();
    let program = scratch.path().join("a");
    compile(&program, &[source], Against::Posix, &["-Wall", "-Werror"]);
    let dir = scratch.path().join("dir");
    std::fs::create_dir(&dir).unwrap();
    let env = [
        ("PINFOLD_VOLUMES", dir.as_os_str()),
        ("PINFOLD_MEMORY", OsStr::new("nonsense")),
    ];
    let inside = dir.join("file");
    let refused = run(&program, &[inside.as_os_str()], scratch.path(), &env);
    assert_eq!(refused.status.code(), Some(libc::EINVAL));
    assert!(!inside.exists());
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("PINFOLD_MEMORY"), "{said}");
    let outside = scratch.path().join("file");
    let served = run(&program, &[outside.as_os_str()], scratch.path(), &env);
    assert_eq!(served.status.code(), Some(0));
    assert!(outside.exists());
}

#[test]
fn threads_share_the_descriptors_and_leave_none() {
    if no_compiler() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let program = scratch.path().join("threads");
    let strict = ["-Wall", "-Wextra", "-Werror"];
    compile(&program, &[example("threads.c")], Against::Pinfold, &strict);
    let dir = scratch.path().join("data");
    std::fs::create_dir(&dir).unwrap();
    for faults in [&[][..], &[OsStr::new("inline")]] {
        let args = [&[dir.as_os_str()], faults].concat();
        let output = run(&program, &args, scratch.path(), &[]);
        assert_eq!(text(&output), "threads\n");
    }
}

#[test]
fn a_program_that_knows_nothing_of_it_passes_its_own_tests() {
    if no_compiler() {
        return;
    }
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tinycdb");
    let sources: Vec<PathBuf> = std::fs::read_dir(&from)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension() == Some(OsStr::new("c")))
        .collect();
    let scratch = tempfile::tempdir().unwrap();
    let program = scratch.path().join("cdb");
    compile(&program, &sources, Against::Posix, &["-w"]);
    let dir = scratch.path().join("data");
    std::fs::create_dir(&dir).unwrap();
    // Two of its steps pipe one process into another, both at work on the directory: a volume has one process at a time.
    let steps = std::fs::read_to_string(from.join("tests.sh")).unwrap();
    let steps = steps
        .replace(
            "1.cdb | $cdb -c 1a",
            "1.cdb > dump; $cdb -c 1a.cdb < dump #",
        )
        .replace(
            "1.cdb | $cdb -c -m 1a",
            "1.cdb > dump; $cdb -c -m 1a.cdb < dump #",
        );
    assert_eq!(steps.matches("> dump").count(), 2);
    let script = scratch.path().join("tests.sh");
    std::fs::write(&script, steps).unwrap();
    // As its own `make check`: both streams in one.
    let both = OsStr::new("sh \"$0\" \"$1\" 2>&1");
    let args = [
        OsStr::new("-c"),
        both,
        script.as_os_str(),
        program.as_os_str(),
    ];
    let env = [
        ("PINFOLD_VOLUMES", dir.as_os_str()),
        ("PINFOLD_MEMORY", OsStr::new("1M")),
        ("LC_ALL", OsStr::new("C")),
    ];
    let output = run(Path::new("/bin/sh"), &args, &dir, &env);
    let expected = std::fs::read_to_string(from.join("tests.ok")).unwrap();
    assert_same(&expected, &text(&output));
}
