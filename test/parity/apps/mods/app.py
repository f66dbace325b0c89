"""Mods, built in and custom: the order in which they are called, what they change on the way in and out, one that answers in the client's place."""

import numpy as np
from flwr.client import ClientApp, NumPyClient, mod
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from recording import record

try:
    from flwr.common import ConfigRecord, RecordDict
except ImportError:  # before 1.18
    from flwr.common import ConfigsRecord as ConfigRecord, RecordSet as RecordDict

calls = []


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def get_properties(self, config):
        return {"partition": self.partition}

    def fit(self, parameters, config):
        calls.append("fit")
        weights = parameters[0] + config["rate"]
        record("client", at="fit", round=config["round"], partition=self.partition, rate=config["rate"], weights=weights.tolist())
        return [weights], 1 + self.partition, {"x": float(weights.sum())}

    def evaluate(self, parameters, config):
        calls.append("evaluate")
        return float(parameters[0].sum()), 1 + self.partition, {}


def outer(msg, context, call_next):
    calls.clear()
    calls.append("outer")
    kind = msg.metadata.message_type
    for name, config in msg.content.configs_records.items():
        if "rate" in config:
            config["rate"] = config["rate"] * 2
        record("client", at="mod", type=kind, partition=int(context.node_config["partition-id"]), record=name, config={k: v for k, v in sorted(config.items())})
    reply = call_next(msg, context)
    calls.append("back")
    record("client", at="order", type=kind, partition=int(context.node_config["partition-id"]), calls=list(calls))
    return reply


def inner(msg, context, call_next):
    calls.append("inner")
    reply = call_next(msg, context)
    for _, metrics in reply.content.metrics_records.items():
        if "loss" in metrics:
            metrics["loss"] = metrics["loss"] + 0.125
    return reply


def shortcut(msg, context, call_next):
    if msg.metadata.message_type != "get_properties":
        return call_next(msg, context)
    calls.append("shortcut")
    content = RecordDict()
    content.configs_records["getpropertiesres.properties"] = ConfigRecord({"from": "the mod"})
    content.configs_records["getpropertiesres.status"] = ConfigRecord({"code": 0, "message": "Success"})
    return msg.create_reply(content)


class Recorded(FedAvg):
    def configure_fit(self, server_round, parameters, client_manager):
        from flwr.common import GetPropertiesIns

        plan = super().configure_fit(server_round, parameters, client_manager)
        for proxy, _ in plan:
            found = proxy.get_properties(GetPropertiesIns({}), timeout=None, group_id=server_round)
            record("server", at="properties", round=server_round, found=dict(found.properties.items()))
        return plan

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        record("server", at="evaluate", round=server_round, losses=sorted(r.loss for _, r in results), failures=len(failures), loss=loss)
        return loss, metrics


def server_fn(context):
    strategy = Recorded(
        min_fit_clients=2,
        min_evaluate_clients=2,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters([np.linspace(0.1, 0.4, 4)]),
        on_fit_config_fn=lambda rnd: {"round": rnd, "rate": 0.1 * rnd},
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


sizes = getattr(mod, "arrays_size_mod", None) or mod.parameters_size_mod  # renamed between 1.12 and 1.18
client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client(), mods=[outer, mod.message_size_mod, inner, sizes, shortcut])
server = ServerApp(server_fn=server_fn)
