"""Several processes on one file: appending, locking, watching, and every way of I/O at once."""

import ctypes
import ctypes.util
import errno
import fcntl
import hashlib
import mmap
import os
import random
import select
import struct
import time

from results import Skip

from . import MIB, Place, case, check

APPENDERS = 8
RECORDS = 400
PAGE = 4096


def _in_children(count: int, work) -> None:
    """Runs `work(number)` in as many processes and checks that each ends well."""
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(number)
                status = 0
            except BaseException as error:  # The child must end here, whatever happened.
                os.write(2, f"process {number}: {error!r}\n".encode())
            os._exit(status)
        children.append(child)
    ends = [os.waitpid(child, 0)[1] for child in children]
    check(ends == [0] * count, f"processes ended with {ends}")


# The order of the records is anybody's.
@case(data_mib=2, ignored=("log",))
def append(place: Place) -> dict:
    """O_APPEND from several processes: every record is there once, whole, in its writer's order."""
    path = place.dir / "log"

    def work(number: int) -> None:
        rng = random.Random(number)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for record in range(RECORDS):
            line = f"{number} {record} {'x' * rng.randrange(1, 1500)}\n".encode()
            if os.write(fd, line) != len(line):
                raise AssertionError("short write")
        os.close(fd)

    _in_children(APPENDERS, work)
    following = [0] * APPENDERS
    for line in path.read_bytes().splitlines():
        number, record, body = line.split(b" ")
        check(int(record) == following[int(number)], f"record {record} of {number} instead of {following[int(number)]}")
        check(set(body) == {ord("x")}, "a torn record")
        following[int(number)] += 1
    check(following == [RECORDS] * APPENDERS, f"records {following}")
    lines = sorted(path.read_bytes().splitlines())
    return {"sha": hashlib.sha256(b"\n".join(lines)).hexdigest()}


@case(data_mib=1)
def locks(place: Place) -> dict:
    """flock and fcntl locks exclude between processes; ranges are ranges; a lock dies with its process."""
    path = place.dir / "counter"
    path.write_bytes(struct.pack("<Q", 0))

    def count(lock, unlock) -> None:
        fd = os.open(path, os.O_RDWR)
        for _ in range(200):
            lock(fd)
            (n,) = struct.unpack("<Q", os.pread(fd, 8, 0))
            os.pwrite(fd, struct.pack("<Q", n + 1), 0)
            unlock(fd)

    def flocked(_) -> None:
        count(lambda fd: fcntl.flock(fd, fcntl.LOCK_EX), lambda fd: fcntl.flock(fd, fcntl.LOCK_UN))

    def ranged(_) -> None:
        count(lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX, 8), lambda fd: fcntl.lockf(fd, fcntl.LOCK_UN, 8))

    for work in (flocked, ranged):
        path.write_bytes(struct.pack("<Q", 0))
        _in_children(4, work)
        (n,) = struct.unpack("<Q", path.read_bytes())
        check(n == 800, f"{work.__name__}: counted {n} of 800")

    mine = os.open(path, os.O_RDWR)
    fcntl.lockf(mine, fcntl.LOCK_EX, 100, 0)

    def other(_) -> None:
        fd = os.open(path, os.O_RDWR)
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 100, 100)
        try:
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 99)
        except OSError as refused:
            check(refused.errno in (errno.EAGAIN, errno.EACCES), repr(refused))
        else:
            raise AssertionError("got a range that is locked")
        # Ends with its lock held: the next one must get it.

    _in_children(1, other)
    fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 100, 100)
    os.close(mine)
    return {}


@case(data_mib=1)
def inotify(place: Place) -> dict:
    """A watch on a directory sees files made, written, closed, renamed and removed through the same mount."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    if fd < 0:
        raise Skip("no inotify")
    everything = 0xFFF
    check(libc.inotify_add_watch(fd, os.fsencode(place.dir), everything) >= 0, os.strerror(ctypes.get_errno()))

    def work(_) -> None:
        (place.dir / "one").write_bytes(b"bytes")
        os.rename(place.dir / "one", place.dir / "two")
        os.unlink(place.dir / "two")

    _in_children(1, work)
    seen = []
    while select.select([fd], [], [], 0.5)[0]:
        events = os.read(fd, 65536)
        while events:
            _, mask, _, length = struct.unpack_from("iIII", events)
            name = events[16:16 + length].rstrip(b"\0").decode()
            seen.append((mask & 0xFFF, name))
            events = events[16 + length:]
    os.close(fd)
    create, modify, close_write, moved_from, moved_to, delete = 0x100, 0x2, 0x8, 0x40, 0x80, 0x200
    for wanted in ((create, "one"), (modify, "one"), (close_write, "one"), (moved_from, "one"), (moved_to, "two"), (delete, "two")):
        check(wanted in seen, f"{wanted} is not among {seen}")
    return {}


@case(data_mib=8, timed=True, ignored=("file",))
def mixed(place: Place) -> dict:
    """One file through a buffered, an appending and a direct descriptor and a mapping, against a model in memory.

    Every read, whichever way, must see every write before it, whichever way: the promise that direct I/O beside a page
    cache breaks most easily.
    """
    rng = random.Random(place.seed)
    path = place.dir / "file"
    limit = 8 * MIB
    model = bytearray(rng.randbytes(6 * MIB))
    path.write_bytes(model)
    buffered = os.open(path, os.O_RDWR)
    direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    memory = mmap.mmap(-1, MIB)
    mapping: mmap.mmap | None = None
    until = time.monotonic() + max(2, place.seconds // 2)
    trail: list[str] = []

    def remap():
        nonlocal mapping
        if mapping is not None:
            mapping.close()
        mapping = mmap.mmap(buffered, len(model)) if model else None

    def compare(got: bytes, at: int, way: str) -> None:
        want = bytes(model[at:at + len(got)])
        if got != want:
            first = next(i for i in range(len(got)) if got[i] != want[i])
            raise AssertionError(
                f"seed {place.seed}: {way} at {at}+{len(got)} differs from byte {at + first} on: "
                f"{got[first:first + 8]!r} is not {want[first:first + 8]!r}; before that: {'; '.join(trail[-12:])}"
            )

    remap()
    steps = 0
    while time.monotonic() < until:
        steps += 1
        size = len(model)
        step = rng.choice(("read", "read", "write", "write", "dread", "dread", "dwrite", "dwrite", "load", "store", "store",
                           "truncate", "extend", "sync", "msync", "punch", "advise"))  # fmt: skip
        at = rng.randrange(max(1, size))
        length = max(1, min(int((256 << 10) ** rng.random()), size - at))
        if step.startswith("d"):
            at -= at % PAGE
            length = max(PAGE, length - length % PAGE)
            if at + length > size:
                length = (size - at) // PAGE * PAGE
            if length == 0:
                continue
        trail.append(f"{step} {at}+{length}")
        if step == "read":
            compare(os.pread(buffered, length, at), at, step)
        elif step == "write":
            body = rng.randbytes(length)
            check(os.pwrite(buffered, body, at) == length, "short write")
            if at + length > size:
                model.extend(bytes(at + length - size))
            model[at:at + length] = body
        elif step == "dread":
            got = os.preadv(direct, [memoryview(memory)[:length]], at)
            check(got == length, f"short direct read: {got} of {length} at {at}, size {size}")
            compare(memory[:got], at, step)
        elif step == "dwrite":
            body = rng.randbytes(length)
            memory[:length] = body
            check(os.pwritev(direct, [memoryview(memory)[:length]], at) == length, "short direct write")
            model[at:at + length] = body
        elif step == "load" and mapping and at + length <= len(mapping) and at + length <= size:
            compare(mapping[at:at + length], at, step)
        elif step == "store" and mapping and at + length <= len(mapping) and at + length <= size:
            body = rng.randbytes(length)
            mapping[at:at + length] = body
            model[at:at + length] = body
        elif step == "truncate" and rng.random() < 0.2:
            keep = max(PAGE, size - rng.randrange(MIB))
            # The mapping goes first: a load beyond the end would be SIGBUS, as it should.
            os.ftruncate(buffered, keep)
            del model[keep:]
            remap()
        elif step == "extend" and size < limit - MIB:
            os.ftruncate(buffered, size + length)
            model.extend(bytes(length))
            remap()
        elif step == "sync":
            (os.fsync if rng.random() < 0.5 else os.fdatasync)(rng.choice((buffered, direct)))
        elif step == "msync" and mapping:
            mapping.flush()
        elif step == "punch":
            _punch(buffered, at, length)
            model[at:at + length] = bytes(min(length, size - at))
        elif step == "advise":
            os.posix_fadvise(buffered, at, length, os.POSIX_FADV_DONTNEED)
        check(os.fstat(direct).st_size == len(model), f"size {os.fstat(direct).st_size} is not {len(model)} after {trail[-1]}")
    for way, fd in (("read", buffered), ("direct read", direct)):
        at = 0
        while at < len(model):
            got = os.preadv(fd, [memoryview(memory)[:min(MIB, -(-(len(model) - at) // PAGE) * PAGE)]], at)
            check(got > 0, f"{way} at {at} of {len(model)} got nothing")
            compare(memory[:got], at, f"final {way}")
            at += got
    os.fsync(buffered)
    os.close(buffered)
    os.close(direct)
    return {}


def _punch(fd: int, at: int, length: int) -> None:
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    keep_size_and_punch = 0x1 | 0x2
    if libc.fallocate(fd, keep_size_and_punch, ctypes.c_long(at), ctypes.c_long(length)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")
