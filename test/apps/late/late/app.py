"""Adds 1 + partition per fit. Round 1 takes `first` clients, every later one waits until `clients` are there."""

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
        time.sleep(float(self.context.run_config["sleep"]))
        return [parameters[0] + 1 + self.partition], 10, {"sum": float(parameters[0].sum())}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 10, {"accuracy": 1.0 / (1.0 + float(parameters[0].sum()))}


def client_fn(context: Context):
    return Client(context).to_client()


def mean(results):
    total = sum(n for n, _ in results)
    return {k: sum(n * m[k] for n, m in results) / total for k in results[0][1]}


class Patient(FedAvg):
    def __init__(self, first, clients, **args):
        super().__init__(min_fit_clients=first, min_evaluate_clients=first, min_available_clients=first, **args)
        self.clients = clients

    def configure_fit(self, server_round, parameters, client_manager):
        if server_round > 1:
            self.min_fit_clients = self.min_evaluate_clients = self.min_available_clients = self.clients
        return super().configure_fit(server_round, parameters, client_manager)


def server_fn(context: Context):
    strategy = Patient(
        int(context.run_config["first"]),
        int(context.run_config["clients"]),
        initial_parameters=ndarrays_to_parameters([np.zeros(4, dtype=np.float32)]),
        fit_metrics_aggregation_fn=mean,
        evaluate_metrics_aggregation_fn=mean,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn=client_fn)
server = ServerApp(server_fn=server_fn)
