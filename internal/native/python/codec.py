"""Messages and states as frames have them: a protobuf without the bytes of arrays, and those bytes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from .arrays import NOTHING, Beside, fill, strip
from .blobs import Blob
from .frames import MAX_BODY
from .generations import Generation


class TooLargeError(ValueError):
    """A message is larger than a frame can be, even without its arrays."""


class Codec:
    """Writes and reads messages of one generation."""

    def __init__(self, gen: Generation) -> None:
        self.gen = gen
        self._empty = gen.RecordDict()
        self._tag = bytes([gen.PbMessage.DESCRIPTOR.fields_by_name["content"].number << 3 | 2])

    def content(self, content: Any) -> tuple[bytes, Beside]:
        """Give a content as the field of a Message's protobuf, and the bytes beside it."""
        thin, beside = strip(self.gen, content)
        proto = self.gen.content_to_proto(thin)
        size = proto.ByteSize()
        if size > MAX_BODY - (1 << 20):
            raise TooLargeError(
                f"a message of {size} bytes without its arrays: records of configuration and metrics may have 2 GiB in sum"
            )
        return self._tag + _varint(size) + proto.SerializeToString(), beside

    def encode(self, message: Any, written: dict[int, tuple[bytes, Beside]] | None = None, **fields: Any) -> tuple[bytes, Beside]:
        """Give a message's protobuf, with those fields of its metadata set, and the bytes beside it.

        `written` remembers contents while the caller holds them: many messages often have the same.
        """
        body: tuple[bytes, Beside] = (b"", NOTHING)
        if message.has_content():
            content = message.content
            found = written.get(id(content)) if written is not None else None
            body = found or self.content(content)
            if written is not None:
                written[id(content)] = body
            message = copy.copy(message)
            message.content = self._empty
        proto = self.gen.message_to_proto(message)
        if body[0]:
            proto.ClearField("content")
        for k, v in fields.items():
            setattr(proto.metadata, k, v)
        # Fields of a protobuf may stand in any order, so that one can be put behind the others.
        return proto.SerializeToString() + body[0], body[1]

    def decode(self, proto: bytes, lens: Sequence[int], blobs: Sequence[bytes | Blob]) -> Any:
        """Give the message of a protobuf and of the bytes beside it."""
        message = self.gen.message_from_proto(self.gen.PbMessage.FromString(proto))
        if lens:
            fill(self.gen, message.content, lens, blobs)
        return message

    def encode_state(self, state: Any) -> tuple[bytes, Beside]:
        """Give a state as a protobuf Message that has it as its content, and the bytes beside it; nothing if it is empty."""
        if state == self._empty:
            return b"", NOTHING
        return self.content(state)

    def decode_state(self, proto: bytes, lens: Sequence[int], blobs: Sequence[bytes | Blob]) -> Any:
        """Give the state that was encoded so."""
        if not proto:
            return self.gen.RecordDict()
        state = self.gen.content_from_proto(self.gen.PbMessage.FromString(proto).content)
        if lens:
            fill(self.gen, state, lens, blobs)
        return state


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)
