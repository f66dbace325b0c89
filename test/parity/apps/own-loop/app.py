"""A message loop of the app's own: push and pull, a timeout with one reply of two, the late reply pulled afterwards, and node by node."""

import os
import time

from flwr.client import ClientApp
from flwr.server import ServerApp
from recording import record

try:
    from flwr.common import ConfigRecord, RecordDict
except ImportError:  # before 1.18
    from flwr.common import ConfigsRecord as ConfigRecord, RecordSet as RecordDict

client = ClientApp()
server = ServerApp()


def configs(**values):
    content = RecordDict()
    content.configs_records["c"] = ConfigRecord(values)
    return content


@client.query()
def query(msg, context):
    partition, asked = int(context.node_config["partition-id"]), msg.content.configs_records["c"]
    gate = asked["gate"]
    give_up = time.monotonic() + 120
    while gate and partition == 1 and not os.path.exists(gate) and time.monotonic() < give_up:
        time.sleep(0.05)
    record("client", at=asked["step"], partition=partition, opened=bool(gate) and os.path.exists(gate) if partition == 1 else None)
    return msg.create_reply(configs(partition=partition, step=asked["step"], tenth=0.1 * (partition + 1)))


def found(replies):
    return sorted((r.content.configs_records["c"]["partition"], r.content.configs_records["c"]["step"], r.content.configs_records["c"]["tenth"]) for r in replies)


def answered(reply):
    m = reply.metadata
    return m.reply_to_message if hasattr(m, "reply_to_message") else m.reply_to_message_id  # renamed in 1.21


def pull(grid, ids, n):
    """Pull until there are n replies. Of ids whose reply has been pulled Flower makes errors, so they are asked for no more."""
    replies, waiting = [], set(ids)
    while len(replies) < n:
        for reply in grid.pull_messages(list(waiting)):
            waiting.discard(answered(reply))
            replies.append(reply)
        time.sleep(0.1)
    return replies


@server.main()
def main(grid, context):
    timeout, gate = float(context.run_config["timeout"]), os.path.join(os.environ.get("PARITY_OUT", "."), "gate")
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    nodes = list(grid.get_node_ids())

    ids = list(grid.push_messages([grid.create_message(configs(step="push", gate=""), "query", node, "1") for node in nodes]))
    record("server", at="pushed", ids=len(set(ids)), types=sorted({type(i).__name__ for i in ids}))
    replies = pull(grid, ids, 2)
    record("server", at="pulled", found=found(replies), answers={answered(r) for r in replies} == set(ids))
    again = list(grid.pull_messages(ids))
    record("server", at="pulled again", errors=sorted([r.error.code, r.error.reason] for r in again))

    began = time.monotonic()
    replies = list(grid.send_and_receive([grid.create_message(configs(step="late", gate=gate), "query", node, "2") for node in nodes], timeout=timeout))
    record("server", at="timeout", found=found(replies), waited=time.monotonic() - began >= timeout)
    with open(gate, "w"):
        pass

    # A node answers one message at a time, so the next one comes after the late one.
    replies = list(grid.send_and_receive([grid.create_message(configs(step="next", gate=""), "query", node, "3") for node in nodes]))
    record("server", at="next", found=found(replies))
    os.remove(gate)

    ids = list(grid.push_messages([grid.create_message(configs(step="pushed late", gate=gate), "query", node, "4") for node in nodes]))
    replies = pull(grid, ids, 1)
    record("server", at="one of two", found=found(replies))
    with open(gate, "w"):
        pass
    replies += pull(grid, set(ids) - {answered(r) for r in replies}, 1)
    record("server", at="both", found=found(replies))

    replies = []
    for node in nodes:
        replies += grid.send_and_receive([grid.create_message(configs(step="alone", gate=""), "query", node, "")], timeout=300.0)
    record("server", at="alone", found=found(replies))
