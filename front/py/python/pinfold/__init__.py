"""Files through a page cache of the process's own, with a fixed memory budget.

A directory becomes a :class:`Volume`; its files are opened as with Python's own ``open`` and are :class:`io.RawIOBase`
objects (:class:`File`). What is cached is read and written without a system call. :meth:`File.map` puts files into memory, where
numpy and whatever else takes a buffer works on them in place, within the same budget (:class:`Mapping`).
"""

from pinfold._file import File
from pinfold._native import MEMORY_MIN, Mapping, Pin, __version__
from pinfold._volume import DirEntry, Volume

__all__ = ["MEMORY_MIN", "DirEntry", "File", "Mapping", "Pin", "Volume", "__version__"]
