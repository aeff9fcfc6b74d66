//! Programs that work on both mounts of one directory: what comes of it is what one kernel directory would have.
//!
//! The longer form is `PINFOLD_CLUSTER_ROUNDS` times the work; `tests/programs/run --two-mounts N` sets it.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use super::{LIMIT, Node, Place, complaint, is_there, must, rounds, run};

/// Git may wait for its own locks for as long as it takes, and moves nothing in the background.
const GIT: [&str; 8] = [
    "-c",
    "core.packedRefsTimeout=100000",
    "-c",
    "core.filesRefLockTimeout=100000",
    "-c",
    "gc.auto=0",
    "-c",
    "maintenance.auto=false",
];

fn git(arguments: &[&str], at: &Path) -> String {
    must("git", &[&GIT[..], arguments].concat(), at)
}

fn try_git(arguments: &[&str], at: &Path) -> Output {
    run("git", &[&GIT[..], arguments].concat(), at)
}

/// Commits and pushes to the branch that all push to, over whatever others pushed meanwhile.
fn push(clone: &Path, name: &str) {
    fs::write(clone.join(name), name).unwrap();
    git(&["add", "."], clone);
    git(&["commit", "-qm", name], clone);
    let start = Instant::now();
    loop {
        let pushed = try_git(&["push", "-q", "origin", "HEAD:main"], clone);
        if pushed.status.success() {
            return;
        }
        let said = complaint(&pushed);
        // Somebody else was faster; or gc removed a directory of objects, empty so far, after git had found it there and before
        // it linked an object into it (mkdir, EEXIST, link, ENOENT), which git does not try again. All else is a failure.
        let late = [
            "fetch first",
            "non-fast-forward",
            "cannot lock ref",
            "incorrect old value",
            "unable to migrate objects",
        ];
        assert!(late.iter().any(|why| said.contains(why)), "{said}");
        assert!(start.elapsed() < LIMIT, "others are always faster: {said}");
        if !said.contains("unable to migrate objects") {
            git(&["pull", "-q", "--rebase", "origin", "main"], clone);
        }
    }
}

#[test]
fn git_pushes_and_gc_from_two_mounts_leave_every_commit_in_a_sound_repository() {
    let place = Place::new();
    if !is_there("git") {
        return;
    }
    let Some(nodes) = place.two_lively() else {
        return;
    };
    let bare = |node: &Node| node.mnt.join("bare.git").to_str().unwrap().to_owned();
    git(
        &["init", "-q", "--bare", "-b", "main", "bare.git"],
        &nodes[0].mnt,
    );
    let count = 2 * rounds();
    // What all have in common.
    let first = place.path("first");
    git(
        &["clone", "-q", &bare(&nodes[1]), "first"],
        place.base.path(),
    );
    push(&first, "first");
    let clones = [0, 1].map(|which| {
        let name = format!("clone{which}");
        git(
            &["clone", "-q", &bare(&nodes[which % 2]), &name],
            place.base.path(),
        );
        place.path(&name)
    });
    std::thread::scope(|scope| {
        for (which, clone) in clones.iter().enumerate() {
            let node = &nodes[which % 2];
            scope.spawn(move || {
                for number in 0..count {
                    push(clone, &format!("{which}-{number}"));
                    let cleared = try_git(&["gc", "-q"], bare(node).as_ref());
                    let said = complaint(&cleared);
                    let other = said.contains("already running");
                    assert!(cleared.status.success() || other, "{said}");
                }
            });
        }
    });
    for node in &nodes {
        let bare = bare(node);
        git(&["fsck", "--strict"], bare.as_ref());
        let told = git(&["log", "--format=%s", "main"], bare.as_ref());
        let mut told: Vec<&str> = told.lines().collect();
        told.sort_unstable();
        let mut expected: Vec<String> = (0..2)
            .flat_map(|which| (0..count).map(move |number| format!("{which}-{number}")))
            .chain(["first".to_owned()])
            .collect();
        expected.sort_unstable();
        assert_eq!(told, expected);
    }
    nodes.into_iter().for_each(Node::end);
}

#[test]
fn make_builds_anew_what_was_edited_on_the_other_mount_and_nothing_else() {
    const MAKEFILE: &str =
        "all: $(patsubst %.c,%.o,$(wildcard *.c))\n\tcat $^ > $@\n%.o: %.c\n\tcp $< $@\n";
    let place = Place::new();
    if !is_there("make") {
        return;
    }
    let Some(nodes) = place.two() else { return };
    fs::write(nodes[0].mnt.join("Makefile"), MAKEFILE).unwrap();
    let sources = ["a", "b", "c"];
    for name in sources {
        fs::write(nodes[0].mnt.join(format!("{name}.c")), name).unwrap();
    }
    must("make", &["-s"], &nodes[1].mnt);
    for round in 0..4 * rounds() {
        let [here, there] = [round % 2, (round + 1) % 2].map(|which| &nodes[which].mnt);
        let name = sources[round % 3];
        edit(
            &here.join(format!("{name}.c")),
            &format!("{name}{round}"),
            &here.join("all"),
        );
        let built = must("make", &[], there);
        for other in sources {
            assert_eq!(
                built.contains(&format!("{other}.o\n")),
                other == name,
                "{built}"
            );
        }
        let expected: String = sources
            .map(|name| fs::read_to_string(here.join(format!("{name}.c"))).unwrap())
            .concat();
        for mnt in [here, there] {
            assert_eq!(fs::read_to_string(mnt.join("all")).unwrap(), expected);
            let nothing = must("make", &[], mnt);
            assert!(nothing.contains("'all' is up to date"), "{nothing}");
        }
    }
    nodes.into_iter().for_each(Node::end);
}

/// Writes a source until it is newer than what was made of it: the clock of files moves in steps.
fn edit(source: &Path, text: &str, made: &Path) {
    let start = Instant::now();
    let time = |path: &Path| path.metadata().unwrap().modified().unwrap();
    loop {
        fs::write(source, text).unwrap();
        if time(source) > time(made) {
            return;
        }
        assert!(start.elapsed() < LIMIT, "its time does not move");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn rsync_from_one_mount_to_the_other_and_back_loses_nothing() {
    let place = Place::new();
    if !is_there("rsync") {
        return;
    }
    let Some(nodes) = place.two_lively() else {
        return;
    };
    let [one, two] = [&nodes[0].mnt, &nodes[1].mnt];
    let mut size = 1;
    for number in 0..12 * rounds() {
        let dir = one.join(format!("tree/{}", number % 3));
        fs::create_dir_all(&dir).unwrap();
        size = size * 7 % 200_003;
        let byte = u8::try_from(number % 251).unwrap();
        fs::write(dir.join(format!("file{number}")), vec![byte; size]).unwrap();
    }
    let path = |mnt: &Path, name: &str| format!("{}/{name}/", mnt.to_str().unwrap());
    for round in 0..2 {
        // What changed a little goes as differences, whose base is read on the other mount.
        let file = fs::File::options()
            .write(true)
            .open(one.join("tree/0/file0"));
        let at = 100_000 * round;
        std::os::unix::fs::FileExt::write_all_at(&file.unwrap(), b"changed", at).unwrap();
        for (from, to) in [
            (path(one, "tree"), path(two, "copy")),
            (path(two, "copy"), path(one, "back")),
        ] {
            must(
                "rsync",
                &["-a", "--no-whole-file", &from, &to],
                place.base.path(),
            );
        }
        for (from, to) in [
            (path(one, "tree"), path(two, "back")),
            (path(two, "tree"), path(one, "copy")),
        ] {
            let differs = ["-anc", "--delete", "--out-format=%n", &from, &to];
            assert_eq!(must("rsync", &differs, place.base.path()), "");
        }
    }
    nodes.into_iter().for_each(Node::end);
}

/// As fsx does, but each of two on its part of one file; the parts meet within a page.
#[test]
fn two_parts_of_one_file_are_each_as_its_writer_left_them() {
    let place = Place::new();
    let Some(nodes) = place.two_lively() else {
        return;
    };
    for round in 0..rounds() as u64 {
        // The same on one directory of the kernel's.
        let plain = place.path("plain");
        fs::create_dir_all(&plain).unwrap();
        for [one, two] in [[&plain, &plain], [&nodes[0].mnt, &nodes[1].mnt]] {
            fs::write(
                one.join("parts"),
                vec![0; usize::try_from(2 * PART).unwrap()],
            )
            .unwrap();
            std::thread::scope(|scope| {
                for (which, mnt) in [(0, one), (1, two)] {
                    scope.spawn(move || exercise(&mnt.join("parts"), which, 2 * round + which));
                }
            });
        }
    }
    nodes.into_iter().for_each(Node::end);
}

/// Bytes of each part: no whole number of pages.
const PART: u64 = 150_001;

/// Writes and reads a part at random places, buffered and direct, and compares.
fn exercise(path: &Path, which: u64, seed: u64) {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    const PAGE: u64 = 4096;
    let options = || {
        let mut options = fs::File::options();
        options.read(true).write(true);
        options
    };
    let buffered = options().open(path).unwrap();
    // O_DIRECT, where the file system knows it.
    let direct = options()
        .custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed())
        .open(path)
        .ok();
    let (from, to) = (which * PART, (which + 1) * PART);
    let mut model = vec![0; usize::try_from(PART).unwrap()];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut draw = |below: u64| {
        // Xorshift (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    // Direct transfers want memory, offset and length aligned.
    let mut memory = vec![0; 17 * 4096];
    for step in 0..400_u32 {
        let past = direct.as_ref().filter(|_| draw(3) == 0);
        let (at, len) = if past.is_some() {
            let first = from.div_ceil(PAGE);
            let pages = to / PAGE - first;
            let page = draw(pages);
            (
                (first + page) * PAGE,
                (1 + draw((pages - page).min(16))) * PAGE,
            )
        } else {
            let at = from + draw(PART);
            (at, 1 + draw((to - at).min(3 * PAGE)))
        };
        let file = past.unwrap_or(&buffered);
        let len = usize::try_from(len).unwrap();
        let inside = usize::try_from(at - from).unwrap();
        let start = memory.as_ptr().align_offset(4096);
        let bytes = &mut memory[start..start + len];
        if draw(2) == 0 {
            let byte = u8::try_from(draw(255)).unwrap() + 1;
            bytes.fill(byte);
            file.write_all_at(bytes, at).unwrap();
            model[inside..inside + len].fill(byte);
            if step % 50 == 0 {
                file.sync_all().unwrap();
            }
        } else {
            file.read_exact_at(bytes, at).unwrap();
            let differs = bytes.iter().zip(&model[inside..]).position(|(a, b)| a != b);
            assert_eq!(differs, None, "part {which}, step {step}: from {at} on");
        }
    }
}
