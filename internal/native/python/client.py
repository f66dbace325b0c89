"""A worker: answers a node's messages with the user's ClientApp."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from . import generations
from .arrays import Beside
from .blobs import Blob, File, settle
from .codec import Codec
from .exits import flush
from .frames import PROTOCOL, Frame, Link, ProtocolError
from .generations import CRASHED_REASON, LOAD_FAILED, RAISED, Generation
from .packs import ReadPacks, WorkerPacks, check, held, read
from .randomness import Generators
from .readings import numbers, round_of

LONGEST = 2000  # letters of an error in a head, which is for events; the reply itself has all of them
LOAD_REASON = "An exception was raised when attempting to load `ClientApp`"  # Flower's, in each generation


# Names of records in a state that no app has: what a message has changed of the rest of its context.
NODE_CONFIG, RUN_CONFIG = "pergola.node-config", "pergola.run-config"


def _configs(state: Any) -> Any:
    """Give the mapping that takes config records: before 1.18 a state is no mapping by itself."""
    return state if hasattr(state, "items") else state.configs_records


def _typed(values: Any) -> dict[str, Any]:
    return {k: (type(v), v) for k, v in values.items()}


def hello(role: str) -> Frame:
    """Make the first frame."""
    return Frame(
        {
            "t": "hello",
            "role": role,
            "pid": os.getpid(),
            "flwr": generations.version(),
            "python": ".".join(map(str, sys.version_info[:3])),
            "protocol": PROTOCOL,
        }
    )


def _logger() -> logging.Logger:
    return logging.getLogger("flwr")


class Worker:
    """A ClientApp of one run, loaded once, or why it could not be loaded."""

    def __init__(
        self,
        gen: Generation,
        run_id: int,
        run_config: dict[str, Any],
        app: Any,
        prefix: str,
        failure: Exception | None = None,
    ) -> None:
        self.gen = gen
        self.codec = Codec(gen)
        self.run_id = run_id
        self.run_config = run_config
        self.app = app
        self.failure = failure
        self.read = ReadPacks()
        self.written = WorkerPacks(prefix)
        self._state: File | None = None  # the pack of the node's state

    @classmethod
    def load(cls, gen: Generation, start: dict[str, Any], prefix: str) -> Worker:
        """Load the app that the runner names."""
        try:
            run_config = gen.settings(start["app"], start.get("config") or [])[1]
            return cls(gen, start["run"], run_config, gen.load(start["app"], "clientapp"), prefix)
        except Exception as e:  # noqa: BLE001 - told to whoever sends a message, as Flower does
            _logger().error("%s raised an exception", "ClientApp", exc_info=e)
            return cls(gen, start["run"], {}, None, prefix, e)

    def reason(self, e: Exception) -> tuple[int, str]:
        """Give code and text of the error that Flower answers with."""
        if isinstance(e, self.gen.LoadClientAppError):
            return LOAD_FAILED, LOAD_REASON
        return RAISED, str(type(e)) + ":<'" + str(e) + "'>"

    def answer(self, frame: Frame) -> Frame:
        """Answer a message. The reply's descriptors stay this worker's; of the message's, nothing is wanted afterwards."""
        self.gen.lazy.arena = self.written.arena
        try:
            return self._answer(frame)
        finally:
            self.read.settle()
            if self._state is not None:
                settle(self._state)
                self._state = None

    def _answer(self, frame: Frame) -> Frame:
        head = frame.head
        node = head["node"]
        self.gen.set_identity(self.run_id, node, head.get("task", 0))
        message = self.codec.decode(frame.proto, *self._beside(frame))
        state = self.codec.decode_state(frame.state, *self._beside_state(frame))
        given = {NODE_CONFIG: head.get("node_config") or {}, RUN_CONFIG: self.run_config}
        context = self.gen.context(self.run_id, node, *self._settings(state, given))
        answer: dict[str, Any] = {"t": "reply", "id": head["id"], "node": node, "type": message.metadata.message_type}
        self._note(answer, "round", lambda: round_of(self.gen, message))
        begun = time.perf_counter()
        kept = False
        try:
            if self.failure is not None:
                reply = self.gen.error_reply(message, *self.reason(self.failure))
            else:
                reply = self.app(message, context)
            proto, beside = self._encode(reply)
        except SystemExit as e:
            # Under Flower the process ends, and neither reply nor state leave it.
            _logger().error("ClientApp called sys.exit(%r)", e.code)
            reply = self.gen.error_reply(message, self.gen.code("CLIENT_APP_CRASHED", RAISED), CRASHED_REASON)
            proto, beside = self._encode(reply)
            kept = True
        except Exception as e:  # noqa: BLE001 - whatever an app raises is answered
            _logger().error("%s raised an exception", "ClientApp", exc_info=e)
            reply = self.gen.error_reply(message, *self.reason(e))
            proto, beside = self._encode(reply)
        answer["seconds"] = time.perf_counter() - begun
        if reply.has_error():
            answer["error"] = {"code": reply.error.code, "reason": (reply.error.reason or "")[:LONGEST]}
        else:
            self._note(answer, "numbers", lambda: numbers(self.gen, reply.content))
        out = Frame(answer, proto)
        self._put(out, "pack", "lens", beside)
        if kept:
            answer["kept"] = True
        else:
            self._put_state(out, context, given)
        flush()
        return out

    def _beside(self, frame: Frame) -> tuple[list[int], list[bytes | Blob]]:
        name = frame.head.get("pack")
        if name is None:
            return [], []
        sizes: list[int] = frame.head.get("lens") or []
        return sizes, self.read.get(name, sizes, frame.take(name), self.gen.lazy.may_stay())

    def _beside_state(self, frame: Frame) -> tuple[list[int], list[bytes | Blob]]:
        name = frame.head.get("spack")
        if name is None:
            return [], []
        fd = frame.take(name)  # it comes each time: a state is seldom wanted twice
        if fd is None:
            raise ProtocolError(f"the state's pack {name:.100} is named without its descriptor")
        self._state = File(fd, os.close)
        sizes = check(fd, frame.head.get("slens"))
        return sizes, held(self._state, read(self._state, sizes, self.gen.lazy.may_stay()))

    def _encode(self, reply: Any) -> tuple[bytes, Beside]:
        return self.codec.encode(reply, message_id=self.gen.new_id())

    def _put(self, out: Frame, pack: str, lens: str, beside: Beside) -> None:
        if beside.blobs:
            out.head[pack], fd = self.written.put(beside.blobs)
            out.head[lens] = beside.lens
            out.head.setdefault("fds", []).append(out.head[pack])
            out.fds.append(fd)

    def _settings(self, state: Any, given: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """Give node config, state and run config as the node's last message has left them: Flower's whole context goes on."""
        left = _configs(state)
        node, run = (dict(left.pop(name)) if name in left else dict(values) for name, values in given.items())
        return node, state, run

    def _put_state(self, out: Frame, context: Any, given: dict[str, dict[str, Any]]) -> None:
        try:
            for name, values in ((NODE_CONFIG, context.node_config), (RUN_CONFIG, context.run_config)):
                if _typed(values) != _typed(given[name]):
                    _configs(context.state)[name] = self.gen.ConfigRecord(dict(values))
            out.state, beside = self.codec.encode_state(context.state)
        except Exception as e:  # noqa: BLE001 - an app may have put anything there; Flower's process would end
            _logger().error("the context's state cannot be kept", exc_info=e)
            out.head["kept"] = True
            return
        self._put(out, "spack", "slens", beside)

    @staticmethod
    def _note(answer: dict[str, Any], name: str, read: Any) -> None:
        """Put into the head what can be read; no reply fails because something cannot."""
        try:
            value = read()
        except Exception as e:  # noqa: BLE001
            answer.setdefault("unread", {})[name] = f"{type(e).__name__}: {e}"[:200]
            return
        if value is not None:
            answer[name] = value


def begin(role: str, serve: Callable[[Link, Generation, dict[str, Any]], int]) -> int:
    """Greet the runner, and serve as it says what to start; nothing if it goes away before."""
    link = Link.inherited()
    link.send(hello(role))
    gen = generations.installed(role)
    try:
        start = link.receive()
    except EOFError:
        return 0
    if start.kind != "start":
        raise ProtocolError(f"{start.kind!r} came instead of start")
    if start.head.get("cwd"):
        os.chdir(start.head["cwd"])
    return serve(link, gen, start.head)


def main() -> int:
    """Be a worker until the runner goes away."""
    return begin("client", serve)


def serve(link: Link, gen: Generation, start: dict[str, Any]) -> int:
    """Load the app, and answer messages as the isolation says."""
    isolation = start.get("isolation") or "warm"
    if isolation not in ("warm", "fork", "process"):
        raise ProtocolError(f"there is no isolation {isolation!r:.50}")
    if isolation == "fork":
        from . import forking

        forking.prepare()
    generators = Generators()
    worker = Worker.load(gen, start, f"c.{os.getpid()}")
    ready: dict[str, Any] = {"t": "ready"}
    if worker.failure is not None:
        ready["error"] = f"{type(worker.failure).__name__}: {worker.failure}"[:LONGEST]
    if isolation == "fork":
        why = forking.unsafe()
        if why:
            ready.update(fork=False, why=why)
            isolation = "process"
        else:
            generators.look()
    link.send(Frame(ready))
    if isolation == "fork":
        return forking.Template(link, worker, generators).serve()
    while True:
        try:
            frame = link.receive()
        except EOFError:
            return 0
        if frame.kind == "free":
            worker.written.free(frame.head["pack"])
        elif frame.kind == "msg":
            try:
                reply = worker.answer(frame)
            finally:
                frame.close()
            # Before the reply: the next message may follow it at once.
            for name in worker.read.forget():
                link.send(Frame({"t": "forgot", "pack": name}))
            link.send(reply)
            if isolation == "process":
                return 0
        else:
            raise ProtocolError(f"a worker cannot do {frame.kind!r:.50}")
