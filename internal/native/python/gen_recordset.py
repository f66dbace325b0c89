"""flwr 1.8 to 1.16 or so: RecordSet with three kinds of records apart, Driver, messages made of metadata."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from .generations import CRASHED, CRASHED_REASON, NODE_GONE, RAISED, Generation, exists, first, random_uuid


def fits() -> bool:
    """Tell whether this generation is installed."""
    return exists("flwr.common", "RecordSet", "ParametersRecord")


class This(Generation):
    """What is particular to this generation."""

    name = "record sets"

    def __init__(self) -> None:
        super().__init__()
        common = importlib.import_module("flwr.common")
        self.RecordDict = common.RecordSet
        self.ArrayRecord = common.ParametersRecord
        self.MetricRecord = common.MetricsRecord
        self.ConfigRecord = common.ConfigsRecord
        serde = importlib.import_module("flwr.common.serde")
        self.content_to_proto = serde.recordset_to_proto
        self.content_from_proto = serde.recordset_from_proto
        if not hasattr(self.ErrorCode, "MESSAGE_UNAVAILABLE"):  # to 1.12 or so, the SuperLink took everything
            self.refuses_unknown_nodes = self.answers_unknown_ids = False
            self.state_utils = "flwr.server.superlink.state.utils"

    def for_server(self) -> None:
        super().for_server()
        server = importlib.import_module("flwr.server")
        self.ServerApp, self.Link = server.ServerApp, server.Driver
        self.LoadServerAppError = first("LoadServerAppError", "flwr.server.server_app")

    def for_client(self) -> None:
        self.ClientApp = importlib.import_module("flwr.client").ClientApp
        self.LoadClientAppError = first("LoadClientAppError", "flwr.client.client_app")

    def array_records(self, content: Any) -> list[Any]:
        # By name: the protobuf has a map, which keeps no order.
        return [r for _, r in sorted(content.parameters_records.items())]

    def with_array_records(self, content: Any, change: Callable[[Any], Any]) -> Any:
        new = self.RecordDict()
        new.metrics_records.update(content.metrics_records)
        new.configs_records.update(content.configs_records)
        for name, record in content.parameters_records.items():
            new.parameters_records[name] = change(record)
        return new

    def metric_records(self, content: Any) -> Iterable[tuple[str, Any]]:
        return list(content.metrics_records.items())

    def config_records(self, content: Any) -> Iterable[tuple[str, Any]]:
        return list(content.configs_records.items())

    def put(self, content: Any, name: str, record: Any) -> None:
        if isinstance(record, self.ArrayRecord):
            content.parameters_records[name] = record
        elif isinstance(record, self.MetricRecord):
            content.metrics_records[name] = record
        else:
            content.configs_records[name] = record

    def reply(self, message: Any, content: Any) -> Any:
        return message.create_reply(content)

    def reply_to(self, metadata: Any) -> str:
        return str(metadata.reply_to_message)

    def new_message(self, run_id: int, content: Any, message_type: str, dst: int, group: str, ttl: float | None) -> Any:
        if ttl:
            warnings.warn(
                "A custom TTL was set, but note that the SuperLink does not enforce "
                "the TTL yet. The SuperLink will start enforcing the TTL in a future "
                "version of Flower.",
                stacklevel=3,
            )
        meta = self.metadata(
            run_id=run_id,
            message_id="",
            src_node_id=self.server_id,
            dst_node_id=dst,
            reply_to="",
            group_id=group,
            ttl=self.default_ttl if ttl is None else ttl,
            message_type=message_type,
        )
        return self.Message(metadata=meta, content=content)

    def new_id(self) -> str:
        return random_uuid()

    def stamp(self, message: Any, run_id: int, message_id: str) -> None:
        del message_id  # the app does not see it in its message
        meta = message.metadata
        if not (
            meta.run_id == run_id
            and meta.src_node_id == self.server_id
            and meta.message_id == ""
            and meta.reply_to_message == ""
            and meta.ttl > 0
        ):
            raise ValueError(f"Invalid message: {message}")

    def error_reply(self, message: Any, code: int, reason: str) -> Any:
        return message.create_error_reply(error=self.Error(code=code, reason=reason))

    def lost(self, code: int) -> tuple[int, str, str]:
        if code == CRASHED:
            return RAISED, CRASHED_REASON, "node"
        if not hasattr(self.ErrorCode, "MESSAGE_UNAVAILABLE"):  # to 1.12 there was one reason only
            return (
                self.code("NODE_UNAVAILABLE", 3),
                self.text("NODE_UNAVAILABLE_ERROR_REASON", "Node Unavailable"),
                "node",
            )
        if code == self.code("REPLY_MESSAGE_UNAVAILABLE", 4):
            return code, self.text("REPLY_MESSAGE_UNAVAILABLE_ERROR_REASON", "Reply Message Unavailable"), "server"
        if code == NODE_GONE and hasattr(self.ErrorCode, "NODE_UNAVAILABLE"):
            return code, self.text("NODE_UNAVAILABLE_ERROR_REASON", "Node Unavailable"), "server"
        return (
            self.ErrorCode.MESSAGE_UNAVAILABLE,
            self.text("MESSAGE_UNAVAILABLE_ERROR_REASON", "Message Unavailable"),
            "server",
        )
