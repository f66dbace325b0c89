"""What Flower imports in an app's process and does not use there: stores in a database, and clients of HTTP.

Many versions from 1.26 on import SQLAlchemy and Alembic with the stores, which is half the time of the whole import, and
28 MB; HTTPX is another sixth. Here they are imported by who uses them first.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Modules, each with the one class that others import from it.
CLASSES = {
    "flwr.server.superlink.linkstate.sql_linkstate": "SqlLinkState",
    "flwr.supercore.object_store.sql_object_store": "SqlObjectStore",
}

# Modules of which Flower asks nothing when it imports them.
MODULES = ("httpx", "requests")


class Later:
    """Stands for a class in the modules that have imported it, until they make one, ask something of it, or derive from it."""

    def __init__(self, module: str, name: str) -> None:
        self.__dict__["_pergola_class"] = module, name

    def _pergola_real(self) -> Any:
        module, name = self._pergola_class
        return getattr(_real(module), name)

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
        if (
            (name not in CLASSES and name not in MODULES)
            or name in self._found
            or PathFinder.find_spec(name, path, target) is None
        ):
            return None
        self._found.add(name)
        return ModuleSpec(name, self)

    def exec_module(self, module: ModuleType) -> None:
        of = module.__name__
        if of in CLASSES:
            setattr(module, CLASSES[of], Later(of, CLASSES[of]))
            return

        _finds(module, lambda name: getattr(_real(of), name))


def _finds(module: ModuleType, find: Callable[[str], Any]) -> None:
    """Have a module ask for what is not there (PEP 562)."""
    setattr(module, "__getattr__", find)  # noqa: B010 - as an assignment, it would be one to a method


def _real(name: str) -> ModuleType:
    """Import a module, also while others are given an empty one."""
    _forget(name)
    return importlib.import_module(name)


def _forget(name: str) -> None:
    """Have the next import of a module find the real one, and whoever looks for it in its package."""
    module = sys.modules.get(name)
    if module is None or not isinstance(getattr(module.__spec__, "loader", None), _Standing):
        return
    del sys.modules[name]
    package, _, own = name.rpartition(".")
    parent = sys.modules.get(package)
    if parent is None or name in MODULES:
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

    _finds(parent, find)


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Have what is imported meanwhile do without."""
    standing = _Standing()
    sys.meta_path.insert(0, standing)
    try:
        yield
    finally:
        sys.meta_path.remove(standing)
        for name in (*CLASSES, *MODULES):
            _forget(name)
