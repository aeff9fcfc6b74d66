"""Comparing two directory trees: every byte and everything a program can see of a file except times and numbers."""

import os
import stat
from pathlib import Path

CHUNK = 1 << 20
DIFFERENCES_MAX = 20


def differences(left: Path, right: Path, ignored: tuple[str, ...] = ()) -> list[str]:
    """Says where two trees differ: names, kinds, modes, owners, sizes, bytes, link targets, which names share a file.

    `ignored` names paths relative to the top, whole subtrees included, that a program makes differently each time.
    """
    seen = _listing(left, ignored), _listing(right, ignored)
    found = [f"only in one tree: {name}" for name in sorted(seen[0].keys() ^ seen[1].keys())]
    for name in sorted(seen[0].keys() & seen[1].keys()):
        if len(found) > DIFFERENCES_MAX:
            return [*found[:DIFFERENCES_MAX], "and more"]
        found += [f"{name}: {what}" for what in _differ(left / name, right / name)]
    if _hard_links(left, seen[0]) != _hard_links(right, seen[1]):
        found.append("other sets of hard links")
    return found


def _listing(top: Path, ignored: tuple[str, ...]) -> dict[str, os.stat_result]:
    found = {}
    for parent, dirs, files in os.walk(top):
        for name in dirs + files:
            path = os.path.relpath(os.path.join(parent, name), top)
            if not any(path == skip or path.startswith(skip + "/") for skip in ignored):
                found[path] = os.lstat(os.path.join(parent, name))
    return found


def _differ(left: Path, right: Path) -> list[str]:
    a, b = os.lstat(left), os.lstat(right)
    if stat.S_IFMT(a.st_mode) != stat.S_IFMT(b.st_mode):
        return [f"kinds {stat.filemode(a.st_mode)} and {stat.filemode(b.st_mode)}"]
    found = []
    if a.st_mode != b.st_mode:
        found.append(f"modes {a.st_mode:o} and {b.st_mode:o}")
    if (a.st_uid, a.st_gid) != (b.st_uid, b.st_gid):
        found.append(f"owners {a.st_uid}:{a.st_gid} and {b.st_uid}:{b.st_gid}")
    if stat.S_ISLNK(a.st_mode):
        if os.readlink(left) != os.readlink(right):
            found.append("link targets")
    elif stat.S_ISREG(a.st_mode):
        if a.st_size != b.st_size:
            found.append(f"sizes {a.st_size} and {b.st_size}")
        else:
            found += _bytes_differ(left, right)
    return found


def _bytes_differ(left: Path, right: Path) -> list[str]:
    with open(left, "rb") as a, open(right, "rb") as b:
        at = 0
        while True:
            x, y = a.read(CHUNK), b.read(CHUNK)
            if x != y:
                first = next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), min(len(x), len(y)))
                return [f"bytes differ from {at + first} on: {x[first:first + 16]!r} and {y[first:first + 16]!r}"]
            if not x:
                return []
            at += len(x)


def _hard_links(top: Path, listing: dict[str, os.stat_result]) -> list[list[str]]:
    by_inode: dict[tuple[int, int], list[str]] = {}
    for name, entry in listing.items():
        if stat.S_ISREG(entry.st_mode) and entry.st_nlink > 1:
            by_inode.setdefault((entry.st_dev, entry.st_ino), []).append(name)
    return sorted(sorted(names) for names in by_inode.values())
