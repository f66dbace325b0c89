"""FedAvg in the message API: each client moves the one array towards a value of its own, and evaluates. Both apps tell what time was their own."""

import json
import os
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()
FALLBACK = json.loads(os.environ.get("BENCH_CONFIG", "{}"))  # Flower's simulation engine, called from Python, gives no run config


def setting(context: Context, key: str):
    return context.run_config.get(key, FALLBACK.get(key))


@client.train()
def train(msg: Message, context: Context) -> Message:
    begun = time.perf_counter()
    partition = int(context.node_config["partition-id"])
    if float(setting(context, "wait") or 0) > 0 and msg.content["config"]["server-round"] == 1:
        with open(os.path.join(os.environ["BENCH_MARK"], f"waiting-{partition}"), "w"):
            pass
        time.sleep(float(setting(context, "wait")))
    values = msg.content["arrays"]["w"].numpy()
    values = values + np.float32(0.1) * (np.float32(partition % 7) - values)
    arrays = ArrayRecord({"w": Array(values)})
    metrics = MetricRecord({"num-examples": 1, "seconds": time.perf_counter() - begun})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    begun = time.perf_counter()
    loss = float(np.square(msg.content["arrays"]["w"].numpy()).mean())
    metrics = MetricRecord({"num-examples": 1, "loss": loss, "seconds": time.perf_counter() - begun})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)


class Timed(FedAvg):
    """FedAvg that keeps the time of its own arithmetic, and of the clients'."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.own, self.clients = 0.0, {}

    def _timed(self, what, rnd, replies):
        replies = list(replies)
        found = [r.content["metrics"]["seconds"] for r in replies if r.has_content()]
        self.clients[what] = self.clients.get(what, 0.0) + max(found, default=0.0)  # they work side by side
        begun = time.perf_counter()
        out = getattr(super(), what)(rnd, replies)
        self.own += time.perf_counter() - begun
        return out

    def aggregate_train(self, server_round, replies):
        return self._timed("aggregate_train", server_round, replies)

    def aggregate_evaluate(self, server_round, replies):
        return self._timed("aggregate_evaluate", server_round, replies)


@server.main()
def main(grid: Grid, context: Context) -> None:
    begun = time.perf_counter()
    clients, rounds = int(setting(context, "clients")), int(setting(context, "num-server-rounds"))
    while len(list(grid.get_node_ids())) < clients:  # Flower's simulation engine registers them while this app runs
        time.sleep(0.01)
    strategy = Timed(min_available_nodes=clients, min_train_nodes=clients, min_evaluate_nodes=clients)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord({"w": Array(np.zeros(int(setting(context, "numbers")), dtype=np.float32))}), num_rounds=rounds)
    losses = [m["loss"] for _, m in sorted(result.evaluate_metrics_clientapp.items())]
    print("BENCH " + json.dumps({"app": time.perf_counter() - begun, "aggregation": strategy.own, "clients": sum(strategy.clients.values()), "losses": losses}), flush=True)
