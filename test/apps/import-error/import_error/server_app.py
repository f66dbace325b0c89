"""The server side: the module below is not among the app's dependencies."""

import pergola_not_a_dependency  # noqa: F401
from flwr.server import ServerApp, ServerAppComponents, ServerConfig


def server_fn(context):
    return ServerAppComponents(config=ServerConfig(num_rounds=1))


app = ServerApp(server_fn=server_fn)
