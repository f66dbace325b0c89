"""A relay for tests: starts the processes of a run and moves frames between them, as the Go side does."""

from __future__ import annotations

import os
import random
import selectors
import socket
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _pergola_native.frames import Frame, Link

BOOT = Path(__file__).resolve().parent.parent / "boot.py"


def start(role: str, env: dict[str, str] | None = None, command: list[str] | None = None) -> tuple[subprocess.Popen[bytes], Link]:
    """Start a process with one end of a socket pair as its descriptor 3."""
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()

    def place() -> None:
        os.set_inheritable(3, True) if fd == 3 else os.dup2(fd, 3)

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment.update(env or {})
    p = subprocess.Popen(
        [sys.executable, *(command or [str(BOOT), role])],
        preexec_fn=place,
        pass_fds=[3],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    theirs.close()
    return p, Link(ours)


def spoil(fd: int) -> None:
    """Write other things over a pack."""
    os.pwrite(fd, b"\xff" * os.fstat(fd).st_size, 0)


def copied(fd: int) -> int:
    """Copy a pack into a file of one's own."""
    new = os.memfd_create("relay")
    os.pwrite(new, os.pread(fd, os.fstat(fd).st_size, 0), 0)
    os.close(fd)
    return new


@dataclass
class Peer:
    """A process and what the relay knows of it."""

    process: subprocess.Popen[bytes]
    link: Link
    output: bytearray = field(default_factory=bytearray)
    has: dict[str, str] = field(default_factory=dict)
    busy: str | None = None
    over: bool = False  # it has answered the one message that it answers
    queue: deque[Frame] = field(default_factory=deque)
    ready: dict[str, Any] = field(default_factory=dict)
    status: int = -1

    def __post_init__(self) -> None:
        self.news, self.quiet = threading.Condition(), False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while chunk := os.read(self.process.stdout.fileno(), 1 << 16):
            with self.news:
                self.output += chunk
                self.news.notify_all()
        with self.news:
            self.quiet = True
            self.news.notify_all()

    def wait_for(self, word: bytes) -> None:
        """Wait until it has printed a word."""
        with self.news:
            assert self.news.wait_for(lambda: word in self.output or self.quiet, 60)
            assert word in self.output, self.output

    def end(self) -> int:
        """Close the connection, wait for the process, and give its status."""
        self.link.close()
        try:
            status = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.reader.join(10)
            assert self.process.stdout is not None
            self.process.stdout.close()
        return status


class Relay:
    """One server and some workers; nodes are spread over the workers."""

    def __init__(
        self,
        app: Path,
        nodes: int = 2,
        workers: int = 2,
        isolation: str = "warm",
        config: list[str] | None = None,
        env: dict[str, str] | None = None,
        spoils: bool = False,
    ) -> None:
        rng = random.Random(7)
        self.nodes = [rng.getrandbits(62) for _ in range(nodes)]
        self.run = rng.getrandbits(62)
        self.app, self.isolation, self.config, self.env = app, isolation, config or [], env
        # As in a job: each end gets packs of its runner's own, which that uses again when they are dropped or free; and what a worker
        # has written is free as soon as it is passed on.
        self.spoils = spoils
        self.passed: dict[str, int] = {}
        self.state: dict[int, tuple[bytes, dict[str, Any], int | None]] = {}
        self.done: dict[str, Any] = {}
        self.replies: list[dict[str, Any]] = []
        self.messages: list[dict[str, Any]] = []
        self.packs: dict[str, int] = {}
        self.naming: dict[str, str] = {}  # packs, by the message that is not answered
        self.dropped: set[str] = set()
        self.received: dict[str, int] = {}
        self.owner: dict[str, Peer] = {}
        self.tasks = 0
        self.replaced = 0
        self.forgot: list[str] = []
        self.server = Peer(*start("server", env))
        self.workers = [self._worker() for _ in range(workers)]
        self.where = {n: i % max(workers, 1) for i, n in enumerate(self.nodes)}

    def _worker(self) -> Peer:
        return Peer(*start("client", self.env))

    def _begin(self, peer: Peer) -> None:
        hello = peer.link.receive()
        assert hello.kind == "hello", hello
        head: dict[str, Any] = {
            "t": "start",
            "run": self.run,
            "app": str(self.app),
            "config": self.config,
            "cwd": str(self.app.parent),
        }
        if peer is self.server:
            head.update(nodes=self.nodes, task=1)
        else:
            head.update(isolation=self.isolation)
        peer.link.send(Frame(head))
        if peer is not self.server:
            peer.ready = peer.link.receive().head

    def go(self, on_reply: Any = None) -> dict[str, Any]:
        """Run until the ServerApp is done."""
        peers = [self.server, *self.workers]
        try:
            for p in [*self.workers, self.server]:
                self._begin(p)
            with selectors.DefaultSelector() as sel:
                for p in peers:
                    sel.register(p.link.fileno(), selectors.EVENT_READ, p)
                while not self.done:
                    for key, _ in sel.select(60) or [(None, None)]:
                        assert key is not None, "nothing happens"
                        peer = key.data
                        try:
                            frame = peer.link.receive()
                        except (EOFError, ConnectionError):
                            sel.unregister(peer.link.fileno())
                            if peer is self.server:
                                self.done = {"t": "died"}
                                break
                            new = self._lost(peer)
                            sel.register(new.link.fileno(), selectors.EVENT_READ, new)
                            continue
                        if peer is self.server:
                            self._from_server(frame)
                        else:
                            self._from_worker(peer, frame)
                            if on_reply and frame.kind == "reply":
                                on_reply(self, frame.head)
        finally:
            for p in [self.server, *self.workers]:
                p.status = p.end()
        for fd in [*self.packs.values(), *self.passed.values(), *(fd for _, _, fd in self.state.values() if fd is not None)]:
            os.close(fd)
        return self.done

    def _lost(self, peer: Peer) -> Peer:
        status = peer.end()
        if peer.busy is not None or status != 0:
            self.replaced += 1
        i = self.workers.index(peer)
        new = self.workers[i] = self._worker()
        new.queue = peer.queue
        new.output = peer.output + new.output
        if peer.busy is not None:
            self._answered(peer.busy)
            self.server.link.send(Frame({"t": "lost", "id": peer.busy, "code": 8, "reason": "the worker died"}))
        self._begin(new)
        self._pump(new)
        return new

    def _from_server(self, frame: Frame) -> None:
        head = frame.head
        if frame.kind == "done":
            self.done = head
        elif frame.kind == "free" and self.spoils:
            fd = self.passed.pop(head["pack"])
            spoil(fd)
            os.close(fd)
        elif frame.kind == "free":
            self._free(head["pack"])
        else:
            assert frame.kind == "msg", head
            self.messages.append(head)
            for name in head.get("fds", []):
                self.packs[name] = copied(frame.fds[0]) if self.spoils else frame.fds[0]
                self.received[name] = self.received.get(name, 0) + 1
            frame.fds = []
            if "pack" in head:
                self.naming[head["id"]] = head["pack"]
            self.dropped.update(head.pop("drop", []))
            self._forget()
            if head["node"] not in self.where:
                self._answered(head["id"])
                self.server.link.send(Frame({"t": "lost", "id": head["id"], "code": 5, "reason": "no such node"}))
                return
            peer = self.workers[self.where[head["node"]]]
            peer.queue.append(frame)
            self._pump(peer)

    def _answered(self, message: str) -> None:
        self.naming.pop(message, None)
        self._forget()

    def _forget(self) -> None:
        for name in self.dropped - set(self.naming.values()):
            self.dropped.remove(name)
            fd = self.packs.pop(name)
            if self.spoils:
                spoil(fd)
            os.close(fd)
            self.server.link.send(Frame({"t": "forgot", "pack": name}))

    def _pump(self, peer: Peer) -> None:
        if peer.busy is not None or peer.over or not peer.queue:
            return
        frame = peer.queue.popleft()
        head = {k: v for k, v in frame.head.items() if k != "fds"}
        self.tasks += 1
        i = self.nodes.index(head["node"])
        head.update(task=self.tasks, node_config={"partition-id": i, "num-partitions": len(self.nodes)})
        fds: list[int] = []
        names: list[str] = []
        if "pack" in head and head["pack"] not in peer.has:
            peer.has[head["pack"]] = head["pack"]
            names.append(head["pack"])
            fds.append(self.packs[head["pack"]])
        state, more, fd = self.state.get(head["node"], (b"", {}, None))
        head.update(more)
        if fd is not None:
            names.append(more["spack"])
            fds.append(fd)
        head["fds"] = names
        peer.busy = head["id"]
        try:
            peer.link.send(Frame(head, frame.proto, state, fds))
        except OSError:
            pass  # its end is noticed by the reader

    def _from_worker(self, peer: Peer, frame: Frame) -> None:
        head = frame.head
        if frame.kind == "forgot":
            peer.has.pop(head["pack"], None)
            self.forgot.append(head["pack"])
            return
        assert frame.kind == "reply", head
        assert head["id"] == peer.busy
        self.replies.append(head)
        self._answered(peer.busy)
        peer.busy = None
        named = dict(zip(head.get("fds", []), frame.fds))
        if not head.get("kept"):
            old = self.state.pop(head["node"], None)
            if old is not None and old[2] is not None:
                os.close(old[2])
                self._free(old[1]["spack"])
            more = {k: head[k] for k in ("spack", "slens") if k in head}
            if "spack" in more:
                self.owner[more["spack"]] = peer
            self.state[head["node"]] = (frame.state, more, named.get(head.get("spack")))
        out = {k: head[k] for k in ("t", "id", "node", "pack", "lens") if k in head}
        fds = []
        if "pack" in head:
            self.owner[head["pack"]] = peer
            out["fds"] = [head["pack"]]
            fds = [named[head["pack"]]]
            if self.spoils:
                fds = [copied(fds[0])]
                self.passed[head["pack"]] = os.dup(fds[0])
        self.server.link.send(Frame(out, frame.proto, b"", fds))
        for fd in fds:
            os.close(fd)
        if self.spoils and "pack" in head:
            self._free(head["pack"])
        peer.over = self.isolation == "process"
        self._pump(peer)

    def _free(self, name: str) -> None:
        owner = self.owner.pop(name)
        try:
            owner.link.send(Frame({"t": "free", "pack": name}))
        except OSError:
            pass  # it has been replaced

    def text(self) -> str:
        """Give what all processes printed."""
        return "\n".join(bytes(p.output).decode(errors="replace") for p in [self.server, *self.workers])

    def printed(self, word: str) -> list[str]:
        """Give the rest of the lines that begin with a word."""
        return [line[len(word) + 1 :] for line in self.text().splitlines() if line.startswith(word + " ")]
