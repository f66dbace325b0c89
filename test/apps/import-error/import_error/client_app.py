"""The client side; it is in order."""

from flwr.client import ClientApp, NumPyClient
from flwr.common import Context


class Client(NumPyClient):
    def __init__(self, context: Context):
        self.context = context
        self.partition = int(context.node_config["partition-id"])

    def fit(self, parameters, config):
        return [parameters[0] + 1 + self.partition], 10, {"sum": float(parameters[0].sum())}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 10, {"accuracy": 1.0 / (1.0 + float(parameters[0].sum()))}


def client_fn(context: Context):
    return Client(context).to_client()


app = ClientApp(client_fn=client_fn)
