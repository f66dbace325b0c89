"""Answers with an array that its state keeps too, from the first message on, or from that on the one of before."""

import json

import numpy as np
from flwr.client import ClientApp
from flwr.common import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.server import ServerApp

ROUNDS = 5
SIZE = 1 << 19
client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    number = message.content["do"]["number"]
    made = ArrayRecord({"w": Array(np.full(SIZE, number, dtype=np.float32))})
    wrong = [n for n, r in context.state.items() if not (r["w"].numpy() == float(n)).all()]
    if number == 1 or context.run_config["always"]:
        context.state[str(number)] = made
    return Message(RecordDict({"made": made, "seen": ConfigRecord({"wrong": wrong})}), reply_to=message)


@server.main()
def main(grid, context):
    said = []
    for number in range(1, ROUNDS + 1):
        messages = [Message(RecordDict({"do": ConfigRecord({"number": number})}), n, "train") for n in grid.get_node_ids()]
        for reply in grid.send_and_receive(messages):
            content = reply.content
            said.append([number, bool((content["made"]["w"].numpy() == number).all()), list(content["seen"]["wrong"])])
    print("RESULT", json.dumps(said), flush=True)
