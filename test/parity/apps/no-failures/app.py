"""accept_failures=False: a round in which one client fails leaves the model as it was, and its evaluation gives no loss."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from recording import record


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def fit(self, parameters, config):
        record("client", at="fit", partition=self.partition, round=config["round"], given=parameters[0].tolist())
        if self.partition == 1 and config["round"] == 1:
            raise RuntimeError("failed in fit")
        return [parameters[0] + 0.1], 1, {}

    def evaluate(self, parameters, config):
        record("client", at="evaluate", partition=self.partition, round=config["round"], given=parameters[0].tolist())
        if self.partition == 0 and config["round"] == 2:
            raise RuntimeError("failed in evaluate")
        return float(parameters[0].sum()), 1, {}


class Recorded(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        record("server", at="fit", round=server_round, results=len(results), failures=len(failures), nothing=parameters is None)
        return parameters, metrics

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        record("server", at="evaluate", round=server_round, results=len(results), failures=len(failures), loss=loss)
        return loss, metrics


def server_fn(context):
    settings = lambda rnd: {"round": rnd}  # noqa: E731
    strategy = Recorded(
        accept_failures=False,
        min_fit_clients=2,
        min_evaluate_clients=2,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters([np.linspace(0.1, 0.4, 4)]),
        on_fit_config_fn=settings,
        on_evaluate_config_fn=settings,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client())
server = ServerApp(server_fn=server_fn)
