"""A directory served by a page cache of this process."""

from __future__ import annotations

import io
import os
import stat as stat_bits
import warnings
from typing import TYPE_CHECKING, Any, AnyStr, Generic, Literal, overload

from pinfold import _native
from pinfold._file import File

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from _typeshed import OpenBinaryMode, OpenTextMode, StrOrBytesPath


class Volume(_native.Volume):
    """A directory served by a page cache of this process: ``Volume(path, memory="256MiB")``.

    `memory` is the budget for cached pages in bytes, an int or a str with a unit (powers of 1024), at least
    :data:`MEMORY_MIN`. `dirty_limit` says how much of it may wait to be written before writers are made to wait, half
    unless given; `dirty_age` after how many seconds it is written anyway, 5 unless given. Without `io_uring`, threads do
    the transfers. With `retain_dirty_on_error`, data that could not be stored is kept for another try. With `store_timeout`,
    what the directory's file system has not answered after so many seconds fails with EIO; names are not limited.

    Paths are looked up in the volume; a leading slash is its root. One process serves a directory at a time: elsewhere
    the same directory, one above and one below are refused (EBUSY) until this volume and its files are closed. After a
    fork, the child cannot use the volume: it raises RuntimeError.
    """

    def __enter__(self) -> Self:
        if self.closed:
            raise ValueError("I/O operation on closed volume")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " [closed]" if self.closed else ""
        return f"<pinfold.Volume path={self.path!r}{state}>"

    def __del__(self) -> None:
        if not self.closed:
            warnings.warn(f"unclosed volume {self!r}", ResourceWarning, stacklevel=2, source=self)

    @overload
    def open(
        self,
        path: StrOrBytesPath,
        mode: OpenBinaryMode = "rb",
        buffering: Literal[-1, 0] = -1,
        *,
        direct: bool = False,
        dsync: bool = False,
        permissions: int = 0o666,
    ) -> File: ...
    @overload
    def open(
        self,
        path: StrOrBytesPath,
        mode: OpenTextMode,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *,
        dsync: bool = False,
        permissions: int = 0o666,
    ) -> io.TextIOWrapper: ...
    @overload
    def open(
        self,
        path: StrOrBytesPath,
        mode: OpenBinaryMode,
        buffering: int,
        *,
        dsync: bool = False,
        permissions: int = 0o666,
    ) -> File | io.BufferedReader | io.BufferedWriter | io.BufferedRandom: ...
    def open(
        self,
        path: StrOrBytesPath,
        mode: str = "rb",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *,
        direct: bool = False,
        dsync: bool = False,
        permissions: int = 0o666,
    ) -> Any:
        """Open a file; the arguments are those of Python's own open.

        Binary modes give a :class:`File`: the volume's cache is its buffer, another would only copy. A `buffering` above
        1 puts Python's buffered stream of that size on top. Modes without a "b" give a text stream.

        `direct` goes past the cache (O_DIRECT): offsets, lengths and the memory of buffers must be aligned; objects that
        `read` returns are taken care of. With `dsync`, a write returns when its data is durable (O_DSYNC). `permissions`
        are for a file that is created, less the umask.
        """
        letters = set(mode)
        binary = "b" in letters
        access = letters - set("bt+")
        if (
            letters - set("axrwb+t")
            or len(letters) < len(mode)
            or len(access) != 1
            or letters >= {"b", "t"}
        ):
            raise ValueError(f"invalid mode: {mode!r}")
        if binary:
            for what, given in (("encoding", encoding), ("errors", errors), ("newline", newline)):
                if given is not None:
                    raise ValueError(f"binary mode doesn't take {what!r}")
            if buffering == 1:
                raise ValueError("line buffering is for text modes")
        elif buffering == 0:
            raise ValueError("can't have unbuffered text I/O")
        if buffering < -1:
            raise ValueError("invalid buffering size")
        if direct and not (binary and buffering <= 0):
            raise ValueError("direct I/O is aligned by the caller: it takes a binary mode and no buffer")

        kind = access.pop()
        update = "+" in letters
        flags = os.O_RDWR if update else os.O_RDONLY if kind == "r" else os.O_WRONLY
        flags |= {
            "r": 0,
            "w": os.O_CREAT | os.O_TRUNC,
            "a": os.O_CREAT | os.O_APPEND,
            "x": os.O_CREAT | os.O_EXCL,
        }[kind]
        if direct:
            flags |= os.O_DIRECT
        if dsync:
            flags |= os.O_DSYNC
        native = self.open_file(path, flags, permissions)
        # A file that was cut to nothing is open for the same as one opened with "r+": Python names it so.
        shown = "r" if update and kind == "w" else kind
        raw = File(native, f"{shown}b{'+' if update else ''}")
        try:
            if kind == "a":
                raw.seek(0, io.SEEK_END)
            if binary and buffering <= 0:
                return raw
            size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
            buffered: Any
            if update:
                buffered = io.BufferedRandom(raw, size)
            elif kind == "r":
                buffered = io.BufferedReader(raw, size)
            else:
                buffered = io.BufferedWriter(raw, size)
            if binary:
                return buffered
            encoding = io.text_encoding(encoding)
            text = io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
            text.mode = mode  # type: ignore[misc]  # as the builtin does
            return text
        except BaseException:
            raw.close()
            raise

    @overload
    def scandir(self, path: bytes | os.PathLike[bytes]) -> Scan[bytes]: ...
    @overload
    def scandir(self, path: str | os.PathLike[str] = ".") -> Scan[str]: ...
    def scandir(self, path: Any = ".") -> Scan[Any]:
        """Return an iterator over a directory's entries, without "." and "..", as os.scandir."""
        return Scan(self, path)

    def makedirs(self, path: StrOrBytesPath, mode: int = 0o777, exist_ok: bool = False) -> None:
        """Make a directory and those above it that are missing, as os.makedirs."""
        plain = os.fspath(path)
        parent, name = os.path.split(plain)
        if not name:
            parent, name = os.path.split(parent)
        if parent and name and not self.exists(parent):
            try:
                self.makedirs(parent, exist_ok=True)
            except FileExistsError:
                pass  # Somebody else was faster.
        try:
            self.mkdir(plain, mode)
        except FileExistsError:
            if not exist_ok or not stat_bits.S_ISDIR(self.stat(plain).st_mode):
                raise


class DirEntry(Generic[AnyStr]):
    """An entry of a directory, as os.DirEntry; what it tells of attributes, it asks for anew each time."""

    __slots__ = ("_inode", "_type", "_volume", "name", "path")

    name: AnyStr
    """The name in its directory."""
    path: AnyStr
    """The path in the volume: that of the scan, and the name."""

    def __init__(
        self, volume: Volume, path: AnyStr, name: AnyStr, inode: int, kind: int | None
    ) -> None:
        self._volume = volume
        self._inode = inode
        self._type = kind
        self.name = name
        self.path = path

    def inode(self) -> int:
        """Return the inode's number; for a mount point, that of the inode below."""
        return self._inode

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return the attributes."""
        return self._volume.stat(self.path, follow_symlinks=follow_symlinks)

    def is_symlink(self) -> bool:
        """Tell whether it is a symbolic link."""
        return self._is(stat_bits.S_IFLNK, follow=False)

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Tell whether it is a directory, or by default a symbolic link to one."""
        return self._is(stat_bits.S_IFDIR, follow=follow_symlinks)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Tell whether it is a regular file, or by default a symbolic link to one."""
        return self._is(stat_bits.S_IFREG, follow=follow_symlinks)

    def _is(self, kind: int, *, follow: bool) -> bool:
        known = self._type
        if known is None or (follow and known == stat_bits.S_IFLNK):
            try:
                known = stat_bits.S_IFMT(self.stat(follow_symlinks=follow).st_mode)
            except FileNotFoundError:
                return False
        return known == kind

    def __fspath__(self) -> AnyStr:
        return self.path

    def __repr__(self) -> str:
        return f"<pinfold.DirEntry {self.name!r}>"


class Scan(Generic[AnyStr]):
    """An iterator over the entries of a directory; as a context manager it lets go of the directory at the end."""

    __slots__ = ("_entries", "_path", "_volume")

    def __init__(self, volume: Volume, path: AnyStr | os.PathLike[AnyStr]) -> None:
        self._volume = volume
        self._path: AnyStr = os.fspath(path)
        self._entries: _native.Directory[AnyStr] = volume.read_directory(path)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DirEntry[AnyStr]:
        name, inode, kind = next(self._entries)
        return DirEntry(self._volume, os.path.join(self._path, name), name, inode, kind)

    def close(self) -> None:
        """End the iteration and let go of the directory."""
        self._entries.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
