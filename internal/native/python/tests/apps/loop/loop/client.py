"""Does what a message's configuration says."""

import copy
import json
import os
import random
import signal
import sys
import threading
import time

import numpy as np
from flwr.client import ClientApp

from .names import ConfigRecord, MetricRecord, kinds, make

app = ClientApp()
CALLS = 0
AT_IMPORT = random.random()


def reply(message, content):
    if hasattr(message, "create_reply"):
        return message.create_reply(content)
    from flwr.common import Message

    return Message(content, reply_to=message)


@app.train()
def train(message, context):
    global CALLS
    CALLS += 1
    arrays, metrics, configs = kinds(message.content)
    do = configs["do"]["what"]
    state_configs = kinds(context.state)[2]
    count = int(state_configs["n"]["n"]) + 1 if "n" in state_configs else 1
    if hasattr(context.state, "config_records"):
        context.state["n"] = ConfigRecord({"n": count})
    else:
        context.state.configs_records["n"] = ConfigRecord({"n": count})
    if do == "raise":
        raise ZeroDivisionError("asked to")
    if do == "exit":
        sys.exit(3)
    if do == "_exit":
        os._exit(7)
    if do == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if do == "sleep":
        time.sleep(float(configs["do"]["seconds"]))
    if do == "until":
        while not os.path.exists(configs["do"]["path"]):
            time.sleep(0.01)
    if do == "nothing":
        return None
    if do == "leaves":
        import atexit
        import multiprocessing

        daemon = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
        daemon.start()
        atexit.register(lambda: print("LEFT at exit", flush=True))
        threading.Thread(target=lambda: (time.sleep(0.2), print("LEFT thread", flush=True))).start()
        return reply(message, make(metrics={"m": MetricRecord({"daemon": daemon.pid, "self": os.getpid()})}))
    if do == "big-state":
        record = type(next(iter(arrays.values())))()
        record.update(next(iter(arrays.values())))
        if hasattr(context.state, "array_records"):
            context.state["big"] = record
        else:
            context.state.parameters_records["big"] = record
    if do == "return":  # as many bytes, made anew
        back = type(next(iter(arrays.values())))()
        for key, a in next(iter(arrays.values())).items():
            back[key] = copy.copy(a)
            back[key].data = a.data[:128] + a.data[128:]
        return reply(message, make(arrays={"w": back}))
    seen = {
        "calls": CALLS,
        "count": count,
        "node_id": context.node_id,
        "node_config": dict(context.node_config),
        "run_config": dict(context.run_config),
        "run_id": getattr(context, "run_id", None),
        "message_run": message.metadata.run_id,
        "src": message.metadata.src_node_id,
        "dst": message.metadata.dst_node_id,
        "message_id": message.metadata.message_id,
        "group": message.metadata.group_id,
        "type": message.metadata.message_type,
        "ttl": message.metadata.ttl,
        "cwd": os.getcwd(),
        "argv": sys.argv,
        "path": sys.path[:3],
        "file": __file__,
        "pid": os.getpid(),
        "main_thread": threading.current_thread() is threading.main_thread(),
        "threads": threading.active_count(),
        "at_import": AT_IMPORT,
        "random": random.random(),
        "np_random": float(np.random.rand()),
        "fds": sorted(int(f) for f in os.listdir("/proc/self/fd") if f.isdigit() and int(f) < 10),
        "modules": sorted(m for m in sys.modules if m in ("boot", "frames", "grid", "client", "server", "packs")),
        "sums": {name: [float(a.numpy().sum()) for a in r.values()] for name, r in sorted(arrays.items())},
        "metrics": {n: dict(r.items()) for n, r in metrics.items()},
    }
    context.node_config["mine"] = 1
    context.run_config["mine"] = 1
    context.extra = "lost, as in Flower"
    # The arrays that are sent back are new objects, as after training.
    back = {}
    for name, r in arrays.items():
        new = type(r)()
        for key, a in r.items():
            new[key] = copy.copy(a)
            new[key].data = bytes(bytearray(a.data))
        back[name] = new
    return reply(
        message,
        make(
            arrays=back,
            metrics={"m": MetricRecord({"loss": 0.5, "n": 3, "bad": float("nan"), "far": float("-inf"), "list": [1.0, 2.0]})},
            configs={"seen": ConfigRecord({"json": json.dumps(seen), "flag": True, "bytes": b"\x00\xff"})},
        ),
    )


@app.query()
def query(message, context):
    return reply(message, make(metrics={"m": MetricRecord({"pid": os.getpid()})}))
