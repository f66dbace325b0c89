"""Clients keep state of every kind of record from one message to the next, also from a message that raised. What is no state is not kept."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import array_from_numpy, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from recording import record

try:
    from flwr.common import ArrayRecord, ConfigRecord, MetricRecord
except ImportError:  # before 1.18
    from flwr.common import ParametersRecord as ArrayRecord, ConfigsRecord as ConfigRecord, MetricsRecord as MetricRecord


class Client(NumPyClient):
    def __init__(self, context):
        self.context, self.partition = context, int(context.node_config["partition-id"])

    def remember(self, what, weights):
        state = self.context.state
        before = dict(state.configs_records["seen"].items()) if "seen" in state.configs_records else {"messages": 0, "list": []}
        total = state.parameters_records["sum"]["w"].numpy() if "sum" in state.parameters_records else np.zeros(4)
        metric = state.metrics_records["m"]["x"] if "m" in state.metrics_records else 0.0
        fresh = not hasattr(self.context, "mark")
        self.context.mark = True  # no state: the next message is to find none
        total = total + weights
        state.configs_records["seen"] = ConfigRecord({"messages": before["messages"] + 1, "list": [*before["list"], what]})
        state.parameters_records["sum"] = ArrayRecord({"w": array_from_numpy(total)})
        state.metrics_records["m"] = MetricRecord({"x": metric + 0.1})
        record("client", at=what, partition=self.partition, fresh=fresh, messages=before["messages"] + 1, before=before["list"], total=total.tolist(), metric=metric)
        return total

    def fit(self, parameters, config):
        total = self.remember(f"fit-{config['round']}", parameters[0])
        if self.partition == 1 and config["round"] == 2:
            raise ValueError("after the state has changed")
        return [parameters[0] + 0.1 * total], 1 + self.partition, {}

    def evaluate(self, parameters, config):
        total = self.remember(f"evaluate-{config['round']}", parameters[0])
        return float(total.sum()), 1 + self.partition, {}


class Recorded(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        record("server", at="fit", round=server_round, results=len(results), failures=[type(f).__name__ for f in failures])
        return super().aggregate_fit(server_round, results, failures)

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        record("server", at="evaluate", round=server_round, loss=loss)
        return loss, metrics


def server_fn(context):
    settings = lambda rnd: {"round": rnd}  # noqa: E731
    strategy = Recorded(
        min_fit_clients=2,
        min_evaluate_clients=2,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters([np.linspace(0.1, 0.4, 4)]),
        on_fit_config_fn=settings,
        on_evaluate_config_fn=settings,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn=lambda context: Client(context).to_client())
server = ServerApp(server_fn=server_fn)
