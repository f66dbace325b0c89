"""Differential privacy, local, central and with clipping at the clients. The seeds are the app's, so that even the noise can be compared."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.client.mod import LocalDpMod, fixedclipping_mod
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import DifferentialPrivacyClientSideFixedClipping, DifferentialPrivacyServerSideFixedClipping, FedAvg
from recording import record

local = LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=8.0, delta=0.1)


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def fit(self, parameters, config):
        weights = parameters[0] + np.linspace(-0.9, 1.7, 4) * (self.partition + 1)
        record("client", at="fit", round=config["round"], partition=self.partition, weights=weights.tolist())
        np.random.seed(10 * config["round"] + self.partition)
        return [weights], 1, {}

    def evaluate(self, parameters, config):
        loss = float(parameters[0].sum())
        record("client", at="evaluate", partition=self.partition, loss=loss)
        return loss, 1, {}


def protect(msg, context, call_next):
    if msg.metadata.message_type != "train":
        return call_next(msg, context)
    mode = msg.content.configs_records["fitins.config"]["mode"]
    if mode == "local":
        return local(msg, context, call_next)
    if mode == "clients":
        return fixedclipping_mod(msg, context, call_next)
    return call_next(msg, context)


class Recorded(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        record("server", at="replies", round=server_round, weights=sorted(parameters_to_ndarrays(r.parameters)[0].tolist() for _, r in results), failures=len(failures))
        np.random.seed(server_round)
        return super().aggregate_fit(server_round, results, failures)

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        record("server", at="evaluate", round=server_round, loss=loss)
        return loss, metrics


def server_fn(context):
    mode = context.run_config["mode"]
    strategy = Recorded(
        min_fit_clients=2,
        min_evaluate_clients=2,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters([np.linspace(0.1, 0.4, 4)]),
        on_fit_config_fn=lambda rnd: {"round": rnd, "mode": mode},
    )
    if mode == "central":
        strategy = DifferentialPrivacyServerSideFixedClipping(strategy, noise_multiplier=0.2, clipping_norm=0.5, num_sampled_clients=2)
    if mode == "clients":
        strategy = DifferentialPrivacyClientSideFixedClipping(strategy, noise_multiplier=0.2, clipping_norm=0.5, num_sampled_clients=2)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client(), mods=[protect])
server = ServerApp(server_fn=server_fn)
