"""Arrays beside the protobuf: protobuf would copy their bytes eight to sixteen times."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from .frames import ProtocolError

if TYPE_CHECKING:
    from .generations import Generation

BESIDE_FROM = 64 << 10  # bytes of all arrays of a message, from which on they are put beside it
MOST = 50_000  # arrays whose lengths fit into a head


def strip(gen: Generation, content: Any) -> tuple[Any, list[bytes]]:
    """Give a content without its arrays' bytes, and those in order; or the content itself and none, if they are few.

    The content that is given stays as it is: the app may send it again.
    """
    blobs: list[bytes] = []
    size = 0
    for record in gen.array_records(content):
        for a in record.values():
            data = a.data
            size += len(data)
            blobs.append(data if type(data) is bytes else bytes(data))
    if size < BESIDE_FROM or len(blobs) > MOST:
        return content, []

    def thin(record: Any) -> Any:
        new = type(record)()
        for key, a in record.items():
            new[key] = b = copy.copy(a)
            b.data = b""
        return new

    return gen.with_array_records(content, thin), blobs


def fill(gen: Generation, content: Any, lens: list[int], blobs: list[bytes]) -> None:
    """Give the arrays of a content, in order, the bytes that came beside it."""
    arrays = [a for record in gen.array_records(content) for a in record.values()]
    if len(arrays) != len(lens):
        raise ProtocolError(f"lengths of {len(lens)} arrays came with a content that has {len(arrays)}")
    at = 0
    for a, n in zip(arrays, lens):
        if n >= 0:
            a.data = blobs[at]
            at += 1
