"""The self-check of an environment: does everything that the engine needs of this Flower work as it should?

It runs once per environment, before the native engine is chosen for it. It uses the same code as a job, with both ends
in this process.
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import math
import os
import socket
import sys
import tempfile
import traceback
import warnings
from typing import Any

from . import generations, grid
from .client import Worker
from .frames import PROTOCOL, Frame, Link
from .generations import CRASHED, EXPIRED, NO_REPLY, NODE_GONE, Generation

RUN, NODE = (1 << 61) + 5, (1 << 62) + 7
SIZE = 40_000  # float32: enough to go beside the protobuf


PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "pergola_check"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "pergola"
[tool.flwr.app.components]
serverapp = "pergola_check:wrong"
clientapp = "pergola_check:app"
[tool.flwr.app.config]
a = 1
b.c = "y"
d = 1.5
"""


class FailedError(Exception):
    """Something works, but not as it should."""


def main() -> int:
    """Print one line of JSON; the exit status is 0 either way, so that another one means that Python itself failed."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed on the way is no result
    warnings.simplefilter("ignore")
    said: dict[str, Any] = {"ok": False, "flwr": generations.version(), "protocol": PROTOCOL, "generation": ""}
    try:
        gen = generations.installed("server", "client")
        logging.getLogger("flwr").setLevel(logging.CRITICAL + 1)  # an error is provoked
        said["generation"] = gen.name
        Check(gen).run()
        said["ok"] = True
    except Exception as e:  # noqa: BLE001 - whatever it is, it is why the engine is not to be used
        traceback.print_exc()
        said["why"] = f"{type(e).__name__}: {e}"[:2000]
    sys.stderr.flush()
    print(json.dumps(said), file=out, flush=True)
    return 0


def expect(what: str, got: Any, want: Any) -> None:
    """Fail unless what was got is what was wanted."""
    if got != want:
        raise FailedError(f"{what}: got {got!r:.200}, wanted {want!r:.200}")


class Check:
    """A server's and a worker's end in one process, with a socket pair between them and nobody who relays."""

    def __init__(self, gen: Generation) -> None:
        self.gen = gen
        ours, theirs = socket.socketpair()
        self.server, self.client = Link(ours), Link(theirs)
        gen.set_identity(RUN, gen.server_id, 1)
        self.exchange = grid.Exchange(gen, self.server, RUN, [NODE])
        self.run_object = gen.run(RUN, "pergola/check", "1.0", "", {})
        self.grid = grid.make(self.exchange, self.run_object)
        self.state: tuple[bytes, dict[str, Any], int | None] = (b"", {}, None)

    def run(self) -> None:
        """Check one thing after the other."""
        expect("the Grid's run", self.grid.run.run_id, RUN)
        expect("the Grid's nodes", list(self.grid.get_node_ids()), [NODE])
        self.app()
        self.records()
        self.errors()
        self.legacy()

    def worker(self, app: Any) -> Worker:
        """Make a worker whose app is loaded already."""
        return Worker(self.gen, RUN, {"of-the-run": 1}, app, "c")

    def trip(self, worker: Worker, message: Any) -> tuple[Any, dict[str, Any]]:
        """Send a message to the worker and its reply back; give it and its head."""
        gen = self.gen
        gen.set_identity(RUN, gen.server_id, 1)
        gen.lazy.arena = self.exchange.packs.arena
        ids = list(self.grid.push_messages([message]))
        expect("messages that were pushed", len(ids), 1)
        frame = self.client.receive()
        expect("the id in the frame", frame.head["id"], ids[0])
        frame.head.update(task=2, node_config={"partition-id": 0})
        frame.state, more, fd = self.state
        frame.head.update(more)
        if fd is not None:
            frame.head.setdefault("fds", []).append(more["spack"])
            frame.fds.append(fd)
        reply = worker.answer(frame)
        frame.close()
        head = dict(reply.head)
        fds = dict(zip(head.get("fds", []), reply.fds))
        if not head.get("kept"):
            more = {k: head[k] for k in ("spack", "slens") if k in head}
            self.state = (reply.state, more, os.dup(fds[head["spack"]]) if "spack" in head else None)
        out = {k: v for k, v in head.items() if k in ("t", "id", "node", "pack", "lens")}
        if "pack" in out:
            out["fds"] = [out["pack"]]
        self.client.send(Frame(out, reply.proto, b"", [fds[out["pack"]]] if "pack" in out else []))
        self.exchange.take(self.server.receive())
        replies = list(self.grid.pull_messages(ids))
        expect("replies", len(replies), 1)
        expect("the message that is replied to", gen.reply_to(replies[0].metadata), ids[0])
        expect("the reply's sender", replies[0].metadata.src_node_id, NODE)
        return replies[0], head

    def freed(self, head: dict[str, Any]) -> None:
        """Check that the server's end is done with a reply that is gone."""
        if "pack" in head:
            expect("what follows a reply with a pack", self.client.receive().head, {"t": "free", "pack": head["pack"]})

    def content(self, size: int) -> Any:
        """Make a content with a record of each kind."""
        import numpy as np

        gen = self.gen
        content = gen.RecordDict()
        arrays = self.arrays({"b": np.arange(size, dtype=np.float32), "a": np.ones((2, 3))})
        gen.put(content, "arrays", arrays)
        gen.put(content, "metrics", gen.MetricRecord({"i": 3, "f": 0.5, "l": [1.0, 2.0], "nan": math.nan}))
        gen.put(content, "config", gen.ConfigRecord({"s": "x", "b": b"\x00\xff", "t": True, "i": -1, "l": ["a", "b"]}))
        return content

    def arrays(self, named: dict[str, Any]) -> Any:
        """Make a record of arrays."""
        import numpy as np

        cls = generations.first("Array", "flwr.app", "flwr.common", "flwr.common.record")
        record = self.gen.ArrayRecord()
        for name, a in named.items():
            try:
                record[name] = cls(a)
            except TypeError:  # as a dataclass, it had its fields only
                f = io.BytesIO()
                np.save(f, a, allow_pickle=False)
                record[name] = cls(dtype=str(a.dtype), shape=list(a.shape), stype="numpy.ndarray", data=f.getvalue())
        return record

    def same(self, what: str, content: Any, size: int) -> None:
        """Compare a content with what content() makes."""
        gen = self.gen
        records = gen.array_records(content)
        expect(f"{what}: records of arrays", len(records), 1)
        expect(f"{what}: names of arrays", list(records[0].keys()), ["b", "a"])
        b, a = (records[0][k].numpy() for k in ("b", "a"))
        expect(f"{what}: an array", (a.shape, float(a.sum())), ((2, 3), 6.0))
        expect(f"{what}: a large array", (b.shape, float(b[-1])), ((size,), float(size - 1)))
        metrics = dict(dict(gen.metric_records(content))["metrics"].items())
        expect(f"{what}: NaN", math.isnan(metrics.pop("nan")), True)
        expect(f"{what}: metrics", metrics, {"i": 3, "f": 0.5, "l": [1.0, 2.0]})
        config = dict(dict(gen.config_records(content))["config"].items())
        expect(f"{what}: config", config, {"s": "x", "b": b"\x00\xff", "t": True, "i": -1, "l": ["a", "b"]})

    def app(self) -> None:
        """Read an app's settings and load it, by Flower's own functions."""
        with tempfile.TemporaryDirectory(prefix="pergola-check-") as folder:
            with open(os.path.join(folder, "pyproject.toml"), "w", encoding="utf-8") as f:
                f.write(PROJECT)
            with open(os.path.join(folder, "pergola_check.py"), "w", encoding="utf-8") as f:
                f.write(f"from {self.gen.ClientApp.__module__} import ClientApp\napp = ClientApp()\nwrong = 7\n")
            override, config = self.gen.settings(folder, ["a=2", "b.c='x'"])
            expect("the overrides", override, {"a": 2, "b.c": "x"})
            expect("the run's configuration", config, {"a": 2, "b.c": "x", "d": 1.5})
            expect("the app", isinstance(self.gen.load(folder, "clientapp"), self.gen.ClientApp), True)
            try:
                self.gen.load(folder, "serverapp")
            except self.gen.LoadServerAppError:
                return
            raise FailedError("what is no ServerApp was loaded as one")

    def records(self) -> None:
        """Each type of record there and back, small and large; state; node and run configuration."""
        gen = self.gen
        sizes = [4, SIZE]
        at = 0

        def call(message: Any, context: Any) -> Any:
            self.same("what arrived", message.content, sizes[at])
            expect("the node's configuration", context.node_config, {"partition-id": 0})
            expect("the run's configuration", context.run_config, {"of-the-run": 1})
            expect("the node", context.node_id, NODE)
            expect("the state", len(gen.array_records(context.state)), min(at, 1))
            if at:
                self.same("the state", context.state, sizes[at - 1])
            kept = self.content(sizes[at])
            context.state = kept
            return gen.reply(message, message.content)

        app = gen.ClientApp()
        app.train()(call)
        worker = self.worker(app)
        for at, size in enumerate(sizes):  # noqa: B007 - call() looks at it
            reply, head = self.trip(worker, gen.new_message(RUN, self.content(size), "train", NODE, "1", None))
            self.same("what came back", reply.content, size)
            expect("whether the arrays went beside", "pack" in head, size > 1000)
            expect("the round", head.get("round"), 1)
            expect("the numbers", head.get("numbers"), {"i": 3, "f": 0.5, "nan": "NaN"})
            del reply
            self.freed(head)
        expect("whether the state went beside", self.state[2] is not None, True)

    def errors(self) -> None:
        """An exception, and the errors that the server's end makes."""
        gen = self.gen

        def call(message: Any, context: Any) -> Any:
            raise ZeroDivisionError("asked to")

        reply, head = self.trip(self.worker(call), gen.new_message(RUN, self.content(4), "evaluate", NODE, "", 60.0))
        expect("the error", (reply.error.code, reply.error.reason), (2, "<class 'ZeroDivisionError'>:<'asked to'>"))
        expect("the error in the head", head["error"], {"code": 2, "reason": reply.error.reason})
        for code in (EXPIRED, NO_REPLY, NODE_GONE, CRASHED):
            ids = list(self.grid.push_messages([gen.new_message(RUN, self.content(4), "train", NODE, "1", None)]))
            self.client.receive().close()
            self.exchange.take(Frame({"t": "lost", "id": ids[0], "code": code}))
            replies = list(self.grid.pull_messages(ids))
            expect("replies to what is lost", len(replies), 1)
            expect("the message that is replied to", gen.reply_to(replies[0].metadata), ids[0])
            if not replies[0].error.code or not replies[0].error.reason:
                raise FailedError(f"a lost message gave {replies[0].error}")

    def legacy(self) -> None:
        """One fit of the legacy API, as DefaultWorkflow and the strategies do it, where this Flower still has it."""
        try:
            import numpy as np
            from flwr.client import ClientApp, NumPyClient
            from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays

            modules = [
                importlib.import_module(m)
                for m in (
                    "flwr.compat.common.recorddict_compat",
                    "flwr.common.recorddict_compat",
                    "flwr.common.recordset_compat",
                )
                if generations.exists(m)
            ]
        except ImportError:
            return
        if not modules:
            return

        class Client(NumPyClient):
            def fit(self, parameters: Any, config: Any) -> Any:
                return [parameters[0] + config["by"]], 7, {"accuracy": 0.25}

        names = ("fitins_to_recorddict", "fitins_to_recordset"), ("recorddict_to_fitres", "recordset_to_fitres")
        there, back = (next(getattr(modules[0], n) for n in pair if hasattr(modules[0], n)) for pair in names)
        ins = FitIns(ndarrays_to_parameters([np.zeros(SIZE, dtype=np.float32)]), {"by": 2.0})
        app = ClientApp(client_fn=lambda context: Client().to_client())
        reply, head = self.trip(self.worker(app), self.gen.new_message(RUN, there(ins, True), "train", NODE, "3", None))
        if reply.has_error():
            raise FailedError(f"a legacy fit gave {reply.error}")
        res = back(reply.content, False)
        del reply
        self.freed(head)
        expect("a legacy fit", (res.num_examples, res.metrics), (7, {"accuracy": 0.25}))
        expect("a legacy fit's parameters", float(parameters_to_ndarrays(res.parameters)[0].sum()), 2.0 * SIZE)
        expect("a legacy fit's numbers", head.get("numbers"), {"num_examples": 7, "accuracy": 0.25})
