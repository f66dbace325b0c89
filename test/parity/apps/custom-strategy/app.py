"""A subclass of FedAvg that asks clients for properties, gives each a config of its own, and takes the larger of what they answer."""

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import FitIns, GetPropertiesIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from recording import record


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def get_properties(self, config):
        record("client", at="properties", partition=self.partition, config=dict(config.items()))
        return {"partition": self.partition, "speed": 0.1 * (self.partition + 1)}

    def fit(self, parameters, config):
        weights = parameters[0] + config["rate"] * np.linspace(-0.3, 0.7, 4)
        record("client", at="fit", partition=self.partition, config=dict(config.items()), weights=weights.tolist())
        return [weights], 1, {"partition": self.partition}

    def evaluate(self, parameters, config):
        loss = float(np.abs(parameters[0]).sum() * (self.partition + 1))
        record("client", at="evaluate", partition=self.partition, config=dict(config.items()), loss=loss)
        return loss, 1 + self.partition, {}


class Larger(FedAvg):
    def configure_fit(self, server_round, parameters, client_manager):
        client_manager.wait_for(2)
        record("server", at="configure", round=server_round, available=client_manager.num_available())
        plan = []
        for proxy in client_manager.sample(2, min_num_clients=2):
            found = proxy.get_properties(GetPropertiesIns({"round": server_round}), timeout=None, group_id=server_round).properties
            plan.append((proxy, FitIns(parameters, {"rate": found["speed"], "round": server_round})))
        return plan

    def aggregate_fit(self, server_round, results, failures):
        found = sorted((r.metrics["partition"], parameters_to_ndarrays(r.parameters)[0]) for _, r in results)
        weights = np.maximum(found[0][1], found[1][1])
        record("server", at="aggregate", round=server_round, from_=[int(p) for p, _ in found], failures=len(failures), weights=weights.tolist())
        return ndarrays_to_parameters([weights]), {}

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        record("server", at="evaluate", round=server_round, replies=sorted((r.num_examples, r.loss, r.status.code.name) for _, r in results), loss=loss)
        return loss, metrics


def server_fn(context):
    strategy = Larger(min_evaluate_clients=2, min_available_clients=2, initial_parameters=ndarrays_to_parameters([np.linspace(0.1, 0.4, 4)]), on_evaluate_config_fn=lambda rnd: {"round": rnd})
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client())
server = ServerApp(server_fn=server_fn)
