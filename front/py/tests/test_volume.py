"""Volumes: arguments, life, and the end of it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

import pinfold


@pytest.mark.parametrize(
    ("memory", "pages"),
    [(1 << 20, 256), ("1MiB", 256), ("1024k", 256), ("262144", 64), ("1m", 256), (2**18, 64)],
)
def test_budgets_are_numbers_or_text(directory: Path, memory: Any, pages: int) -> None:
    with pinfold.Volume(directory, memory) as volume:
        assert volume.statistics()["pages_max"] == pages


@pytest.mark.parametrize(
    ("memory", "error"),
    [
        ("", ValueError),
        ("64 MiB", ValueError),
        ("1.5G", ValueError),
        ("-1", ValueError),
        ("20000000T", ValueError),
        (1.5, TypeError),
        (b"1MiB", TypeError),
        (-1, OverflowError),
        (2**64, OverflowError),
        (0, OSError),
        (pinfold.MEMORY_MIN - 1, OSError),
    ],
)
def test_budgets_that_are_none_are_refused(
    directory: Path, memory: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        pinfold.Volume(directory, memory)


def test_a_refused_budget_says_what_is_least(directory: Path) -> None:
    with pytest.raises(OSError) as caught:
        pinfold.Volume(directory, 1000)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.filename == str(directory)
    assert str(pinfold.MEMORY_MIN) in caught.value.__notes__[0]


def test_a_directory_is_served_once(directory: Path) -> None:
    (directory / "below").mkdir()
    with pinfold.Volume(directory, "1MiB"):
        for path in (directory, directory / "below"):
            with pytest.raises(OSError, match="another Pinfold") as caught:
                pinfold.Volume(path, "1MiB")
            assert caught.value.errno == errno.EBUSY
    pinfold.Volume(directory, "1MiB").close()


def test_only_directories_can_be_served(directory: Path) -> None:
    (directory / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        pinfold.Volume(directory / "file")
    with pytest.raises(FileNotFoundError) as caught:
        pinfold.Volume(directory / "missing")
    assert caught.value.filename == str(directory / "missing")


def test_closing_writes_back_and_frees_the_directory(directory: Path, descriptors: None) -> None:
    volume = pinfold.Volume(directory, "1MiB", dirty_age=3600, dirty_limit="512KiB")
    file = volume.open("f", "wb+")
    file.write(b"kept")
    volume.close()
    volume.close()
    assert volume.closed
    assert (directory / "f").read_bytes() == b"kept"
    # A file that is still open keeps working, and the directory is not free yet.
    file.write_at(b"K", 0)
    with pytest.raises(OSError):
        pinfold.Volume(directory)
    file.close()
    assert (directory / "f").read_bytes() == b"Kept"
    pinfold.Volume(directory, "1MiB").close()


def test_a_limit_on_the_store_has_to_be_one(directory: Path) -> None:
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="number of seconds"):
            pinfold.Volume(directory, "1MiB", store_timeout=wrong)
    with pytest.raises(OSError) as caught:
        pinfold.Volume(directory, "1MiB", store_timeout=0)
    assert caught.value.errno == errno.EINVAL
    with pinfold.Volume(directory, "1MiB", store_timeout=1000) as volume:
        with volume.open("f", "wb") as file:
            file.write(b"in time")
    assert (directory / "f").read_bytes() == b"in time"


def test_a_closed_volume_says_so(directory: Path) -> None:
    volume = pinfold.Volume(directory, "1MiB")
    volume.close()
    for call in (
        volume.sync,
        volume.statistics,
        volume.listdir,
        volume.scandir,
        volume.__enter__,
        lambda: volume.open("f", "wb"),
        lambda: volume.stat("."),
        lambda: volume.exists("."),
        lambda: volume.rename("a", "b"),
    ):
        with pytest.raises(ValueError, match="closed volume"):
            call()
    assert repr(volume).endswith("[closed]>")


def test_a_volume_left_open_is_warned_about_and_written_back(directory: Path) -> None:
    with pytest.warns(ResourceWarning, match="unclosed volume"):
        volume = pinfold.Volume(directory, "1MiB", dirty_age=3600)
        with volume.open("f", "wb") as file:
            file.write(b"kept")
        del volume
    assert (directory / "f").read_bytes() == b"kept"
    pinfold.Volume(directory, "1MiB").close()


def test_threads_instead_of_io_uring_do_the_same(directory: Path) -> None:
    with pinfold.Volume(directory, "1MiB", io_uring=False) as volume:
        with volume.open("f", "wb+") as file:
            file.write(b"x" * (3 << 20))
            file.drop_cache()
            assert file.read_at(1 << 20, 1 << 20) == b"x" * (1 << 20)


def test_subclasses_and_attributes_work(directory: Path) -> None:
    class Mine(pinfold.Volume):
        label = "mine"

    with Mine(directory, memory="1MiB") as volume:
        volume.note = 5  # type: ignore[attr-defined]
        assert volume.label == "mine"
        assert volume.listdir() == []
