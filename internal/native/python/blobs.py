"""Bytes of arrays that stay in their memory file until somebody wants them.

An app seldom wants an array's bytes: it wants the numbers, and makes them of the bytes again. So that each process
copies the bytes once into a file, and at most once out of one, NumPy reads and writes the files itself, and what is
large it finds in the file's own pages, which are copied where the app writes to them; the bytes are made for those who
ask for them. No file is ever made shorter: pages of a mapping would go with its end.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

FROM = 64 << 10  # bytes from which on an array's are left in the file
MOST = 128  # files that are held so at a time: there are not descriptors for any number
MAP_FROM = 1 << 20  # bytes from which on numbers are those of the file's pages
ALIGNED = 16  # bytes; what malloc gives at least
SLACK = 64 << 20  # bytes of arrays that are gone which a file may hold beside those that are not

_POPULATE_READ, _POPULATE_WRITE = 22, 23  # of madvise, since Linux 5.14; Python has no names for them


def wasteful(fd: int, size: int) -> bool:
    """Tell whether a file holds much more memory than so many bytes need: what it had before stays in it."""
    return os.fstat(fd).st_size > 2 * size + MAP_FROM


class TornError(Exception):
    """A file is shorter than what it is to hold."""


class File:
    """A memory file with arrays' bytes, given back when nobody holds any of them."""

    def __init__(self, fd: int, release: Callable[[int], None]) -> None:
        self.fd = fd
        self.end = 0  # what is written into it comes here
        self.made = 0  # bytes of all arrays since there was none
        self.blobs: weakref.WeakValueDictionary[int, Blob] = weakref.WeakValueDictionary()  # by identity
        self.maps: weakref.WeakValueDictionary[int, Mapping] = weakref.WeakValueDictionary()  # by identity
        self.read: dict[int, bytes] = {}  # by offset: bytes that somebody wanted
        self._release = release
        self._spent = False
        self._counted = (0, 0), 0
        _files[id(self)] = self

    def __del__(self) -> None:
        if self._spent:
            os.close(self.fd)
        else:
            self._release(self.fd)

    def discard(self) -> None:
        """Have the file closed in the end, and not used again."""
        self._spent = True

    def released_by(self, release: Callable[[int], None]) -> bool:
        """Tell whether that is who gets the file back."""
        return self._release is release

    def open(self, mode: str) -> Any:
        """Open the file anew: a position of its own, which those have not who share a descriptor."""
        return open(f"/proc/self/fd/{self.fd}", mode, buffering=0)

    def pread(self, size: int, offset: int) -> bytes:
        """Read bytes."""
        first = os.pread(self.fd, size, offset)
        if len(first) == size:
            return first
        parts = [first]
        got = len(first)
        while got < size:  # one call gives 2 GiB at most
            part = os.pread(self.fd, size - got, offset + got)
            if not part:
                raise TornError(f"a pack became shorter while it was read: {offset + got} bytes are left, not {offset + size}")
            parts.append(part)
            got += len(part)
        return b"".join(parts)

    def held(self) -> bool:
        """Tell whether somebody holds any of the arrays."""
        return bool(self.blobs or self.maps)

    def living(self) -> int:
        """Give how many bytes those arrays have that somebody holds."""
        n = len(self.blobs), len(self.maps)
        if n != self._counted[0]:  # nearly always, none has come for one that went
            sizes = {x.offset: len(x) for those in (self.blobs, self.maps) for x in _living(those)}
            self._counted = n, sum(sizes.values())
        return self._counted[1]


class Mapping(mmap.mmap):
    """The pages of one array, for its numbers to be in: who writes to them has a copy of them."""

    file: File | None
    offset: int  # of the array, in the file
    begin: int  # of the array, in the mapping
    whole: tuple[int, int] = 0, 0  # inode and size of the file that it does without

    @classmethod
    def of(cls, file: File, offset: int, size: int) -> Mapping:
        """Map an array's bytes."""
        begin = offset % mmap.ALLOCATIONGRANULARITY
        self = cls(file.fd, begin + size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=offset - begin)
        self.file, self.offset, self.begin = file, offset, begin
        file.maps[id(self)] = _maps[id(self)] = self
        self.madvise(_POPULATE_READ)  # in one go: half of what it costs page by page
        return self

    def settle(self) -> None:
        """Do without the file: have copies of all pages."""
        file = self.file
        if file is not None:
            self.madvise(_POPULATE_WRITE)
            status = os.fstat(file.fd)
            self.whole = status.st_ino, status.st_size
            file.maps.pop(id(self), None)
            self.file = None


def can_map() -> bool:
    """Tell whether mappings can be made to do without their files here: not every system that takes the call heeds it."""
    if sys.platform != "linux":
        return False
    try:
        fd = os.memfd_create("pergola")
        try:
            os.pwrite(fd, b"a" * mmap.PAGESIZE, 0)
            with mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as m:
                m.madvise(_POPULATE_WRITE)
                os.pwrite(fd, b"b", 0)
                return m[:1] == b"a"
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return False


class Blob:
    """The bytes of one array."""

    __slots__ = ("__weakref__", "_bytes", "file", "offset", "size")

    def __init__(self, file: File, offset: int, size: int) -> None:
        self.file: File | None = file
        self.offset = offset
        self.size = size
        self._bytes: bytes | None = None
        file.made = size + (file.made if file.held() else 0)
        file.blobs[id(self)] = self

    def __len__(self) -> int:
        return self.size

    def data(self) -> bytes:
        """Give the bytes, always the same object."""
        file = self.file
        if file is None:
            return self._settled()
        read = file.read
        found = self.peek()
        return read.setdefault(self.offset, found) if self.file is file else self._settled()

    def peek(self) -> bytes:
        """Give the bytes for a moment: they are not kept."""
        file = self.file
        if file is None:
            return self._settled()
        try:
            found = file.read.get(self.offset) or file.pread(self.size, self.offset)
        except TornError:
            if self.file is file:
                raise
            found = b""
        # Settled meanwhile by another thread, the file may have been of others already.
        return found if self.file is file else self._settled()

    def _settled(self) -> bytes:
        assert self._bytes is not None
        return self._bytes

    def settle(self) -> None:
        """Do without the file."""
        file = self.file
        if file is not None:
            self._bytes = self.data()
            self.file = None  # before the file may be of others: who reads it now looks here afterwards
            file.blobs.pop(id(self), None)


_files: weakref.WeakValueDictionary[int, File] = weakref.WeakValueDictionary()  # by identity
_maps: weakref.WeakValueDictionary[int, Mapping] = weakref.WeakValueDictionary()  # by identity


def _living(those: weakref.WeakValueDictionary[int, Any]) -> list[Any]:
    return [x for x in (ref() for ref in those.valuerefs()) if x is not None]  # no other thread's change disturbs it


def count() -> int:
    """Give how many files are held."""
    return len(_files)


def may_map() -> bool:
    """Tell whether there may be one mapping more. Each keeps a descriptor and its whole file, also when it does without."""
    maps = _living(_maps)
    alone = [m for m in maps if m.file is None]
    return len(maps) < MOST and sum(dict(m.whole for m in alone).values()) - sum(map(len, alone)) <= SLACK


def empty(fd: int, maker: int) -> None:
    """Give up the pages of a file that nobody else reads, if mappings that do without it keep it all the same.

    `maker` is the process whose file it is: one that was forked has no say.
    """
    status = os.fstat(fd)
    if os.getpid() == maker and any(m.file is None and m.whole[0] == status.st_ino for m in _living(_maps)):
        with mmap.mmap(fd, status.st_size) as pages:
            pages.madvise(mmap.MADV_REMOVE)


def settle(file: File | None = None) -> None:
    """Have what is held, of one file or of all, do without the file."""
    for f in [file] if file is not None else _living(_files):
        for blob in _living(f.blobs):
            blob.settle()
        for m in _living(f.maps):  # after the blobs: a thread that has made one looks whether its blob has the file still
            m.settle()


def trim() -> None:
    """Have the lesser parts of files do without them, where the rest is much in sum.

    An app that keeps one array of each message is not to hold the messages with it.
    """
    rests = [(f.made - f.living(), f) for f in _living(_files) if f.held()]
    much = sum(n for n, _ in rests)
    for n, file in sorted(rests, key=lambda r: -r[0]):
        if much > SLACK and n >= file.living():
            settle(file)
            much -= n


class Arena:
    """Writes arrays one behind the other, so that those of a message are a pack already when it is sent."""

    def __init__(self, get: Callable[[int], int], put: Callable[[int], None]) -> None:
        self._get = get
        self._put = put
        self._lock = threading.RLock()
        self._within = False  # a finalizer, which runs in the midst of anything, may make an array too
        self._closed = False
        self._file: File | None = None
        self._last = 0  # bytes in the file before
        self._checked = 0

    def add(self, write: Callable[[Any], None]) -> Blob | None:
        """Have an array written; nothing if there are files enough."""
        with self._lock:
            if self._within or self._closed:
                return None
            self._within = True
            try:
                file = self._file = self._room()
                if file is None:
                    return None
                with file.open("r+b") as f:
                    f.seek(file.end)
                    write(f)
                    end = f.tell()
                blob = Blob(file, file.end, end - file.end)
                file.end = end
                return blob
            finally:
                self._within = False

    def _room(self) -> File | None:
        file = self._file
        if file is not None:
            if file.held() and file.end - self._checked > SLACK:
                self._checked = file.end
                trim()
                if file.held() and file.end - file.living() > SLACK:
                    file = None
            if file is not None and not file.held():
                file.end = self._checked = 0
                file.read = {}  # another thread may be at the old ones
        if file is None:
            trim()
            if count() >= MOST:
                return None
            self._checked = 0
            file = File(self._get(self._last), self._put)
        return file

    def seal(self, blobs: Sequence[bytes | Blob]) -> File | None:
        """Give the file that holds those and begins with them, if there is one. Nothing is written to it any more.

        Nor where they are not its first ones: what comes next is to be the first of another, for it may be the next message.
        """
        with self._lock:
            if self._within:
                return None
            own = [b for b in blobs if isinstance(b, Blob)]
            files = {b.file for b in own}
            if self._file is not None and self._file in files:
                self._last = self._file.end
                self._file = None
            file = files.pop() if len(files) == 1 and len(own) == len(blobs) else None
            if file is None or not file.released_by(self._put):
                return None
            at = 0
            for blob in own:
                if blob.offset != at:
                    return None
                at += blob.size
            return None if wasteful(file.fd, at) else file

    def close(self) -> None:
        """Write nothing any more."""
        with self._lock:
            self._closed = True
            self._file = None
