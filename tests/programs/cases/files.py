"""What POSIX says of names, links, modes and times, as programs rely on it."""

import errno
import os
import stat
import time

from . import Place, case, check


@case(data_mib=1)
def links(place: Place) -> dict:
    """Hard links share bytes and times; unlinked open files live on; rename replaces what is open."""
    here = place.dir
    (here / "a").write_bytes(b"first")
    os.link(here / "a", here / "b")
    with open(here / "b", "ab") as file:
        file.write(b" second")
    check((here / "a").read_bytes() == b"first second", "a link does not show the other's bytes")
    check(os.stat(here / "a").st_nlink == 2 and os.path.samefile(here / "a", here / "b"), "not the same file")
    fd = os.open(here / "a", os.O_RDWR)
    os.unlink(here / "a")
    os.unlink(here / "b")
    check(os.fstat(fd).st_nlink == 0, "still has links")
    os.pwrite(fd, b"x" * 300_000, 100_000)
    os.ftruncate(fd, 350_000)
    os.fsync(fd)
    check(os.pread(fd, 5, 0) == b"first" and os.pread(fd, 10, 349_990) == b"x" * 10, "an unlinked file lost bytes")
    check(not (here / "a").exists(), "the name is still there")
    (here / "a").write_bytes(b"another")
    check(os.fstat(fd).st_ino != os.stat(here / "a").st_ino, "the new file is the old one")
    os.close(fd)
    # Save as editors do: write beside, sync, rename over.
    old = os.open(here / "a", os.O_RDONLY)
    (here / "new").write_bytes(b"saved")
    os.rename(here / "new", here / "a")
    check(os.pread(old, 20, 0) == b"another" and (here / "a").read_bytes() == b"saved", "rename over an open file")
    os.close(old)
    os.makedirs(here / "d/e/f")
    os.rename(here / "d/e", here / "moved")
    check(os.listdir(here / "moved") == ["f"] and os.listdir(here / "d") == [], "a moved directory")
    for call, error in (
        (lambda: os.rmdir(here / "moved"), errno.ENOTEMPTY),
        (lambda: os.rename(here / "d", here / "moved"), errno.ENOTEMPTY),
        (lambda: os.mkdir(here / "d"), errno.EEXIST),
        (lambda: os.unlink(here / "none"), errno.ENOENT),
        (lambda: os.rename(here / "moved", here / "moved/f/g"), errno.EINVAL),
        (lambda: (here / ("n" * 256)).touch(), errno.ENAMETOOLONG),
        (lambda: os.listdir(here / "a"), errno.ENOTDIR),
    ):
        try:
            call()
        except OSError as refused:
            check(refused.errno == error, f"{os.strerror(error)} expected: {refused}")
        else:
            check(False, f"{os.strerror(error)} expected")
    return {}


@case(data_mib=1)
def attributes(place: Place) -> dict:
    """Modes, owners, times, extended attributes: as set, and unmoved by write-back."""
    here = place.dir
    before = os.umask(0o027)
    try:
        os.close(os.open(here / "made", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(here / "dir", 0o777)
    finally:
        os.umask(before)
    check(stat.S_IMODE(os.stat(here / "made").st_mode) == 0o640, "umask of a file")
    check(stat.S_IMODE(os.stat(here / "dir").st_mode) == 0o750, "umask of a directory")
    if os.geteuid() == 0:
        os.chown(here / "made", 1234, 2345)
        os.chmod(here / "dir", 0o2775)
        os.chown(here / "dir", -1, 2345)
        (here / "dir/inherits").touch()
        check(os.stat(here / "dir/inherits").st_gid == 2345, "a set-gid directory's group")
    os.chmod(here / "made", 0o4751)
    os.utime(here / "made", ns=(1_111_111_111_222_333_444, 1_222_222_222_333_444_555))
    check(os.stat(here / "made").st_mtime_ns == 1_222_222_222_333_444_555, "nanoseconds lost")
    os.setxattr(here / "made", "user.name", b"value" * 100)
    check(os.getxattr(here / "made", "user.name") == b"value" * 100, "extended attribute")
    os.removexattr(here / "made", "user.name")
    check(os.listxattr(here / "made") == [], f"left over: {os.listxattr(here / 'made')}")
    # A program that writes and looks sees a time; the same time has to be there after the bytes were stored.
    (here / "written").write_bytes(b"w" * 200_000)
    seen = os.stat(here / "written")
    check(abs(seen.st_mtime - time.time()) < 60, "the time of a write is far off")
    fd = os.open(here / "written", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    later = os.stat(here / "written")
    check(seen.st_mtime_ns == later.st_mtime_ns, "storing moved the modification time")
    check(seen.st_ctime_ns == later.st_ctime_ns, "storing moved the change time")
    time.sleep(0.02)
    with open(here / "written", "r+b") as file:
        file.write(b"again")
    check(os.stat(here / "written").st_mtime_ns > seen.st_mtime_ns, "a write left the time alone")
    check(os.stat(here / "written").st_ctime_ns > seen.st_ctime_ns, "a write left the change time alone")
    os.utime(here / "written", ns=(5, 7))
    with open(here / "written", "rb") as file:
        file.read()
        os.fsync(file.fileno())
    check(os.stat(here / "written").st_mtime_ns == 7, "a time set after writing did not last")
    return {"mode": os.stat(here / "made").st_mode}


@case(data_mib=4)
def directories(place: Place) -> dict:
    """Ten thousand names listed whole, also while they are removed; deep paths; statfs."""
    many = place.dir / "many"
    many.mkdir()
    names = {f"name-{i:05}" for i in range(10_000)}
    for name in names:
        os.close(os.open(many / name, os.O_CREAT | os.O_WRONLY))
    check(set(os.listdir(many)) == names, "the listing is not whole")
    with os.scandir(many) as entries:
        for number, entry in enumerate(entries):
            if number % 2:
                os.unlink(entry.path)
    left = os.listdir(many)
    check(len(left) == len(set(left)) == 5000, f"{len(left)} names are left")
    deep = place.dir
    for level in range(60):
        deep = deep / f"level{level}"
        deep.mkdir()
    (deep / "bottom").write_bytes(b"bottom")
    check((deep / "bottom").read_bytes() == b"bottom", "the deep file")
    figures = os.statvfs(place.dir)
    check(figures.f_blocks > 0 and figures.f_bavail > 0 and figures.f_namemax >= 255, "statfs")
    return {"names": sorted(left) != []}
