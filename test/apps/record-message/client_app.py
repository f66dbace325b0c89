"""The client app in the message API."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from recording import record

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    partition, rnd = int(context.node_config["partition-id"]), int(msg.content["config"]["server-round"])
    if rnd == 1:
        record("node-config", partition=partition, values=dict(context.node_config.items()))
        record("client-config", partition=partition, values=dict(context.run_config.items()))
    weights = msg.content["arrays"].to_numpy_ndarrays()[0]
    target = np.linspace(0.1, 0.7, 5) * (partition + 1)
    updated = weights + float(context.run_config["rate"]) * (target - weights)
    loss = float(np.square(updated - target).mean())
    record("client", at="train", round=rnd, partition=partition, loss=loss, weights=updated.tolist())
    metrics = MetricRecord({"train_loss": loss, "num-examples": 3 + partition})
    return Message(content=RecordDict({"arrays": ArrayRecord([updated]), "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    partition = int(context.node_config["partition-id"])
    weights = msg.content["arrays"].to_numpy_ndarrays()[0]
    loss = float(np.square(weights - (partition + 1) / 3).sum())
    record("client", at="evaluate", round=int(msg.content["config"]["server-round"]), partition=partition, loss=loss)
    metrics = MetricRecord({"eval_loss": loss, "num-examples": 3 + partition})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
