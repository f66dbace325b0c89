"""The client app writes down what it sees in each message."""

import importlib.util
import os
import random
import sys
import time

import numpy as np
from flwr.client import ClientApp

from .look import process, seen, typed
from .recording import record

try:
    from flwr.common import ConfigRecord, RecordDict
except ImportError:  # before 1.18
    from flwr.common import ConfigsRecord as ConfigRecord, RecordSet as RecordDict

client = ClientApp()
CHANGEABLE = importlib.util.find_spec("flwr.app") is not None  # before 1.21 the supernode ends when a run config was changed
calls = 0
stream = np.random.RandomState(1)  # a seed at import time: each process begins it anew


def known(records, name):
    return dict(records[name].items()) if name in records else {}


def look(msg, context):
    global calls
    calls += 1
    step = msg.content.configs_records["c"]["step"]
    who = f"client {int(context.node_config['partition-id'])}"
    state = known(context.state.configs_records, "s")
    at = {"at": step}
    seen("module globals", who, **at, calls=calls)
    seen("random numbers of a seed at import", who, **at, first=float(stream.rand()))
    chance = [random.random(), float(np.random.rand())]
    seen("unseeded random numbers", who, **at, repeated=[c == p for c, p in zip(chance, state.get("chance", [None, None]))])
    seen("environment set by an earlier message", who, **at, kept="SET_BY_THE_APP" in os.environ)
    os.environ["SET_BY_THE_APP"] = "1"
    seen("sys.path changed by an earlier message", who, **at, kept="/changed/by/the/app" in sys.path)
    sys.path.append("/changed/by/the/app")
    seen("working directory changed by an earlier message", who, **at, kept=os.getcwd() == state.get("changed", ""))
    place = os.getcwd()
    changed = os.path.join(os.environ.get("PARITY_OUT", "."), who.replace(" ", "-"))
    os.makedirs(changed, exist_ok=True)
    os.chdir(changed)
    seen("an attribute of the context", who, **at, kept=hasattr(context, "mark"))
    context.mark = True
    seen("node config changed by an earlier message", who, **at, kept="by-the-app" in context.node_config)
    context.node_config["by-the-app"] = 1
    if CHANGEABLE:
        seen("run config changed by an earlier message", who, **at, kept="by-the-app" in context.run_config)
        context.run_config["by-the-app"] = 1
    seen("state", who, **at, messages=state.get("messages", 0))
    seen("node id", who, **at, type=type(context.node_id).__name__, large=abs(context.node_id) > 2**32, same=state.get("node", context.node_id) == context.node_id)
    m = msg.metadata
    seen("message", who, **at, type=m.message_type, group=m.group_id, ttl=m.ttl, to_me=m.dst_node_id == context.node_id, from_=m.src_node_id, run=m.run_id != 0 and m.run_id == getattr(context, "run_id", m.run_id), id=len(m.message_id) > 0, answers=getattr(m, "reply_to_message", None) if hasattr(m, "reply_to_message") else m.reply_to_message_id, recent=abs(time.time() - m.created_at) < 300, new=m.message_id != state.get("message", ""))
    if calls == 1:
        process(who)
        os.chdir(place)  # for the observation to be of the start alone
        os.chdir(changed)
    if step == "first":
        config = dict(context.node_config)
        config.pop("by-the-app")
        seen("node config", who, values=typed(config))
        config = dict(context.run_config)
        config.pop("by-the-app", None)
        seen("run config", who, values=typed(config))
    context.state.configs_records["s"] = ConfigRecord({"messages": state.get("messages", 0) + 1, "chance": chance, "changed": changed, "node": context.node_id, "message": m.message_id})
    record("client", at=step, partition=int(who.split()[1]), value=calls * 0)
    if step == "raise":
        raise ZeroDivisionError("asked to")
    content = RecordDict()
    content.configs_records["c"] = ConfigRecord({"partition": int(who.split()[1]), "node": context.node_id, "message": m.message_id})
    return msg.create_reply(content)


@client.query()
def query(msg, context):
    return look(msg, context)


@client.train()
def train(msg, context):
    return look(msg, context)
