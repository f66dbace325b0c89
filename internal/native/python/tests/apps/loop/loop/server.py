"""Runs the scenarios that the run's configuration names, one after the other, and prints what came of each as JSON."""

import json
import os
import sys
import tempfile
import threading
import time

import numpy as np
from flwr.server import ServerApp

from .names import ConfigRecord, MetricRecord, array_record, kinds, make

app = ServerApp()


def told(message):
    """Give what a reply says, as JSON can have it."""
    out = {
        "src": message.metadata.src_node_id,
        "dst": message.metadata.dst_node_id,
        "run": message.metadata.run_id,
        "id": message.metadata.message_id,
        "reply_to": getattr(message.metadata, "reply_to_message_id", None) or getattr(message.metadata, "reply_to_message", None),
        "type": message.metadata.message_type,
        "group": message.metadata.group_id,
    }
    if message.has_error():
        out["error"] = [message.error.code, message.error.reason]
        return out
    arrays, metrics, configs = kinds(message.content)
    out["metrics"] = {n: {k: repr(v) for k, v in r.items()} for n, r in metrics.items()}
    out["sums"] = {n: [float(a.numpy().sum()) for a in r.values()] for n, r in sorted(arrays.items())}
    if "seen" in configs:
        out["seen"] = json.loads(configs["seen"]["json"])
        out["flag"], out["bytes"] = configs["seen"]["flag"], list(configs["seen"]["bytes"])
    return out


class Scenarios:
    def __init__(self, grid, context):
        self.grid, self.context = grid, context
        self.nodes = list(grid.get_node_ids())

    def message(self, node, what="echo", content=None, group="1", ttl=None, kind="train", **more):
        if content is None:
            content = make(configs={"do": ConfigRecord({"what": what, **more})})
        return self.grid.create_message(content, kind, node, group, ttl)

    def ask(self, *args, timeout=None, **more):
        begun = time.monotonic()
        replies = self.grid.send_and_receive([self.message(n, *args, **more) for n in self.nodes], timeout=timeout)
        return [told(r) for r in replies], time.monotonic() - begun

    def about(self):
        run = self.grid.run
        return {
            "grid": [c.__name__ for c in type(self.grid).__mro__],
            "nodes": self.nodes,
            "run": {k: v for k, v in vars(run).items() if k in ("run_id", "fab_id", "fab_version", "override_config")},
            "node_id": self.context.node_id,
            "run_id": getattr(self.context, "run_id", None),
            "run_config": self.context.run_config,
            "argv": sys.argv,
            "path": sys.path[:3],
            "cwd": os.getcwd(),
            "main_thread": threading.current_thread() is threading.main_thread(),
            "fds": sorted(int(f) for f in os.listdir("/proc/self/fd") if f.isdigit() and int(f) < 10),
        }

    def echo(self):
        return self.ask()[0]

    def records(self):
        """Several records of each kind, with large arrays and small ones, names not in order."""
        big = np.arange(50_000, dtype=np.float32)
        content = make(
            arrays={
                "z": array_record({"b": big, "a": big * 2}),
                "a": array_record({"x": np.ones(3), "empty": np.zeros((0, 4))}),
                "none": array_record({}),
            },
            metrics={"m1": MetricRecord({"x": 1, "y": [0.5, 1.5]}), "m0": MetricRecord({})},
            configs={"do": ConfigRecord({"what": "echo", "list": ["a", "b"], "b": b"\x01", "t": True, "f": 1.0})},
        )
        first = [told(r) for r in self.grid.send_and_receive([self.message(n, content=content) for n in self.nodes])]
        again = [told(r) for r in self.grid.send_and_receive([self.message(n, content=content) for n in self.nodes])]
        return {
            "first": first,
            "again": again,
            "unchanged": [float(a.numpy().sum()) for a in kinds(content)[0]["z"].values()],
        }

    def many(self):
        """2,000 arrays of 4 KiB."""
        content = make(
            arrays={"w": array_record({f"{i:04}": np.full(1000, i, dtype=np.float32) for i in range(2000)})},
            configs={"do": ConfigRecord({"what": "echo"})},
        )
        replies = self.grid.send_and_receive([self.message(n, content=content) for n in self.nodes])
        return [[len(told(r)["sums"]["w"]), sum(told(r)["sums"]["w"])] for r in replies]

    def large(self):
        """100 MB to each node twice."""
        content = make(
            arrays={"w": array_record({"0": np.ones(25_000_000, dtype=np.float32)})},
            configs={"do": ConfigRecord({"what": "echo"})},
        )
        out = []
        for _ in range(2):
            out += [
                told(r)["sums"]["w"][0]
                for r in self.grid.send_and_receive([self.message(n, content=content) for n in self.nodes])
            ]
        return out

    def big_state(self):
        content = make(
            arrays={"w": array_record({"0": np.ones(100_000, dtype=np.float32)})},
            configs={"do": ConfigRecord({"what": "big-state"})},
        )
        first = [told(r) for r in self.grid.send_and_receive([self.message(n, content=content) for n in self.nodes])]
        return [r["seen"]["count"] for r in first + self.ask()[0] + self.ask()[0]]

    def raises(self):
        return {"replies": self.ask("raise")[0], "after": self.echo()}

    def exits(self):
        return {"replies": self.ask("exit")[0], "after": self.echo()}

    def dies(self):
        return {w: {"replies": self.ask(w)[0], "after": self.echo()} for w in ("_exit", "segfault")}

    def load(self):
        return self.ask()[0]

    def leaves(self):
        return self.ask("leaves")[0]

    def nothing(self):
        return {"replies": self.ask("nothing")[0], "after": self.echo()}

    def hangs(self):
        """A timeout that is hit; a message whose reply is not there yet, and is pulled later."""
        with tempfile.TemporaryDirectory() as folder:
            go = os.path.join(folder, "go")
            slow, rest = self.nodes[0], self.nodes[1:]
            got = [told(r) for r in self.grid.send_and_receive([self.message(slow, "until", path=go)], timeout=0.2)]
            ids = list(self.grid.push_messages([self.message(slow, "until", path=go)]))
            early = list(self.grid.pull_messages(ids))
            fast = [told(r) for r in self.grid.send_and_receive([self.message(n) for n in rest], timeout=300)]
            with open(go, "w"):
                pass
            late = []
            while not late:
                late = list(self.grid.pull_messages(ids))
                time.sleep(0.01)
        return {"got": got, "early": len(early), "fast": fast, "late": [told(r) for r in late]}

    def pulls(self):
        """The own loop: push, pull until all are there; pull again; pull what never was."""
        ids = list(self.grid.push_messages([self.message(n, kind="query") for n in self.nodes]))
        got = []
        while len(got) < len(ids):
            got += list(
                self.grid.pull_messages(ids[::-1])
                if not got
                else self.grid.pull_messages([i for i in ids if i not in {told(g)["reply_to"] for g in got}])
            )
            time.sleep(0.001)
        return {
            "ids": ids,
            "got": [told(g) for g in got],
            "again": [told(r) for r in self.grid.pull_messages(ids)],
            "never": [told(r) for r in self.grid.pull_messages(["11111111-1111-1111-1111-111111111111"])],
            "zero": [told(r) for r in self.grid.send_and_receive([self.message(self.nodes[0], kind="query")], timeout=0)],
            "empty": list(self.grid.push_messages([])),
        }

    def unknown(self):
        """A node that never was."""
        messages = [self.message(12345), self.message(self.nodes[0])]
        return [told(r) for r in self.grid.send_and_receive(messages, timeout=20)]

    def invalid(self):
        message = self.message(self.nodes[0])
        message.metadata.ttl = -1.0
        try:
            self.grid.push_messages([message])
        except ValueError as e:
            return str(e)[:16]
        return "taken"

    def threads(self):
        """Many threads send at once, as the legacy strategies do."""
        out, lock = [], threading.Lock()

        def one(i):
            replies = [
                told(r)
                for r in self.grid.send_and_receive([self.message(self.nodes[i % len(self.nodes)], group=str(i))], timeout=30)
            ]
            with lock:
                out.append([i, [r["group"] for r in replies]])

        ts = [threading.Thread(target=one, args=(i,)) for i in range(24)]
        [t.start() for t in ts]
        [t.join() for t in ts]
        return sorted(out)

    def speed(self):
        """Seconds for some messages: small ones, and 100 MB there and back, the same and new ones in turn."""
        n = int(self.context.run_config["number"])
        small = make(
            arrays={"w": array_record({"0": np.ones(10, dtype=np.float32)})},
            configs={"do": ConfigRecord({"what": "echo"})},
        )
        begun = time.perf_counter()
        for _ in range(n):
            list(self.grid.send_and_receive([self.message(node, content=small) for node in self.nodes]))
        out = {"small": (time.perf_counter() - begun) / max(n, 1) / len(self.nodes)}
        for i in range(int(os.environ.get("LARGE", "0"))):
            large = make(
                arrays={"w": array_record({"0": np.full(25_000_000, i, dtype=np.float32)})},
                configs={"do": ConfigRecord({"what": "return"})},
            )
            for again in ("new", "again"):
                begun = time.perf_counter()
                list(self.grid.send_and_receive([self.message(node, content=large) for node in self.nodes]))
                out.setdefault(again, []).append(round((time.perf_counter() - begun), 4))
        return out

    def raise_here(self):
        raise LookupError("the server was asked to")

    def exit_here(self):
        sys.exit(5)

    def forever(self):
        print("WAITING", flush=True)
        try:
            self.ask("sleep", seconds=60)
        except ConnectionError as e:
            print("GONE", type(e).__name__, flush=True)
            raise
        return "it went on"

    def stubborn(self):
        print("WAITING", flush=True)
        while True:
            time.sleep(0.05)


@app.main()
def main(grid, context):
    s = Scenarios(grid, context)
    for name in context.run_config["scenarios"].split(","):
        print("RESULT", json.dumps({name: getattr(s, name)()}), flush=True)
