"""The process: its end, its children, and what stays behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import pinfold
from conftest import pattern

TIMEOUT_S = 200


def python(text: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a program in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize("end", ["pass", "sys.exit(0)", "raise SystemExit"])
def test_the_end_of_the_process_writes_back(directory: Path, end: str) -> None:
    done = python(
        f"""
        import sys, warnings, pinfold
        warnings.simplefilter("ignore")
        volume = pinfold.Volume(sys.argv[1], "1MiB", dirty_age=3600)
        file = volume.open("f", "wb")
        file.write(b"kept")
        text = volume.open("t", "w", encoding="utf-8")
        text.write("kept, too")
        keep = [volume, file, text]
        keep.append(keep)
        {end}
        """,
        directory,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (directory / "f").read_bytes() == b"kept"
    assert (directory / "t").read_text() == "kept, too"


def test_a_child_of_fork_is_told_and_the_parent_is_not_disturbed(directory: Path) -> None:
    done = python(
        """
        import os, sys, pinfold
        volume = pinfold.Volume(sys.argv[1], "1MiB", dirty_age=3600)
        file = volume.open("f", "wb+")
        file.write(b"the parent's")
        entries = volume.scandir()
        child = os.fork()
        if child == 0:
            refused = 0
            for call in (lambda: file.read_at(1, 0), lambda: file.write(b"x"), lambda: file.size,
                         file.sync, volume.sync, volume.statistics, lambda: volume.open("g", "wb"),
                         lambda: next(entries)):
                try:
                    call()
                except RuntimeError as error:
                    assert "fork" in str(error)
                    refused += 1
            # Closing is what a program does without asking; nothing of the parent's is touched.
            file.close()
            volume.close()
            del file, volume, entries
            # Something of its own is fine.
            os.mkdir(sys.argv[2])
            with pinfold.Volume(sys.argv[2], "1MiB") as own, own.open("f", "wb") as f:
                f.write(b"the child's")
            # By way of exit(3), whose handlers the child has inherited.
            sys.exit(refused)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 8, status
        assert not os.path.getsize(sys.argv[1] + "/f")
        assert file.read_at(100, 0) == b"the parent's"
        file.close()
        volume.close()
        """,
        directory,
        directory.parent / "child",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (directory / "f").read_bytes() == b"the parent's"
    assert (directory.parent / "child" / "f").read_bytes() == b"the child's"


def test_a_child_that_lives_on_does_not_keep_the_directory(directory: Path) -> None:
    done = python(
        """
        import os, sys, pinfold
        volume = pinfold.Volume(sys.argv[1], "1MiB")
        wait, go = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(wait, 1)
            os._exit(0)
        volume.close()
        pinfold.Volume(sys.argv[1], "1MiB").close()
        os.close(go)
        os.waitpid(child, 0)
        """,
        directory,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_a_pool_open_what_is_theirs(directory: Path, method: str) -> None:
    script = directory.parent / "pool.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, os, sys, pinfold

            def work(which):
                path = os.path.join(sys.argv[1], str(which))
                os.mkdir(path)
                with pinfold.Volume(path, "1MiB") as volume, volume.open("f", "wb+") as file:
                    file.write(bytes([which]) * 100_000)
                    return file.read_at(1, 99_999)

            if __name__ == "__main__":
                with multiprocessing.get_context(sys.argv[2]).Pool(2) as pool:
                    assert pool.map(work, range(6)) == [bytes([n]) for n in range(6)]
            """
        )
    )
    done = subprocess.run(
        [sys.executable, script, directory, method],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_faulthandler_and_the_library_share_the_signals(directory: Path) -> None:
    done = python(
        """
        import faulthandler, sys, pinfold
        faulthandler.enable()
        with pinfold.Volume(sys.argv[1], "1MiB") as volume, volume.open("f", "wb+") as file:
            file.write(b"x" * 5_000_000)
            file.sync()
        faulthandler._sigsegv()
        """,
        directory,
    )
    assert done.returncode == -11
    assert "Segmentation fault" in done.stderr


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_calls_leave_no_memory_behind(directory: Path) -> None:
    with pinfold.Volume(directory, "1MiB") as volume:
        data = pattern(100_000)
        buffer = bytearray(100_000)

        def once() -> None:
            with volume.open("f", "wb+") as file:
                file.write(data)
                file.seek(0)
                file.read()
                file.read_at(len(data), 0)
                file.readinto_at(buffer, 0)
                file.readline()
                with file.map(access="w") as mapping:
                    mapping[5_000] = 1
                    assert mapping.find(b"no such bytes") == -1
                    with memoryview(mapping) as view:
                        view[:10] = mapping[10:20]
                    mapping.pin(0, 4096).close()
            volume.stat("f")
            volume.listdir()
            list(volume.scandir())
            for call in (lambda: volume.open("missing"), lambda: volume.stat(b"\xff")):
                with pytest.raises(FileNotFoundError):
                    call()

        for _ in range(300):
            once()
        gc.collect()
        before = resident()
        for _ in range(2_000):
            once()
        gc.collect()
        # A single one of the buffers in each round would be 200 MB.
        assert resident() - before < 3 << 20


def test_volumes_leave_nothing_behind(directory: Path, descriptors: None) -> None:
    def once() -> None:
        with pinfold.Volume(directory, "1MiB") as volume, volume.open("f", "wb+") as file:
            file.write(b"x" * 500_000)

    for _ in range(10):
        once()
    before = resident()
    for _ in range(50):
        once()
    # One in five that kept its pages would be 10 MB.
    assert resident() - before < 3 << 20


def test_a_signal_that_is_sent_still_ends_the_process(directory: Path) -> None:
    done = python(
        """
        import os, signal, sys, pinfold
        with pinfold.Volume(sys.argv[1], "1MiB") as volume, volume.open("f", "wb") as file:
            file.write(b"x")
            os.kill(os.getpid(), signal.SIGSEGV)
        """,
        directory,
    )
    assert done.returncode == -11
