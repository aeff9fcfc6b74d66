from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import pinfold


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An empty directory that nobody serves; volumes are opened on it by the test."""
    path = tmp_path / "served"
    path.mkdir()
    return path


@pytest.fixture
def volume(directory: Path) -> Iterator[pinfold.Volume]:
    with pinfold.Volume(directory, memory="4MiB") as volume:
        yield volume


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A directory of the kernel's, for the same done with Python's own files."""
    path = tmp_path / "beside"
    path.mkdir()
    return path


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes that repeat at no power of two."""
    period = bytes((seed * 7 + i * 31 + i // 251) & 0xFF for i in range(65_521))
    return (period * (size // len(period) + 1))[:size]


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Fails the test if descriptors or threads are left behind."""

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    before = held()
    yield
    assert held() <= before
