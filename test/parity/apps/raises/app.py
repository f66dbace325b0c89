"""A client that raises all sorts of things: the codes and texts of the error replies, what belongs to them, and that the next message is answered."""

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


class Own(Exception):
    def __init__(self, code):
        super().__init__(f"code {code}")


class Silent(Exception):
    pass


def nested():
    try:
        [][0]
    except IndexError as e:
        raise KeyError("missing 'key'") from e


def fail(error):
    raise error


# What each of the two clients does, step by step.
HOW = {
    "fine": (lambda: None, lambda: None),
    "texts": (lambda: fail(Own(7)), lambda: fail(ValueError("a text with 'quotes', ü and\na line"))),
    "one of two": (lambda: None, nested),
    "nothing said": (lambda: fail(Silent()), lambda: fail(AssertionError(1, "two"))),
    "fine again": (lambda: None, lambda: None),
}


@client.query()
def query(msg, context):
    how, partition = msg.content.configs_records["c"]["how"], int(context.node_config["partition-id"])
    record("client", at=how, partition=partition)
    HOW[how][partition]()
    content = RecordDict()
    content.configs_records["c"] = ConfigRecord({"partition": partition})
    return msg.create_reply(content)


@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    nodes = list(grid.get_node_ids())
    for how in HOW:
        content = RecordDict()
        content.configs_records["c"] = ConfigRecord({"how": how})
        replies = list(grid.send_and_receive([grid.create_message(content, "query", node, "g") for node in nodes]))
        good = sorted(r.content.configs_records["c"]["partition"] for r in replies if not r.has_error())
        record("server", at=how, good=good, errors=sorted([r.error.code, r.error.reason] for r in replies if r.has_error()))
    # There is no handler for this type.
    replies = list(grid.send_and_receive([grid.create_message(RecordDict(), "evaluate", node, "g") for node in nodes]))
    record("server", at="no handler", errors=sorted([r.error.code, r.error.reason] for r in replies if r.has_error()))
