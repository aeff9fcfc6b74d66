"""An open file as ``io`` knows files."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any, Literal, NoReturn

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from pinfold import _native


class File(io.RawIOBase):
    """An open file of a volume. :meth:`Volume.open` makes them.

    It is a raw stream: every call reaches the volume's page cache, which is all the buffering there is. A read returns
    fewer bytes than asked only at the end of the file or before an error; a write, only before an error. Calls may come
    from several threads at once; they share the file position, as those of one descriptor do.
    """

    __slots__ = ("_native", "mode")

    mode: str
    """How it was opened, such as ``"rb+"``."""

    def __init__(self, native: _native.File, mode: str) -> None:
        self._native = native
        self.mode = mode

    @property
    def name(self) -> Any:
        """The path it was opened with."""
        return self._native.name

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self._native.size

    def __repr__(self) -> str:
        state = " [closed]" if self.closed else ""
        return f"<pinfold.File name={self.name!r} mode={self.mode!r}{state}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"cannot pickle {type(self).__name__!r} object")

    # The stream.

    def readable(self) -> bool:
        """Tell whether it was opened for reading."""
        return self._native.readable()

    def writable(self) -> bool:
        """Tell whether it was opened for writing."""
        return self._native.writable()

    def seekable(self) -> bool:
        """Return True: all files of a volume can seek."""
        self._native.check()
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes from the file position on; all that is left without a size."""
        return self._native.read(size)

    def readall(self) -> bytes:
        """Read all that is left after the file position. An error is raised, not taken for the end."""
        return self._native.readall()

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read from the file position on into a writable buffer; return how many bytes."""
        return self._native.readinto(buffer)

    def readline(self, size: int | None = -1, /) -> bytes:
        """Read to the end of the line, or `size` bytes of it."""
        return self._native.readline(size)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write at the file position (the end, in mode "a"); return how many bytes."""
        return self._native.write(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the file position and return it; ``os.SEEK_DATA`` and ``os.SEEK_HOLE`` find the next data or hole."""
        return self._native.seek(offset, whence)

    def tell(self) -> int:
        """Return the file position."""
        return self._native.tell()

    def truncate(self, size: int | None = None, /) -> int:
        """Set the size in bytes, to the file position unless given, and return it; what is added reads as zeros."""
        return self._native.truncate(size)

    def close(self) -> None:
        """Close it. What is dirty is written back if nobody else has the file open; errors of that are raised."""
        if self.closed:
            return
        try:
            super().close()
        finally:
            self._native.close()

    # Past the file position.

    def read_at(self, size: int, offset: int) -> bytes:
        """Read up to `size` bytes at `offset`, as os.pread."""
        return self._native.read_at(size, offset)

    def readinto_at(self, buffer: WriteableBuffer, offset: int) -> int:
        """Read at `offset` into a writable buffer; return how many bytes."""
        return self._native.readinto_at(buffer, offset)

    def write_at(self, data: ReadableBuffer, offset: int) -> int:
        """Write at `offset`, as os.pwrite (at the end, in mode "a"); return how many bytes."""
        return self._native.write_at(data, offset)

    # The file.

    def sync(self) -> None:
        """Make data, size and times durable. A write-back error is raised once for each open file."""
        self._native.sync()

    def datasync(self) -> None:
        """Make the data durable, and what is needed to read it."""
        self._native.datasync()

    def allocate(self, offset: int, length: int, *, keep_size: bool = False) -> None:
        """Reserve space for a range; the file grows to its end unless `keep_size`."""
        self._native.allocate(offset, length, keep_size=keep_size)

    def punch(self, offset: int, length: int) -> None:
        """Make a range read as zeros and give its space back; the size stays."""
        self._native.punch(offset, length)

    def drop_cache(self) -> None:
        """Write back, then forget what is cached: the next read comes from the store."""
        self._native.drop_cache()

    def map(
        self,
        offset: int = 0,
        length: int | None = None,
        access: Literal["r", "w", "c"] = "r",
        *,
        delivery: Literal["handler", "inline"] = "handler",
        advice: Literal["normal", "random", "sequential", "willneed", "dontneed"] = "normal",
    ) -> _native.Mapping:
        """Map a range of the file into memory, all that follows `offset` without a length; see :class:`Mapping`.

        `offset` must be a multiple of the page size. With `access` "w" stores change the file, which must be open for
        reading and writing; with "c" they stay with the mapping. `delivery` says who brings pages in: a thread of the
        library's, or "inline" the thread that touches them, several times cheaper; system calls on memory that is not
        resident then fail with EFAULT unless it was pinned.
        """
        return self._native.map(offset, length, access, delivery, advice)

    # The end.

    def __del__(self) -> None:
        native = getattr(self, "_native", None)
        if native is None or self.closed:
            return
        self._dealloc_warn(self)
        self.close()

    def _dealloc_warn(self, source: object) -> None:
        # Buffered streams call this, too, when they go without having been closed.
        if not self._native.closed:
            warnings.warn(f"unclosed file {source!r}", ResourceWarning, stacklevel=2, source=source)
