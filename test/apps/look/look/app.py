"""Each client reports its node config, the variable LOOK and config/look.txt of its working directory; with GATE set it waits in fit until that file is there."""

import os
import time

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


class Client(NumPyClient):
    def __init__(self, context: Context):
        self.partition = int(context.node_config["partition-id"])
        self.partitions = int(context.node_config["num-partitions"])

    def fit(self, parameters, config):
        with open("config/look.txt") as f:
            print(f"LOOK partition {self.partition} of {self.partitions}, {f.read().strip()}", flush=True)
        gate = os.environ.get("GATE")
        while gate and not os.path.exists(gate):
            time.sleep(0.05)
        return parameters, 1, {"partition": self.partition}

    def evaluate(self, parameters, config):
        look = float(os.environ.get("LOOK", "-1"))
        return 0.0, 1, {"partition": self.partition, "partitions": self.partitions, "look": look}


def client_fn(context: Context):
    return Client(context).to_client()


def by_partition(results):
    return {f"{k}-{int(m['partition'])}": float(v) for _, m in results for k, v in m.items() if k != "partition"}


def server_fn(context: Context):
    clients = int(context.run_config["clients"])
    strategy = FedAvg(
        min_fit_clients=clients,
        min_evaluate_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters([np.zeros(4, dtype=np.float32)]),
        fit_metrics_aggregation_fn=lambda results: {"clients": float(len(results))},
        evaluate_metrics_aggregation_fn=by_partition,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn=client_fn)
server = ServerApp(server_fn=server_fn)
