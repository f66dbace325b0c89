"""FedAvg on a few floats that no binary fraction equals, so that another order or another message shows in the last bits."""

import json
import os

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


def record(kind, **values):
    folder = os.environ.get("PARITY_OUT")
    if folder:
        with open(os.path.join(folder, f"{os.getpid()}.jsonl"), "a") as f:
            f.write(json.dumps({"kind": kind, **values}, sort_keys=True) + "\n")


def plain(config):
    return {k: v for k, v in config.items()}


class Client(NumPyClient):
    def __init__(self, context):
        self.context = context
        self.partition = int(context.node_config.get("partition-id", 0))

    def fit(self, parameters, config):
        target = np.linspace(0.1, 0.7, 5) * (self.partition + 1)
        updated = parameters[0] + config["rate"] * (target - parameters[0])
        loss = float(np.square(updated - target).mean())
        if config["round"] == 1:
            record("node-config", partition=self.partition, values=plain(self.context.node_config))
            record("client-config", partition=self.partition, values=plain(self.context.run_config))
        record("client", at="fit", round=config["round"], partition=self.partition, loss=loss, weights=updated.tolist())
        return [updated], 3 + self.partition, {"loss": loss}

    def evaluate(self, parameters, config):
        loss = float(np.square(parameters[0] - (self.partition + 1) / 3).sum())
        record("client", at="evaluate", round=config["round"], partition=self.partition, loss=loss)
        return loss, 3 + self.partition, {"accuracy": 1 / (1 + loss)}


def client_fn(context: Context):
    return Client(context).to_client()


def mean(results):
    total = sum(n for n, _ in results)
    return {k: sum(n * m[k] for n, m in results) / total for k in results[0][1]}


class Recorded(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        record("server", at="fit", round=server_round, clients=len(results), failures=len(failures), **metrics)
        return parameters, metrics

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        record("server", at="evaluate", round=server_round, clients=len(results), failures=len(failures), loss=loss, **metrics)
        return loss, metrics


def server_fn(context: Context):
    record("server-config", values=plain(context.run_config))
    rate = float(context.run_config.get("rate", 0.1))  # by way of the server: clients of 1.11 and 1.12 have no run config everywhere
    strategy = Recorded(
        min_fit_clients=2,
        min_evaluate_clients=2,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters([np.linspace(0.0, 0.3, 5)]),
        on_fit_config_fn=lambda rnd: {"round": rnd, "rate": rate},
        on_evaluate_config_fn=lambda rnd: {"round": rnd},
        fit_metrics_aggregation_fn=mean,
        evaluate_metrics_aggregation_fn=mean,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config.get("num-server-rounds", 2))))


client = ClientApp(client_fn=client_fn)
server = ServerApp(server_fn=server_fn)
