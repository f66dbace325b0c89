"""Adds the number of its partition, plus one, to what it gets."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.client.mod import fixedclipping_mod, secaggplus_mod
from flwr.common import Context


def kinds(content):
    return content.config_records if hasattr(content, "config_records") else content.configs_records


def outer(msg, ctx, call_next):
    """A mod of the app's own, which sees what goes in and comes out."""
    reply = call_next(msg, ctx)
    reply.content  # whatever comes back has one, or it would have raised
    return reply


def chosen(msg, ctx, call_next):
    """The mods that come with Flower, where the message wants them."""
    configs = kinds(msg.content)
    if any(name.startswith("secagg") for name in configs):
        return secaggplus_mod(msg, ctx, call_next)
    if msg.metadata.message_type == "train" and configs["fitins.config"].get("mode") == "dp":
        return fixedclipping_mod(msg, ctx, call_next)
    return call_next(msg, ctx)


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def get_parameters(self, config):
        return [np.zeros(30_000, dtype=np.float32)]

    def get_properties(self, config):
        return {"partition": self.partition}

    def fit(self, parameters, config):
        if config.get("mode") == "fails" and self.partition == 1:
            raise ValueError("no data")
        return [parameters[0] + 1 + self.partition], 10, {"partition": self.partition}

    def evaluate(self, parameters, config):
        return float(parameters[0].mean()), 10 + self.partition, {"nan": float("nan")}


def client_fn(context: Context):
    return Client(int(context.node_config["partition-id"])).to_client()


app = ClientApp(client_fn=client_fn, mods=[outer, chosen])
