"""Lifespan contexts of both apps: entered and left around each message, also around one that raises, and around the server app."""

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
steps = []


@client.lifespan()
def around(context):
    partition = int(context.node_config["partition-id"])
    count = dict(context.state.configs_records["n"].items())["n"] if "n" in context.state.configs_records else 0
    context.state.configs_records["n"] = ConfigRecord({"n": count + 1})
    steps.clear()
    steps.append("enter")
    try:
        yield
    finally:
        steps.append("leave")
        record("client", at="lifespan", partition=partition, count=count, steps=list(steps))


@client.query()
def query(msg, context):
    steps.append("query")
    if msg.content.configs_records["c"]["fail"] and int(context.node_config["partition-id"]) == 1:
        raise ValueError("within the lifespan")
    content = RecordDict()
    content.configs_records["c"] = ConfigRecord({"partition": int(context.node_config["partition-id"])})
    return msg.create_reply(content)


@server.lifespan()
def whole(context):
    record("server", at="enter", settings=dict(context.run_config.items()))
    yield
    record("server", at="leave")


@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    for fail in (False, True, False):
        content = RecordDict()
        content.configs_records["c"] = ConfigRecord({"fail": fail})
        replies = list(grid.send_and_receive([grid.create_message(content, "query", node, str(fail)) for node in grid.get_node_ids()]))
        good = sorted(r.content.configs_records["c"]["partition"] for r in replies if not r.has_error())
        record("server", at="replies", fail=fail, good=good, errors=[[r.error.code, r.error.reason] for r in replies if r.has_error()])
