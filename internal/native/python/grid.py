"""The Grid (or Driver) that a ServerApp gets: pushes messages to the runner, and is pushed replies by it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any

from .arrays import Beside
from .blobs import Blob, File, empty, trim
from .codec import Codec
from .frames import Frame, Link, ProtocolError
from .generations import EXPIRED, NO_REPLY, Generation
from .packs import ServerPacks, check, held, read

ENOUGH = 64 << 20  # bytes of replies that have come since garbage was collected for it to be done again
PER_SECOND = 4 << 30  # and as many more for each second that it took: memory of that size is made new in about as long


class RunnerGoneError(ConnectionError):
    """The runner has closed the connection: the job is over."""


class Exchange:
    """Messages on their way and replies that came. The app's threads send and wait; one thread of ours receives."""

    def __init__(self, gen: Generation, link: Link, run_id: int, nodes: list[int]) -> None:
        self.gen = gen
        self.codec = Codec(gen)
        self.packs = ServerPacks()
        gen.lazy.arena = self.packs.arena
        self._link = link
        self._run_id = run_id
        self._sending = threading.Lock()  # a pack's descriptor goes out before its name does alone
        self._done: SimpleQueue[str | None] = SimpleQueue()  # packs of replies that may go; None: no more will
        self._freeing: threading.Thread | None = None
        self._named: dict[str, str] = {}  # packs, by the id of a message that waits
        self._changed = threading.Condition()  # guards the rest
        self._nodes = list(nodes)
        self._ever = set(nodes)
        self._waiting: dict[str, Any] = {}  # metadata by id, until a reply has come
        self._replies: dict[str, Any] = {}
        self._gone: BaseException | None = None
        self._came = 0  # bytes in replies' packs, since garbage was collected
        self._enough = ENOUGH

    def nodes(self) -> list[int]:
        """Give the nodes that there are."""
        with self._changed:
            self._check()
            return list(self._nodes)

    def push(self, messages: Iterable[Any]) -> list[str]:
        """Send messages; give their ids, "" where the SuperLink would not take the message."""
        ids = []
        written: dict[int, tuple[bytes, Beside]] = {}
        messages = list(messages)
        stamped = []
        for message in messages:
            mid = self.gen.new_id()
            self.gen.stamp(message, self._run_id, mid)
            stamped.append((message, mid))
        for message, mid in stamped:
            meta = message.metadata
            with self._changed:
                self._check()
                if meta.dst_node_id not in self._ever and self.gen.refuses_unknown_nodes:
                    logging.getLogger("flwr").error("Invalid destination node ID for Message: %s", meta.dst_node_id)
                    ids.append("")
                    continue
                self._waiting[mid] = self.gen.sent(meta, mid)
            try:
                proto, beside = self.codec.encode(
                    message, written, run_id=self._run_id, src_node_id=self.gen.server_id, message_id=mid
                )
                head = {
                    "t": "msg",
                    "id": mid,
                    "node": meta.dst_node_id,
                    "ttl": meta.ttl,
                    "type": meta.message_type,
                    "group": meta.group_id,
                }
                self._send(mid, Frame(head, proto), beside)
            except BaseException:
                with self._changed:
                    self._waiting.pop(mid, None)
                raise
            ids.append(mid)
        return ids

    def _send(self, mid: str, frame: Frame, beside: Beside) -> None:
        with self._sending:
            if not beside.blobs:
                self._tell(frame)
                return
            name, fd, dropped = self.packs.put(beside.blobs)
            frame.head["pack"], frame.head["lens"] = name, beside.lens
            if dropped:
                frame.head["drop"] = dropped
            if fd is not None:
                frame.head["fds"] = [name]
                frame.fds = [fd]
            self._named[mid] = name  # before its answer can come
            try:
                self._tell(frame)
            except BaseException:
                self._answered(mid)
                self.packs.unsent(name, fd, dropped)
                raise

    def _tell(self, frame: Frame) -> None:
        try:
            self._link.send(frame)
        except OSError as e:
            raise RunnerGoneError(f"the runner of this job has gone: {e}") from e

    def pull(self, ids: Iterable[str]) -> list[Any]:
        """Give the replies that have come, and for ids that nobody waits for what the SuperLink says of them."""
        out = []
        with self._changed:
            for mid in dict.fromkeys(ids):
                reply = self._replies.pop(mid, None)
                if reply is not None:
                    out.append(reply)
                elif mid not in self._waiting and self.gen.answers_unknown_ids:
                    out.append(self.gen.lost_reply(self._run_id, mid, EXPIRED, time.time()))
            if not out:
                self._check()
        return out

    def wait(self, ids: list[str], timeout: float | None) -> None:
        """Wait until each id has its reply, or the time is up."""
        end = None if timeout is None else time.monotonic() + timeout
        self._collect()
        todo = [i for i in ids if i]
        with self._changed:
            while True:
                # Each reply wakes this: looking at the last one that is missing, not at all, costs the same for any number.
                while todo and todo[-1] not in self._waiting:
                    todo.pop()
                left = None if end is None else end - time.monotonic()
                if not todo or (left is not None and left <= 0):
                    return
                self._check()
                self._changed.wait(left)

    def _collect(self) -> None:
        """Have replies freed that the app has done with, in a moment in which it waits.

        Flower's RecordDict refers to itself, and Python counts objects, not the bytes that they hold.
        """
        if self._came >= self._enough and gc.isenabled() and gc.get_threshold()[0]:
            self._came = 0
            begun = time.monotonic()
            gc.collect()
            self._enough = max(ENOUGH, int((time.monotonic() - begun) * PER_SECOND))

    def _check(self) -> None:
        if self._gone is not None:
            raise RunnerGoneError(f"the runner of this job has gone: {self._gone}")

    # -- what the runner says -----------------------------------------------------------------------------------

    def receive(self) -> None:
        """Take in what the runner sends, until it closes the connection."""
        try:
            while True:
                frame = self._link.receive()
                try:
                    self.take(frame)
                finally:
                    frame.close()
        except (EOFError, OSError, ProtocolError) as e:
            self._end(e)
        except Exception as e:
            logging.getLogger("flwr").error("what the runner sent cannot be taken in", exc_info=e)
            self._end(e)

    def _end(self, why: BaseException) -> None:
        self._done.put(None)
        with self._changed:
            self._gone = why
            self._changed.notify_all()

    def take(self, frame: Frame) -> None:
        """Take in one frame."""
        head = frame.head
        if frame.kind == "reply":
            self._reply(frame)
        elif frame.kind == "lost":
            self._settle(head["id"], lambda meta: self._lost(meta, head["code"]))
        elif frame.kind == "nodes":
            with self._changed:
                self._nodes = list(head["nodes"])
                self._ever.update(self._nodes)
                self._changed.notify_all()
        elif frame.kind == "forgot":
            self.packs.forgot(head["pack"])
        else:
            raise ProtocolError(f"a server cannot do {frame.kind!r:.50}")

    def _reply(self, frame: Frame) -> None:
        head = frame.head
        lens: list[int] = []
        blobs: list[bytes | Blob] = []
        if head.get("pack") is not None:
            if len(frame.fds) != 1:
                raise ProtocolError("a reply names a pack without its descriptor")
            self._start_freeing()
            trim()
            file = File(frame.fds.pop(), self._releaser(head["pack"]))
            lens = check(file.fd, head.get("lens"))
            self._came += sum(n for n in lens if n > 0)
            blobs = held(file, read(file, lens, self.gen.lazy.may_stay()))
            del file  # once nobody wants anything of it, it goes

        def make(meta: Any) -> Any:
            try:
                reply = self.codec.decode(frame.proto, lens, blobs)
                if self.gen.reply_to(reply.metadata) != meta.message_id:
                    raise ProtocolError("it replies to another message")
            except Exception as e:  # noqa: BLE001 - what a site sends must not end the job
                logging.getLogger("flwr").error(
                    "the reply of node %s to message %s cannot be read: %s", meta.dst_node_id, meta.message_id, e
                )
                return self._lost(meta, NO_REPLY)
            return reply

        self._settle(head["id"], make)

    def _releaser(self, pack: str) -> Callable[[int], None]:
        """Make what is called when a reply's pack is read, or its arrays are gone."""
        done, close, maker = self._done, os.close, os.getpid()

        def release(fd: int) -> None:  # by any thread, in the middle of anything
            with contextlib.suppress(OSError, ValueError):  # it costs memory
                empty(fd, maker)
            close(fd)
            done.put(pack)

        return release

    def _start_freeing(self) -> None:
        """Have somebody say which packs are free.

        The runner may have the app's messages wait until sites have answered others. Who takes the answers must not wait for
        it in turn.
        """
        if self._freeing is None:
            self._freeing = threading.Thread(target=self._say_free, name="pergola-free", daemon=True)
            self._freeing.start()

    def _say_free(self) -> None:
        while (pack := self._done.get()) is not None:
            try:
                self._link.send(Frame({"t": "free", "pack": pack}))
            except OSError:
                return  # nobody is there to be told; the receiver hears of it too

    def _lost(self, meta: Any, code: int) -> Any:
        if self.gen.answers_unknown_ids and self.gen.lost(code)[0] == EXPIRED:
            # The SuperLink has removed such a message, and knows nothing of it but the id that it is asked for.
            meta = meta.message_id
        return self.gen.lost_reply(self._run_id, meta, code, time.time())

    def _settle(self, mid: str, make: Any) -> None:
        with self._changed:
            meta = self._waiting.get(mid)
        if meta is None:
            return  # answered already, or never asked
        reply = make(meta)
        self._answered(mid)
        with self._changed:
            if self._waiting.pop(mid, None) is not None:
                self._replies[mid] = reply
                self._changed.notify_all()

    def _answered(self, mid: str) -> None:
        name = self._named.pop(mid, None)
        if name is not None:
            self.packs.answered(name)


def make(exchange: Exchange, run: Any) -> Any:
    """Make the object that a ServerApp is called with."""
    gen = exchange.gen

    class RunnerGrid(gen.Link):  # type: ignore[misc, name-defined]
        """Speaks to Pergola's runner."""

        def set_run(self, run: Any) -> None:
            """Do nothing: this Grid is of one run."""

        @property
        def run(self) -> Any:
            return type(run)(**vars(run))

        def create_message(
            self, content: Any, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
        ) -> Any:
            return gen.new_message(run.run_id, content, message_type, dst_node_id, group_id, ttl)

        def get_node_ids(self) -> list[int]:
            return exchange.nodes()

        def push_messages(self, messages: Iterable[Any]) -> list[str]:
            return exchange.push(messages)

        def pull_messages(self, message_ids: Iterable[str]) -> list[Any]:
            return exchange.pull(message_ids)

        def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
            ids = list(self.push_messages(messages))
            if timeout is not None and timeout <= 0:
                return []  # however soon the replies come
            exchange.wait(ids, timeout)
            return list(self.pull_messages(ids))

        def close(self) -> None:
            """Do nothing: the connection lives as long as the process."""

    return RunnerGrid()
