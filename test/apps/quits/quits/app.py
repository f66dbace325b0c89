"""The server app exits with `code` before any client was asked for anything."""

import sys

from flwr.client import ClientApp, NumPyClient
from flwr.common import Context
from flwr.server import ServerApp


def client_fn(context: Context):
    return NumPyClient().to_client()


def server_fn(context: Context):
    sys.exit(int(context.run_config["code"]))


client = ClientApp(client_fn=client_fn)
server = ServerApp(server_fn=server_fn)
