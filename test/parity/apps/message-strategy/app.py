"""A subclass of the message API's FedAvg: a message of its own for each node, replies seen one by one, an error among them; mods of one handler."""

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from recording import record

client = ClientApp()
server = ServerApp()


def halve(msg: Message, context: Context, call_next) -> Message:
    reply = call_next(msg, context)
    reply.content["metrics"]["half"] = reply.content["metrics"]["loss"] / 2
    return reply


@client.train(mods=[halve])
def train(msg: Message, context: Context):
    partition, config = int(context.node_config["partition-id"]), msg.content["config"]
    if partition == 1 and config["server-round"] == 1:
        raise RuntimeError("not in the first round")
    weights = msg.content["arrays"].to_numpy_ndarrays()[0] + 0.1 * (partition + 1)
    record("client", at="train", round=config["server-round"], partition=partition, config=dict(config.items()), weights=weights.tolist())
    return Message(content=RecordDict({"arrays": ArrayRecord([weights]), "metrics": MetricRecord({"loss": float(weights.sum()), "num-examples": 1 + partition})}), reply_to=msg)


@client.train("warm_up")
def warm_up(msg: Message, context: Context):
    record("client", at="warm-up", partition=int(context.node_config["partition-id"]))
    return Message(content=RecordDict({"metrics": MetricRecord({"warm": 1.5, "num-examples": 1})}), reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context):
    partition = int(context.node_config["partition-id"])
    loss = float(msg.content["arrays"].to_numpy_ndarrays()[0].sum()) * (partition + 1)
    record("client", at="evaluate", round=msg.content["config"]["server-round"], partition=partition, loss=loss)
    return Message(content=RecordDict({"metrics": MetricRecord({"loss": loss, "num-examples": 1 + partition})}), reply_to=msg)


class Watched(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        record("server", at="configure", round=server_round, messages=len(messages), nodes=len({m.metadata.dst_node_id for m in messages}))
        return messages

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        for r in sorted(replies, key=lambda r: r.has_error()):
            if r.has_error():
                record("server", at="error", round=server_round, code=r.error.code, reason=r.error.reason)
            else:
                record("server", at="reply", round=server_round, metrics=dict(sorted(r.content["metrics"].items())) if server_round == 1 else {})
        arrays, metrics = super().aggregate_train(server_round, replies)
        record("server", at="aggregate", round=server_round, metrics=dict(metrics.items()), weights=arrays.to_numpy_ndarrays()[0].tolist())
        return arrays, metrics


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = Watched(min_available_nodes=2, min_train_nodes=2, min_evaluate_nodes=2)
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord([np.linspace(0.1, 0.4, 4)]), num_rounds=int(context.run_config["num-server-rounds"]), train_config=ConfigRecord({"lr": 0.1}))
    for rnd, metrics in result.evaluate_metrics_clientapp.items():
        record("server", at="evaluate", round=rnd, **dict(metrics.items()))
    asked = [Message(RecordDict(), dst_node_id=node, message_type=f"{MessageType.TRAIN}.warm_up") for node in grid.get_node_ids()]
    for reply in grid.send_and_receive(asked):
        record("server", at="warm-up", type=reply.metadata.message_type, metrics=dict(reply.content["metrics"].items()))
