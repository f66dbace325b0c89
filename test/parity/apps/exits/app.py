"""A client app that ends its process in one message: what the server sees, and that the node answers the next message."""

import os
import signal
import sys
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


@client.query()
def query(msg, context):
    asked, partition = msg.content.configs_records["c"], int(context.node_config["partition-id"])
    seen = dict(context.state.configs_records["n"].items())["n"] if "n" in context.state.configs_records else 0
    context.state.configs_records["n"] = ConfigRecord({"n": seen + 1})
    record("client", at=asked["how"], partition=partition, seen=seen)
    if partition == 1 and asked["how"] == "sys-exit":
        sys.exit(3)
    if partition == 1 and asked["how"] == "os-exit":
        os._exit(7)
    if partition == 1 and asked["how"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    content = RecordDict()
    content.configs_records["c"] = ConfigRecord({"partition": partition, "seen": seen})
    return msg.create_reply(content)


@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    nodes = list(grid.get_node_ids())
    for how in ("fine", context.run_config["how"], "fine"):
        content = RecordDict()
        content.configs_records["c"] = ConfigRecord({"how": how})
        messages = [grid.create_message(content, "query", node, how) for node in nodes]
        replies = list(grid.send_and_receive(messages, timeout=float(context.run_config["timeout"])))
        good = sorted([r.content.configs_records["c"]["partition"], r.content.configs_records["c"]["seen"]] for r in replies if not r.has_error())
        record("server", at=how, good=good, errors=[[r.error.code, r.error.reason] for r in replies if r.has_error()])
