"""Every fit says that it begins and takes at least sleep seconds, so that a test can interrupt it."""

import time

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


class Client(NumPyClient):
    def __init__(self, context: Context):
        self.context = context
        self.partition = int(context.node_config["partition-id"])

    def fit(self, parameters, config):
        print("a fit begins", flush=True)
        time.sleep(float(self.context.run_config["sleep"]))
        return [parameters[0] + 1 + self.partition], 10, {"sum": float(parameters[0].sum())}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 10, {"accuracy": 1.0 / (1.0 + float(parameters[0].sum()))}


def client_fn(context: Context):
    return Client(context).to_client()


def mean(results):
    total = sum(n for n, _ in results)
    return {k: sum(n * m[k] for n, m in results) / total for k in results[0][1]}


def server_fn(context: Context):
    clients = int(context.run_config.get("clients", 2))
    strategy = FedAvg(
        min_fit_clients=clients,
        min_evaluate_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters([np.zeros(4, dtype=np.float32)]),
        on_fit_config_fn=lambda rnd: {"round": rnd},
        fit_metrics_aggregation_fn=mean,
        evaluate_metrics_aggregation_fn=mean,
    )
    rounds = int(context.run_config.get("num-server-rounds", 2))
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))


client = ClientApp(client_fn=client_fn)
server = ServerApp(server_fn=server_fn)
