"""Keeps what it gets and what it sends in its globals and its state, changes it, and looks whether all of it stays right."""

import os
import threading
import time

import numpy as np
from flwr.client import ClientApp
from flwr.common import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from .models import is_model, model

app = ClientApp()
kept = []  # (arrays, seed) of all messages before, where the process has had any


def linger(made, sent, seed, path):
    """Outlive the reply; look when others have been answered by other processes."""
    until = time.monotonic() + 60
    while not os.path.exists(path) and time.monotonic() < until:
        time.sleep(0.01)
    right = [is_model(made, seed + 5), is_model(sent, seed + 6), is_model(ArrayRecord(model(seed)), seed)]
    print(f"LINGERED {right}\n", end="", flush=True)


@app.train()
def train(message, context):
    seed, node = message.content["do"]["seed"], context.node_id % 1000
    got = message.content["model"]
    assert is_model(got, seed)
    for arrays, of in kept:
        assert is_model(arrays, of), "what a global has"
    for name, record in context.state.items():
        assert is_model(record, int(name)), "what the state has"
    # In place: numbers of one's own, as Flower gives.
    mine = got.to_numpy_ndarrays()
    for a in mine:
        np.add(a, 1, out=a, casting="unsafe")
    assert is_model(got, seed)
    state = ArrayRecord(model(seed + node + 1))  # one of its own, after which the reply does not begin the file
    back = ArrayRecord(model(seed + node + 2))
    mixed = ArrayRecord({"0": back["0"], "1": got["1"], "2": Array(mine[2] - 1), "3": state["3"]})
    made = ArrayRecord(model(seed + 5))
    sent = ArrayRecord(model(seed + 6))
    context.state[str(seed)] = got
    context.state[str(seed + node + 1)] = state
    kept.extend(
        [
            (got, seed),
            ([a.numpy() for a in got.values()], seed),
            (back, seed + node + 2),
            (list(state.values()), seed + node + 1),
            (made, seed + 5),
        ]
    )
    if context.run_config["leaves"]:
        threading.Thread(target=linger, args=(made, sent, seed, message.content["do"]["path"])).start()
    content = {"echo": got, "back": back, "mixed": mixed, "sent": sent, "seen": ConfigRecord({"kept": len(kept), "node": node})}
    return Message(RecordDict(content), reply_to=message)
