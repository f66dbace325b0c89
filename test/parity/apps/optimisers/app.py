"""FedProx and FedAdam, whose state lives on over a round in which a client fails in fit and one in which it fails in evaluate."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAdam, FedProx, FedYogi
from recording import record


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def fit(self, parameters, config):
        if self.partition == 0 and config["round"] == 2:
            raise OSError("no data today")
        weights = parameters[0] - (0.2 + config.get("proximal_mu", 0.0)) * (parameters[0] - self.partition - 0.3)
        record("client", at="fit", partition=self.partition, config=dict(config.items()), weights=weights.tolist())
        return [weights], 2 + self.partition, {}

    def evaluate(self, parameters, config):
        if self.partition == 1 and config["round"] == 1:
            raise OSError("no test data today")
        loss = float(np.square(parameters[0] - self.partition - 0.3).sum())
        record("client", at="evaluate", partition=self.partition, config=dict(config.items()), loss=loss)
        return loss, 2 + self.partition, {}


def recorded(base):
    class Recorded(base):
        def aggregate_fit(self, server_round, results, failures):
            parameters, metrics = super().aggregate_fit(server_round, results, failures)
            record("server", at="fit", round=server_round, results=len(results), failures=len(failures), weights=parameters_to_ndarrays(parameters)[0].tolist())
            return parameters, metrics

        def aggregate_evaluate(self, server_round, results, failures):
            loss, metrics = super().aggregate_evaluate(server_round, results, failures)
            record("server", at="evaluate", round=server_round, results=len(results), failures=len(failures), loss=loss)
            return loss, metrics

    return Recorded


def server_fn(context):
    base, extra = {"prox": (FedProx, {"proximal_mu": 0.1}), "adam": (FedAdam, {"eta": 0.05}), "yogi": (FedYogi, {"eta": 0.05})}[context.run_config["strategy"]]
    settings = lambda rnd: {"round": rnd}  # noqa: E731
    strategy = recorded(base)(
        min_fit_clients=2,
        min_evaluate_clients=2,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters([np.linspace(0.1, 0.4, 4)]),
        on_fit_config_fn=settings,
        on_evaluate_config_fn=settings,
        **extra,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client())
server = ServerApp(server_fn=server_fn)
