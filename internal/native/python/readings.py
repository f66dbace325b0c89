"""The numbers in a reply, for the runner's events: read of metric records and of what the legacy API makes of its results."""

from __future__ import annotations

import math
from typing import Any

from .generations import Generation

MOST = 1000  # numbers of one reply
LONGEST = 200  # letters of a name
_LEGACY = ("fitres", "evaluateres", "getparametersres", "getpropertiesres")
_ROUNDS = ("server-round", "server_round", "round", "current_round", "current-round")


def numbers(gen: Generation, content: Any) -> dict[str, float | int | str]:
    """Give a reply's scalars by name. JSON has no NaN and no infinities: those are strings, "NaN", "Infinity", "-Infinity"."""
    out: dict[str, float | int | str] = {}

    def put(record: str, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or len(out) >= MOST:
            return
        if name in out:
            name = f"{record}.{name}"
        out[str(name)[:LONGEST]] = value if isinstance(value, int) or math.isfinite(value) else _word(value)

    for name, record in gen.metric_records(content):
        for key, value in record.items():
            put(name, key, value)
    for name, record in gen.config_records(content):
        if name.partition(".")[0] in _LEGACY and name.endswith(".metrics"):
            for key, value in record.items():
                put(name, key, value)
    return out


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def round_of(gen: Generation, message: Any) -> int | None:
    """Give the round that a message belongs to: its group's number, or what a record of its configuration says."""
    group = message.metadata.group_id
    if group.isascii() and group.isdigit() and len(group) < 10:
        return int(group)
    if message.has_content():
        for _, record in gen.config_records(message.content):
            for name in _ROUNDS:
                value = record.get(name)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
    return None
