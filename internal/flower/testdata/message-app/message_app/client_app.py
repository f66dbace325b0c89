"""Adds 1 + partition per training; partition 1 raises if run config "end" is "client"."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    partition = int(context.node_config["partition-id"])
    if context.run_config["end"] == "client" and partition == 1:
        raise ZeroDivisionError("asked to, in the client app")
    arrays = msg.content["arrays"].to_numpy_ndarrays()[0] + 1 + partition
    metrics = MetricRecord({"train_loss": float(arrays.sum()) / 7, "num-examples": 10})
    return Message(content=RecordDict({"arrays": ArrayRecord([arrays]), "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    arrays = msg.content["arrays"].to_numpy_ndarrays()[0]
    metrics = MetricRecord({"eval_loss": float(arrays.sum()) / 3, "eval_acc": 0.5, "num-examples": 10})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
