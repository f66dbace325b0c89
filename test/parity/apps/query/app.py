"""No training: query messages with records of every type there and back, then evaluate messages alone."""

import time

import numpy as np
from flwr.client import ClientApp
from flwr.common import array_from_numpy
from flwr.server import ServerApp
from recording import record

try:
    from flwr.common import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
except ImportError:  # before 1.18
    from flwr.common import ParametersRecord as ArrayRecord, ConfigsRecord as ConfigRecord, MetricsRecord as MetricRecord, RecordSet as RecordDict

client = ClientApp()
server = ServerApp()


def describe(content):
    return {
        "configs": {k: {a: repr(b) for a, b in sorted(v.items())} for k, v in sorted(content.configs_records.items())},
        "metrics": {k: {a: repr(b) for a, b in sorted(v.items())} for k, v in sorted(content.metrics_records.items())},
        "arrays": {k: {a: [b.dtype, list(b.shape), b.stype, b.numpy().tolist()] for a, b in v.items()} for k, v in sorted(content.parameters_records.items())},
    }


@client.query()
def query(msg, context):
    partition = int(context.node_config["partition-id"])
    record("client", at="query", partition=partition, content=describe(msg.content))
    content = RecordDict()
    content.configs_records["who"] = ConfigRecord({"partition": partition, "of": int(context.node_config["num-partitions"])})
    content.metrics_records["numbers"] = MetricRecord({"float": 0.1 + partition, "int": 2**40, "floats": [0.1, 1e-300], "ints": [1, -2], "none": []})
    return msg.create_reply(content)


@client.evaluate()
def evaluate(msg, context):
    partition = int(context.node_config["partition-id"])
    value = float(msg.content.parameters_records["model"]["w"].numpy().sum()) / 3 * (partition + 1)
    record("client", at="evaluate", partition=partition, value=value)
    content = RecordDict()
    content.metrics_records["result"] = MetricRecord({"value": value, "partition": partition})
    return msg.create_reply(content)


def ask(grid, content, kind, group):
    messages = [grid.create_message(content, kind, node, group) for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages))


@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    content = RecordDict()
    content.configs_records["c"] = ConfigRecord({"int": -7, "float": 0.1, "text": "ü 'quoted'", "raw": b"\x00\xff", "on": True, "texts": ["a", ""], "raws": [b"", b"x"], "flags": [True, False], "big": 2**62})
    content.parameters_records["model"] = ArrayRecord({k: array_from_numpy(v) for k, v in {
        "w": np.linspace(0.1, 0.7, 3),
        "empty": np.zeros((0, 2), dtype=np.float32),
        "half": np.array([[0.1, 65504]], dtype=np.float16),
        "bool": np.array([True, False]),
        "scalar": np.array(3, dtype=np.int64),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
    }.items()})
    replies = ask(grid, content, "query", "first")
    for reply in sorted(replies, key=lambda r: r.content.configs_records["who"]["partition"]):
        record("server", at="query", group=reply.metadata.group_id, type=reply.metadata.message_type, content=describe(reply.content))
    for rnd in range(int(context.run_config["num-server-rounds"])):
        for value, partition in sorted((r.content.metrics_records["result"]["value"], r.content.metrics_records["result"]["partition"]) for r in ask(grid, content, "evaluate", str(rnd))):
            record("server", at="evaluate", round=rnd, partition=partition, value=value)
