"""Files through a page cache of the process's own, with a fixed memory budget.

A directory becomes a :class:`Volume`; its files are opened as with Python's own ``open`` and are :class:`io.RawIOBase`
objects (:class:`File`). What is cached is read and written without a system call.
"""

from pinfold._file import File
from pinfold._native import MEMORY_MIN, __version__
from pinfold._volume import DirEntry, Volume

__all__ = ["MEMORY_MIN", "DirEntry", "File", "Volume", "__version__"]
