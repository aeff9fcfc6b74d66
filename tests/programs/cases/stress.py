"""Programs made to break filesystems: fsx, fio with verification, stress-ng."""

import itertools
import subprocess
import time
from pathlib import Path

from . import MIB, Place, case, check, find, run

# Weights of fsx's operations, and what each configuration adds to the ordinary reads, writes and truncates.
_ORDINARY = {"read": 10, "write": 10, "truncate": 5, "mapread": 0, "mapwrite": 0, "fsync": 0.5, "fdatasync": 0.5, "close_open": 1}
_EVERYTHING = {
    **_ORDINARY, "mapread": 10, "mapwrite": 10, "invalidate": 1, "punch_hole": 3,
    "posix_fadvise": 2, "copy_file_range": 3, "sendfile": 3,
}  # fmt: skip
# Without posix_fallocate: fsx 0.3.2 asks it for no bytes at all now and then, and takes the EINVAL for a finding.
FSX = {
    "plain": ("", _ORDINARY),
    "mapped": ("", {**_ORDINARY, "mapread": 10, "mapwrite": 10, "invalidate": 1}),
    "holes": ("", {**_ORDINARY, "punch_hole": 5}),
    "everything": ("", _EVERYTHING),
    "everything, large": (f"flen = {8 * MIB}\n[opsize]\nmax = 1048576\n", _EVERYTHING),
    "everything, tiny": ("flen = 20000\n[opsize]\nmax = 100\n", _EVERYTHING),
    "aligned": ("flen = 1048576\n[opsize]\nmax = 65536\nalign = 4096\n", _EVERYTHING),
    "no msync": ("nomsyncafterwrite = true\n", _EVERYTHING),
}
FIO = [
    (engine, direct, pattern)
    for engine, direct in (("psync", 0), ("psync", 1), ("libaio", 0), ("libaio", 1), ("io_uring", 0), ("io_uring", 1), ("mmap", 0))
    for pattern in ("randwrite", "randrw")
]
# Stressors that map a file, read it ahead, or have many transfers under way. Not io-uring: that of stress-ng 0.15 asks for the
# attributes of a name that it has removed, and fails in any directory.
MIXED_STRESSORS = (
    ("--mmap", "1", "--mmap-file", "--mmap-bytes", "2m"), ("--mmap", "1", "--mmap-file", "--mmap-async", "--mmap-bytes", "2m"),
    ("--mmap", "1", "--mmap-odirect", "--mmap-bytes", "2m"), ("--mmap", "1", "--mmap-osync", "--mmap-bytes", "2m"),
    ("--readahead", "2", "--readahead-bytes", "4m"), ("--aio", "2"), ("--aiol", "2"),
    ("--iomix", "2", "--iomix-bytes", "4m"),
)  # fmt: skip
# Stressors that work on files in a directory and can check what they read.
STRESSORS = (
    "aio", "aiol", "chmod", "copy-file", "dentry", "dir", "dirdeep", "dup", "fallocate", "fcntl", "file-ioctl", "filename",
    "flock", "fpunch", "fstat", "getdent", "hdd", "iomix", "lease", "link", "lockf", "locka", "lockofd", "mmapfork",
    "msync", "open", "readahead", "rename", "revio", "seek", "sendfile", "splice", "symlink", "sync-file", "utime", "xattr",
)  # fmt: skip


def _share(place: Place, parts: int) -> float:
    return max(1.0, place.seconds / parts)


# fsx stops by the number of operations only; a run is ended by signal when its time is over.
@case(data_mib=1, tools=("fsx",), timed=True, ignored=("file",))
def fsx(place: Place) -> dict:
    """fsx in each configuration for its share of the time: every read is compared with what fsx wrote before."""
    for number, (name, (settings, weights)) in enumerate(FSX.items()):
        top, _, sections = settings.partition("[")
        config = place.dir.parent / f"fsx-{number}.toml"
        table = "".join(f"{key} = {value}\n" for key, value in weights.items())
        config.write_text(f"{top}{'[' + sections if sections else ''}[weights]\n{table}")
        artifacts = place.dir.parent
        command = [find("fsx"), "-q", "-S", str(place.seed * 100 + number), "-f", config, "-P", artifacts, place.dir / "file"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            said, _ = process.communicate(timeout=_share(place, len(FSX)))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.communicate(timeout=240)
            continue
        finally:
            config.unlink()
        raise AssertionError(f"{name}: status {process.returncode}: {said.decode(errors='replace')[-2500:]}")
    (place.dir / "file").unlink()
    return {}


@case(data_mib=32, tools=("fio",), timed=True)
def fio(place: Place) -> dict:
    """fio writes with every engine, buffered and direct, and verifies each block's checksum, again in a second run."""
    for engine, direct, pattern in FIO:
        name = f"{engine}-{direct}-{pattern}"
        depth = 1 if engine in ("psync", "mmap") else 16
        common = [
            f"--name={name}", f"--filename={name}", f"--ioengine={engine}", f"--direct={direct}", f"--rw={pattern}",
            "--size=32m", "--bs=4k-64k" if not direct else "--bsrange=4k-128k", f"--blockalign=4k", f"--iodepth={depth}",
            "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", f"--randseed={place.seed}", "--fallocate=none",
            "--serialize_overlap=1" if depth > 1 else "--end_fsync=1", "--group_reporting", "--minimal",
        ]  # fmt: skip
        until = time.monotonic() + _share(place, len(FIO))
        for turn in itertools.count():
            run("fio", *common, "--do_verify=1", f"--verify_pattern={turn + 1}" if turn % 2 else "--verify_backlog=64", cwd=place.dir)
            if time.monotonic() > until:
                break
        (place.dir / name).unlink()
    return {}


@case(data_mib=16, tools=("fio",), timed=True)
def fio_jobs(place: Place) -> dict:
    """Jobs of different engines on one file at a time, each verifying its own part: direct beside buffered beside mapped."""
    # The mapping first: fio maps from 0 on, whatever the offset.
    parts = (("mmap", 0), ("psync", 0), ("psync", 1), ("io_uring", 1), ("io_uring", 0), ("libaio", 1), ("libaio", 0), ("psync", 1))
    jobs = []
    for number, (engine, direct) in enumerate(parts):
        jobs += [
            f"--name=part{number}", "--filename=shared", f"--ioengine={engine}", f"--direct={direct}", f"--offset={number * 2}m",
            "--size=2m", "--rw=randwrite", "--bsrange=4k-64k", f"--iodepth={8 if 'io' in engine else 1}", "--serialize_overlap=1", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
        ]  # fmt: skip
    (place.dir / "shared").write_bytes(bytes(16 * MIB))
    until = time.monotonic() + place.seconds / 4
    turn = 0
    while turn == 0 or time.monotonic() < until:
        turn += 1
        run("fio", "--minimal", "--verify_state_save=0", "--fallocate=none", f"--randseed={place.seed + turn}", *jobs, cwd=place.dir)
    (place.dir / "shared").unlink()
    return {}


def _every_way(place: Place) -> dict:
    program = place.dir.parent / "every_way"
    source = Path(__file__).resolve().parent.parent / "every_way.c"
    run("gcc", "-O2", "-o", program, source, cwd=place.dir)
    try:
        for processes in (1, 3):
            run(program, place.dir / "file", str(max(1, place.seconds // 2)), str(place.seed), str(processes), cwd=place.dir)
    finally:
        program.unlink()
    (place.dir / "file").unlink()
    return {}


@case(data_mib=1, tools=("gcc",), timed=True)
def every_way(place: Place) -> dict:
    """every_way.c: one file buffered, direct, mapped, by AIO and by io_uring at once, its own mapping as buffers too."""
    return _every_way(place)


@case(data_mib=64, tools=("gcc",), timed=True)
def every_way_cached(place: Place) -> dict:
    """The same with memory for all of it."""
    return _every_way(place)


@case(data_mib=4, tools=("stress-ng",), timed=True)
def stress_mixed(place: Place) -> dict:
    """stress-ng's mappings of files, read-ahead, AIO, io_uring and mixed I/O, with their own verification."""
    each = max(1, round(_share(place, len(MIXED_STRESSORS))))
    return _stress(place, each, [list(stressor) for stressor in MIXED_STRESSORS])


@case(data_mib=16, tools=("stress-ng",), timed=True)
def stress_ng(place: Place) -> dict:
    """stress-ng's file stressors, with their own verification."""
    each = max(1, round(_share(place, len(STRESSORS))))
    limits = ["--hdd-bytes", "16m", "--iomix-bytes", "16m"]
    return _stress(place, each, [[f"--{stressor}", "2", *limits] for stressor in STRESSORS])


def _stress(place: Place, each: int, stressors: list[list[str]]) -> dict:
    """Runs each stressor for so many seconds; none may fail, and nothing may be left."""
    failed = []
    for stressor in stressors:
        done = subprocess.run(
            ["stress-ng", "--temp-path", place.dir, *stressor, "--timeout", f"{each}s", "--verify", "--oomable"],
            cwd=place.dir, capture_output=True, timeout=each + 300, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said = (done.stdout + done.stderr).decode(errors="replace")
        unavailable = 3, 4
        if done.returncode not in (0, *unavailable):
            complaints = [line for line in said.splitlines() if "fail" in line or "error" in line]
            failed.append(f"{' '.join(stressor)}: status {done.returncode}: {' '.join(complaints)[:500]}")
    check(not failed, "; ".join(failed))
    left = [path.name for path in place.dir.iterdir()]
    check(not left, f"left behind: {left[:5]}")
    return {}
