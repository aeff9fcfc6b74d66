"""Names and attributes, compared with the os module on a directory of the kernel's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pinfold


class Kernel:
    """The same functions, by the os module below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(os, name)
        paths = 2 if name in ("rename", "link") else 1

        def call(*arguments: Any, **options: Any) -> Any:
            if name == "symlink":
                return os.symlink(arguments[0], self.root / arguments[1])
            placed = [self.root / path for path in arguments[:paths]]
            return function(*placed, *arguments[paths:], **options)

        return call


def outcome(call: Callable[[], Any]) -> Any:
    try:
        result = call()
    except OSError as error:
        # The kernel's are below a directory; ours are paths in the volume.
        names = [error.filename, error.filename2]
        names = [name and Path(os.fsdecode(name)).name for name in names]
        return type(error), error.errno, error.strerror, names
    if isinstance(result, list):
        return sorted(result)
    if isinstance(result, os.stat_result):
        return result.st_mode, result.st_nlink, result.st_size
    return result


PROGRAM: list[tuple[Any, ...]] = [
    ("mkdir", "a"),
    ("mkdir", "a"),
    ("mkdir", "a/b", 0o700),
    ("mkdir", "missing/b"),
    ("makedirs", "a/c/d/e"),
    ("makedirs", "a/c/d/e"),
    ("listdir", "a"),
    ("listdir", "missing"),
    ("stat", "a/b"),
    ("rmdir", "a"),
    ("rmdir", "missing"),
    ("remove", "a"),
    ("remove", "missing"),
    ("symlink", "c/d", "a/link"),
    ("symlink", "c/d", "a/link"),
    ("readlink", "a/link"),
    ("readlink", "a/b"),
    ("lstat", "a/link"),
    ("listdir", "a/link"),
    ("symlink", "nowhere", "dangling"),
    ("stat", "dangling"),
    ("lstat", "dangling"),
    ("symlink", "loop", "loop"),
    ("stat", "loop"),
    ("rename", "a/b", "a/b2"),
    ("rename", "missing", "a/b3"),
    ("rename", "a", "a/c/into-itself"),
    ("rename", "a/c", "a/b2"),
    ("listdir", "a/b2"),
    ("link", "dangling", "second"),
    ("link", "a", "of-a-directory"),
    ("link", "missing", "x"),
    ("rmdir", "a/b2/d"),
    ("rmdir", "a/b2/d/e"),
    ("rmdir", "a/b2/d"),
    ("remove", "loop"),
    ("listdir", "."),
    ("stat", "a/link/through/nothing"),
    ("stat", "x" * 300),
    ("mkdir", b"bytes"),
]


def test_a_program_of_names_goes_as_with_the_kernel(volume: pinfold.Volume, beside: Path) -> None:
    kernel = Kernel(beside)
    for name, *arguments in PROGRAM:
        theirs = [os.fsdecode(a) if isinstance(a, bytes) else a for a in arguments]
        ours = outcome(lambda: getattr(volume, name)(*arguments))
        assert ours == outcome(lambda: getattr(kernel, name)(*theirs)), (name, arguments)


def test_stat_tells_what_os_stat_tells(volume: pinfold.Volume, directory: Path) -> None:
    (directory / "f").write_bytes(b"12345")
    os.utime(directory / "f", ns=(-1, 2**60 + 1))
    ours, theirs = volume.stat("f"), os.stat(directory / "f")
    assert isinstance(ours, os.stat_result)
    for name in dir(theirs):
        if name.startswith("st_"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert tuple(ours) == tuple(theirs)


def test_stat_tells_the_live_size(volume: pinfold.Volume) -> None:
    with volume.open("f", "wb") as file:
        file.write(b"not yet stored")
        assert volume.stat("f").st_size == 14


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_paths_may_be_str_bytes_or_pathlike(volume: pinfold.Volume, kind: Any) -> None:
    path = kind("näme")
    with volume.open(path, "xb") as file:
        assert file.name == (str(path) if isinstance(path, Path) else path)
    assert volume.exists(path)
    assert volume.listdir(kind(".")) == [kind("näme") if kind is not Path else "näme"]
    with pytest.raises(FileExistsError) as caught:
        volume.open(path, "xb")
    assert caught.value.filename == (str(path) if isinstance(path, Path) else path)


def test_undecodable_names_survive(volume: pinfold.Volume) -> None:
    volume.open(b"\xff\xfe", "xb").close()
    (name,) = volume.listdir()
    assert os.fsencode(name) == b"\xff\xfe"
    assert volume.exists(name)
    (entry,) = volume.scandir(b".")
    assert (entry.name, entry.path) == (b"\xff\xfe", b"./\xff\xfe")


@pytest.mark.parametrize("path", [5, None, 1.5, ["a"]])
def test_what_is_no_path_is_a_type_error(volume: pinfold.Volume, path: Any) -> None:
    with pytest.raises(TypeError):
        volume.stat(path)
    with pytest.raises(TypeError):
        volume.open(path)


def test_odd_paths_have_clear_errors(volume: pinfold.Volume) -> None:
    with pytest.raises(ValueError, match="null byte"):
        volume.open("a\0b")
    with pytest.raises(FileNotFoundError):
        volume.open("")
    with pytest.raises(OSError) as caught:
        volume.open("../outside")
    assert caught.value.errno == errno.EXDEV
    with pytest.raises(IsADirectoryError):
        volume.open(".")
    assert volume.exists("/")
    assert not volume.exists("/etc/passwd")


def test_scandir_tells_names_kinds_and_attributes(volume: pinfold.Volume) -> None:
    volume.mkdir("d")
    volume.open("d/file", "xb").close()
    volume.mkdir("d/dir")
    volume.symlink("dir", "d/link")
    volume.symlink("nowhere", "d/dangling")
    for at in range(600):
        volume.open(f"d/many-{at}", "xb").close()
    with volume.scandir("d") as entries:
        found = {entry.name: entry for entry in entries}
    assert len(found) == 604
    assert set(found) == set(volume.listdir("d"))
    file, folder, link, dangling = (found[n] for n in ("file", "dir", "link", "dangling"))
    assert file.path == os.fspath(file) == "d/file"
    assert file.is_file() and not file.is_dir() and not file.is_symlink()
    assert folder.is_dir() and not folder.is_file()
    assert link.is_symlink() and link.is_dir() and not link.is_dir(follow_symlinks=False)
    assert dangling.is_symlink() and not dangling.is_file() and not dangling.is_dir()
    assert file.inode() == file.stat().st_ino == volume.stat("d/file").st_ino
    assert link.stat(follow_symlinks=False).st_size == 3
    with pytest.raises(NotADirectoryError):
        volume.scandir("d/file")


def test_a_scan_ends_when_it_is_closed(volume: pinfold.Volume) -> None:
    for at in range(10):
        volume.mkdir(f"d{at}")
    held = len(os.listdir("/proc/self/fd"))
    entries = volume.scandir()
    next(entries)
    assert len(os.listdir("/proc/self/fd")) == held + 1
    entries.close()
    assert len(os.listdir("/proc/self/fd")) == held
    assert list(entries) == []


def test_removed_files_live_until_they_are_closed(volume: pinfold.Volume) -> None:
    with volume.open("f", "wb+") as file:
        file.write(b"still here")
        volume.remove("f")
        assert not volume.exists("f")
        assert file.read_at(20, 0) == b"still here"
    with volume.open("a", "xb") as one:
        one.write(b"new")
    with volume.open("b", "xb") as other:
        other.write(b"old")
    volume.rename("a", "b")
    with volume.open("b") as file:
        assert file.read() == b"new"
    volume.link("b", "c")
    assert volume.stat("c").st_nlink == 2
