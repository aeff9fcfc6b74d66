"""What a file does, compared with an unbuffered file of Python's own."""

from __future__ import annotations

import array
import ctypes
import errno
import io
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pinfold
from conftest import pattern


@pytest.fixture
def file(volume: pinfold.Volume) -> Any:
    with volume.open("f", "wb+") as file:
        yield file


def test_reading_and_writing_move_the_position_and_at_calls_do_not(file: pinfold.File) -> None:
    data = pattern(20_000)
    assert file.write(data) == len(data)
    assert file.tell() == len(data)
    assert file.write_at(b"xyz", 5_000) == 3
    assert file.read_at(5, 4_999) == data[4_999:5_000] + b"xyz" + data[5_003:5_004]
    assert file.tell() == len(data)
    assert file.seek(-5, os.SEEK_END) == len(data) - 5
    assert file.read(100) == data[-5:]
    assert file.read() == b""
    assert file.read_at(10, len(data) + 7) == b""
    assert file.seek(1) == 1
    assert file.seek(2, os.SEEK_CUR) == 3
    assert file.readall() == file.read_at(1 << 20, 3)
    assert file.size == len(data)


def buffers() -> list[Any]:
    return [
        bytearray(1000),
        memoryview(bytearray(1200))[100:1100],
        array.array("d", [0.0] * 125),
        np.zeros(125),
        np.zeros((25, 5)),
        (ctypes.c_char * 1000)(),
        mmap.mmap(-1, 1000),
    ]


@pytest.mark.parametrize("at", range(len(buffers())))
def test_any_contiguous_buffer_will_do(file: pinfold.File, at: int) -> None:
    data = pattern(1000)
    target = buffers()[at]
    file.write(data)
    file.seek(0)
    assert file.readinto(target) == 1000
    assert bytes(memoryview(target).cast("B")) == data
    other = buffers()[at]
    assert file.readinto_at(other, 500) == 500
    assert bytes(memoryview(other).cast("B"))[:500] == data[500:]
    assert file.write_at(target, 3) == 1000
    assert file.read_at(1000, 3) == data


@pytest.mark.parametrize(
    "call",
    [
        lambda file: file.readinto(b"read-only"),
        lambda file: file.readinto_at(memoryview(b"read-only"), 0),
        lambda file: file.write("text"),
        lambda file: file.write(None),
        lambda file: file.write(np.zeros((8, 8))[:, ::2]),
        lambda file: file.write(np.zeros(8)[::2]),
        lambda file: file.readinto(7),
        lambda file: file.read("5"),
        lambda file: file.seek(1.5),
    ],
)
def test_what_is_no_fitting_buffer_or_number_is_refused(file: pinfold.File, call: Any) -> None:
    file.write(b"kept")
    with pytest.raises((TypeError, BufferError, ValueError)):
        call(file)
    assert file.read_at(10, 0) == b"kept"


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda file: file.seek(-1), errno.EINVAL),
        (lambda file: file.seek(-10, os.SEEK_CUR), errno.EINVAL),
        (lambda file: file.seek(0, 17), errno.EINVAL),
        (lambda file: file.seek(100, os.SEEK_DATA), errno.ENXIO),
        (lambda file: file.read_at(1, -1), errno.EINVAL),
        (lambda file: file.readinto_at(bytearray(1), -1), errno.EINVAL),
        (lambda file: file.write_at(b"x", -1), errno.EINVAL),
        (lambda file: file.write_at(b"x", 2**63 - 1), errno.EINVAL),
        (lambda file: file.truncate(-1), errno.EINVAL),
        (lambda file: file.truncate(2**63 - 1), errno.EFBIG),
        (lambda file: file.allocate(0, 0), errno.EINVAL),
        (lambda file: file.punch(-1, 5), errno.EINVAL),
        (lambda file: file.punch(0, -5), errno.EINVAL),
        (lambda file: file.punch(2**63 - 1, 2**63 - 1), errno.EFBIG),
    ],
)
def test_errors_carry_number_text_and_name(file: pinfold.File, call: Any, number: int) -> None:
    file.write(b"kept")
    with pytest.raises(OSError) as caught:
        call(file)
    assert caught.value.errno == number
    assert caught.value.strerror == os.strerror(number)
    assert caught.value.filename == "f"
    assert file.size == 4


def test_numbers_beyond_64_bits_overflow(file: pinfold.File) -> None:
    for call in (file.seek, file.truncate, lambda n: file.read_at(1, n), lambda n: file.read(n)):
        with pytest.raises(OverflowError):
            call(2**64)


def test_a_size_beyond_the_file_costs_no_memory(file: pinfold.File) -> None:
    file.write(b"small")
    assert file.read_at(2**62, 0) == b"small"
    file.seek(0)
    assert file.read(2**62) == b"small"


def test_access_that_was_not_asked_for_is_unsupported(volume: pinfold.Volume) -> None:
    with volume.open("f", "wb") as writer, volume.open("f", "rb") as reader:
        for call in (
            writer.read,
            writer.readall,
            writer.readline,
            lambda: writer.readinto(bytearray(1)),
            lambda: writer.read_at(1, 0),
            lambda: writer.readinto_at(bytearray(1), 0),
            lambda: reader.write(b"x"),
            lambda: reader.write_at(b"x", 0),
            lambda: reader.truncate(0),
            lambda: reader.allocate(0, 1),
            lambda: reader.punch(0, 1),
        ):
            with pytest.raises(io.UnsupportedOperation):
                call()


def test_a_closed_file_says_so(volume: pinfold.Volume) -> None:
    file = volume.open("f", "wb+")
    file.close()
    file.close()
    assert file.closed
    for call in (
        file.read,
        file.readall,
        file.readline,
        file.readlines,
        file.tell,
        file.sync,
        file.datasync,
        file.flush,
        file.truncate,
        file.readable,
        file.seekable,
        file.writable,
        file.drop_cache,
        file.__enter__,
        lambda: file.size,
        lambda: next(file),
        lambda: file.read_at(1, 0),
        lambda: file.readinto(bytearray(1)),
        lambda: file.write(b"x"),
        lambda: file.seek(0),
        lambda: file.punch(0, 1),
    ):
        with pytest.raises(ValueError, match="closed file"):
            call()


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 5_000, 200_000])
def test_lines_are_found_however_long(file: pinfold.File, beside: Path, length: int) -> None:
    data = b"a" * length + b"\n\n" + b"b" * (length // 2) + b"\nlast"
    file.write(data)
    file.seek(0)
    (beside / "f").write_bytes(data)
    with open(beside / "f", "rb", 0) as theirs:
        assert list(file) == list(theirs)
        for stream in (file, theirs):
            stream.seek(0)
        assert file.readline(3) == theirs.readline(3)
        assert file.readline(None) == theirs.readline(None)
        assert file.tell() == theirs.tell()
        assert file.readline(0) == b""
        assert file.readlines(5) == theirs.readlines(5)


def test_appends_go_to_the_end_whatever_the_offset(volume: pinfold.Volume) -> None:
    with volume.open("f", "ab+") as one, volume.open("f", "ab") as other:
        one.write(b"1")
        other.write(b"2")
        one.seek(0)
        one.write(b"3")
        assert one.tell() == 3
        one.write_at(b"4", 0)
        assert one.read_at(10, 0) == b"1234"
    with volume.open("f", "ab") as again:
        assert again.tell() == 4


def test_sizes_change_and_holes_are_found(file: pinfold.File) -> None:
    file.write(b"x" * 100_000)
    assert file.truncate(10) == 10
    assert file.truncate(100_000) == 100_000
    assert file.read_at(20, 5) == b"x" * 5 + bytes(15)
    file.allocate(0, 200_000)
    assert file.size == 200_000
    file.allocate(0, 400_000, keep_size=True)
    assert file.size == 200_000
    file.write_at(b"y" * 100_000, 0)
    file.punch(4_096, 8_192)
    assert file.read_at(8_194, 4_095) == b"y" + bytes(8_192) + b"y"
    assert file.seek(0, os.SEEK_HOLE) in (4_096, 200_000)
    assert file.seek(0, os.SEEK_DATA) == 0


def test_what_is_written_is_in_the_directory_after_sync(
    volume: pinfold.Volume, file: pinfold.File, directory: Path
) -> None:
    file.write(b"durable")
    file.sync()
    assert (directory / "f").read_bytes() == b"durable"
    file.write_at(b"again  ", 0)
    file.datasync()
    assert (directory / "f").read_bytes() == b"again  "
    file.write_at(b"volume ", 0)
    volume.sync()
    assert (directory / "f").read_bytes() == b"volume "


def test_dropping_the_cache_reads_from_the_store(
    volume: pinfold.Volume, file: pinfold.File
) -> None:
    file.write(pattern(100_000))
    file.drop_cache()
    missed = volume.statistics()["misses"]
    assert file.read_at(100_000, 0) == pattern(100_000)
    assert volume.statistics()["misses"] > missed


def test_a_file_larger_than_the_budget_is_whole(directory: Path, beside: Path) -> None:
    data = pattern(8 << 20)
    with pinfold.Volume(directory, memory="1MiB") as volume:
        with volume.open("f", "wb+") as file:
            assert file.write(data) == len(data)
            file.seek(0)
            assert file.read() == data
            assert volume.statistics()["pages_max"] == 256
    assert (directory / "f").read_bytes() == data


def test_libraries_that_want_a_file_take_one(volume: pinfold.Volume) -> None:
    import csv
    import json
    import pickle
    import tarfile
    import zipfile

    with volume.open("z", "wb+") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("inside", pattern(50_000))
    with volume.open("z") as file, zipfile.ZipFile(file) as archive:
        assert archive.read("inside") == pattern(50_000)
        assert archive.testzip() is None
    with volume.open("t", "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
        info = tarfile.TarInfo("inside")
        info.size = 5_000
        tar.addfile(info, io.BytesIO(pattern(5_000)))
    with volume.open("t") as file, tarfile.open(fileobj=file) as tar:
        inside = tar.extractfile("inside")
        assert inside is not None and inside.read() == pattern(5_000)
    with volume.open("p", "wb+") as file:
        pickle.dump({"a": [1, 2]}, file)
        file.seek(0)
        assert pickle.load(file) == {"a": [1, 2]}
    with volume.open("j", "w+", encoding="utf-8") as text:
        json.dump([1, "zwei"], text)
        text.seek(0)
        assert json.load(text) == [1, "zwei"]
    with volume.open("c", "w+", encoding="utf-8", newline="") as text:
        csv.writer(text).writerows([["a", "b"], ["1", "2"]])
        text.seek(0)
        assert list(csv.reader(text)) == [["a", "b"], ["1", "2"]]
    numbers = np.arange(10_000.0).reshape(100, 100)
    with volume.open("n", "wb+") as file:
        np.save(file, numbers)
        file.seek(0)
        assert (np.load(file) == numbers).all()
