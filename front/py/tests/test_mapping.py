"""Mappings: the buffer protocol, indexing as mmap.mmap offers it, and data larger than the budget."""

from __future__ import annotations

import errno
import gc
import hashlib
import mmap
import os
import random
import re
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pinfold
from conftest import pattern

SIZE = 300_001
DELIVERIES = ["handler", "inline"]


@pytest.fixture
def file(volume: pinfold.Volume) -> Iterator[pinfold.File]:
    told = volume.capabilities()
    if told["mappings"] is None:
        pytest.skip(str(told["mappings_error"]))
    with volume.open("f", "wb+") as file:
        file.write(pattern(SIZE))
        yield file


@pytest.fixture(params=DELIVERIES)
def delivery(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_what_takes_a_buffer_takes_a_mapping(file: pinfold.File, delivery: Any) -> None:
    data = pattern(SIZE)
    file.drop_cache()
    with file.map(delivery=delivery) as mapping:
        assert len(mapping) == SIZE
        with memoryview(mapping) as view:
            assert (view.readonly, view.format, view.nbytes) == (True, "B", SIZE)
            assert view == data
        assert hashlib.sha256(mapping).digest() == hashlib.sha256(data).digest()
        assert struct.unpack_from("<Q", mapping, 12_345) == struct.unpack_from("<Q", data, 12_345)
        wanted = re.escape(data[200_000:200_050])
        match = re.search(wanted, mapping)
        assert match is not None and match.start() == data.find(data[200_000:200_050])
        del match
        array = np.frombuffer(mapping, np.uint8)
        assert not array.flags.writeable
        assert (array == np.frombuffer(data, np.uint8)).all()
        del array
        assert bytes(mapping) == data


def test_stores_through_a_buffer_are_the_files_bytes(
    file: pinfold.File, directory: Path, delivery: Any
) -> None:
    with file.map(access="w", delivery=delivery) as mapping:
        array = np.frombuffer(mapping, np.uint8)
        array[1000:2000] = 7
        assert file.read_at(1002, 999) == pattern(SIZE)[999:1000] + b"\7" * 1000 + pattern(SIZE)[2000:2001]
        file.write_at(b"from the file", 150_000)
        assert array[150_000:150_013].tobytes() == b"from the file"
        struct.pack_into("<I", mapping, 50, 0xDEADBEEF)
        mapping.flush()
        stored = (directory / "f").read_bytes()
        assert stored[50:54] == b"\xef\xbe\xad\xde"
        assert stored[1000:2000] == b"\7" * 1000
        del array


def test_a_private_mapping_keeps_its_stores(file: pinfold.File, delivery: Any) -> None:
    with file.map(access="c", delivery=delivery) as mapping:
        mapping[:5] = b"mine!"
        np.frombuffer(mapping, np.uint8)[10_000:20_000] = 0
        assert mapping[:5] == b"mine!"
        assert mapping[10_000:20_000] == bytes(10_000)
        assert file.read_at(SIZE, 0) == pattern(SIZE)
        with memoryview(mapping) as view:
            assert file.readinto_at(view[100_000:200_000], 7) == 100_000
            assert file.write_at(view[10_000:20_000], 50_000) == 10_000
        assert mapping[100_000:200_000] == pattern(SIZE)[7:100_007]
        assert file.read_at(10_000, 50_000) == bytes(10_000)


def as_mmap(tmp_path: Path) -> mmap.mmap:
    path = tmp_path / "theirs"
    path.write_bytes(pattern(SIZE))
    with open(path, "rb+") as file:
        return mmap.mmap(file.fileno(), 0)


def outcome(call: Any) -> Any:
    try:
        return call()
    except (IndexError, TypeError, ValueError) as error:
        return type(error)


KEYS = [
    *(0, 1, SIZE - 1, -1, -SIZE, SIZE, -SIZE - 1, 2**40, 1.5, "a", None),
    *(slice(None), slice(5), slice(-5, None), slice(100, 50), slice(4090, 4100)),
    *(slice(None, None, 4096), slice(None, None, -1), slice(9000, 10, -7), slice(0, 10**9, 10**8)),
    *(slice(SIZE, SIZE + 10), slice(3, 3), slice(None, None, 0), slice("a")),
]


def test_indexing_and_slicing_are_those_of_mmap(file: pinfold.File, tmp_path: Path) -> None:
    with file.map(access="w") as ours, as_mmap(tmp_path) as theirs:
        for key in KEYS:
            assert outcome(lambda: ours[key]) == outcome(lambda: theirs[key]), key
        for key, value in [
            (0, 255),
            (-1, 0),
            (5, 256),
            (5, -1),
            (5, b"x"),
            (SIZE, 1),
            (slice(10, 20), b"0123456789"),
            (slice(10, 20), b"too short"),
            (slice(10, 20), bytearray(b"ABCDEFGHIJ")),
            (slice(20, 10, -1), b"0123456789"),
            (slice(None, None, 30_000), bytes(11)),
            (slice(None), bytes(reversed(pattern(SIZE)))),
            (slice(7, 7), b""),
            (slice(0, 3), "abc"),
        ]:
            results = [outcome(lambda m=m: m.__setitem__(key, value)) for m in (ours, theirs)]
            assert results[0] == results[1], (key, value)
            assert ours[:] == theirs[:]
        for sub in (b"", b"\0" * 3, pattern(SIZE)[100:0:-1], b"nowhere", bytes(SIZE)):
            for bounds in ((), (5,), (5, 200), (-400,), (-400, -2), (SIZE, 2 * SIZE)):
                assert ours.find(sub, *bounds) == theirs.find(sub, *bounds), (sub[:9], bounds)
        assert list(ours)[:5_000] == [byte for byte in theirs[:5_000]]


def test_a_search_finds_what_lies_across_its_steps(volume: pinfold.Volume) -> None:
    with volume.open("f", "wb+") as file:
        file.truncate(3 << 20)
        for at in (256 << 10, 512 << 10, (3 << 20) - 9):
            for shift in range(-9, 1):
                file.truncate(0)
                file.truncate(3 << 20)
                file.write_at(b"needle=42", at + shift)
                with file.map() as mapping:
                    assert mapping.find(b"needle=42") == at + shift


def test_a_slice_may_be_assigned_from_the_mapping_itself(file: pinfold.File) -> None:
    model = bytearray(pattern(SIZE))
    with file.map(access="w") as mapping:
        with memoryview(mapping) as view:
            mapping[100:200_100] = view[:200_000]
        model[100:200_100] = model[:200_000]
        assert mapping[:] == model
        with memoryview(mapping) as view:
            assert file.write_at(view[:100_000], 100_033) == 100_000
        model[100_033:200_033] = model[:100_000]
        assert mapping[:] == model
        with memoryview(mapping) as view:
            assert file.readinto_at(view[250_000:], 33) == SIZE - 250_000
        model[250_000:] = model[33 : SIZE - 250_000 + 33]
        assert mapping[:] == model


def test_a_part_is_mapped_where_it_is_asked_for(file: pinfold.File) -> None:
    with file.map(8192, 10_000) as mapping:
        assert (mapping.offset, len(mapping), mapping.access, mapping.name) == (8192, 10_000, "r", "f")
        assert mapping[:] == pattern(SIZE)[8192:18_192]
        assert repr(mapping) == "<pinfold.Mapping name='f' access='r' offset=8192 length=10000>"
    with file.map(8192) as mapping:
        assert mapping[:] == pattern(SIZE)[8192:]


@pytest.mark.parametrize(
    ("arguments", "error", "number"),
    [
        ({"offset": 100}, OSError, errno.EINVAL),
        ({"offset": -4096}, OSError, errno.EINVAL),
        ({"length": -1}, OSError, errno.EINVAL),
        ({"length": 0}, ValueError, None),
        ({"length": SIZE + 1}, ValueError, None),
        ({"offset": 1 << 20}, ValueError, None),
        ({"offset": 2**63}, OverflowError, None),
        ({"access": "rw"}, ValueError, None),
        ({"delivery": "pigeon"}, ValueError, None),
        ({"advice": "good"}, ValueError, None),
    ],
)
def test_what_cannot_be_mapped_is_refused(
    file: pinfold.File, arguments: Any, error: type[Exception], number: int | None
) -> None:
    with pytest.raises(error) as caught:
        file.map(**arguments)
    if number is not None:
        assert getattr(caught.value, "errno", None) == number


def test_a_mapping_asks_for_the_rights_it_needs(volume: pinfold.Volume, file: pinfold.File) -> None:
    with volume.open("f", "rb") as reader, volume.open("f", "ab") as writer:
        for call in (lambda: reader.map(access="w"), writer.map, lambda: writer.map(access="w")):
            with pytest.raises(PermissionError) as caught:
                call()
            assert caught.value.filename == "f"
        with reader.map(access="c") as mapping:
            mapping[0] = 1
        with reader.map() as mapping:
            with pytest.raises(TypeError):
                mapping[0] = 1
            with pytest.raises((TypeError, BufferError)):
                reader.readinto(mapping)
            with pytest.raises(ValueError):
                np.frombuffer(mapping, np.uint8)[0] = 1


def test_closing_waits_for_buffers_and_pins(file: pinfold.File) -> None:
    mapping = file.map(access="w")
    view = memoryview(mapping)
    part = view[10:20]
    array = np.frombuffer(mapping, np.uint8)
    pin = mapping.pin(0, 4096, write=True)
    assert pin.pages == 1
    for held in (lambda: view.release(), lambda: part.release(), lambda: None, pin.close):
        with pytest.raises(BufferError):
            mapping.close()
        held()
    with pytest.raises(BufferError):
        mapping.close()
    del array
    gc.collect()
    mapping.close()
    mapping.close()
    assert mapping.closed
    for call in (
        lambda: mapping[0],
        lambda: len(mapping),
        lambda: memoryview(mapping),
        mapping.flush,
        mapping.resident,
        mapping.pin,
        lambda: mapping.advise("normal"),
        mapping.__enter__,
    ):
        with pytest.raises((ValueError, BufferError), match="closed mapping"):
            call()


def test_resizing_resizes_mapping_and_file_as_mmap_does(
    file: pinfold.File, tmp_path: Path, delivery: Any
) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(pattern(SIZE))
    with open(theirs, "rb+") as other, mmap.mmap(other.fileno(), 0) as oracle:
        mapping = file.map(access="w", delivery=delivery)
        for size in [SIZE + 70_000, 5000, 9 * 4096, 12, 2_000_000]:
            mapping.resize(size)
            oracle.resize(size)
            mapping[size - 1] = oracle[size - 1] = size % 251
            assert len(mapping) == len(oracle) == size
            assert mapping[:] == oracle[:]
            assert file.size == size
        mapping.flush()
        assert theirs.stat().st_size == 2_000_000
        for wrong in [0, -1]:
            with pytest.raises(ValueError):
                mapping.resize(wrong)
        with memoryview(mapping), pytest.raises(BufferError):
            mapping.resize(SIZE)
        with mapping.pin(0, 10), pytest.raises(BufferError):
            mapping.resize(SIZE)
        assert len(mapping) == 2_000_000
        mapping.close()
        with pytest.raises(ValueError):
            mapping.resize(SIZE)
    for access in ["r", "c"]:
        with file.map(access=access) as mapping, pytest.raises(TypeError):
            mapping.resize(SIZE)


def test_a_mapping_outlives_its_file_and_its_volume(directory: Path) -> None:
    with pinfold.Volume(directory, "1MiB", dirty_age=3600) as volume:
        with volume.open("f", "wb+") as file:
            file.write(pattern(SIZE))
            mapping = file.map(access="w")
        view = memoryview(mapping)
    del mapping
    assert view == pattern(SIZE)
    view[:4] = b"late"
    view.release()
    gc.collect()
    assert (directory / "f").read_bytes()[:4] == b"late"
    pinfold.Volume(directory, "1MiB").close()


def test_residency_advice_and_pins_are_told(file: pinfold.File) -> None:
    with file.map(access="w") as mapping:
        file.drop_cache()
        pages = len(mapping.resident())
        assert pages == -(-SIZE // 4096)
        mapping[4096 * 3]
        assert mapping.resident(4096 * 3, 1) == [True]
        for advice in ("random", "sequential", "willneed", "dontneed", "normal"):
            mapping.advise(advice)
            mapping.advise(advice, 8192, 100)
        with pytest.raises(ValueError):
            mapping.advise("good")
        with mapping.pin(0, 40_000) as pin:
            assert pin.pages == 10
            assert all(mapping.resident(0, 40_000))
        assert pin.pages == 0
        with pytest.raises(OSError) as caught:
            mapping.pin(0, SIZE + 1)
        assert caught.value.errno == errno.EINVAL
    with file.map() as reader, pytest.raises(PermissionError):
        reader.pin(write=True)


def test_more_than_a_quarter_of_the_budget_cannot_be_pinned(volume: pinfold.Volume) -> None:
    with volume.open("f", "wb+") as file:
        file.truncate(8 << 20)
        with file.map() as mapping:
            with pytest.raises(OSError) as caught:
                mapping.pin()
            assert caught.value.errno == errno.ENOMEM
            mapping.pin(0, 1 << 20).close()


def test_indexing_what_was_cut_off_is_an_error_and_no_signal(file: pinfold.File) -> None:
    with file.map(access="w") as mapping:
        file.truncate(10_000)
        assert mapping[9_999] == pattern(SIZE)[9_999]
        for call in (
            lambda: mapping[100_000],
            lambda: mapping[0:20_000],
            lambda: mapping.__setitem__(100_000, 1),
            lambda: mapping.pin(100_000, 1),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.EFAULT
        with memoryview(mapping) as view:
            # A call of the system's or the library's finds out, too; only bare loads are SIGBUS.
            assert file.write_at(view[8_192:10_000], 0) == 1_808
        file.truncate(SIZE)
        assert mapping[100_000] == 0


def test_threads_store_side_by_side_under_pressure(directory: Path) -> None:
    part = 200_000
    with pinfold.Volume(directory, pinfold.MEMORY_MIN) as volume, volume.open("f", "wb+") as file:
        if volume.capabilities()["mappings"] is None:
            pytest.skip("no mappings")
        file.truncate(8 * part)
        with file.map(access="w") as mapping:
            view = memoryview(mapping)
            models = [bytearray(part) for _ in range(8)]

            def work(which: int) -> None:
                chance = random.Random(which)
                mine = models[which]
                for _ in range(60):
                    at = chance.randrange(part)
                    data = chance.randbytes(chance.randrange(1, 9_000))[: part - at]
                    mine[at : at + len(data)] = data
                    place = which * part + at
                    match chance.randrange(3):
                        case 0:
                            view[place : place + len(data)] = data
                        case 1:
                            mapping[place : place + len(data)] = data
                        case _:
                            file.write_at(data, place)
                    if which == 0 and chance.random() < 0.2:
                        mapping.flush()

            threads = [threading.Thread(target=work, args=(which,)) for which in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert view == b"".join(models)
            view.release()
        assert file.read_at(8 * part, 0) == b"".join(models)


OUT_OF_CORE = """
import os, sys
import numpy as np
import pinfold

BUDGET, FILE = 4 << 20, 32 << 20
path, delivery = sys.argv[1], sys.argv[2]

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10

chance = np.random.default_rng(7)
step = BUDGET // 8 // 4
with pinfold.Volume(path, memory=BUDGET) as volume:
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = peak()
    with volume.open("numbers", "wb+") as file:
        for _ in range(FILE // 8 // step):
            file.write(chance.integers(-(2**62), 2**62, step))
        with file.map(access="w", delivery=delivery) as mapping:
            numbers = np.frombuffer(mapping, np.int64)
            results = [int(numbers.sum()), int(numbers[::513].sum()), int(numbers[::-4097].sum())]
            numbers.sort()
            results += [int(numbers[0]), int(numbers[-1])]
            mapping.flush()
            del numbers
        grown = peak() - before
        assert volume.statistics()["pages_max"] == BUDGET // 4096
print(grown, *results)
"""


@pytest.mark.timeout(480)
@pytest.mark.parametrize("which", DELIVERIES)
def test_numpy_sorts_eight_times_the_budget_in_place(directory: Path, which: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OUT_OF_CORE), directory, which],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    grown, *results = map(int, done.stdout.split())
    chance = np.random.default_rng(7)
    path = directory.parent / "theirs"
    step = (4 << 20) // 8 // 4
    with open(path, "wb") as file:
        for _ in range(32):
            file.write(chance.integers(-(2**62), 2**62, step).tobytes())
    theirs = np.memmap(path, np.int64, "r+")
    expected = [int(theirs.sum()), int(theirs[::513].sum()), int(theirs[::-4097].sum())]
    theirs.sort()
    expected += [int(theirs[0]), int(theirs[-1])]
    assert results == expected
    assert (np.memmap(directory / "numbers", np.int64, "r") == theirs).all()
    # The budget and a tenth, and what a process needs beside it. Eight times the budget was touched.
    print(f"grown by {grown >> 10} KiB", which)
    assert grown <= (4 << 20) * 1.1 + (16 << 20), grown
    os.unlink(path)


def test_mapping_puts_the_handler_back_on_top_of_faulthandler(directory: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                """
                import faulthandler, sys, pinfold
                with pinfold.Volume(sys.argv[1], "1MiB") as volume, volume.open("f", "wb+") as file:
                    file.write(b"x" * 100_000)
                    file.drop_cache()
                    with file.map(delivery="inline"):
                        faulthandler.enable()
                        with file.map(delivery="inline") as mapping, memoryview(mapping) as view:
                            assert bytes(view) == b"x" * 100_000
                faulthandler._sigsegv()
                """
            ),
            directory,
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == -11, done
    assert done.stderr.startswith("Fatal Python error: Segmentation fault")


def test_a_child_of_fork_has_no_mapping_and_is_told(directory: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                """
                import os, sys, pinfold
                with pinfold.Volume(sys.argv[1], "1MiB") as volume:
                    with volume.open("f", "wb+") as file:
                        file.write(b"x" * 10_000)
                        mapping = file.map(access="w")
                    pin = mapping.pin()
                    child = os.fork()
                    if child == 0:
                        refused = 0
                        for call in (lambda: mapping[0], lambda: memoryview(mapping), mapping.flush,
                                     lambda: pin.pages, lambda: len(mapping)):
                            try:
                                call()
                            except RuntimeError:
                                refused += 1
                        pin.close()
                        mapping.close()
                        del pin, mapping
                        sys.exit(refused)
                    _, status = os.waitpid(child, 0)
                    assert os.waitstatus_to_exitcode(status) == 5, status
                    assert pin.pages == 3
                    mapping[0] = 7
                    assert mapping[:2] == b"\\x07x"
                    pin.close()
                    mapping.close()
                """
            ),
            directory,
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_others_run_while_a_mapping_call_waits(directory: Path) -> None:
    with pinfold.Volume(directory, "1MiB") as volume, volume.open("f", "wb+") as file:
        if volume.capabilities()["mappings"] is None:
            pytest.skip("no mappings")
        file.truncate(16 << 20)
        counted = 0
        ended = False

        def count() -> None:
            nonlocal counted
            while not ended:
                counted += 1
                time.sleep(0)

        interval = sys.getswitchinterval()
        thread = threading.Thread(target=count)
        thread.start()
        sys.setswitchinterval(1000)
        try:
            with file.map() as mapping:

                def counts_beside(call: Callable[[], bool], turns: int) -> bool:
                    # On a busy machine the other thread may wait for a processor as long as a call takes.
                    deadline = time.monotonic() + 200
                    while time.monotonic() < deadline:
                        before = counted
                        assert call()
                        if counted - before > turns:
                            return True
                    return False

                assert counts_beside(lambda: mapping.find(b"x") == -1, 10)
                assert counts_beside(lambda: mapping[:] == bytes(16 << 20), 0)
        finally:
            sys.setswitchinterval(interval)
            ended = True
            thread.join()
