"""Threads: nobody holds the interpreter while a call waits, and calls may come from all sides."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pinfold
from conftest import pattern

BIG = 32 << 20


class Counter(threading.Thread):
    """Counts as long as it gets the interpreter; gives it up after each step."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value = 0
        self.ended = False

    def run(self) -> None:
        while not self.ended:
            self.value += 1
            time.sleep(0)


@pytest.fixture
def counter() -> Iterator[Counter]:
    """Counts only while the main thread lets go of the interpreter of its own accord: nobody is made to."""
    interval = sys.getswitchinterval()
    counter = Counter()
    counter.start()
    sys.setswitchinterval(1000)
    yield counter
    sys.setswitchinterval(interval)
    counter.ended = True
    counter.join()


def let_others_run(
    counter: Counter, call: Callable[[], Any], seconds: float = 200, turns: int = 1
) -> bool:
    """Repeats a call until another thread has counted meanwhile: on a busy machine it may wait for a processor as long as
    a call takes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = counter.value
        call()
        if counter.value - before >= turns:
            return True
    return False


CALLS: dict[str, Callable[[pinfold.Volume, pinfold.File], Any]] = {
    "read": lambda _, file: file.seek(0) or file.read(1 << 20),
    "readall": lambda _, file: file.seek(0) or file.readall(),
    "readinto": lambda _, file: file.seek(0) or file.readinto(bytearray(1 << 20)),
    "readline": lambda _, file: file.seek(0) or file.readline(1 << 20),
    "read_at": lambda _, file: file.read_at(1 << 20, 0),
    "readinto_at": lambda _, file: file.readinto_at(bytearray(1 << 20), 0),
    "write": lambda _, file: file.seek(0) or file.write(bytes(1 << 20)),
    "write_at": lambda _, file: file.write_at(bytes(1 << 20), 0),
    "seek": lambda _, file: file.seek(0),
    "tell": lambda _, file: file.tell(),
    "truncate": lambda _, file: file.truncate(BIG),
    "sync": lambda _, file: file.write_at(b"x", 0) and file.sync(),
    "datasync": lambda _, file: file.write_at(b"x", 0) and file.datasync(),
    "allocate": lambda _, file: file.allocate(0, BIG),
    "punch": lambda _, file: file.punch(0, 4096),
    "drop_cache": lambda _, file: file.write_at(b"x", 0) and file.drop_cache(),
    "volume sync": lambda volume, _: volume.sync(),
    "statistics": lambda volume, _: volume.statistics(),
    "open and close": lambda volume, _: volume.open("g", "wb").close(),
    "stat": lambda volume, _: volume.stat("f"),
    "exists": lambda volume, _: volume.exists("f"),
    "listdir": lambda volume, _: volume.listdir(),
    "scandir": lambda volume, _: list(volume.scandir()),
    "mkdir and rmdir": lambda volume, _: volume.mkdir("d") or volume.rmdir("d"),
    "rename": lambda volume, _: volume.rename("f", "f"),
    "readlink": lambda volume, _: volume.readlink("link"),
}


@pytest.mark.parametrize("name", CALLS)
def test_others_run_while_a_call_is_under_way(
    directory: Path, counter: Counter, name: str
) -> None:
    with pinfold.Volume(directory, "4MiB") as volume, volume.open("f", "wb+") as file:
        file.truncate(BIG)
        volume.symlink("f", "link")
        assert let_others_run(counter, lambda: CALLS[name](volume, file))


def test_others_do_not_run_while_a_call_keeps_the_interpreter(counter: Counter) -> None:
    # What the tests above would see if a call did.
    assert not let_others_run(counter, lambda: sum(range(100_000)), seconds=0.3)


def test_others_run_all_the_time_while_a_long_call_waits(
    directory: Path, counter: Counter
) -> None:
    with pinfold.Volume(directory, "4MiB") as volume, volume.open("f", "wb+") as file:
        file.write(pattern(BIG))
        file.sync()
        file.drop_cache()
        buffer = bytearray(BIG)
        # Eight times the budget, from the store: long enough for many turns.
        assert let_others_run(counter, lambda: file.readinto_at(buffer, 0), turns=11)
        assert buffer == pattern(BIG)


def test_closing_while_others_read_is_an_end_and_no_crash(directory: Path) -> None:
    with pinfold.Volume(directory, "1MiB") as volume:
        for _ in range(20):
            file = volume.open("f", "wb+")
            file.write(pattern(2 << 20))
            ended: list[BaseException] = []

            def work(file: pinfold.File = file, ended: list[BaseException] = ended) -> None:
                buffer = bytearray(1 << 20)
                try:
                    while True:
                        assert file.readinto_at(buffer, 0) == 1 << 20
                        assert buffer == pattern(1 << 20)
                except ValueError as error:
                    ended.append(error)

            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            file.close()
            for thread in threads:
                thread.join()
            assert len(ended) == 3


def test_threads_that_write_and_read_apart_do_not_disturb_each_other(directory: Path) -> None:
    part = 300_000
    with pinfold.Volume(directory, "1MiB") as volume, volume.open("f", "wb+") as file:
        file.truncate(8 * part)
        wrong: list[int] = []

        def work(which: int) -> None:
            chance = random.Random(which)
            mine = bytearray(part)
            for _ in range(100):
                at = chance.randrange(part)
                data = chance.randbytes(chance.randrange(1, 20_000))[: part - at]
                mine[at : at + len(data)] = data
                file.write_at(data, which * part + at)
                at = chance.randrange(part)
                if file.read_at(5_000, which * part + at)[: part - at] != mine[at : at + 5_000]:
                    wrong.append(which)
            if file.read_at(part, which * part) != mine:
                wrong.append(which)

        threads = [threading.Thread(target=work, args=(which,)) for which in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_appends_of_several_threads_stay_whole(directory: Path) -> None:
    with pinfold.Volume(directory, "1MiB") as volume:

        def work(which: int) -> None:
            with volume.open("f", "ab") as file:
                for _ in range(500):
                    file.write(bytes([which]) * 100)

        threads = [threading.Thread(target=work, args=(which,)) for which in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with volume.open("f") as file:
            records = [record for record in iter(lambda: file.read(100), b"")]
        assert len(records) == 2_000
        assert all(record == record[:1] * 100 for record in records)


def test_a_buffer_that_is_lent_to_a_call_cannot_be_resized(directory: Path) -> None:
    with pinfold.Volume(directory, "1MiB") as volume, volume.open("f", "wb+") as file:
        file.write(pattern(8 << 20))
        buffer = bytearray(8 << 20)
        reading = threading.Event()
        refused = 0

        def work() -> None:
            for _ in range(10):
                reading.set()
                file.readinto_at(buffer, 0)
            reading.clear()

        thread = threading.Thread(target=work)
        thread.start()
        reading.wait()
        while thread.is_alive():
            try:
                buffer.append(0)
                buffer.pop()
            except BufferError:
                refused += 1
        thread.join()
        assert refused > 0
        assert buffer[: 8 << 20] == pattern(8 << 20)
