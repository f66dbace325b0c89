"""NumPyClient and FedAvg as most apps have them: initial parameters of a client, central evaluation, metrics, history."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow
from recording import record


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def get_parameters(self, config):
        record("client", at="get_parameters")  # any one is asked
        return [np.linspace(0.0, 0.3, 5), np.full((2, 2), 0.1, dtype=np.float32)]

    def fit(self, parameters, config):
        target = np.linspace(0.1, 0.7, 5) * (self.partition + 1)
        weights = parameters[0] + config["rate"] * (target - parameters[0])
        bias = parameters[1] * np.float32(1.1 + self.partition)
        loss = float(np.square(weights - target).mean())
        record("client", at="fit", round=config["round"], partition=self.partition, loss=loss, weights=weights.tolist(), bias=bias.tolist())
        return [weights, bias], 3 + self.partition, {"loss": loss, "who": self.partition, "ok": True, "raw": b"\x00\xff", "name": "a 'b'"}

    def evaluate(self, parameters, config):
        loss = float(np.square(parameters[0] - (self.partition + 1) / 3).sum() + parameters[1].sum())
        record("client", at="evaluate", round=config["round"], partition=self.partition, loss=loss)
        return loss, 3 + self.partition, {"accuracy": 1 / (1 + loss)}


client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client())
server = ServerApp()


def mean(results):
    for n, m in sorted(results, key=lambda r: r[0]):
        record("server", at="reply", examples=n, metrics={k: repr(v) for k, v in sorted(m.items()) if not isinstance(v, float)})
    total = sum(n for n, _ in results)
    return {k: sum(n * m[k] for n, m in results) / total for k, v in results[0][1].items() if isinstance(v, float)}


def central(rnd, parameters, config):
    loss = float(np.square(parameters[0]).sum() + np.square(parameters[1]).sum())
    record("server", at="central", round=rnd, loss=loss, weights=parameters[0].tolist(), bias=parameters[1].tolist(), dtype=str(parameters[1].dtype))
    return loss, {"central": loss / 2}


@server.main()
def main(grid, context: Context) -> None:
    strategy = FedAvg(
        min_fit_clients=2,
        min_evaluate_clients=2,
        min_available_clients=2,
        evaluate_fn=central,
        on_fit_config_fn=lambda rnd: {"round": rnd, "rate": 0.25},
        on_evaluate_config_fn=lambda rnd: {"round": rnd},
        fit_metrics_aggregation_fn=mean,
        evaluate_metrics_aggregation_fn=mean,
    )
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])), strategy=strategy)
    DefaultWorkflow()(grid, legacy)
    h = legacy.history
    record("server", at="history", losses=h.losses_distributed, central=h.losses_centralized, fit=h.metrics_distributed_fit, evaluate=h.metrics_distributed, metrics=h.metrics_centralized)
