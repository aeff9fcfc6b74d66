"""Any sequence of operations gives the bytes that memory would give."""

from __future__ import annotations

import tempfile
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pinfold

# Three times the least budget: pages come and go.
SIZE_MAX = 3 * pinfold.MEMORY_MIN
PLACES = st.one_of(
    st.integers(0, SIZE_MAX),
    st.integers(0, SIZE_MAX // 4096).map(lambda page: page * 4096),
)
LENGTHS = st.one_of(st.integers(0, 5000), st.integers(0, 100_000), st.just(4096))
STEPS = st.one_of(
    st.tuples(st.just("write_at"), PLACES, LENGTHS),
    st.tuples(st.just("write"), LENGTHS),
    st.tuples(st.just("append"), LENGTHS),
    st.tuples(st.just("read_at"), PLACES, LENGTHS),
    st.tuples(st.just("read"), LENGTHS),
    st.tuples(st.just("readinto"), LENGTHS),
    st.tuples(st.just("readline")),
    st.tuples(st.just("seek"), PLACES),
    st.tuples(st.just("truncate"), PLACES),
    st.tuples(st.just("punch"), PLACES, LENGTHS),
    st.tuples(st.just("map_read"), PLACES, LENGTHS, st.booleans()),
    st.tuples(st.just("map_write"), PLACES, LENGTHS, st.booleans()),
    st.tuples(st.just("copy"), PLACES, PLACES, LENGTHS),
    st.tuples(st.just("sync")),
    st.tuples(st.just("drop_cache")),
)


class Model:
    """A file in a bytearray."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.at = 0

    def write_at(self, data: bytes, offset: int) -> int:
        if data:
            if offset > len(self.bytes):
                self.bytes.extend(bytes(offset - len(self.bytes)))
            self.bytes[offset : offset + len(data)] = data
        return len(data)

    def read_at(self, size: int, offset: int) -> bytes:
        return bytes(self.bytes[offset : offset + size])

    def step(self, name: str, *n: int) -> Any:
        match name:
            case "write_at":
                return self.write_at(data_of(n[1]), n[0])
            case "write":
                done = self.write_at(data_of(n[0]), self.at)
                self.at += done
                return done
            case "append":
                return self.write_at(data_of(n[0]), len(self.bytes))
            case "read_at":
                return self.read_at(n[1], n[0])
            case "read" | "readinto":
                data = self.read_at(n[0], self.at)
                self.at += len(data)
                return data
            case "readline":
                end = self.bytes.find(b"\n", self.at) + 1 or len(self.bytes)
                line = self.read_at(max(end - self.at, 0), self.at)
                self.at += len(line)
                return line
            case "seek":
                self.at = n[0]
            case "truncate":
                del self.bytes[n[0] :]
                self.bytes.extend(bytes(n[0] - len(self.bytes)))
            case "map_read":
                return self.read_at(n[1], n[0])
            case "map_write":
                data = data_of(n[1])[: max(len(self.bytes) - n[0], 0)]
                self.bytes[n[0] : n[0] + len(data)] = data
            case "copy":
                data = self.read_at(n[2], n[0])
                if abs(n[0] - n[1]) >= len(data):
                    self.write_at(data, n[1])
            case "punch":
                end = min(n[0] + n[1], len(self.bytes))
                if n[1] and n[0] < end:
                    self.bytes[n[0] : end] = bytes(end - n[0])
        return None


def data_of(length: int) -> bytes:
    """Bytes that tell lengths apart, newlines among them."""
    period = bytes((length + i) % 251 for i in range(251))
    return (period * (length // 251 + 1))[:length]


def real_step(file: pinfold.File, appending: pinfold.File, name: str, *n: int) -> Any:
    match name:
        case "write_at":
            return file.write_at(data_of(n[1]), n[0])
        case "write":
            return file.write(data_of(n[0]))
        case "append":
            return appending.write(data_of(n[0]))
        case "read_at":
            return file.read_at(n[1], n[0])
        case "read":
            return file.read(n[0])
        case "readinto":
            buffer = bytearray(n[0])
            return bytes(buffer[: file.readinto(buffer)])
        case "readline":
            return file.readline()
        case "seek":
            file.seek(n[0])
        case "truncate":
            file.truncate(n[0])
        case "map_read" | "map_write":
            return mapped_step(file, name, *n)
        case "copy":
            size = min(n[2], max(file.size - n[0], 0))
            if size and abs(n[0] - n[1]) >= size:
                # From the file's own mapping.
                with file.map() as mapping, memoryview(mapping) as view:
                    assert file.write_at(view[n[0] : n[0] + size], n[1]) == size
        case "punch":
            if n[1]:
                file.punch(n[0], n[1])
        case "sync":
            file.sync()
        case "drop_cache":
            file.drop_cache()
    return None


def mapped_step(file: pinfold.File, name: str, at: int, length: int, through_buffer: int) -> Any:
    """The same through a mapping: its methods, or the memory itself."""
    if not file.size:
        return b"" if name == "map_read" else None
    with file.map(access="w") as mapping, memoryview(mapping) as view:
        target: Any = view if through_buffer else mapping
        if name == "map_read":
            return bytes(target[at : at + length])
        data = data_of(length)[: max(len(mapping) - at, 0)]
        if data:
            target[at : at + len(data)] = data
    return None


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STEPS, min_size=5, max_size=40))
def test_a_file_holds_what_a_bytearray_would(program: list[tuple[Any, ...]]) -> None:
    model = Model()
    with tempfile.TemporaryDirectory() as directory:
        with pinfold.Volume(directory, pinfold.MEMORY_MIN) as volume:
            with volume.open("f", "wb+") as file, volume.open("f", "ab") as appending:
                for step in program:
                    assert real_step(file, appending, *step) == model.step(*step), step
                    assert file.tell() == model.at
                    assert file.size == len(model.bytes)
                assert file.read_at(file.size, 0) == model.bytes
        with open(f"{directory}/f", "rb") as stored:
            assert stored.read() == model.bytes
