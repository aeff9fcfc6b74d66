"""Programs that move bytes: tar, rsync, sort, dd, cp."""

import hashlib
import os
import random

from . import MIB, Place, case, check, run, write_files


def _tree_with_everything(top) -> None:
    write_files(top, 400, 1_000_000, 7)
    (top / "empty").touch()
    (top / "link").symlink_to("d1/e1")
    (top / "dangling").symlink_to("no/such/" + "long/" * 40)
    os.link(top / "empty", top / "empty too")
    os.link(top / "d0/e0/f0.txt", top / "d1/hard")
    (top / ("n" * 255)).write_bytes(b"long name")
    os.mkdir(os.path.join(os.fsencode(top), b"not \xff utf8"))
    (top / "suid").write_bytes(b"x")
    os.chmod(top / "suid", 0o4711)
    (top / "private").mkdir(mode=0o700)
    os.mkfifo(top / "fifo", 0o640)
    with open(top / "sparse", "wb") as sparse:
        sparse.seek(3 * MIB + 77)
        sparse.write(b"end")
        sparse.truncate(5 * MIB)
    for number, (path, _, files) in enumerate(os.walk(top)):
        for name in files:
            if not os.path.islink(os.path.join(path, name)):
                os.utime(os.path.join(path, name), ns=(10**18 + number, 10**18 + 123456789 + number))


@case(data_mib=40, tools=("tar",))
def tar(place: Place) -> dict:
    """Packs a tree with links, holes, modes and odd names, unpacks it, and compares with the archive."""
    tree = place.dir / "tree"
    tree.mkdir()
    _tree_with_everything(tree)
    args = ("--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=posix", "--pax-option=delete=atime,delete=ctime")
    run("tar", *args, "--mtime=2020-01-01", "-cf", "all.tar", "tree", cwd=place.dir)
    run("tar", "-cSzf", "sparse.tgz", "tree", cwd=place.dir)
    for archive, into in (("all.tar", "plain"), ("sparse.tgz", "holes")):
        (place.dir / into).mkdir()
        run("tar", "-xpf", archive, "-C", into, cwd=place.dir)
    run("tar", "--compare", "-f", "sparse.tgz", "-C", "holes", cwd=place.dir)
    check((place.dir / "holes/tree/d1/hard").samefile(place.dir / "holes/tree/d0/e0/f0.txt"), "hard link lost")
    (place.dir / "sparse.tgz").unlink()  # Holes may lie elsewhere, and times are in it.
    listing = run("tar", "-tvf", "all.tar", cwd=place.dir)
    # The pax headers of a file with holes name the process.
    return {"listing": listing}


@case(data_mib=20, tools=("rsync",))
def rsync(place: Place) -> dict:
    """Copies a tree with times, links and modes; the second run finds nothing to do, by times and by sums."""
    tree = place.dir / "tree"
    tree.mkdir()
    _tree_with_everything(tree)
    copy = ("rsync", "-aHS", "--itemize-changes", "tree/", "copy/")
    check(run(*copy, cwd=place.dir).count("\n") > 400, "the first run copied too little")
    again = run(*copy, cwd=place.dir)
    check(again == "", f"the second run found {again[:300]}")
    check(run(*copy, "--checksum", cwd=place.dir) == "", "sums differ")
    with open(tree / "d1/hard", "ab") as file:
        file.write(b"more")
    third = run(*copy, "--inplace", "--no-whole-file", "--no-sparse", cwd=place.dir)
    check("f0.txt" in third or "hard" in third, f"the third run missed the change: {third[:300]}")
    check(run(*copy, "--delete", cwd=place.dir) == "", "the fourth run found something")
    return {}


@case(data_mib=24, tools=("sort",))
def sort(place: Place) -> dict:
    """An external sort with a megabyte of memory and its temporary files alongside."""
    rng = random.Random(place.seed)
    with open(place.dir / "input", "w") as file:
        for _ in range(600_000):
            file.write(f"{rng.randrange(10**12):x} {rng.randrange(100)}\n")
    env = {**os.environ, "LC_ALL": "C"}
    run("sort", "-S", "1M", "-T", ".", "-o", "sorted", "input", cwd=place.dir, env=env)
    run("sort", "-c", "sorted", cwd=place.dir, env=env)
    run("sort", "-S", "1M", "-T", ".", "--compress-program=gzip", "-k2n", "-k1", "-o", "input", "input", cwd=place.dir, env=env)
    lines = hashlib.sha256(b"".join(sorted(open(place.dir / "input", "rb")))).hexdigest()
    check(lines == hashlib.sha256((place.dir / "sorted").read_bytes()).hexdigest(), "sorted other lines than given")
    return {"lines": lines}


@case(data_mib=24, tools=("dd",))
def dd(place: Place) -> dict:
    """Odd block sizes, direct, appending, synchronous, seeking without truncation."""
    here = place.dir
    (here / "input").write_bytes(random.Random(place.seed).randbytes(6 * MIB + 513))
    whole = (here / "input").read_bytes()

    def dd(*args):
        run("dd", "status=none", *args, cwd=here)

    for size in (1, 511, 4095, 4097, 65537, 1048577):
        # One byte at a time only for a little of it.
        count = [f"count={MIB // 16}"] if size == 1 else []
        dd("if=input", f"of=odd{size}", f"bs={size}", *count)
        expected = whole[:MIB // 16] if size == 1 else whole
        check((here / f"odd{size}").read_bytes() == expected, f"bs={size}")
    (here / "aligned").write_bytes(whole[:6 * MIB])
    for size in ("4k", "64k", "1M", "3M"):
        dd("if=aligned", f"of=direct{size}", f"bs={size}", "oflag=direct", "iflag=direct")
        check((here / f"direct{size}").read_bytes() == whole[:6 * MIB], f"direct bs={size}")
    dd("if=input", "of=tail", "bs=1M", "iflag=direct")
    check((here / "tail").read_bytes() == whole, "a direct read of an odd tail")
    for flag in ("append", "sync", "dsync"):
        dd("if=/dev/zero", f"of={flag}", "bs=1000", "count=1")
        dd("if=input", f"of={flag}", "bs=10007", "count=50", f"oflag={flag}", "conv=notrunc")
        expected = bytes(1000) + whole[:500350] if flag == "append" else whole[:500350]
        check((here / flag).read_bytes() == expected, f"oflag={flag}")
    (here / "patched").write_bytes(whole)
    dd("if=/dev/zero", "of=patched", "bs=777", "count=3", "seek=1000", "conv=notrunc,fsync")
    expected = whole[:777000] + bytes(2331) + whole[779331:]
    check((here / "patched").read_bytes() == expected, "seek without truncation")
    dd("if=patched", "of=patched", "bs=4k", "skip=100", "seek=7", "count=50", "conv=notrunc")
    check((here / "patched").read_bytes()[28672:28672 + 204800] == expected[409600:409600 + 204800], "onto itself")
    dd("if=input", "of=sparse", "bs=4k", "conv=sparse", "seek=512")
    check((here / "sparse").read_bytes() == bytes(2 * MIB) + whole, "a hole at the front")
    return {}


@case(data_mib=24, tools=("cp", "fallocate"))
def holes(place: Place) -> dict:
    """cp --sparse, reflink, fallocate, punching, SEEK_HOLE and SEEK_DATA: the bytes are right wherever holes come to lie."""
    here = place.dir
    with open(here / "holey", "wb") as file:
        for at in (0, 5, 9, 14):
            file.seek(at * MIB)
            file.write(bytes([at + 65]) * (MIB // 3))
        file.truncate(16 * MIB + 5)
    whole = (here / "holey").read_bytes()
    for how in ("always", "never", "auto"):
        run("cp", f"--sparse={how}", "holey", f"copy-{how}", cwd=here)
        check((here / f"copy-{how}").read_bytes() == whole, f"cp --sparse={how}")
    run("cp", "--reflink=auto", "holey", "reflink", cwd=here)
    os.sync()
    used = {how: os.stat(here / f"copy-{how}").st_blocks * 512 for how in ("always", "never")}
    check(used["always"] < 4 * MIB, f"cp --sparse=always uses {used['always']} bytes")
    check(used["never"] >= 16 * MIB, f"cp --sparse=never uses {used['never']} bytes")
    run("fallocate", "-d", "copy-never", cwd=here)
    check((here / "copy-never").read_bytes() == whole, "digging holes changed bytes")
    run("fallocate", "-p", "-o", "100", "-l", str(MIB), "copy-auto", cwd=here)
    check((here / "copy-auto").read_bytes() == whole[:100] + bytes(MIB) + whole[100 + MIB:], "punch")
    run("fallocate", "-z", "-o", str(5 * MIB + 10), "-l", "70000", "reflink", cwd=here)
    zeroed = 5 * MIB + 10
    check((here / "reflink").read_bytes() == whole[:zeroed] + bytes(70000) + whole[zeroed + 70000:], "zero range")
    run("fallocate", "-l", "3000000", "reserved", cwd=here)
    check((here / "reserved").read_bytes() == bytes(3000000), "reserved space is not zero")
    run("fallocate", "-n", "-l", "9000000", "reserved", cwd=here)
    check(os.stat(here / "reserved").st_size == 3000000, "keep size did not")
    fd = os.open(here / "holey", os.O_RDWR)
    check(os.lseek(fd, 0, os.SEEK_DATA) == 0, "data at 0")
    at, regions = 0, []
    while at < len(whole):
        hole = os.lseek(fd, at, os.SEEK_HOLE)
        regions.append(whole[at:hole])
        if hole >= len(whole):
            break
        try:
            data = os.lseek(fd, hole, os.SEEK_DATA)
        except OSError:
            data = len(whole)  # ENXIO: nothing but a hole until the end.
        check(not any(whole[hole:data]), f"bytes in the hole at {hole}")
        at = data
    # What was just written and not yet stored is data too.
    os.pwrite(fd, b"fresh", 3 * MIB)
    check(os.lseek(fd, 2 * MIB, os.SEEK_DATA) <= 3 * MIB, "fresh bytes lie in a hole")
    os.close(fd)
    return {}
