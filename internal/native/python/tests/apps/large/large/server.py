"""Sends a model in each round, keeps all replies, and looks at all of them in the end."""

import json
import os
import tempfile

import numpy as np
from flwr.common import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.server import ServerApp

from .models import is_model, model

ROUNDS = 6  # with two packs each: more than are kept at hand
app = ServerApp()


@app.main()
def main(grid, context):
    nodes = list(grid.get_node_ids())
    kept = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "go")
        for seed in range(1000, 1000 + 10 * ROUNDS, 10):
            record = ArrayRecord(model(seed))
            messages = [
                Message(RecordDict({"model": record, "do": ConfigRecord({"seed": seed, "path": path})}), n, "train")
                for n in nodes
            ]
            # As a strategy that serialises for each client anew.
            messages.append(
                Message(
                    RecordDict({"model": ArrayRecord(model(seed)), "do": ConfigRecord({"seed": seed, "path": path})}),
                    nodes[0],
                    "train",
                )
            )
            replies = list(grid.send_and_receive(messages))
            assert len(replies) == len(messages)
            kept += [(seed, r) for r in replies]
            # What came goes out again, and is changed in between.
            sum_of = sum(r.content["back"]["0"].numpy() for r in replies if r.has_content())
            assert not replies or Array(np.asarray(sum_of)).numpy().shape == (300_000,)
        with open(path, "w"):
            pass
        errors = [str(r.error) for _, r in kept if not r.has_content()]
        right = []
        for seed, reply in kept:
            if not reply.has_content():
                continue
            content = reply.content
            node = content["seen"]["node"]
            mixed = content["mixed"]
            right.append(
                is_model(content["echo"], seed)
                and is_model(content["back"], seed + node + 2)
                and is_model(content["sent"], seed + 6)
                and np.array_equal(mixed["0"].numpy(), model(seed + node + 2)[0])
                and np.array_equal(mixed["1"].numpy(), model(seed)[1])
                and np.allclose(mixed["2"].numpy(), model(seed)[2])
                and np.array_equal(mixed["3"].numpy(), model(seed + node + 1)[3])
            )
        print(
            "RESULT",
            json.dumps(
                {"errors": errors, "right": right, "kept": [r.content["seen"]["kept"] for _, r in kept if r.has_content()]}
            ),
            flush=True,
        )
