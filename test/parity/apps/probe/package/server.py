"""The server app writes down what it sees of itself, of the nodes, and of the replies."""

import time

from flwr.common import DEFAULT_TTL
from flwr.server import Driver, ServerApp

from .look import process, seen, typed
from .recording import record

try:
    from flwr.common import ConfigRecord, RecordDict
except ImportError:  # before 1.18
    from flwr.common import ConfigsRecord as ConfigRecord, RecordSet as RecordDict

server = ServerApp()


def ask(grid, nodes, kind, step, group, **extra):
    content = RecordDict()
    content.configs_records["c"] = ConfigRecord({"step": step})
    messages = [grid.create_message(content, kind, node, group, **extra) for node in nodes]
    seen("message before it is sent", "server", at=step, types=sorted({m.metadata.message_type for m in messages}), ttls=sorted({m.metadata.ttl for m in messages}), groups=sorted({m.metadata.group_id for m in messages}), ids=sorted({m.metadata.message_id for m in messages}), error=any(m.has_error() for m in messages))
    return list(grid.send_and_receive(messages))


def answered(m):
    return m.reply_to_message if hasattr(m, "reply_to_message") else m.reply_to_message_id


@server.main()
def main(grid, context):
    who = "server"
    process(who)
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    nodes = list(grid.get_node_ids())
    seen("nodes", who, count=len(nodes), different=len(set(nodes)), types=sorted({type(n).__name__ for n in nodes}), large=all(abs(n) > 2**32 for n in nodes), same=sorted(grid.get_node_ids()) == sorted(nodes))
    seen("run config", who, values=typed(context.run_config))
    seen("context", who, node=context.node_id, node_config=typed(context.node_config), state=[type(context.state).__name__, len(context.state.configs_records)], run=not hasattr(context, "run_id") or context.run_id == grid.run.run_id)
    run = grid.run
    seen("run", who, id=[type(run.run_id).__name__, run.run_id > 2**32], fab=getattr(run, "fab_id", None), version=getattr(run, "fab_version", None), hash=len(getattr(run, "fab_hash", "") or ""), overrides=typed(getattr(run, "override_config", {}) or {}))
    seen("grid", who, driver=isinstance(grid, Driver), methods=sorted(n for n in ("create_message", "get_node_ids", "get_nodes", "push_messages", "pull_messages", "send_and_receive", "set_run") if hasattr(grid, n)))

    of = {}
    for kind, step, group, extra in (("query", "first", "a group", {}), ("train", "second", "7", {"ttl": DEFAULT_TTL / 2}), ("query", "raise", "", {}), ("train", "last", "7", {})):
        for r in sorted(ask(grid, nodes, kind, step, group, **extra), key=lambda r: of.get(r.metadata.src_node_id, 0) if r.has_error() else r.content.configs_records["c"]["partition"]):
            m = r.metadata
            if r.has_error():
                seen("error reply", who, at=step, code=r.error.code, reason=r.error.reason, type=m.message_type, group=m.group_id, from_=m.src_node_id in nodes, content=r.has_content())
                continue
            found = r.content.configs_records["c"]
            of[m.src_node_id] = found["partition"]
            seen("reply", who, at=step, partition=found["partition"], type=m.message_type, group=m.group_id, from_=m.src_node_id == found["node"], to=m.dst_node_id, answers=answered(m) == found["message"], id=len(m.message_id) > 0 and m.message_id != found["message"], ttl=0 < m.ttl <= DEFAULT_TTL, content=r.has_content())
        record("server", at=step, answered=len(of))
