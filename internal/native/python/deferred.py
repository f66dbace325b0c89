"""Parts of Flower that an app's process imports and does not use: its stores in a database.

From 1.26 on, Flower's modules for clients and servers import those of a SuperLink, and these SQLAlchemy and Alembic: half
the time of the whole import, and 28 MB. Here they are imported by who uses them first.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Modules, each with the one class that others import from it.
CLASSES = {
    "flwr.server.superlink.linkstate.sql_linkstate": "SqlLinkState",
    "flwr.supercore.object_store.sql_object_store": "SqlObjectStore",
}


class Later:
    """Stands for a class until somebody makes one, asks for something of it, or derives from it."""

    def __init__(self, module: str, name: str) -> None:
        self._pergola_class = module, name

    def _pergola_real(self) -> Any:
        module, name = self._pergola_class
        _forget(module)
        return getattr(importlib.import_module(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._pergola_real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pergola_real(), name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._pergola_real(),)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._pergola_real())

    def __subclasscheck__(self, cls: type) -> bool:
        return issubclass(cls, self._pergola_real())


class _Standing(Loader, MetaPathFinder):
    """Finds the modules, and makes empty ones in their place; each once, for who imports one again wants the real one."""

    def __init__(self) -> None:
        self._found: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in CLASSES or name in self._found or PathFinder.find_spec(name, path, target) is None:
            return None
        self._found.add(name)
        return ModuleSpec(name, self)

    def exec_module(self, module: ModuleType) -> None:
        name = CLASSES[module.__name__]
        setattr(module, name, Later(module.__name__, name))


def _forget(name: str) -> None:
    """Have the next import of a module find the real one."""
    module = sys.modules.get(name)
    if module is None or not isinstance(getattr(module.__spec__, "loader", None), _Standing):
        return
    del sys.modules[name]
    package, _, own = name.rpartition(".")
    parent = sys.modules.get(package)
    if getattr(parent, own, None) is module:
        delattr(parent, own)


@contextlib.contextmanager
def stores() -> Iterator[None]:
    """Have what is imported meanwhile do without the stores."""
    standing = _Standing()
    sys.meta_path.insert(0, standing)
    try:
        yield
    finally:
        sys.meta_path.remove(standing)
        for name in CLASSES:
            _forget(name)
