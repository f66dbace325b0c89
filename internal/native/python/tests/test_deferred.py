"""Modules that are imported by who uses them first."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from _pergola_native import deferred

FACTORY = """
import shelf_wire
from .store import Store

def make(*args, **kwargs):
    return Store(*args, **kwargs)

def fetch():
    try:
        return shelf_wire.get()
    except shelf_wire.Error as e:
        return e
"""

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
    (folder / "__init__.py").write_text("from .factory import make\nfrom .store import Store\n\n__all__ = ['Store', 'make']\n")
    (folder / "factory.py").write_text(FACTORY)
    (folder / "store.py").write_text(STORE)
    (folder / "costly.py").write_text("")
    (tmp_path / "shelf_wire.py").write_text("import shelf.costly\n\nclass Error(Exception): pass\n\ndef get(): raise Error\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(deferred, "CLASSES", {"shelf.store": "Store", "shelf.missing": "Store"})
    monkeypatch.setattr(deferred, "MODULES", ("shelf_wire", "shelf_missing"))
    before = list(sys.meta_path)
    with deferred.imports():
        package = importlib.import_module("shelf")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("shelf.missing")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("shelf_missing")
    assert sys.meta_path == before and not costs() and not {"shelf.store", "shelf_wire"} & set(sys.modules)
    yield package
    forget()


def costs() -> bool:
    return "shelf.costly" in sys.modules


def test_a_store_is_there_for_who_makes_one(shelf: Any) -> None:
    made = shelf.make("a", size=3)
    assert (made.name, made.size, made.kind) == ("a", 3, "real") and costs()
    assert type(made) is importlib.import_module("shelf.store").Store is shelf.store.Store


def test_a_store_is_a_class_to_its_factory(shelf: Any) -> None:
    stand = shelf.factory.Store
    assert copy.copy(stand)("b").name == "b" and costs()
    assert stand.kind == "real" and isinstance(shelf.make("a"), stand) and not isinstance("a", stand)


def test_a_store_may_be_derived_from(shelf: Any) -> None:
    class Mine(shelf.factory.Store):  # type: ignore[misc, name-defined]
        pass

    assert costs() and Mine.__bases__ == (shelf.store.Store,) and Mine("b", 2).size == 2


def imported_all() -> Any:
    names: dict[str, Any] = {}
    exec("from shelf import *", names)
    return names["Store"]


WAYS: dict[str, Callable[[Any], Any]] = {
    "of the package": lambda shelf: shelf.Store,
    "of the module in the package": lambda shelf: shelf.store.Store,
    "imported": lambda shelf: importlib.import_module("shelf.store").Store,
    "imported with all": lambda shelf: imported_all(),
    "pickled": lambda shelf: pickle.loads(pickle.dumps(shelf.Store)),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_everybody_else_has_the_real_class(shelf: Any, way: Callable[[Any], Any]) -> None:
    found = way(shelf)
    assert isinstance(found, type) and costs() and found is sys.modules["shelf.store"].Store and found.__module__ == "shelf.store"
    with pytest.raises(AttributeError, match=r"module 'shelf' has no attribute 'other'"):
        shelf.other


def test_a_module_is_there_for_who_asks_something_of_it(shelf: Any) -> None:
    error = shelf.factory.fetch()
    assert costs() and type(error) is importlib.import_module("shelf_wire").Error is shelf.factory.shelf_wire.Error
    with pytest.raises(AttributeError, match="module 'shelf_wire' has no attribute 'other'"):
        shelf.factory.shelf_wire.other


def test_who_imports_a_part_of_a_module_has_all_of_it(shelf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    (tmp_path / "shelf_wire.py").unlink()
    (tmp_path / "shelf_wire").mkdir()
    (tmp_path / "shelf_wire" / "__init__.py").write_text("whole = True\n")
    (tmp_path / "shelf_wire" / "part.py").write_text("from . import whole\n")
    importlib.invalidate_caches()
    with deferred.imports():
        package = importlib.import_module("shelf")
        assert importlib.import_module("shelf_wire.part").whole is True
    assert package.factory.shelf_wire.part is sys.modules["shelf_wire"].part


def test_a_package_that_finds_names_itself_does_so_still(tmp_path: Path, shelf: Any) -> None:
    forget()
    with (tmp_path / "shelf" / "__init__.py").open("a") as f:
        f.write("\ndef __getattr__(name): return name * 2\n")
    importlib.invalidate_caches()
    with deferred.imports():
        package = importlib.import_module("shelf")
    assert package.ab == "abab" and not costs() and package.Store is package.store.Store


def forget() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] in ("shelf", "shelf_wire")]:
        del sys.modules[name]


def test_in_the_midst_of_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shelf: Any) -> None:
    forget()
    (tmp_path / "shelf" / "__init__.py").write_text("from .factory import make\nmade = make('early')\nfrom .store import Store\n")
    importlib.invalidate_caches()
    with deferred.imports():
        package = importlib.import_module("shelf")
    assert package.made.name == "early" and type(package.made) is package.Store is package.store.Store


FLOWER = """
import importlib.util, sys
from _pergola_native import generations, deferred

generations.installed("server", "client")
assert not {"sqlalchemy", *deferred.CLASSES, *deferred.MODULES} & set(sys.modules)
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
assert flwr.server.superlink.linkstate.sql_linkstate.SqlLinkState is SqlLinkState and isinstance(SqlLinkState, type)
"""


def test_flower_does_without_its_stores(alone: Callable[[str], str]) -> None:
    alone(FLOWER)
