"""flwr 1.41 and later: messages ask the process for the task that it does; much has moved to flwr.supercore."""

from __future__ import annotations

from typing import Any

from . import gen_object
from .generations import exists, first


def fits() -> bool:
    """Tell whether this generation is installed."""
    return gen_object.fits() and exists("flwr.supercore.task_identity", "TaskIdentity")


class This(gen_object.This):
    """What is particular to this generation."""

    name = "tasks"
    run_modules = ("flwr.supercore.run", "flwr.common.typing")
    unknown_has_run = True

    def __init__(self) -> None:
        super().__init__()
        self._identity = first("TaskIdentity", "flwr.supercore.task_identity")

    def set_identity(self, run_id: int, node_id: int, task_id: int) -> None:
        self._identity.run_id, self._identity.node_id, self._identity.task_id = run_id, node_id, task_id

    def stamp(self, message: Any, run_id: int, message_id: str) -> None:
        del run_id  # the constructor has set it
        message.metadata.__dict__["_message_id"] = message_id
        if not message.metadata.ttl > 0:
            raise ValueError(f"Invalid message: {message}")
