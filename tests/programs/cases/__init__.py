"""The cases: each does the same work in any directory it is given and checks what the program itself can check.

A case is a function `(Place) -> dict`. It raises `AssertionError` when a check fails and `Skip` when it cannot run. What
it leaves in the directory is compared byte by byte between a plain directory and the mount, except `ignored`; what it
returns is compared too.
"""

import functools
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from results import Skip

MIB = 1 << 20
COMMAND_S_MAX = 900


@dataclass(frozen=True)
class Place:
    """Where a case works, and for how long if it can go on for any time."""

    dir: Path
    seconds: int
    seed: int


@dataclass(frozen=True)
class Case:
    """A case, how much data it works on (the mount gets a quarter of that as memory), and what differs each time."""

    name: str
    work: Callable[[Place], dict]
    data: int
    ignored: tuple[str, ...]
    timed: bool


ALL: dict[str, Case] = {}


def case(data_mib: float, ignored: tuple[str, ...] = (), tools: tuple[str, ...] = (), timed: bool = False):
    """Registers a case under its function's name; without its tools it is skipped. `timed`: runs as long as asked."""

    def register(work: Callable[[Place], dict]) -> Callable[[Place], dict]:
        @functools.wraps(work)
        def checked(place: Place) -> dict:
            missing = [tool for tool in tools if not find(tool)]
            if missing:
                raise Skip(f"{', '.join(missing)} is not installed; see tests/programs/install")
            return work(place) or {}

        ALL[work.__name__] = Case(work.__name__, checked, int(data_mib * MIB), ignored, timed)
        return work

    return register


def find(tool: str) -> str | None:
    """The path of a program, installed by the system or by tests/programs/install."""
    tools = os.environ.get("PINFOLD_TOOLS", str(Path.home() / ".cache/pinfold-programs"))
    return shutil.which(tool, path=os.environ["PATH"] + os.pathsep + tools + "/bin")


def run(*command, cwd: Path, status: int = 0, **options) -> str:
    """Runs a program, checks its exit status and returns its standard output."""
    command = [find(str(command[0])) or command[0], *command[1:]]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, timeout=COMMAND_S_MAX, stdin=subprocess.DEVNULL, check=False, **options
    )
    out = done.stdout.decode(errors="replace")
    if done.returncode != status:
        said = (done.stderr.decode(errors="replace")[-1500:] + "\n" + out[-1500:]).strip()
        raise AssertionError(f"{' '.join(map(str, command))[:300]}: status {done.returncode}: {said}")
    return out


def write_files(top: Path, count: int, size_max: int, seed: int) -> None:
    """Fills a directory with a tree of files: sizes of all orders, half of them text, half of them noise."""
    rng = random.Random(seed)
    for number in range(count):
        parent = top / f"d{number % 17}" / f"e{number % 5}"
        parent.mkdir(parents=True, exist_ok=True)
        size = int(size_max ** rng.random())
        if number % 2:
            body = rng.randbytes(size)
        else:
            body = b"".join(b"line %d of %d\n" % (rng.randrange(1000), number) for _ in range(size // 14 + 1))[:size]
        (parent / f"f{number}.{'bin' if number % 2 else 'txt'}").write_bytes(body)


def check(holds: bool, what: str) -> None:
    """An assertion that stays under `python3 -O`."""
    if not holds:
        raise AssertionError(what)


from . import builds, copies, databases, files, sharing, stress  # noqa: E402,F401  (they register themselves)
