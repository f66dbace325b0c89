"""The client app as it was written for flwr 1.8: a client knows nothing of its place among the others."""

import json
import os

import numpy as np
from flwr.client import ClientApp, NumPyClient


def record(kind, **values):
    folder = os.environ.get("PARITY_OUT")
    if folder:
        with open(os.path.join(folder, f"{os.getpid()}.jsonl"), "a") as f:
            f.write(json.dumps({"kind": kind, **values}, sort_keys=True) + "\n")


class Client(NumPyClient):
    def fit(self, parameters, config):
        target = np.linspace(0.1, 0.7, 5)
        updated = parameters[0] + 0.25 * (target - parameters[0])
        loss = float(np.square(updated - target).mean())
        record("client", at="fit", round=config["round"], loss=loss, weights=updated.tolist())
        return [updated], 3, {"loss": loss}

    def evaluate(self, parameters, config):
        loss = float(np.square(parameters[0] - 1 / 3).sum())
        record("client", at="evaluate", round=config["round"], loss=loss)
        return loss, 3, {"accuracy": 1 / (1 + loss)}


def client_fn(cid):
    return Client().to_client()


app = ClientApp(client_fn=client_fn)
