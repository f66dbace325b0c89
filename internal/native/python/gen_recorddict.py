"""flwr 1.17 to 1.19 or so: RecordDict, Grid, messages made by Message(...), with ids from the SuperLink."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from .generations import CRASHED, CRASHED_REASON, NODE_GONE, RAISED, Generation, exists, first, random_uuid


def fits() -> bool:
    """Tell whether this generation is installed."""
    return exists("flwr.common", "RecordDict", "ArrayRecord")


class This(Generation):
    """What is particular to this generation, and to those after it."""

    name = "record dicts"
    system_type = "system"

    def __init__(self) -> None:
        super().__init__()
        common = importlib.import_module("flwr.common")
        if "reply_to" not in inspect.signature(self.Message.__init__).parameters:
            raise TypeError("Message takes no reply_to")
        self.RecordDict = common.RecordDict
        self.ArrayRecord = common.ArrayRecord
        self.MetricRecord = common.MetricRecord
        self.ConfigRecord = common.ConfigRecord
        serde = importlib.import_module("flwr.common.serde")
        self._warned = False
        self.content_to_proto = serde.recorddict_to_proto
        self.content_from_proto = serde.recorddict_from_proto
        self.lazy.install(first("Array", "flwr.app", "flwr.common"), self.ArrayRecord)

    def for_server(self) -> None:
        super().for_server()
        self.Link = first("Grid", "flwr.serverapp", "flwr.server")
        self.ServerApp = first("ServerApp", "flwr.serverapp", "flwr.server")
        self.LoadServerAppError = first("LoadServerAppError", "flwr.serverapp.server_app", "flwr.server.server_app")

    def for_client(self) -> None:
        self.ClientApp = first("ClientApp", "flwr.clientapp", "flwr.client")
        self.LoadClientAppError = first("LoadClientAppError", "flwr.clientapp.client_app", "flwr.client.client_app")

    def array_records(self, content: Any) -> list[Any]:
        found = [(k, r) for k, r in content.items() if isinstance(r, self.ArrayRecord)]
        return [r for _, r in sorted(found, key=lambda kr: kr[0])]

    def with_array_records(self, content: Any, change: Callable[[Any], Any]) -> Any:
        new = self.RecordDict()
        for name, record in content.items():
            new[name] = change(record) if isinstance(record, self.ArrayRecord) else record
        return new

    def metric_records(self, content: Any) -> Iterable[tuple[str, Any]]:
        return [(k, r) for k, r in content.items() if isinstance(r, self.MetricRecord)]

    def config_records(self, content: Any) -> Iterable[tuple[str, Any]]:
        return [(k, r) for k, r in content.items() if isinstance(r, self.ConfigRecord)]

    def put(self, content: Any, name: str, record: Any) -> None:
        content[name] = record

    def reply(self, message: Any, content: Any) -> Any:
        return self.Message(content, reply_to=message)

    def reply_to(self, metadata: Any) -> str:
        return str(metadata.reply_to_message_id)

    def new_message(self, run_id: int, content: Any, message_type: str, dst: int, group: str, ttl: float | None) -> Any:
        del run_id  # set when it is pushed
        if not self._warned:
            self._warned = True
            warn = first("warn_deprecated_feature", "flwr.common.logger", "flwr.supercore.logger")
            warn("`Driver.create_message` / `Grid.create_message` is deprecated.Use `Message` constructor instead.")
        return self.Message(content, dst, message_type, ttl=ttl, group_id=group)

    def new_id(self) -> str:
        return random_uuid()

    def stamp(self, message: Any, run_id: int, message_id: str) -> None:
        del message_id  # the app does not see it in its message
        meta = message.metadata
        meta.__dict__["_run_id"] = run_id
        meta.__dict__["_src_node_id"] = self.server_id
        if not (meta.message_id == "" and meta.reply_to_message_id == "" and meta.ttl > 0):
            raise ValueError(f"Invalid message: {message}")

    def error_reply(self, message: Any, code: int, reason: str) -> Any:
        return self.Message(self.Error(code=code, reason=reason), reply_to=message)

    def lost(self, code: int) -> tuple[int, str, str]:
        if code == CRASHED:
            return self.code("CLIENT_APP_CRASHED", RAISED), CRASHED_REASON, "node"
        if code == NODE_GONE:
            return (
                self.ErrorCode.NODE_UNAVAILABLE,
                self.text("NODE_UNAVAILABLE_ERROR_REASON", "Node Unavailable"),
                "server",
            )
        if code == self.ErrorCode.REPLY_MESSAGE_UNAVAILABLE:
            return code, self.text("REPLY_MESSAGE_UNAVAILABLE_ERROR_REASON", "Reply Message Unavailable"), "server"
        return (
            self.ErrorCode.MESSAGE_UNAVAILABLE,
            self.text("MESSAGE_UNAVAILABLE_ERROR_REASON", "Message Unavailable"),
            "server",
        )
