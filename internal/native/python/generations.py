"""What the engine needs of Flower, and which generation of it is installed.

Whatever goes beyond Flower's public API is in one module per generation, gen_*.py; this one has what they share.
Generations are told by whether names exist, never by comparing versions: many versions between those that were tried
have the same names.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import gc
import importlib
import inspect
import os
import secrets
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import deferred
from .lazy import Lazy


class UnknownGenerationError(Exception):
    """The installed Flower has none of the shapes that the engine knows."""


# Codes of errors in the newest generation, as the runner names them; older ones have fewer.
LOAD_FAILED, RAISED, EXPIRED, NO_REPLY, NODE_GONE, CRASHED = 1, 2, 3, 4, 5, 8

CRASHED_REASON = "ClientApp stopped responding."  # flwr.supernode.nodestate has it so


def exists(module: str, *names: str) -> bool:
    """Tell whether a module can be imported and has the names."""
    try:
        m = importlib.import_module(module)
    except ImportError:
        return False
    return all(hasattr(m, n) for n in names)


def first(name: str, *modules: str) -> Any:
    """Give a name from the first of the modules that has it."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise UnknownGenerationError(f"none of {', '.join(modules)} has {name}")


class Generation(ABC):
    """A generation of Flower: its names, and where it makes things differently."""

    name: str
    RecordDict: Any  # RecordSet, before it was renamed
    ArrayRecord: Any
    MetricRecord: Any
    ConfigRecord: Any
    ServerApp: Any
    ClientApp: Any
    LoadServerAppError: Any
    LoadClientAppError: Any
    Link: Any  # the base class of what a ServerApp is called with: Grid or Driver
    server_id: int
    content_to_proto: Callable[[Any], Any]
    content_from_proto: Callable[[Any], Any]
    state_utils = "flwr.server.superlink.linkstate.utils"  # has the SuperLink's texts
    refuses_unknown_nodes = True  # a message to a node that never was is not taken
    answers_unknown_ids = True  # pulling the reply to an unknown message gives an error, not nothing
    unknown_has_run = False  # the reply to an id that nobody knows names the run
    system_type = ""  # of messages that the SuperLink makes on its own
    run_modules: tuple[str, ...] = ("flwr.common.typing",)

    def __init__(self) -> None:
        public = ("flwr.app", "flwr.common")
        self.Message = first("Message", *public)
        self.Metadata = first("Metadata", *public)
        self.Context = first("Context", *public)
        self.Error = first("Error", *public)
        self.default_ttl: float = first("DEFAULT_TTL", *public)
        serde = importlib.import_module("flwr.common.serde")
        self.message_to_proto: Callable[[Any], Any] = serde.message_to_proto
        self.message_from_proto: Callable[[Any], Any] = serde.message_from_proto
        self.PbMessage = importlib.import_module("flwr.proto.message_pb2").Message
        config = importlib.import_module("flwr.common.config")
        self._parse_config_args = config.parse_config_args
        self._fused_config = config.get_fused_config_from_dir
        self._project_config = config.get_project_config
        self.ErrorCode = importlib.import_module("flwr.common.constant").ErrorCode
        self.server_id = getattr(importlib.import_module("flwr.common.constant"), "SUPERLINK_NODE_ID", 0)
        self.load_app = first("load_app", "flwr.common.object_ref", "flwr.supercore.object_ref")
        self.lazy = Lazy()
        self._texts: dict[str, str] = {}
        # Looked up once: messages need them, and a signature costs as much as decoding one does.
        self._metadata_names = set(inspect.signature(self.Metadata.__init__).parameters)
        self._context_names = set(inspect.signature(self.Context.__init__).parameters)

    # What only one of the roles needs is imported for that one: it takes a while.

    @abstractmethod
    def for_server(self) -> None:
        """Find what a server needs."""
        self._run = first("Run", *self.run_modules)

    @abstractmethod
    def for_client(self) -> None:
        """Find what a worker needs."""

    # -- records and messages ---------------------------------------------------------------------------------

    @abstractmethod
    def array_records(self, content: Any) -> list[Any]:
        """Give the records of arrays, in an order that both ends find."""

    @abstractmethod
    def with_array_records(self, content: Any, change: Callable[[Any], Any]) -> Any:
        """Give a copy of the content that shares all records but those of arrays, which are changed."""

    @abstractmethod
    def metric_records(self, content: Any) -> Iterable[tuple[str, Any]]:
        """Give the records of metrics with their names."""

    @abstractmethod
    def config_records(self, content: Any) -> Iterable[tuple[str, Any]]:
        """Give the records of configuration with their names."""

    def metadata(self, **fields: Any) -> Any:
        """Make metadata of the fields that this generation has."""
        if "reply_to" in fields:
            reply_to = fields.pop("reply_to")
            fields["reply_to_message_id"] = fields["reply_to_message"] = reply_to
        created = fields.get("created_at")
        made = self.Metadata(**{k: v for k, v in fields.items() if k in self._metadata_names})
        if created is not None:
            made.created_at = created
        return made

    @abstractmethod
    def put(self, content: Any, name: str, record: Any) -> None:
        """Put a record into a content."""

    @abstractmethod
    def reply(self, message: Any, content: Any) -> Any:
        """Make the reply to a message."""

    @abstractmethod
    def reply_to(self, metadata: Any) -> str:
        """Give the id of the message that one replies to."""

    @abstractmethod
    def new_message(self, run_id: int, content: Any, message_type: str, dst: int, group: str, ttl: float | None) -> Any:
        """Make a message as the Grid's or Driver's create_message does."""

    @abstractmethod
    def new_id(self) -> str:
        """Make an id for a message."""

    @abstractmethod
    def stamp(self, message: Any, run_id: int, message_id: str) -> None:
        """Do to a message that is pushed what the Grid or Driver does, and raise as it does if it is no such message."""

    def sent(self, metadata: Any, message_id: str) -> Any:
        """Give what is to be remembered of a message that was pushed."""
        kept = copy.copy(metadata)
        kept.__dict__["_message_id"] = message_id
        return kept

    @abstractmethod
    def error_reply(self, message: Any, code: int, reason: str) -> Any:
        """Make the reply that tells of an error in a ClientApp."""

    def lost_reply(self, run_id: int, sent: Any, code: int, now: float) -> Any:
        """Make the reply that the SuperLink makes where none comes. `sent` is the metadata, or the id, of the message."""
        code, reason, sender = self.lost(code)
        if isinstance(sent, str):
            meta = self.metadata(
                run_id=run_id if self.unknown_has_run else 0,
                message_id="",
                src_node_id=self.server_id,
                dst_node_id=self.server_id,
                reply_to=sent,
                group_id="",
                created_at=now,
                ttl=0,
                message_type=self.system_type,
            )
        else:
            meta = self.metadata(
                run_id=run_id,
                message_id="",
                src_node_id=sent.dst_node_id if sender == "node" else self.server_id,
                dst_node_id=self.server_id,
                reply_to=sent.message_id,
                group_id=sent.group_id,
                created_at=now,
                ttl=max(sent.ttl - (now - sent.created_at), 0),
                message_type=sent.message_type,
                src_task_id=getattr(sent, "dst_task_id", None),
                dst_task_id=getattr(sent, "src_task_id", None),
            )
        reply = self.Message(metadata=meta, error=self.Error(code=code, reason=reason))
        meta.created_at = now
        meta.__dict__["_message_id"] = self.new_id()
        return reply

    @abstractmethod
    def lost(self, code: int) -> tuple[int, str, str]:
        """Give code and text of this generation for one of the newest's, and who is named as the sender: node, server."""

    def text(self, name: str, otherwise: str) -> str:
        """Give one of the SuperLink's texts, read off its source: importing it would bring half a database along."""
        if name not in self._texts:
            try:
                self._texts[name] = _constant(self.state_utils, name)
            except Exception:  # noqa: BLE001 - an error reply with a text of ours is better than none
                self._texts[name] = otherwise
        return self._texts[name]

    def code(self, name: str, otherwise: int) -> int:
        """Give the code of an error, or another where this generation lacks it."""
        return int(getattr(self.ErrorCode, name, otherwise))

    # -- runs ---------------------------------------------------------------------------------------------------

    def set_identity(self, run_id: int, node_id: int, task_id: int) -> None:
        """Tell Flower who this process is, where Flower wants to know."""
        del run_id, node_id, task_id

    def context(self, run_id: int, node_id: int, node_config: Any, state: Any, run_config: Any) -> Any:
        """Make a context."""
        fields = {"run_id": run_id, "node_id": node_id, "node_config": node_config, "state": state, "run_config": run_config}
        return self.Context(**{k: v for k, v in fields.items() if k in self._context_names})

    def run(self, run_id: int, fab_id: str, fab_version: str, fab_hash: str, override: dict[str, Any]) -> Any:
        """Make the object that describes the run."""
        cls = self._run
        have = {
            "run_id": run_id,
            "fab_id": fab_id,
            "fab_version": fab_version,
            "fab_hash": fab_hash,
            "override_config": override,
        }
        if hasattr(cls, "create_empty"):
            run = cls.create_empty(run_id)
            for k, v in have.items():
                setattr(run, k, v)
            return run
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in have.items() if k in names})

    def settings(self, app: str, words: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Give the overrides, parsed, and the run's configuration, both as Flower makes them."""
        # In one: of a later argument with a key below the same table, Flower takes the whole table.
        override = self._parse_config_args([" ".join(words)] if words else None)
        return override, self._fused_config(Path(app), override)

    def project(self, app: str) -> dict[str, Any]:
        """Give the app's pyproject.toml."""
        return dict(self._project_config(app))

    def load(self, app: str, component: str) -> Any:
        """Load an app by Flower's own loader, with Flower's own errors."""
        cls, error = (
            (self.ServerApp, self.LoadServerAppError) if component == "serverapp" else (self.ClientApp, self.LoadClientAppError)
        )
        ref = self.project(app)["tool"]["flwr"]["app"]["components"][component]
        loaded = self.load_app(ref, error, app)
        if not isinstance(loaded, cls):
            raise error(f"Attribute {ref} is not of type {cls}") from None
        return loaded


def _constant(module: str, name: str) -> str:
    """Give a constant of a module, without importing the module."""
    root = os.path.dirname(str(importlib.import_module("flwr").__file__))
    with open(os.path.join(root, *module.split(".")[1:]) + ".py", encoding="utf-8") as f:
        tree = ast.parse(f.read())
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            names = dict(vars(importlib.import_module("flwr.common.constant")))
            value = eval(compile(ast.Expression(node.value), module, "eval"), names)
            return str(value)
    raise LookupError(f"{module} has no {name}")


def random_uuid() -> str:
    """Make an id as the SuperLink gave them before messages were objects."""
    return str(uuid.uuid4())


def random_digest() -> str:
    """Make an id that looks like an object's: Flower hashes the message, which costs more than all the rest here."""
    return secrets.token_hex(32)


MODULES = ("gen_task", "gen_object", "gen_recorddict", "gen_recordset")  # newest first


def installed(*roles: str) -> Generation:
    """Give the generation of Flower that is installed, with what the roles, server and client, need of it."""
    collects = gc.isenabled()
    gc.disable()  # importing makes a great many objects that stay: looking through them costs a sixth of it
    try:
        with deferred.imports():
            return _find(roles)
    finally:
        if collects:
            gc.freeze()  # nor are they looked through for every few messages
            gc.enable()


def _find(roles: tuple[str, ...]) -> Generation:
    if not exists("flwr.common", "Message", "Metadata", "Context", "Error", "DEFAULT_TTL"):
        raise UnknownGenerationError(f"{sys.executable} has no Flower, or one without flwr.common.Message")
    for name in MODULES:
        module = importlib.import_module(f".{name}", __package__)
        if module.fits():
            try:
                gen: Generation = module.This()
                if "server" in roles:
                    gen.for_server()
                if "client" in roles:
                    gen.for_client()
            except (ImportError, AttributeError, TypeError, UnknownGenerationError) as e:
                raise UnknownGenerationError(
                    f"flwr {version()} looks like generation {module.This.name!r}, but lacks something of it: {e}"
                ) from e
            return gen
    raise UnknownGenerationError(f"flwr {version()} is of no generation that the native engine knows; use --engine flower")


def version() -> str:
    """Give the version of flwr that is installed, without importing anything; "" where none is found."""
    for folder in sys.path:
        try:
            for entry in os.scandir(folder or "."):
                name = entry.name
                if name.startswith("flwr-") and name.endswith(".dist-info"):
                    return name[len("flwr-") : -len(".dist-info")]
        except OSError:
            continue
    return ""
