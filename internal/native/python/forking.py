"""A template that has the app loaded, and forks a child for each message.

What a message leaves in the process - globals, caches, open files, threads - ends with its child, as under Flower; that
costs a fork, not the imports. The template alone speaks to the runner: it hands a message to a child and its answer
back, so that a child that dies in the middle of a sentence breaks nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import OrderedDict

from .blobs import settle
from .client import Worker
from .exits import flush, leave
from .frames import Frame, Link, ProtocolError
from .generations import CRASHED_REASON, RAISED
from .packs import FEW, ROOM, Idle, keep
from .randomness import Generators
from .readings import round_of

QUICK = 10  # milliseconds for an answer, before the next child is forked meanwhile
LINGER = 3.0  # seconds that the last children have for their exit
_FDS = 5  # pack, state's pack, and files to write into
_PR_SET_PDEATHSIG = 1
_OMP_PAUSE_SOFT = 1


def unsafe() -> str:
    """Tell why this process cannot be forked safely; "" if it can."""
    others = [t.name for t in threading.enumerate() if t is not threading.current_thread()]
    if others:
        return f"loading the app has started threads: {', '.join(others[:5])}"
    torch = sys.modules.get("torch")
    # Not is_available(): it would initialise the driver itself.
    if (torch is not None and torch.cuda.is_initialized()) or "/dev/nvidia-uvm" in _open_files():
        return "loading the app has opened a GPU"
    for name in ("tensorflow", "jax"):
        if name in sys.modules:
            return f"loading the app has imported {name}, which runs threads of its own"
    if not hasattr(os, "fork") or not hasattr(os, "pidfd_open"):
        return "this system cannot fork, or has no pidfd"
    return ""


def prepare() -> None:
    """See to it, before the app is loaded, that asking torch for GPUs does not open them: no child could use them then."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def rest() -> None:
    """Have GNU's OpenMP end the threads that loading the app has started: each child would wait for them for ever.

    A child that wants some starts its own. OpenBLAS, and the OpenMP of LLVM and Intel, see to forks themselves.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as f:
            paths = {line.split(maxsplit=5)[-1].strip() for line in f if "libgomp" in line}
    except OSError:
        return  # no /proc: nothing is forked
    for path in paths:
        with contextlib.suppress(OSError, AttributeError):  # those of GCC 8 and before lack it
            ctypes.CDLL(path).omp_pause_resource_all(_OMP_PAUSE_SOFT)


def _open_files() -> set[str]:
    """Give what this process has open, where the system tells."""
    files = set()
    try:
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                files.add(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        pass  # no /proc: there is pidfd neither
    return files


class _GoneError(Exception):
    """The runner closed the connection while a message was worked on."""


class _Child:
    """A forked process that waits for a message, or answers one, or is about to end."""

    def __init__(self, pid: int, link: Link, sock: socket.socket) -> None:
        self.pid = pid
        self.link = link
        self.sock = sock
        self.pidfd = os.pidfd_open(pid)

    def ended(self, timeout: float = 0) -> bool:
        """Wait for the end."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def reap(self) -> str:
        """Give how it ended, which it must have."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return f"it exited with {code}"
        try:
            return f"it was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"it was ended by signal {-code}"


class Template:
    """Serves a worker's messages by children."""

    def __init__(self, link: Link, worker: Worker, generators: Generators) -> None:
        self._link = link
        self._worker = worker
        self._generators = generators
        self._held: OrderedDict[str, int] = OrderedDict()  # packs of messages, by the runner's names
        self._busy: dict[str, int] = {}  # packs of replies, until the runner frees them
        self._idle = Idle()
        self._count = 0
        self._ahead: _Child | None = None
        self._working: list[_Child] = []  # one at most
        self._leaving: list[_Child] = []
        self._prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)

    def serve(self) -> int:
        """Answer messages until the runner goes away."""
        rest()
        gc.collect()
        gc.freeze()  # or the first collection in a child copies every page that has an object
        try:
            while True:
                if self._ahead is None:
                    self._ahead = self._fork()
                try:
                    frame = self._link.receive()
                except EOFError:
                    return 0
                if frame.kind == "free":
                    fd = self._busy.pop(frame.head["pack"], None)
                    if fd is not None:
                        self._idle.put(fd)
                elif frame.kind == "msg":
                    try:
                        self._message(frame)
                    finally:
                        frame.close()
                else:
                    raise ProtocolError(f"a worker cannot do {frame.kind!r:.50}")
                self._reap()
        except (_GoneError, OSError):
            return 0
        finally:
            self._end()

    # -- one message --------------------------------------------------------------------------------------------

    def _message(self, frame: Frame) -> None:
        out, idle = self._out(frame)
        child = self._hand_over(out)
        self._working.append(child)
        reply = None
        try:
            reply = self._await(child)
            if reply is None:
                reply = self._crashed(frame, self._how(child))
            else:
                child.link.close()
                self._leaving.append(child)
            for name in self._forget():
                self._link.send(Frame({"t": "forgot", "pack": name}))
            self._link.send(reply)
        finally:
            self._working.clear()
            if reply is None:  # nobody is there any more to be answered
                os.kill(child.pid, signal.SIGKILL)
                self._leaving.append(child)
            used = set()
            if reply is not None:
                inodes = [os.fstat(fd).st_ino for fd in reply.fds]
                for name, fd, inode in zip(reply.head.get("fds") or [], reply.fds, inodes):
                    if inodes.count(inode) == 1:
                        keep(self._busy, name, fd)
                    else:
                        os.close(fd)  # the state's as well: the file is not used again, since either may be free before the other
                    used.add(inode)
            for fd in idle:
                if os.fstat(fd).st_ino in used:
                    os.close(fd)  # it is the reply's now, under another descriptor
                else:
                    self._idle.put(fd)

    def _out(self, frame: Frame) -> tuple[Frame, list[int]]:
        """Make what a child gets: the message, its packs, and files to write into. The descriptors stay here."""
        self._hold(frame)
        pack = frame.head.get("pack")
        out = Frame(dict(frame.head), frame.proto, frame.state)
        out.head["fds"] = []
        for name, fd in zip(frame.head.get("fds") or [], frame.fds):
            if name != pack:
                out.head["fds"].append(name)
                out.fds.append(fd)
        if pack is not None:
            if pack not in self._held:
                raise ProtocolError(f"pack {pack:.100} is named without its descriptor")
            self._held.move_to_end(pack)
            out.head["fds"].append(pack)
            out.fds.append(self._held[pack])
        idle = self._idle.take()
        out.head["fds"] += [f"idle.{i}" for i in range(len(idle))]
        out.fds += idle
        return out, idle

    def _hand_over(self, out: Frame) -> _Child:
        """Give a message to a child."""
        while True:
            child, self._ahead = self._ahead or self._fork(), None
            try:
                child.link.send(out)
                return child
            except OSError:  # it has died since it was forked, with nothing to do
                logging.getLogger("flwr").error("a child that waited for a message has ended: %s", self._how(child))

    def _hold(self, frame: Frame) -> None:
        pack = frame.head.get("pack")
        fd = frame.take(pack)
        if fd is not None and pack is not None:
            old = self._held.pop(pack, None)
            if old is not None:
                os.close(old)
            self._held[pack] = fd

    def _forget(self) -> list[str]:
        names = []
        while len(self._held) > 1 and (len(self._held) > FEW or sum(os.fstat(fd).st_size for fd in self._held.values()) > ROOM):
            name, fd = self._held.popitem(last=False)
            os.close(fd)
            names.append(name)
        return names

    def _await(self, child: _Child) -> Frame | None:
        """Wait for a child's answer; nothing if it dies without one. The next child is forked meanwhile."""
        poll = select.poll()
        poll.register(child.link.fileno(), select.POLLIN)
        poll.register(child.pidfd, select.POLLIN)
        poll.register(self._link.fileno(), getattr(select, "POLLRDHUP", 0))  # the runner's end
        while True:
            ready = dict(poll.poll(QUICK if self._ahead is None else None))
            if child.link.fileno() in ready or child.pidfd in ready:
                if child.pidfd in ready:
                    # A process that the child has left behind may hold the socket open: no waiting for more then.
                    child.sock.settimeout(1)
                try:
                    return child.link.receive()
                except (EOFError, OSError, ProtocolError):
                    return None
            if self._link.fileno() in ready:
                raise _GoneError
            if self._ahead is None:
                self._ahead = self._fork()

    def _how(self, child: _Child) -> str:
        child.link.close()
        if not child.ended(1):
            os.kill(child.pid, signal.SIGKILL)  # it speaks no more, so that it serves nobody
        return child.reap()

    def _crashed(self, frame: Frame, how: str) -> Frame:
        """Answer for a child that died, with what Flower says then."""
        logging.getLogger("flwr").error("the process of the ClientApp died: %s", how)
        worker, head = self._worker, frame.head
        worker.gen.set_identity(worker.run_id, head["node"], head.get("task", 0))
        message = worker.codec.decode(frame.proto, [], [])
        code = worker.gen.code("CLIENT_APP_CRASHED", RAISED)
        reply = worker.gen.error_reply(message, code, CRASHED_REASON)
        proto, _ = worker.codec.encode(reply, message_id=worker.gen.new_id())
        answer = {
            "t": "reply",
            "id": head["id"],
            "node": head["node"],
            "type": message.metadata.message_type,
            "error": {"code": code, "reason": CRASHED_REASON},
            "died": how,
            "kept": True,
        }
        try:
            number = round_of(worker.gen, message)
        except Exception:  # noqa: BLE001 - a number for an event, which may be missing
            number = None
        if number is not None:
            answer["round"] = number
        return Frame(answer, proto)

    # -- children -----------------------------------------------------------------------------------------------

    def _fork(self) -> _Child:
        try:
            return self._forked()
        except OSError as e:  # not to be taken for the runner's end
            raise RuntimeError(f"no process can be forked for a message: {e}") from e

    def _forked(self) -> _Child:
        ours, theirs = socket.socketpair()
        self._count += 1
        parent = os.getpid()
        flush()  # or the child writes it again
        pid = os.fork()
        if pid:
            theirs.close()
            return _Child(pid, Link(ours, _FDS), ours)
        status = 1
        try:
            ours.close()
            self._link.close()
            self._close()
            if self._prctl is not None:
                self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == parent:  # it is not gone yet
                status = self._be(Link(theirs, _FDS))
        except BaseException:  # noqa: BLE001 - the template answers for it
            traceback.print_exc()
            theirs.close()  # what tells it to
        finally:
            leave(status)
        raise AssertionError

    def _close(self) -> None:
        """Close, in a child, what is the template's."""
        for fd in [*self._held.values(), *self._busy.values(), *self._idle.take()]:
            os.close(fd)
        for child in [*self._leaving, *([self._ahead] if self._ahead else []), *self._working]:
            child.link.close()
            os.close(child.pidfd)

    def _be(self, link: Link) -> int:
        """Be a child: serve one message."""
        self._generators.reseed()
        try:
            frame = link.receive()
        except EOFError:
            return 0
        worker = self._worker
        worker.written = type(worker.written)(f"c.{os.getppid()}.{self._count}")
        for name in frame.head["fds"]:
            if name.startswith("idle."):
                fd = frame.take(name)
                if fd is not None:
                    worker.written.add(fd)
        reply = worker.answer(frame)
        # What the app leaves behind goes on here, while other children write into the same files.
        worker.written.arena.close()
        settle()
        link.send(reply)
        frame.close()
        link.close()
        return 0

    def _reap(self) -> None:
        for child in [c for c in self._leaving if c.ended()]:
            child.reap()
            self._leaving.remove(child)

    def _end(self) -> None:
        """Let children that are at their exit have a moment for it, and see them off."""
        if self._ahead is not None:
            self._ahead.link.close()
            self._leaving.append(self._ahead)
        until = time.monotonic() + LINGER
        for child in self._leaving:
            if not child.ended(max(0, until - time.monotonic())):
                os.kill(child.pid, signal.SIGKILL)
            child.reap()
