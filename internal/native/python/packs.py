"""Packs: memory files that hold the bytes of arrays back to back, beside the protobuf.

The bytes of an array are copied once into a pack by the process that has them, and once out of it by each process
that wants them, however many messages name the pack.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import ref

from .blobs import FROM as LAZY_FROM
from .blobs import Arena, Blob, File, settle, wasteful
from .frames import ProtocolError

ROOM = 256 << 20  # bytes of arrays that are kept at hand; the newest pack is, however large
FEW = 8  # packs that are kept at hand at most
SMALL = 256 << 10  # arrays up to here are read together
TOGETHER = 8 << 20  # as much as this in one go
OPEN = 64  # packs that were written and not freed whose files are kept for the next ones
_IOV = 1000  # buffers per call; Linux takes 1024
_SAMPLE = 256  # bytes


def new_file(name: str) -> int:
    """Open an anonymous file in memory; where the system has none, an unlinked temporary file."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as f:
        return os.dup(f.fileno())


def write(fd: int, blobs: Sequence[bytes | Blob]) -> None:
    """Make the file's content begin with the blobs, back to back."""
    offset = 0
    for at in range(0, len(blobs), _IOV):
        views = [memoryview(b.peek() if isinstance(b, Blob) else b) for b in blobs[at : at + _IOV] if len(b)]
        while views:
            n = os.pwritev(fd, views, offset)
            offset += n
            while views and n >= len(views[0]):
                n -= len(views.pop(0))
            if n:
                views[0] = views[0][n:]


def check(fd: int, lens: object) -> list[int]:
    """Give the lengths of a pack's arrays, if they are what the file has."""
    if not isinstance(lens, list) or not all(isinstance(n, int) and n >= -1 for n in lens):
        raise ProtocolError("the lengths of a pack's arrays are not a list of integers from -1")
    total, size = sum(n for n in lens if n > 0), os.fstat(fd).st_size
    if total > size:
        raise ProtocolError(f"a pack of {size} bytes cannot hold arrays of {total} bytes")
    return lens


class Place(NamedTuple):
    """Where a large array stands in its pack."""

    offset: int
    size: int


def read(file: File, lens: list[int], lazy: bool = False) -> list[bytes | Place]:
    """Give the arrays of a pack, without those that stayed in the protobuf (length -1). What is large stays there, if it may."""
    sizes = [n for n in lens if n >= 0]
    out: list[bytes | Place] = []
    offset, i = 0, 0
    while i < len(sizes):
        j, total = i, 0
        while j < len(sizes) and sizes[j] <= SMALL and total + sizes[j] <= TOGETHER and not (lazy and sizes[j] >= LAZY_FROM):
            total += sizes[j]
            j += 1
        if j > i + 1:
            run = file.pread(total, offset)
            at = 0
            for n in sizes[i:j]:
                out.append(run[at : at + n])
                at += n
            i = j
        else:
            total = sizes[i]
            out.append(Place(offset, total) if lazy and total >= LAZY_FROM else file.pread(total, offset))
            i += 1
        offset += total
    return out


def held(file: File, parts: list[bytes | Place]) -> list[bytes | Blob]:
    """Make blobs of those that stayed in the file."""
    return [Blob(file, *p) if isinstance(p, Place) else p for p in parts]


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

    def get(self, size: int) -> int:
        """Give a file to write about so much into."""
        while True:
            try:
                fd = self._fds.pop()
            except IndexError:
                return new_file("pack")
            if not size or not wasteful(fd, size):
                return fd
            os.close(fd)

    def take(self) -> list[int]:
        """Give all files away, for a child to write into."""
        fds, self._fds = self._fds, []
        return fds

    def put(self, fd: int) -> None:
        """Take a file back. Any thread may say so in the middle of anything."""
        self._fds.append(fd)
        if len(self._fds) > self.KEEP:
            os.close(self._fds.pop(0))


@dataclass
class _Pack:
    name: str
    file: File
    blobs: Sequence[bytes | Blob]
    size: int
    known: bool  # by the runner, which holds a descriptor of its own
    waiting: int = 0  # messages that name it and are not answered


def _trace(blobs: Sequence[bytes | Blob]) -> list[object]:
    """Give what those can be told by that may be gone: another object may have the identity then."""
    return [ref(b) if isinstance(b, Blob) else (id(b), len(b), b[:_SAMPLE], b[-_SAMPLE:]) for b in blobs]


class _Written:
    """Packs that are written here."""

    def __init__(self) -> None:
        self._idle = Idle()
        self._put_back = self._idle.put
        self.arena = Arena(self._idle.get, self._put_back)
        self.writes = 0  # for tests

    def _write(self, blobs: Sequence[bytes | Blob]) -> File:
        """Give a file that has the blobs back to back: where they are so already, that one."""
        file = self.arena.seal(blobs)
        if file is None:
            file = File(self._idle.get(sum(map(len, blobs))), self._put_back)
            write(file.fd, blobs)
            self.writes += 1
        return file


class ServerPacks(_Written):
    """What a ServerApp sends. The same arrays go to many nodes, and often twice in a round: they are written once.

    Arrays are told by the identity of their bytes objects, or blobs. Those cannot change and are held here, so that no other
    object takes their identity; nothing has to be hashed.

    Most apps send a new model and never an old one again, so that a new pack ends those for which no message waits: sites
    take it into the pages of the last. Once one is named that was ended, as many are kept as there is room for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._packs: OrderedDict[tuple[int, ...], _Pack] = OrderedDict()
        self._dropped: dict[str, File] = {}
        self._past: deque[list[object]] = deque(maxlen=FEW)  # those that were ended
        self._again = False  # one of them was named again
        self._untold: list[str] = []  # that are to be dropped
        self._count = 0
        self._size = 0
        self._lock = threading.Lock()

    def put(self, blobs: Sequence[bytes | Blob]) -> tuple[str, int | None, list[str]]:
        """Give the pack's name, its descriptor where the runner lacks it, and the packs to be dropped.

        Whoever names it to the runner says `unsent` if that fails, and `answered` when the message waits no longer.
        """
        key = tuple(map(id, blobs))
        with self._lock:
            pack = self._packs.get(key)
            new = pack is None
            if pack is None:
                file = self._write(blobs)
                self._count += 1
                pack = self._packs[key] = _Pack(f"s.{self._count}", file, blobs, sum(map(len, blobs)), False)
                self._size += pack.size
                self._again = self._again or _trace(blobs) in self._past
            pack.waiting += 1
            self._packs.move_to_end(key)
            fd_to_send = None if pack.known else pack.file.fd
            pack.known = True
            if new and not self._again:
                for old_key in [k for k, p in self._packs.items() if not p.waiting]:
                    self._past.append(_trace(self._packs[old_key].blobs))
                    self._end(old_key)
            while len(self._packs) > 1 and (len(self._packs) > FEW or self._size > ROOM):
                self._end(next(iter(self._packs)))
            dropped, self._untold = self._untold, []
            return pack.name, fd_to_send, dropped

    def _end(self, key: tuple[int, ...]) -> None:
        old = self._packs.pop(key)
        self._size -= old.size
        self._dropped[old.name] = old.file
        self._untold.append(old.name)

    def unsent(self, name: str, fd: int | None, dropped: list[str]) -> None:
        """Note that the runner has not been told what `put` gave."""
        with self._lock:
            self._untold[:0] = dropped
            for pack in self._called(name):
                pack.known = pack.known and fd is None

    def answered(self, name: str) -> None:
        """Note that a message that names a pack waits no longer."""
        with self._lock:
            for pack in self._called(name):
                pack.waiting -= 1

    def forgot(self, name: str) -> None:
        """Note that the runner holds that pack no more."""
        with self._lock:
            if self._dropped.pop(name, None) is not None:
                return
            for pack in self._called(name):
                pack.known = False

    def _called(self, name: str) -> list[_Pack]:
        return [pack for pack in self._packs.values() if pack.name == name]


class WorkerPacks(_Written):
    """What a worker answers with: each pack is sent once, and its file used again when it is free."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix
        self._count = 0
        self._busy: dict[str, File] = {}

    def put(self, blobs: Sequence[bytes | Blob]) -> tuple[str, int]:
        """Have the blobs in a file; give its name and descriptor, which stays the writer's."""
        file = self._write(blobs)
        self._count += 1
        name = f"{self._prefix}.{self._count}"
        self._busy[name] = file
        while len(self._busy) > OPEN:
            self._busy.pop(next(iter(self._busy))).discard()  # the reader has its own descriptor, and may be reading still
        return name, file.fd

    def add(self, fd: int) -> None:
        """Take a file to write into."""
        self._idle.put(fd)

    def free(self, name: str) -> None:
        """Note that nobody reads that pack any more."""
        self._busy.pop(name, None)


class ReadPacks:
    """The packs that a worker reads. The model of a round comes once for all nodes that it serves."""

    def __init__(self) -> None:
        self._packs: OrderedDict[str, tuple[File, list[bytes | Place], int]] = OrderedDict()
        self._size = 0

    def get(self, name: str, lens: object, fd: int | None, lazy: bool = False) -> list[bytes | Blob]:
        """Give a pack's arrays. The descriptor, which is closed in time, is not there when the pack came before."""
        if fd is not None:
            file = File(fd, os.close)
            sizes = check(fd, lens)
            self._drop(name)
            size = sum(n for n in sizes if n > 0)
            self._packs[name] = file, read(file, sizes, lazy), size
            self._size += size
        elif name not in self._packs:
            raise ProtocolError(f"pack {name:.100} is named without its descriptor")
        self._packs.move_to_end(name)
        file, parts, _ = self._packs[name]
        return held(file, parts)

    def settle(self) -> None:
        """Have what an app keeps do without the files: once it has answered, the runner may use them for other packs."""
        for file, _, _ in self._packs.values():
            settle(file)

    def forget(self) -> list[str]:
        """Drop what is too much; give the names, for the runner to know."""
        dropped = []
        while len(self._packs) > 1 and (len(self._packs) > FEW or self._size > ROOM):
            name = next(iter(self._packs))
            self._drop(name)
            dropped.append(name)
        return dropped

    def _drop(self, name: str) -> None:
        old = self._packs.pop(name, None)
        if old is not None:
            self._size -= old[2]
