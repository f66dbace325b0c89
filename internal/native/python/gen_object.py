"""flwr 1.20 to 1.40 or so: flwr.app, messages are objects whose id is their hash and is set when they are pushed."""

from __future__ import annotations

from typing import Any

from . import gen_recorddict
from .generations import first, random_digest


def fits() -> bool:
    """Tell whether this generation is installed."""
    return gen_recorddict.fits() and hasattr(first("Message", "flwr.app", "flwr.common"), "object_id")


class This(gen_recorddict.This):
    """What is particular to this generation."""

    name = "objects"

    def new_id(self) -> str:
        return random_digest()

    def stamp(self, message: Any, run_id: int, message_id: str) -> None:
        meta = message.metadata
        meta.__dict__["_run_id"] = run_id
        meta.__dict__["_src_node_id"] = self.server_id
        meta.__dict__["_message_id"] = message_id
        if not (meta.reply_to_message_id == "" and meta.ttl > 0):
            raise ValueError(f"Invalid message: {message}")
