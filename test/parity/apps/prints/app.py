"""Apps that print a lot: to both streams, long lines, no end of the line, bytes that are no text, loggers. The numbers are to be as ever."""

import logging
import sys

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import ndarrays_to_parameters
from flwr.common.logger import log
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from recording import record


def noise(who, lines):
    for i in range(lines):
        print(who, i, "x" * 60)
        if i % 10 == 0:
            print(who, i, file=sys.stderr)
    print("long " * 20_000)
    sys.stdout.flush()
    sys.stdout.buffer.write(b"\xff\xfe no text\n")
    log(logging.INFO, "%s by flwr's logger", who)
    logging.getLogger("of the app").warning("%s by a logger of its own", who)
    sys.stderr.write(f"{who}: no end of the line")


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def fit(self, parameters, config):
        noise(f"client {self.partition}", int(config["lines"]))
        weights = parameters[0] + 0.1 * (self.partition + 1)
        record("client", at="fit", partition=self.partition, weights=weights.tolist())
        return [weights], 1 + self.partition, {}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 1 + self.partition, {}


class Recorded(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        noise("server", 1000)
        record("server", at="fit", round=server_round, results=len(results), failures=len(failures))
        return super().aggregate_fit(server_round, results, failures)

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        record("server", at="evaluate", round=server_round, results=len(results), failures=len(failures), loss=loss)
        return loss, metrics


def server_fn(context):
    lines = int(context.run_config["lines"])
    strategy = Recorded(
        min_fit_clients=2,
        min_evaluate_clients=2,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters([np.linspace(0.1, 0.4, 4)]),
        on_fit_config_fn=lambda rnd: {"lines": lines},
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client())
server = ServerApp(server_fn=server_fn)
