"""A legacy strategy that never trains: fraction_fit is 0, so that only evaluate messages go out."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from recording import record


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def evaluate(self, parameters, config):
        loss = float(parameters[0].sum()) / 3 * (self.partition + 1)
        record("client", at="evaluate", partition=self.partition, config=dict(config.items()), loss=loss)
        return loss, 1 + self.partition, {"double": 2 * loss}


class Recorded(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        record("server", at="fit", round=server_round, results=len(results))
        return super().aggregate_fit(server_round, results, failures)

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        record("server", at="evaluate", round=server_round, results=len(results), failures=len(failures), loss=loss, **metrics)
        return loss, metrics


def server_fn(context):
    strategy = Recorded(
        fraction_fit=0.0,
        min_fit_clients=0,
        min_evaluate_clients=2,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters([np.linspace(0.1, 0.4, 4)]),
        on_evaluate_config_fn=lambda rnd: {"round": rnd},
        evaluate_metrics_aggregation_fn=lambda results: {"doubles": sum(m["double"] for _, m in results)},
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client())
server = ServerApp(server_fn=server_fn)
