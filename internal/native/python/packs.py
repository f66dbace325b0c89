"""Packs: memory files that hold the bytes of arrays back to back, beside the protobuf.

The bytes of an array are copied once into a pack by the process that has them, and once out of it by each process
that wants them, however many messages name the pack.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from .frames import ProtocolError

ROOM = 256 << 20  # bytes of arrays that are kept at hand; the newest pack is, however large
FEW = 8  # packs that are kept at hand at most
SMALL = 256 << 10  # arrays up to here are read together
TOGETHER = 8 << 20  # as much as this in one go
OPEN = 64  # packs that were written and not freed whose files are kept for the next ones
_IOV = 1000  # buffers per call; Linux takes 1024


def new_file(name: str) -> int:
    """Open an anonymous file in memory; where the system has none, an unlinked temporary file."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as f:
        return os.dup(f.fileno())


def write(fd: int, blobs: Sequence[bytes]) -> None:
    """Make the file's content the blobs, back to back."""
    offset = 0
    for at in range(0, len(blobs), _IOV):
        views = [memoryview(b) for b in blobs[at : at + _IOV] if b]
        while views:
            n = os.pwritev(fd, views, offset)
            offset += n
            while views and n >= len(views[0]):
                n -= len(views.pop(0))
            if n:
                views[0] = views[0][n:]
    os.ftruncate(fd, offset)  # the file may have held more before


def check(fd: int, lens: object) -> list[int]:
    """Give the lengths of a pack's arrays, if they are what the file has."""
    if not isinstance(lens, list) or not all(isinstance(n, int) and n >= -1 for n in lens):
        raise ProtocolError("the lengths of a pack's arrays are not a list of integers from -1")
    total, size = sum(n for n in lens if n > 0), os.fstat(fd).st_size
    if total > size:
        raise ProtocolError(f"a pack of {size} bytes cannot hold arrays of {total} bytes")
    return lens


def read(fd: int, lens: list[int]) -> list[bytes]:
    """Read the arrays of a pack, without those that stayed in the protobuf (length -1)."""
    sizes = [n for n in lens if n >= 0]
    out: list[bytes] = []
    offset, i = 0, 0
    while i < len(sizes):
        j, total = i, 0
        while j < len(sizes) and sizes[j] <= SMALL and total + sizes[j] <= TOGETHER:
            total += sizes[j]
            j += 1
        if j > i + 1:
            run = _pread(fd, total, offset)
            at = 0
            for n in sizes[i:j]:
                out.append(run[at : at + n])
                at += n
            i = j
        else:
            total = sizes[i]
            out.append(_pread(fd, total, offset))
            i += 1
        offset += total
    return out


def _pread(fd: int, n: int, offset: int) -> bytes:
    first = os.pread(fd, n, offset)
    if len(first) == n:
        return first
    parts = [first]
    got = len(first)
    while got < n:  # one call gives 2 GiB at most
        part = os.pread(fd, n - got, offset + got)
        if not part:
            raise ProtocolError("a pack became shorter while it was read")
        parts.append(part)
        got += len(part)
    return b"".join(parts)


def keep(busy: dict[str, int], name: str, fd: int) -> None:
    """Remember the file of a pack that somebody reads. Each node's state may be one: there are not descriptors for any number."""
    busy[name] = fd
    while len(busy) > OPEN:
        os.close(busy.pop(next(iter(busy))))  # the reader has its own; the file is not used again, that is all


class Idle:
    """Files that nobody reads any more. Their pages are there, so that writing into them takes half the time."""

    KEEP = 2

    def __init__(self) -> None:
        self._fds: list[int] = []

    def get(self, name: str) -> int:
        """Give a file to write into."""
        return self._fds.pop() if self._fds else new_file(name)

    def take(self) -> list[int]:
        """Give all files away, for a child to write into."""
        fds, self._fds = self._fds, []
        return fds

    def put(self, fd: int) -> None:
        """Take a file back."""
        self._fds.append(fd)
        if len(self._fds) > self.KEEP:
            os.close(self._fds.pop(0))


@dataclass
class _Pack:
    name: str
    fd: int
    blobs: Sequence[bytes]
    size: int
    known: bool  # by the runner, which holds a descriptor of its own


class ServerPacks:
    """What a ServerApp sends. The same arrays go to many nodes, and often twice in a round: they are written once.

    Arrays are told by the identity of their bytes objects. Bytes cannot change and are held here, so that no other
    object takes their identity; nothing has to be hashed.
    """

    def __init__(self) -> None:
        self._packs: OrderedDict[tuple[int, ...], _Pack] = OrderedDict()
        self._dropped: dict[str, int] = {}
        self._idle = Idle()
        self._count = 0
        self._size = 0
        self._lock = threading.Lock()
        self.writes = 0  # for tests

    def put(self, blobs: Sequence[bytes]) -> tuple[str, int | None, list[str]]:
        """Give the pack's name, its descriptor where the runner lacks it, and the packs to be dropped."""
        key = tuple(map(id, blobs))
        with self._lock:
            pack = self._packs.get(key)
            if pack is None:
                self._count += 1
                name = f"s.{self._count}"
                fd = self._idle.get(name)
                write(fd, blobs)
                self.writes += 1
                pack = self._packs[key] = _Pack(name, fd, blobs, sum(map(len, blobs)), False)
                self._size += pack.size
            self._packs.move_to_end(key)
            fd_to_send = None if pack.known else pack.fd
            pack.known = True
            dropped = []
            while len(self._packs) > 1 and (len(self._packs) > FEW or self._size > ROOM):
                _, old = self._packs.popitem(last=False)
                self._size -= old.size
                self._dropped[old.name] = old.fd
                dropped.append(old.name)
            return pack.name, fd_to_send, dropped

    def forgot(self, name: str) -> None:
        """Note that the runner holds that pack no more."""
        with self._lock:
            fd = self._dropped.pop(name, None)
            if fd is not None:
                self._idle.put(fd)
                return
            for pack in self._packs.values():
                if pack.name == name:
                    pack.known = False


class WorkerPacks:
    """What a worker answers with: each pack is written once, sent once, and its file used again when it is free."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._count = 0
        self._busy: dict[str, int] = {}
        self._idle = Idle()

    def put(self, blobs: Sequence[bytes]) -> tuple[str, int]:
        """Write the blobs into a file; give its name and descriptor, which stays the writer's."""
        self._count += 1
        name = f"{self._prefix}.{self._count}"
        fd = self._idle.get(name)
        write(fd, blobs)
        keep(self._busy, name, fd)
        return name, fd

    def add(self, fd: int) -> None:
        """Take a file to write into."""
        self._idle.put(fd)

    def free(self, name: str) -> None:
        """Note that nobody reads that pack any more."""
        fd = self._busy.pop(name, None)
        if fd is not None:
            self._idle.put(fd)


class ReadPacks:
    """The packs that a worker has read, so that the model of a round is read once for all nodes that it serves."""

    def __init__(self) -> None:
        self._read: OrderedDict[str, list[bytes]] = OrderedDict()
        self._size = 0

    def get(self, name: str, lens: object, fd: int | None) -> list[bytes]:
        """Give a pack's arrays. The descriptor, which is read and closed, is not there when the pack was read before."""
        if fd is not None:
            try:
                blobs = read(fd, check(fd, lens))
            finally:
                os.close(fd)
            self._drop(name)
            self._read[name] = blobs
            self._size += sum(map(len, blobs))
        elif name not in self._read:
            raise ProtocolError(f"pack {name:.100} is named without its descriptor")
        self._read.move_to_end(name)
        return self._read[name]

    def forget(self) -> list[str]:
        """Drop what is too much; give the names, for the runner to know."""
        dropped = []
        while len(self._read) > 1 and (len(self._read) > FEW or self._size > ROOM):
            name = next(iter(self._read))
            self._drop(name)
            dropped.append(name)
        return dropped

    def _drop(self, name: str) -> None:
        self._size -= sum(map(len, self._read.pop(name, [])))
