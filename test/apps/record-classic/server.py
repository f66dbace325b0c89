"""The server app as it was written for flwr 1.8: strategy and rounds are fixed."""

import json
import os

import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerConfig
from flwr.server.strategy import FedAvg


def record(kind, **values):
    folder = os.environ.get("PARITY_OUT")
    if folder:
        with open(os.path.join(folder, f"{os.getpid()}.jsonl"), "a") as f:
            f.write(json.dumps({"kind": kind, **values}, sort_keys=True) + "\n")


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


strategy = Recorded(
    min_fit_clients=2,
    min_evaluate_clients=2,
    min_available_clients=2,
    initial_parameters=ndarrays_to_parameters([np.linspace(0.0, 0.3, 5)]),
    on_fit_config_fn=lambda rnd: {"round": rnd},
    on_evaluate_config_fn=lambda rnd: {"round": rnd},
    fit_metrics_aggregation_fn=mean,
    evaluate_metrics_aggregation_fn=mean,
)
app = ServerApp(config=ServerConfig(num_rounds=2), strategy=strategy)
