"""The message API: FedAvg with configs of its own, two array records' worth of arrays, central evaluation, and the whole result."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from recording import record

client = ClientApp()
server = ServerApp()


@client.train()
def train(msg: Message, context: Context):
    partition, config = int(context.node_config["partition-id"]), msg.content["config"]
    weights, bias = (a.numpy() for a in msg.content["arrays"].values())
    target = np.linspace(0.1, 0.7, 5) * (partition + 1)
    weights = weights + config["rate"] * (target - weights)
    bias = bias * np.float32(1.1 + partition)
    loss = float(np.square(weights - target).mean())
    record("client", at="train", round=config["server-round"], partition=partition, loss=loss, weights=weights.tolist(), bias=bias.tolist(), keys=list(msg.content["arrays"].keys()), config={k: repr(v) for k, v in config.items()})
    arrays = ArrayRecord({"w": Array(weights), "b": Array(bias)})
    metrics = MetricRecord({"loss": loss, "sizes": [loss, loss / 2], "num-examples": 3 + partition})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context):
    partition = int(context.node_config["partition-id"])
    weights = msg.content["arrays"]["w"].numpy()
    loss = float(np.square(weights - (partition + 1) / 3).sum())
    record("client", at="evaluate", round=msg.content["config"]["server-round"], partition=partition, loss=loss)
    return Message(content=RecordDict({"metrics": MetricRecord({"loss": loss, "num-examples": 3 + partition})}), reply_to=msg)


def central(rnd: int, arrays: ArrayRecord) -> MetricRecord:
    record("server", at="central", round=rnd, arrays={k: a.numpy().tolist() for k, a in arrays.items()}, dtypes={k: a.dtype for k, a in arrays.items()})
    return MetricRecord({"sum": float(arrays["w"].numpy().sum())})


@server.main()
def main(grid: Grid, context: Context) -> None:
    result = FedAvg(min_available_nodes=2, min_train_nodes=2, min_evaluate_nodes=2).start(
        grid=grid,
        initial_arrays=ArrayRecord({"w": Array(np.linspace(0.0, 0.3, 5)), "b": Array(np.full((2, 2), 0.1, dtype=np.float32))}),
        num_rounds=int(context.run_config["num-server-rounds"]),
        train_config=ConfigRecord({"rate": 0.25, "name": "a 'b'", "raw": b"\x00\xff", "list": [1, 2], "on": True}),
        evaluate_fn=central,
    )
    for at in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
        for rnd, metrics in getattr(result, at).items():
            record("server", at=at, round=rnd, **dict(metrics.items()))
    record("server", at="result", arrays={k: a.numpy().tolist() for k, a in result.arrays.items()})
