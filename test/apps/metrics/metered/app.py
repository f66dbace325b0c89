"""Each client logs with MLflow's client and as plain JSON, with writer=true also by a SummaryWriter; the server app with MLflow's."""

import json
import os
import urllib.request

import mlflow
import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


def post(*objects):
    """The plain form."""
    request = urllib.request.Request(os.environ["PERGOLA_METRICS"], data="\n".join(json.dumps(o) for o in objects).encode())
    urllib.request.urlopen(request).close()


class Client(NumPyClient):
    def __init__(self, context: Context):
        self.partition = int(context.node_config["partition-id"])
        self.writer = bool(context.run_config["writer"])

    def fit(self, parameters, config):
        rnd = int(config["round"])
        mlflow.set_experiment("metered")
        with mlflow.start_run(run_name="train"):
            mlflow.log_metric("loss", 0.1 * rnd + self.partition, step=rnd)
            mlflow.log_metrics({"third": 1 / 3, "not a number": float("nan"), "infinite": float("-inf")}, step=rnd)
            mlflow.log_param("lr", 0.1)
            mlflow.log_params({"batch": 32, "optimizer": "sgd, with momentum"})
            mlflow.set_tag("partition", self.partition)
            mlflow.set_tags({"round": rnd})
        with mlflow.start_run():
            mlflow.log_metric("seconds", 1e-300, step=rnd)
        post({"name": "plain", "value": rnd / 7, "step": rnd}, {"name": "diverged", "value": float("inf"), "step": rnd})
        if self.writer:
            import nvflare.client as flare
            from nvflare.client.tracking import SummaryWriter

            flare.init()
            writer = SummaryWriter()
            writer.add_scalar("written", np.float32(rnd) / 3, rnd)
            writer.add_scalars("group", {"a": 1.5, "b": rnd}, global_step=rnd)
            writer.flush()
        return [parameters[0] + 1], 1, {}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 1, {}


def client_fn(context: Context):
    return Client(context).to_client()


def server_fn(context: Context):
    clients = int(context.run_config["clients"])
    mlflow.log_metric("clients", clients)
    mlflow.end_run()
    strategy = FedAvg(
        min_fit_clients=clients,
        min_evaluate_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters([np.zeros(4, dtype=np.float32)]),
        on_fit_config_fn=lambda rnd: {"round": rnd},
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["num-server-rounds"])))


client = ClientApp(client_fn=client_fn)
server = ServerApp(server_fn=server_fn)
