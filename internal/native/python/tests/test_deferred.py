"""Modules that are imported by who uses them first."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from _pergola_native import deferred

STORE = """
import shelf.costly

class Store:
    kind = "real"
    def __init__(self, name, size=0):
        self.name, self.size = name, size
"""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Give a package with a module that imports a store, and with a store that imports what costs."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .factory import make")
    (folder / "factory.py").write_text("from .store import Store\n\ndef make(*args, **kwargs): return Store(*args, **kwargs)\n")
    (folder / "store.py").write_text(STORE)
    (folder / "costly.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(deferred, "CLASSES", {"shelf.store": "Store", "shelf.missing": "Store"})
    before = list(sys.meta_path)
    with deferred.stores():
        package = importlib.import_module("shelf")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("shelf.missing")
    assert sys.meta_path == before and not costs() and "shelf.store" not in sys.modules and not hasattr(package, "store")
    yield package
    for name in [n for n in sys.modules if n.partition(".")[0] == "shelf"]:
        del sys.modules[name]


def costs() -> bool:
    return "shelf.costly" in sys.modules


def test_a_store_is_there_for_who_makes_one(shelf: Any) -> None:
    made = shelf.make("a", size=3)
    assert (made.name, made.size, made.kind) == ("a", 3, "real") and costs()
    assert type(made) is importlib.import_module("shelf.store").Store is shelf.store.Store


def test_a_store_is_a_class_to_who_asks(shelf: Any) -> None:
    stand = shelf.factory.Store
    assert stand.kind == "real" and costs()
    assert isinstance(shelf.make("a"), stand) and not isinstance("a", stand)
    assert issubclass(shelf.store.Store, stand) and not issubclass(str, stand)


def test_a_store_may_be_derived_from(shelf: Any) -> None:
    class Mine(shelf.factory.Store):  # type: ignore[misc, name-defined]
        pass

    assert costs() and Mine.__bases__ == (shelf.store.Store,) and Mine("b", 2).size == 2


def test_who_imports_the_module_has_the_real_one(shelf: Any) -> None:
    assert isinstance(importlib.import_module("shelf.store").Store, type) and costs()


def test_in_the_midst_of_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shelf: Any) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "shelf"]:
        del sys.modules[name]
    (tmp_path / "shelf" / "__init__.py").write_text("from .factory import make\nmade = make('early')\nfrom .store import Store\n")
    importlib.invalidate_caches()
    with deferred.stores():
        package = importlib.import_module("shelf")
    assert package.made.name == "early" and type(package.made) is package.Store is package.store.Store


FLOWER = """
import importlib.util, sys
from _pergola_native import generations, deferred

generations.installed("server", "client")
assert "sqlalchemy" not in sys.modules and not any(m in sys.modules for m in deferred.CLASSES)
for m, n in deferred.CLASSES.items():
    try:
        there = importlib.util.find_spec(m)
    except ModuleNotFoundError:
        continue
    if there:
        assert isinstance(getattr(importlib.import_module(m), n), type)
import flwr.server.superlink
try:
    from flwr.server.superlink.linkstate import SqlLinkState
except ImportError:
    sys.exit()
assert issubclass(flwr.server.superlink.linkstate.sql_linkstate.SqlLinkState, SqlLinkState)
"""


def test_flower_does_without_its_stores(alone: Callable[[str], str]) -> None:
    alone(FLOWER)
