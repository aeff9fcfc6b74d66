"""Programs that judge files by their times and sizes: git, make, and an incremental build."""

import os
import time

from . import Place, case, check, run, write_files

GIT_ENV = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_AUTHOR_DATE": "2020-01-01T00:00:00Z",
    "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org", "GIT_COMMITTER_DATE": "2020-01-01T00:00:00Z",
    "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null",
}  # fmt: skip
SOURCES = 40


# The index holds inode numbers and times; a pack's bytes depend on how threads share the work.
@case(data_mib=40, tools=("git",), ignored=("repo/.git", "clone/.git"))
def git(place: Place) -> dict:
    """init, add, commit, change, gc, fsck, clone: the same commits, and a clean tree that stays clean."""
    repo, clone = place.dir / "repo", place.dir / "clone"
    env = {**os.environ, **GIT_ENV}

    def git(*args, cwd=repo):
        return run("git", "-c", "core.fsync=all", "-c", "gc.auto=0", *args, cwd=cwd, env=env)

    repo.mkdir()
    write_files(repo, 3000, 200_000, place.seed)
    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    for number in range(0, 3000, 7):
        parent = repo / f"d{number % 17}" / f"e{number % 5}"
        with open(parent / f"f{number}.{'bin' if number % 2 else 'txt'}", "ab") as file:
            file.write(b"changed\n")
    changed = git("status", "--porcelain").count("\n")
    check(changed == len(range(0, 3000, 7)), f"status sees {changed} changes")
    git("commit", "-q", "-a", "-m", "second")
    git("checkout", "-q", "HEAD~1")
    git("checkout", "-q", "main")
    check(git("status", "--porcelain") == "", "not clean after checkout")
    git("gc", "-q", "--prune=now")
    git("fsck", "--full", "--strict")
    git("clone", "-q", "--no-hardlinks", str(repo), str(clone), cwd=place.dir)
    git("fsck", "--full", cwd=clone)
    check(git("status", "--porcelain", cwd=clone) == "", "the clone is not clean")
    # What stat says of a file must not drift after it was written: else git reads every file again for ever.
    time.sleep(0.1)
    git("update-index", "-q", "--refresh")
    check(git("diff-files", "--name-only") == "", "stat information drifted")
    return {"head": git("rev-parse", "HEAD"), "tree": git("ls-tree", "-r", "HEAD"), "clone": git("rev-parse", "HEAD", cwd=clone)}


@case(data_mib=4, tools=("make", "gcc"))
def make(place: Place) -> dict:
    """Builds a C project in parallel; a second build does nothing; one touched file builds one object and links."""
    project = place.dir
    objects = " ".join(f"s{i}.o" for i in range(SOURCES))
    (project / "all.h").write_text("".join(f"int f{i}(int);\n" for i in range(SOURCES)))
    for i in range(SOURCES):
        (project / f"s{i}.c").write_text(
            f'#include <stdio.h>\n#include "all.h"\nint table{i}[1000] = {{{i}}};\nint f{i}(int x) {{ return x + {i}; }}\n'
        )
    calls = " + ".join(f"f{i}({i})" for i in range(SOURCES))
    (project / "main.c").write_text(
        f'#include <stdio.h>\n#include "all.h"\nint main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    )
    (project / "Makefile").write_text(
        f"CFLAGS = -O1 -g0\nOBJECTS = main.o {objects}\nprogram: $(OBJECTS)\n\t$(CC) -o $@ $(OBJECTS)\n"
        "$(OBJECTS): all.h\n%.o: %.c\n\t$(CC) $(CFLAGS) -c -o $@ $<\n"
    )
    first = run("make", "-j2", cwd=project)
    check(first.count(" -c ") == SOURCES + 1, f"compiled {first.count(' -c ')}")
    total = run("./program", cwd=project).strip()
    check(total == str(2 * sum(range(SOURCES))), f"the program says {total}")
    again = run("make", "-j2", cwd=project)
    check("up to date" in again, f"built again: {again}")
    os.utime(project / "s7.c")
    third = run("make", "-j2", cwd=project)
    check(third.count(" -c ") == 1 and "s7.c" in third, f"after touching one: {third}")
    (project / "s8.c").write_text((project / "s8.c").read_text() + "/* longer */\n")
    fourth = run("make", "-j2", cwd=project)
    check(fourth.count(" -c ") == 1 and "s8.c" in fourth, f"after changing one: {fourth}")
    check("up to date" in run("make", cwd=project), "built again at the end")
    return {"says": run("./program", cwd=project)}


@case(data_mib=8, tools=("cargo",), ignored=("crate/target",))
def cargo(place: Place) -> dict:
    """A cargo build with its lock files, hard links and mapped libraries; the second finds everything fresh."""
    source = place.dir / "crate" / "src"
    source.mkdir(parents=True)
    (place.dir / "crate" / "Cargo.toml").write_text('[package]\nname = "tiny"\nversion = "0.1.0"\nedition = "2021"\n[workspace]\n')
    (source / "main.rs").write_text('fn main() { println!("{}", (1..=10).product::<u64>()); }\n')
    env = {key: value for key, value in os.environ.items() if key not in ("CARGO_TARGET_DIR", "RUSTFLAGS")}
    run("cargo", "build", "--offline", cwd=place.dir / "crate", env=env)
    check(run("target/debug/tiny", cwd=place.dir / "crate") == "3628800\n", "the program is wrong")
    again = run("cargo", "build", "--offline", "--message-format=json", cwd=place.dir / "crate", env=env)
    check('"fresh":true' in again and '"fresh":false' not in again, "built again")
    return {}
