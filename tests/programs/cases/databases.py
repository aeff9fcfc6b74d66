"""Programs that map files and write them too: SQLite in its journal modes, mmap(2) from Python, numpy arrays."""

import hashlib
import mmap
import os
import random
import sqlite3
import subprocess
import sys

from results import Skip

from . import MIB, Place, case, check, find, run

WRITERS = 4
INCREMENTS = 120

_WRITER = """
import sqlite3, sys
path, mode, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
db = sqlite3.connect(path, timeout=120, isolation_level=None)
db.execute("PRAGMA mmap_size = 16777216")
for i in range(count):
    db.execute("BEGIN IMMEDIATE")
    (n,) = db.execute("SELECT n FROM counter").fetchone()
    db.execute("UPDATE counter SET n = ?", (n + 1,))
    db.execute("INSERT INTO log(writer, body) VALUES (?, ?)", (mode, "x" * (i * 37 % 3000)))
    db.execute("COMMIT")
"""


def _dump(db: sqlite3.Connection) -> str:
    return hashlib.sha256("\n".join(db.iterdump()).encode()).hexdigest()


def _fill(db: sqlite3.Connection, seed: int) -> None:
    rng = random.Random(seed)
    db.execute("CREATE TABLE t(id INTEGER PRIMARY KEY, k INTEGER, body BLOB)")
    db.execute("CREATE INDEX t_k ON t(k)")
    for _ in range(8):
        with db:
            db.executemany(
                "INSERT INTO t(k, body) VALUES (?, ?)",
                ((rng.randrange(10_000), rng.randbytes(rng.randrange(2000))) for _ in range(1500)),
            )
    with db:
        db.execute("UPDATE t SET body = zeroblob(length(body) + 100) WHERE k % 5 = 0")
        db.execute("DELETE FROM t WHERE k % 3 = 0")
    db.execute("VACUUM")
    with db:
        db.execute("UPDATE t SET k = k + 1 WHERE k % 2 = 0")
    db.execute("BEGIN")
    db.execute("DELETE FROM t")
    db.execute("ROLLBACK")


# A database's header counts changes and a WAL has random salts: content is compared by dump instead.
@case(data_mib=16, ignored=("delete.db", "truncate.db", "persist.db", "persist.db-journal", "wal.db", "wal.db-wal", "wal.db-shm", "off.db"))
def sqlite(place: Place) -> dict:
    """Each journal mode, with and without mapping: the same rows, and a sound file."""
    facts = {}
    for mode in ("delete", "truncate", "persist", "wal", "off"):
        for mapped in (0, 64 * MIB):
            path = place.dir / f"{mode}.db"
            for old in place.dir.glob(f"{mode}.db*"):
                old.unlink()
            db = sqlite3.connect(path)
            db.execute(f"PRAGMA mmap_size = {mapped}")
            db.execute(f"PRAGMA journal_mode = {mode}")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA cache_size = -256")
            if mode == "off":
                db.execute("CREATE TABLE t(body)")
                db.executemany("INSERT INTO t VALUES (?)", ((str(i) * 20,) for i in range(5000)))
                db.commit()
            else:
                _fill(db, place.seed)
            check(db.execute("PRAGMA integrity_check").fetchall() == [("ok",)], f"{mode} {mapped}: not sound")
            facts[f"{mode} {mapped}"] = _dump(db)
            db.close()
            fresh = sqlite3.connect(path)
            check(fresh.execute("PRAGMA integrity_check").fetchall() == [("ok",)], f"{mode} {mapped}: not sound later")
            check(_dump(fresh) == facts[f"{mode} {mapped}"], f"{mode} {mapped}: other rows after opening again")
            fresh.close()
    return facts


@case(data_mib=4, ignored=("delete.db", "wal.db", "wal.db-wal", "wal.db-shm", "delete.db-journal"))
def sqlite_writers(place: Place) -> dict:
    """Several processes count in one database: no increment is lost, with a journal and with a WAL."""
    facts = {}
    for mode in ("delete", "wal"):
        path = place.dir / f"{mode}.db"
        db = sqlite3.connect(path)
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.execute("CREATE TABLE counter(n INTEGER)")
        db.execute("INSERT INTO counter VALUES (0)")
        db.execute("CREATE TABLE log(id INTEGER PRIMARY KEY, writer, body)")
        db.commit()
        writers = [
            subprocess.Popen([sys.executable, "-c", _WRITER, path, mode, str(INCREMENTS)]) for _ in range(WRITERS)
        ]
        check([writer.wait(600) for writer in writers] == [0] * WRITERS, f"{mode}: a writer failed")
        (count,) = db.execute("SELECT n FROM counter").fetchone()
        check(count == WRITERS * INCREMENTS, f"{mode}: counted {count}")
        (rows,) = db.execute("SELECT count(*) FROM log").fetchone()
        check(rows == count, f"{mode}: {rows} rows of {count}")
        check(db.execute("PRAGMA integrity_check").fetchall() == [("ok",)], f"{mode}: not sound")
        db.close()
        if find("sqlite3"):
            check(run("sqlite3", str(path), "PRAGMA integrity_check", cwd=place.dir).strip() == "ok", "sqlite3 says no")
        facts[mode] = count
    return facts


@case(data_mib=48)
def mmap_module(place: Place) -> dict:
    """Shared mappings and read/write agree at once; private ones leave the file alone; flush makes it last."""
    rng = random.Random(place.seed)
    size = 48 * MIB + 1234
    path = place.dir / "mapped"
    model = bytearray(size)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(fd, size)
    with mmap.mmap(fd, size) as shared:
        for turn in range(3000):
            at, length = rng.randrange(size - 9000), rng.randrange(1, 9000)
            body = rng.randbytes(length)
            model[at:at + length] = body
            if turn % 2:
                shared[at:at + length] = body
                check(os.pread(fd, length, at) == body, f"read does not see the store at {at}")
            else:
                check(os.pwrite(fd, body, at) == length, "short write")
                check(shared[at:at + length] == body, f"the mapping does not see the write at {at}")
            if turn % 500 == 0:
                shared.flush()
        check(shared[:] == model, "the mapping differs from the model")
        with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE) as private:
            private[100:200] = b"p" * 100
            check(os.pread(fd, 100, 100) == bytes(model[100:200]), "a private store reached the file")
        child = os.fork()
        if child == 0:
            shared[size - 10:size] = b"from child"
            os._exit(0)
        check(os.waitpid(child, 0)[1] == 0, "the child died")
        model[size - 10:size] = b"from child"
        check(shared[size - 10:size] == b"from child", "the parent does not see the child's store")
        check(os.pread(fd, 10, size - 10) == b"from child", "read does not see the child's store")
        shared.flush()
    os.fsync(fd)
    os.close(fd)
    check(path.read_bytes() == model, "the file differs from the model")
    return {"sha": hashlib.sha256(path.read_bytes()).hexdigest()}


@case(data_mib=1)
def mapped_tail(place: Place) -> dict:
    """Bytes stored beyond the end within the last page do not come to light when the file grows."""
    path, size = place.dir / "tail", 10_000
    path.write_bytes(b"t" * size)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as tail:
        os.ftruncate(file.fileno(), size - 500)
        tail[size - 400:size - 300] = b"g" * 100
        os.ftruncate(file.fileno(), size)
        check(os.pread(file.fileno(), 500, size - 500) == bytes(500), "read shows them")
        check(tail[size - 500:size] == bytes(500), "the mapping shows them")
    return {}


_NUMPY = """
import numpy, sys
path = sys.argv[1]
a = numpy.memmap(path, dtype="<f8", mode="w+", shape=(3000, 1000))
for i in range(3000):
    a[i] = numpy.arange(1000) * i
a[:, 500] += 1
a.flush()
del a
b = numpy.memmap(path, dtype="<f8", mode="r+", shape=(3000, 1000))
assert b[2999, 999] == 2999 * 999 and b[10, 500] == 5001
b[::7] *= 2
print(float(b.sum()))
numpy.save(path + ".npy", b)
c = numpy.load(path + ".npy", mmap_mode="r")
assert (c == b).all()
"""


@case(data_mib=46)
def numpy_memmap(place: Place) -> dict:
    """numpy.memmap and np.load(mmap_mode): an array twice as large as memory would be, changed by rows and columns."""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            subprocess.run([python, "-c", "import numpy"], check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.CalledProcessError):
            continue
        return {"sum": run(python, "-c", _NUMPY, str(place.dir / "array"), cwd=place.dir)}
    raise Skip("no numpy; see tests/programs/install")
