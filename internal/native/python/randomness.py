"""Random numbers of forked children.

Under Flower a process serves one message: its generators are seeded afresh, unless the app seeds them when it is
imported, and then every message begins with the same numbers. Children of one template would all share its generators'
state. So a child seeds afresh those that the app has not seeded; whether it has is told by their state.
"""

from __future__ import annotations

import random
import sys
from typing import Any

DRAWS = 100_000  # numbers that an app may draw at import and still count as not having seeded
_SEEDED_BELOW = 1 << 32  # torch's own seeds have 53 bits or more, so that next to none is below; people's are


class Generators:
    """The state of the global generators before an app is imported."""

    def __init__(self) -> None:
        self._random = random.getstate()
        numpy = sys.modules.get("numpy.random")
        self._numpy: Any = numpy.get_state() if numpy else None
        self._fresh: list[str] = []

    def look(self) -> None:
        """Find out, after the import, which generators the app has left unseeded."""
        self._fresh = []
        if not _seeded(self._random, random.getstate()):
            self._fresh.append("random")
        numpy = sys.modules.get("numpy.random")
        if numpy and (self._numpy is None or not _numpy_seeded(numpy, self._numpy)):
            self._fresh.append("numpy")
        torch = sys.modules.get("torch")
        if torch and torch.initial_seed() >= _SEEDED_BELOW:
            self._fresh.append("torch")

    def reseed(self) -> None:
        """Seed afresh, in a child, what the app has not seeded."""
        if "random" in self._fresh:
            random.seed()
        if "numpy" in self._fresh:
            sys.modules["numpy.random"].seed()
        if "torch" in self._fresh:
            sys.modules["torch"].seed()


def _seeded(before: Any, after: Any) -> bool:
    """Tell whether a state cannot have come from another by drawing numbers."""
    if before[0] != after[0]:
        return True
    twin = random.Random()
    twin.setstate(before)
    for _ in range(DRAWS // 624 + 1):
        now = twin.getstate()
        if now[1][:-1] == after[1][:-1]:
            return False  # the same block of numbers; how many of it were drawn is no matter
        twin.getrandbits(32 * 624)
    return True


def _numpy_seeded(numpy: Any, before: Any) -> bool:
    after = numpy.get_state()
    if before[0] != after[0] or before[0] != "MT19937":
        return bool(before[0] != after[0])
    twin = numpy.RandomState()
    twin.set_state(before)
    for _ in range(DRAWS // 624 + 1):
        if (twin.get_state()[1] == after[1]).all():
            return False
        twin.bytes(624 * 4)
    return True
