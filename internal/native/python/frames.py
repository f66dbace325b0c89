"""Frames between a runner and a Python process: a length, a JSON head, a protobuf Message, state, and descriptors."""

from __future__ import annotations

import array
import fcntl
import json
import os
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

PROTOCOL = 1
DESCRIPTOR = 3
MAX_HEAD = 4 << 20
MAX_BODY = (1 << 31) - 1
MAX_FDS = 2
ASIDE = 200  # where the socket is moved to

_LENGTH = struct.Struct("<I")
_INTS = array.array("i").itemsize
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # what an app starts is not to have our descriptors
_TRUNCATED = getattr(socket, "MSG_CTRUNC", 0)


class ProtocolError(Exception):
    """The other end said what it must not say, so that nothing after it can be trusted."""


@dataclass
class Frame:
    """One frame. Whoever receives it owns its descriptors."""

    head: dict[str, Any]
    proto: bytes = b""
    state: bytes = b""
    fds: list[int] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What the frame is, as the protocol's tables call it."""
        kind = self.head.get("t")
        if not isinstance(kind, str):
            raise ProtocolError(f"a frame without a kind: {self.head!r:.200}")
        return kind

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())

    def take(self, name: str | None) -> int | None:
        """Give the descriptor of the pack of that name, if the frame carries it; the caller owns it then."""
        names = self.head.get("fds") or []
        if name is None or name not in names:
            return None
        fd = self.fds[names.index(name)]
        self.fds[names.index(name)] = os.dup(fd)  # keeps the order; close() sees to the copy
        return fd


def size_of(head: dict[str, Any], name: str) -> int:
    """Give a length that the head declares, checked."""
    n = head.get(name, 0)
    if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= MAX_BODY:
        raise ProtocolError(f"{name} is {n!r:.50}, which is no length up to {MAX_BODY}")
    return n


class Link:
    """One end of the connection. Sending is safe from several threads; one thread receives."""

    def __init__(self, sock: socket.socket, max_fds: int = MAX_FDS) -> None:
        self._sock = sock
        self._control = socket.CMSG_SPACE(max_fds * _INTS)
        self._sending = threading.Lock()

    @classmethod
    def inherited(cls) -> Link:
        """Take descriptor 3 over, out of the way of what the app opens and starts."""
        try:
            fd = fcntl.fcntl(DESCRIPTOR, fcntl.F_DUPFD_CLOEXEC, ASIDE)
            os.close(DESCRIPTOR)
            return cls(socket.socket(fileno=fd))
        except OSError as e:
            raise SystemExit(f"descriptor {DESCRIPTOR} is not a socket to a runner: {e}") from None

    def fileno(self) -> int:
        """Give the socket's descriptor, to wait on."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close this end."""
        self._sock.close()

    def send(self, frame: Frame) -> None:
        """Send a frame; its descriptors stay open and with the caller."""
        head = dict(frame.head)
        if frame.proto:
            head["plen"] = len(frame.proto)
        if frame.state:
            head["slen"] = len(frame.state)
        text = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
        if len(text) > MAX_HEAD:
            raise ProtocolError(f"a head of {len(text)} bytes, more than {MAX_HEAD}")
        size_of(head, "plen")
        size_of(head, "slen")
        parts = [memoryview(_LENGTH.pack(len(text)) + text)]
        parts += [memoryview(p) for p in (frame.proto, frame.state) if p]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", frame.fds))] if frame.fds else []
        with self._sending:
            while parts:
                sent = self._sock.sendmsg(parts, rights)
                rights = []
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if sent:
                    parts[0] = parts[0][sent:]

    def receive(self) -> Frame:
        """Receive a frame. Raises EOFError where the other end closed between two frames."""
        prefix = bytearray(_LENGTH.size)
        fds: list[int] = []
        try:
            n, controls, flags, _ = self._sock.recvmsg_into([prefix], self._control, _CLOEXEC)
            for level, kind, data in controls:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    got = array.array("i")
                    got.frombytes(data[: len(data) - len(data) % _INTS])
                    fds.extend(got)
            if n == 0:
                raise EOFError("the runner closed the connection")
            if flags & _TRUNCATED:
                raise ProtocolError("more descriptors in a frame than there may be")
            if n < len(prefix):
                self._fill(memoryview(prefix)[n:])
            return self._rest(_LENGTH.unpack(prefix)[0], fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def _rest(self, length: int, fds: list[int]) -> Frame:
        if not 0 < length <= MAX_HEAD:
            raise ProtocolError(f"a head of {length} bytes; 1 to {MAX_HEAD} are allowed")
        try:
            head = json.loads(self._read(length))
        except ValueError as e:
            raise ProtocolError(f"a head that is not JSON: {e}") from None
        if not isinstance(head, dict):
            raise ProtocolError(f"a head that is no object: {head!r:.200}")
        names = head.get("fds") or []
        if not isinstance(names, list) or len(names) != len(fds) or len(set(names)) != len(names):
            raise ProtocolError(f"{len(fds)} descriptors came for {names!r:.200}")
        proto = self._read(size_of(head, "plen"))
        state = self._read(size_of(head, "slen"))
        return Frame(head, proto, state, fds)

    def _read(self, n: int) -> bytes:
        if n == 0:
            return b""
        first = self._sock.recv(n, socket.MSG_WAITALL)
        if len(first) == n:
            return first
        buffer = bytearray(n)
        buffer[: len(first)] = first
        if not first:
            raise ProtocolError("the connection ended within a frame")
        self._fill(memoryview(buffer)[len(first) :])
        return bytes(buffer)

    def _fill(self, view: memoryview) -> None:
        while view:
            n = self._sock.recv_into(view)
            if not n:
                raise ProtocolError("the connection ended within a frame")
            view = view[n:]
