"""Modes, buffering and text: as Python's own open, on the same data."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest

import pinfold

CONTENT = "first\nsecond ä\r\nthird\n".encode()


def outcome(call: Any) -> Any:
    """What a call returns, or the kind of error it raises with its number."""
    try:
        return call()
    except (OSError, ValueError, TypeError) as error:
        return type(error), getattr(error, "errno", None)


def use(stream: Any) -> list[Any]:
    """What a stream lets itself be used for."""
    text = isinstance(stream, io.TextIOBase)
    data: Any = "more\n" if text else b"more\n"
    found = [stream.readable(), stream.writable(), stream.seekable(), stream.mode]
    found += [outcome(stream.tell), outcome(stream.read), outcome(lambda: stream.write(data))]
    stream.flush()
    stream.seek(0)
    found += [outcome(stream.read), outcome(stream.readline), outcome(lambda: stream.truncate(3))]
    found += [outcome(stream.isatty), outcome(stream.fileno) if not text else None]
    stream.close()
    found += [stream.closed, outcome(stream.read), outcome(lambda: stream.write(data))]
    found += [outcome(stream.tell), outcome(stream.readable), outcome(stream.flush)]
    return found


ALL_MODES = sorted(
    {
        "".join(letters)
        for count in (1, 2, 3)
        for letters in itertools.permutations("rwaxb+t", count)
    }
    | {"", "rr", "U", "r+w", "rbt", "rb++", "q", "bb"}
)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("mode", ALL_MODES)
def test_every_mode_does_what_open_does(
    volume: pinfold.Volume, beside: Path, mode: str, exists: bool
) -> None:
    if exists:
        (beside / "f").write_bytes(CONTENT)
        with volume.open("f", "wb") as file:
            file.write(CONTENT)
    buffering = 0 if "b" in mode else -1
    options: dict[str, Any] = {"buffering": buffering}
    if "b" not in mode:
        options |= {"encoding": "utf-8"}

    def ours() -> Any:
        found = use(volume.open("f", mode, **options))
        found[11] = None  # Theirs has a descriptor.
        return found

    def theirs() -> Any:
        found = use(open(beside / "f", mode, **options))
        found[11] = None
        return found

    assert outcome(ours) == outcome(theirs)
    assert volume.exists("f") == (beside / "f").exists()
    if volume.exists("f"):
        with volume.open("f") as file:
            assert file.read() == (beside / "f").read_bytes()


@pytest.mark.parametrize(
    ("mode", "buffering", "kind"),
    [
        ("rb", 0, pinfold.File),
        ("rb", -1, pinfold.File),
        ("rb", 100, io.BufferedReader),
        ("ab", 100, io.BufferedWriter),
        ("rb+", 100, io.BufferedRandom),
        ("r", -1, io.TextIOWrapper),
        ("r+", 1, io.TextIOWrapper),
    ],
)
def test_buffered_and_text_streams_are_pythons_own(
    volume: pinfold.Volume, mode: str, buffering: int, kind: type
) -> None:
    volume.open("f", "xb").close()
    with volume.open("f", mode, buffering, **({} if "b" in mode else {"encoding": "utf-8"})) as stream:
        assert type(stream) is kind
        assert isinstance(stream, io.IOBase)
        assert stream.name == "f"


def test_a_file_is_a_raw_stream_without_a_descriptor(volume: pinfold.Volume) -> None:
    with volume.open("f", "wb+") as file:
        assert isinstance(file, io.RawIOBase)
        with pytest.raises(io.UnsupportedOperation):
            file.fileno()
        with pytest.raises(TypeError):
            pickle.dumps(file)
        assert repr(file) == "<pinfold.File name='f' mode='rb+'>"
    assert repr(file) == "<pinfold.File name='f' mode='rb+' [closed]>"


@pytest.mark.parametrize("newline", [None, "", "\n", "\r\n"])
def test_text_is_read_as_open_reads_it(
    volume: pinfold.Volume, beside: Path, newline: str | None
) -> None:
    (beside / "f").write_bytes(CONTENT * 1000)
    with volume.open("f", "wb") as file:
        file.write(CONTENT * 1000)
    with volume.open("f", "r", encoding="utf-8", newline=newline) as ours:
        with open(beside / "f", encoding="utf-8", newline=newline) as theirs:
            assert list(ours) == list(theirs)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("rb", {"encoding": "utf-8"}),
        ("rb", {"errors": "strict"}),
        ("rb", {"newline": ""}),
        ("r", {"buffering": 0, "encoding": "utf-8"}),
        ("rb", {"buffering": -2}),
        ("rb", {"buffering": 100, "direct": True}),
        ("r", {"direct": True, "encoding": "utf-8"}),
        ("rb", {"buffering": 1}),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    volume: pinfold.Volume, mode: str, options: dict[str, Any]
) -> None:
    volume.open("f", "xb").close()
    with pytest.raises(ValueError):
        volume.open("f", mode, **options)


def test_an_unknown_encoding_leaves_no_file_open(volume: pinfold.Volume) -> None:
    volume.open("f", "xb").close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LookupError):
            volume.open("f", "r", encoding="no such")


def test_a_file_left_open_is_warned_about_and_closed(volume: pinfold.Volume) -> None:
    with pytest.warns(ResourceWarning, match="unclosed file"):
        volume.open("f", "wb").write(b"kept")
    with pytest.warns(ResourceWarning, match="unclosed file"):
        volume.open("g", "wb", 100).write(b"kept")
    assert volume.stat("f").st_size == volume.stat("g").st_size == 4


def test_direct_files_agree_with_the_cache(directory: Path) -> None:
    with pinfold.Volume(directory, memory="1MiB") as volume:
        with volume.open("f", "wb+") as cached, volume.open("f", "rb+", direct=True) as direct:
            cached.write(bytes(range(256)) * 48)
            assert direct.read_at(8192, 4096) == (bytes(range(256)) * 32)
            assert direct.read() == bytes(range(256)) * 48
            assert direct.read(4096) == b""
            try:
                page = memoryview(_aligned(4096))
                page[:] = b"d" * 4096
                assert direct.write_at(page, 4096) == 4096
            except OSError as error:  # pragma: no cover
                raise AssertionError("aligned memory was refused") from error
            assert cached.read_at(1, 4096) == b"d"


def _aligned(size: int) -> Any:
    import mmap

    return mmap.mmap(-1, size)


def test_dsync_and_permissions_reach_the_store(directory: Path) -> None:
    old = os.umask(0o022)
    try:
        with pinfold.Volume(directory, memory="1MiB") as volume:
            with volume.open("f", "xb", dsync=True, permissions=0o640) as file:
                file.write(b"durable")
                assert (directory / "f").read_bytes() == b"durable"
                assert (directory / "f").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)
