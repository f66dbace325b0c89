"""Secure aggregation with three clients: SecAgg+ keeps keys and shares in the clients' state from stage to stage."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.common import Context, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from recording import record


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def fit(self, parameters, config):
        weights = parameters[0] + np.linspace(-0.3, 0.7, 4) * (self.partition + 1)
        record("client", at="fit", partition=self.partition, weights=weights.tolist())
        np.random.seed(self.partition)  # the mod rounds to integers by chance
        return [weights], 2, {}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 1, {}


def stages(msg, context, call_next):
    reply = secaggplus_mod(msg, context, call_next)
    if msg.metadata.message_type == "train":
        names = sorted(reply.content.configs_records.keys())
        record("client", at="stage", partition=int(context.node_config["partition-id"]), type=msg.metadata.message_type, answer=names, state=sorted(context.state.configs_records.keys()))
    return reply


class Recorded(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        record("server", at="fit", round=server_round, results=len(results), failures=len(failures), weights=parameters_to_ndarrays(parameters)[0].tolist())
        return parameters, metrics


client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client(), mods=[stages])
server = ServerApp()


@server.main()
def main(grid, context: Context) -> None:
    strategy = Recorded(fraction_evaluate=0.0, min_fit_clients=3, min_evaluate_clients=0, min_available_clients=3, initial_parameters=ndarrays_to_parameters([np.linspace(0.1, 0.4, 4)]))
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])), strategy=strategy)
    DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2))(grid, legacy)
