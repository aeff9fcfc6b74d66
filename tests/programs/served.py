"""One `pinfold mount` under test: started, watched, ended, and got rid of whatever it does.

Owns: the daemon's process, its mount, its log.
Does not own: the directories, which the caller makes and removes.

The script that reports never touches the mount, since a stuck one would hang it. What is mounted is read from /proc; a
stuck mount is broken by a forced unmount, which aborts its connection.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

# However busy the machine.
START_S_MAX = 120
STOP_S_MAX = 240


class MountError(Exception):
    """The daemon did not do what is asked of any daemon: start, serve, end."""


def default_binary() -> Path:
    """The release binary of this work tree, wherever cargo was told to put it."""
    top = Path(__file__).resolve().parents[2]
    target = Path(os.environ.get("CARGO_TARGET_DIR", top / "target"))
    return target / "release" / "pinfold"


def device_at(mountpoint: Path) -> int | None:
    """The minor device number of the FUSE mount at a path, or None. Looks at no file below the path."""
    found = None
    wanted = str(mountpoint).encode()
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split()
        if _unescaped(fields[4]) == wanted:
            kind = fields[fields.index(b"-") + 1]
            found = int(fields[2].split(b":")[1]) if kind.startswith(b"fuse") else None
    return found


def _unescaped(field: bytes) -> bytes:
    for code, char in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        field = field.replace(code, char)
    return field


def _answers(mountpoint: Path) -> bool:
    """Asks the mount something, in a process that may hang: a dead mount that is being replaced does not answer."""
    try:
        asked = subprocess.run(["stat", "-f", mountpoint], capture_output=True, timeout=START_S_MAX, check=False)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0


def break_mount(mountpoint: Path) -> None:
    """Aborts the connection, so that whoever hangs in it gets an error, and takes the mount away."""
    for _ in range(8):
        if device_at(mountpoint) is None:
            return
        # Forced: the kernel aborts the connection. Lazy: the path is free although somebody still holds files.
        for how in ("-f", "-l"):
            subprocess.run(["umount", how, mountpoint], stderr=subprocess.DEVNULL, timeout=120, check=False)


class Served:
    """A directory served at a mount point, as a context manager."""

    def __init__(self, binary: Path, directory: Path, mountpoint: Path, memory: int, log: Path, through: tuple[str, ...] = ()):
        """`through` is a command that starts the daemon under other circumstances."""
        self.mountpoint = mountpoint
        self.log = log
        with open(log, "ab") as out:
            self.daemon = subprocess.Popen(
                [*through, binary, "mount", "--stats", "--memory", str(memory), directory, mountpoint],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S_MAX
        # In this order: a dead mount that is being replaced has a device but does not answer, and the bare directory
        # that comes to light meanwhile answers but has none.
        while not _answers(mountpoint) or device_at(mountpoint) is None:
            if self.daemon.poll() is not None:
                raise MountError(f"did not start, status {self.daemon.returncode}: {self.tail()}")
            if time.monotonic() > deadline:
                self.destroy()
                raise MountError(f"not mounted after {START_S_MAX} s: {self.tail()}")
            time.sleep(0.01)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.stop()
        else:
            self.destroy()

    def tail(self) -> str:
        """The end of what the daemon said."""
        return self.log.read_text(errors="replace")[-600:].strip()

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Ends it as a user would, and checks that it ends well: written back, unmounted, no panic, status 0."""
        if self.daemon.poll() is None:
            self.daemon.send_signal(how)
        try:
            status = self.daemon.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            stacks = self.stacks()
            self.destroy()
            raise MountError(f"still runs {STOP_S_MAX} s after signal {how}: {stacks}") from None
        left = device_at(self.mountpoint) is not None
        break_mount(self.mountpoint)
        said = self.log.read_text(errors="replace")
        if "panicked at" in said:
            raise MountError("panicked: " + said[said.index("panicked at"):][:400])
        if status != 0:
            raise MountError(f"ended with status {status}: {self.tail()}")
        if left:
            raise MountError("ended but left its mount behind")

    def kill(self) -> None:
        """kill -9, as power or the OOM killer would. The dead mount stays."""
        self.daemon.kill()
        self.daemon.wait()

    def destroy(self) -> None:
        """Gets rid of it in any state."""
        break_mount(self.mountpoint)
        if self.daemon.poll() is None:
            self.daemon.kill()
        self.daemon.wait()
        break_mount(self.mountpoint)

    def stacks(self) -> str:
        """Where each thread of the daemon waits, for a report of a hang."""
        lines = []
        for task in sorted(Path(f"/proc/{self.daemon.pid}/task").glob("*")):
            try:
                name, where = (task / "comm").read_text().strip(), (task / "wchan").read_text().strip()
            except OSError:
                continue
            lines.append(f"{name}:{where}")
        return " ".join(lines)[:1500]
