"""Arrays beside the protobuf: protobuf would copy their bytes eight to sixteen times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import lazy
from .blobs import FROM, Blob
from .frames import ProtocolError

if TYPE_CHECKING:
    from .generations import Generation

BESIDE_FROM = FROM  # bytes of all arrays of a message, from which on they are put beside it
MOST = 50_000  # arrays whose lengths fit into a head
WITHIN = 1 << 20  # bytes of small arrays that stay in the protobuf where the large ones are in a file already


class Beside(NamedTuple):
    """What goes beside a protobuf: arrays' bytes in order, and each array's length, -1 where it stays in the protobuf."""

    blobs: Sequence[bytes | Blob] = ()
    lens: Sequence[int] = ()


NOTHING = Beside()


def strip(gen: Generation, content: Any) -> tuple[Any, Beside]:
    """Give a content without its arrays' bytes, and those; or the content itself and nothing, if they are few.

    The content that is given stays as it is: the app may send it again.
    """
    arrays = [a for record in gen.array_records(content) for a in record.values()]
    parts: list[bytes | Blob] = []
    for a in arrays:
        blob = lazy.of(a)
        if blob is None:
            data = a.data
            parts.append(data if type(data) is bytes else bytes(data))
        else:
            parts.append(blob)
    lens = [len(p) for p in parts]
    if sum(lens) < BESIDE_FROM or len(parts) > MOST:
        return content, NOTHING
    within = [n for n, p in zip(lens, parts) if not isinstance(p, Blob)]
    if len(within) < len(parts) and within and max(within) < FROM and sum(within) <= WITHIN:
        lens = [n if isinstance(p, Blob) else -1 for n, p in zip(lens, parts)]
        parts = [p for p in parts if isinstance(p, Blob)]
    stays = {id(a) for n, a in zip(lens, arrays) if n < 0}

    def thin(record: Any) -> Any:
        new = type(record)()
        for key, a in record.items():
            new[key] = a if id(a) in stays else lazy.thin(a)
        return new

    return gen.with_array_records(content, thin), Beside(parts, lens)


def fill(gen: Generation, content: Any, lens: Sequence[int], blobs: Sequence[bytes | Blob]) -> None:
    """Give the arrays of a content, in order, the bytes that came beside it."""
    arrays = [a for record in gen.array_records(content) for a in record.values()]
    if len(arrays) != len(lens):
        raise ProtocolError(f"lengths of {len(lens)} arrays came with a content that has {len(arrays)}")
    at = 0
    for a, n in zip(arrays, lens):
        if n >= 0:
            blob = blobs[at]
            if isinstance(blob, Blob):
                lazy.attach(a, blob)
            else:
                a.data = blob
            at += 1
