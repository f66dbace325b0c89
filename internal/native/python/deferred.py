"""Parts of Flower that an app's process imports and does not use: its stores in a database.

Many versions from 1.26 on import SQLAlchemy and Alembic with them, which is half the time of the whole import, and 28 MB.
Here they are imported by who uses them first.
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
    """Stands for a class in the modules that have imported it, until they make one, ask something of it, or derive from it."""

    def __init__(self, module: str, name: str) -> None:
        self.__dict__["_pergola_class"] = module, name

    def _pergola_real(self) -> Any:
        module, name = self._pergola_class
        _forget(module)
        return getattr(importlib.import_module(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._pergola_real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_pergola_class":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._pergola_real(), name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._pergola_real(),)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._pergola_real())


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
    """Have the next import of a module find the real one, and whoever looks for it in its package."""
    module = sys.modules.get(name)
    if module is None or not isinstance(getattr(module.__spec__, "loader", None), _Standing):
        return
    del sys.modules[name]
    package, _, own = name.rpartition(".")
    parent = sys.modules.get(package)
    if parent is None:
        return
    names = {n for n, v in vars(parent).items() if v is module or v is getattr(module, CLASSES[name])}
    for n in names:
        delattr(parent, n)
    before = getattr(parent, "__getattr__", None)

    def find(n: str) -> Any:
        if n in names:
            real = importlib.import_module(name)
            return real if n == own else getattr(real, CLASSES[name])
        if before is not None:
            return before(n)
        raise AttributeError(f"module {package!r} has no attribute {n!r}", name=n, obj=parent)

    setattr(parent, "__getattr__", find)  # noqa: B010 - which a module has for what is not there (PEP 562)


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
