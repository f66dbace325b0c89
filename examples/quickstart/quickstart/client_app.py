"""What every site runs, on data that stays there."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import load_partition, make_model, score

app = ClientApp()


def prepare(msg: Message, context: Context):
    """The model that came with the message, and this site's data."""
    config = context.run_config
    model = make_model(
        msg.content["arrays"].to_numpy_ndarrays(), float(config["penalty"]), int(config["local-epochs"])
    )
    node = context.node_config
    return model, load_partition(int(node["partition-id"]), int(node["num-partitions"]))


@app.train()
def train(msg: Message, context: Context) -> Message:
    """A few steps on the site's own images."""
    model, (x, _, y, _) = prepare(msg, context)
    model.fit(x, y)
    reply = RecordDict(
        {
            "arrays": ArrayRecord([model.coef_, model.intercept_]),
            "metrics": MetricRecord({**score(model, x, y), "num-examples": len(y)}),
        }
    )
    return Message(content=reply, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """How well the common model does on images that no training saw."""
    model, (_, x, _, y) = prepare(msg, context)
    metrics = MetricRecord({**score(model, x, y), "num-examples": len(y)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
