"""One exchange of parameters with each client, of any size; a client adds 1 to every number."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

PART = 128 << 20  # bytes of an array

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    record = message.content["arrays"]
    seen = 0
    for key in list(record):
        values = record[key].numpy() + np.float32(1)
        seen += values.nbytes
        record[key] = Array(values)
    return Message(RecordDict({"arrays": record, "seen": MetricRecord({"bytes": seen})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    parts = int(context.run_config["mebibytes"]) * (1 << 20) // PART
    arrays = ArrayRecord({f"part-{i}": Array(np.full(PART // 4, i, dtype=np.float32)) for i in range(parts)})
    messages = [Message(RecordDict({"arrays": arrays}), dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
    del arrays
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            raise RuntimeError(f"a client failed: {reply.error.reason}")
        record = reply.content["arrays"]
        good = sum(bool((record[f"part-{i}"].numpy() == i + 1).all()) for i in range(parts))
        print(f"came back: {good} of {parts} parts, {int(reply.content['seen']['bytes'])} bytes seen by the client", flush=True)
