"""Parts by themselves: the generation that is found, random numbers after a fork, numbers read off replies, the self-check."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from _pergola_native import forking, generations, randomness
from _pergola_native.generations import CRASHED, EXPIRED, NO_REPLY, NODE_GONE, Generation
from _pergola_native.readings import numbers, round_of

BOOT = Path(__file__).resolve().parent.parent / "boot.py"


@pytest.fixture(scope="session")
def gen() -> Generation:
    g = generations.installed("server", "client")
    g.set_identity(7, g.server_id, 1)
    return g


def test_the_generation_is_the_one_of_its_names(gen: Generation) -> None:
    minor = int(generations.version().split(".")[1])
    want = "record sets" if minor < 17 else "record dicts" if minor < 20 else "objects" if minor < 41 else "tasks"
    assert gen.name == want


def test_an_unknown_generation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "MODULES", ())
    with pytest.raises(
        generations.UnknownGenerationError, match="of no generation that the native engine knows; use --engine flower"
    ):
        generations.installed()


def test_a_generation_that_lacks_something_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import flwr.common.config

    monkeypatch.delattr(flwr.common.config, "get_fused_config_from_dir")
    with pytest.raises(generations.UnknownGenerationError, match="looks like generation '.*', but lacks something of it"):
        generations.installed()


@pytest.mark.parametrize("code", [EXPIRED, NO_REPLY, NODE_GONE, CRASHED])
def test_lost_messages_are_answered_as_the_superlink_does(gen: Generation, code: int) -> None:
    """Texts and codes are those of the installed SuperLink, where it has them."""
    utils = generations.importlib.import_module(gen.state_utils)
    message = gen.new_message(7, gen.RecordDict(), "train", 99, "3", 60.0)
    gen.stamp(message, 7, "the-id")
    reply = gen.lost_reply(7, gen.sent(message.metadata, "the-id"), code, message.metadata.created_at + 10)
    assert gen.reply_to(reply.metadata) == "the-id" and reply.metadata.group_id == "3" and reply.metadata.message_type == "train"
    assert reply.metadata.ttl == pytest.approx(50, abs=0.1) and reply.metadata.run_id == 7 and reply.metadata.message_id
    assert reply.metadata.dst_node_id == gen.server_id
    if code == CRASHED:
        assert reply.error.code == getattr(gen.ErrorCode, "CLIENT_APP_CRASHED", 2) and reply.metadata.src_node_id == 99
        return
    name = {EXPIRED: "MESSAGE_UNAVAILABLE", NO_REPLY: "REPLY_MESSAGE_UNAVAILABLE", NODE_GONE: "NODE_UNAVAILABLE"}[code]
    if not hasattr(gen.ErrorCode, name):
        name = "MESSAGE_UNAVAILABLE" if hasattr(gen.ErrorCode, "MESSAGE_UNAVAILABLE") else "NODE_UNAVAILABLE"
    assert reply.error.code == getattr(gen.ErrorCode, name)
    assert reply.error.reason == getattr(utils, name + "_ERROR_REASON")
    assert reply.metadata.src_node_id == (gen.server_id if hasattr(gen.ErrorCode, "MESSAGE_UNAVAILABLE") else 99)


# -- random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "app", "fresh"),
    [
        ("nothing", lambda: None, ["random", "numpy"]),
        ("a few draws", lambda: (random.random(), np.random.rand(3)), ["random", "numpy"]),
        ("many draws", lambda: (random.getrandbits(32 * 50_000), np.random.bytes(4 * 50_000)), ["random", "numpy"]),
        ("a seed", lambda: random.seed(7), ["numpy"]),
        ("numpy's seed", lambda: np.random.seed(7), ["random"]),
        ("a seed and draws", lambda: (random.seed(1), random.random(), np.random.seed(1), np.random.rand(2000)), []),
    ],
)
def test_what_the_app_has_not_seeded_is_seeded_afresh(name: str, app: Any, fresh: list[str]) -> None:
    random.seed()
    np.random.seed()
    generators = randomness.Generators()
    app()
    states = random.getstate(), np.random.get_state()[1].tolist()
    generators.look()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states, "looking changes nothing"
    generators.reseed()
    assert [
        n
        for n, same in (
            ("random", random.getstate() == states[0]),
            ("numpy", np.random.get_state()[1].tolist() == states[1]),
        )
        if not same
    ] == fresh


@pytest.mark.once
def test_torch_is_seeded_afresh_unless_the_app_did(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[bool] = []
    for initial, want in ((1 << 52, [True]), (42, [])):
        seeded.clear()
        monkeypatch.setitem(
            sys.modules, "torch", SimpleNamespace(initial_seed=lambda i=initial: i, seed=lambda: seeded.append(True))
        )  # type: ignore[arg-type]
        generators = randomness.Generators()
        generators.look()
        generators.reseed()
        assert seeded == want


# -- forking ---------------------------------------------------------------------------------------------------------


@pytest.mark.once
def test_what_cannot_be_forked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forking.unsafe() == ""
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="the-apps-own")
    thread.start()
    assert forking.unsafe() == "loading the app has started threads: the-apps-own"
    over.set()
    thread.join()
    for initialised, why in ((False, ""), (True, "loading the app has opened a GPU")):
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda i=initialised: i)))  # type: ignore[arg-type]
        assert forking.unsafe() == why
    monkeypatch.delitem(sys.modules, "torch")
    with monkeypatch.context() as m:
        m.setattr(forking, "_open_files", lambda: {"/dev/nvidia-uvm"})
        assert forking.unsafe() == "loading the app has opened a GPU"
    with open("/dev/null") as f:
        assert "/dev/null" in forking._open_files() and f
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace())  # type: ignore[arg-type]
    assert "imported jax" in forking.unsafe()


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers(gen: Generation) -> None:
    content = gen.RecordDict()
    gen.put(content, "m1", gen.MetricRecord({"loss": 0.5, "n": 3, "l": [1.0], "nan": float("nan"), "big": 1 << 60}))
    gen.put(content, "m2", gen.MetricRecord({"loss": 1.5, "up": float("inf")}))
    gen.put(content, "c", gen.ConfigRecord({"x": 1.0}))
    gen.put(content, "fitres.metrics", gen.ConfigRecord({"accuracy": 0.25, "name": "a", "flag": True, "raw": b"1"}))
    got = numbers(gen, content)
    other = got.pop("m2.loss", None)
    assert sorted([got.pop("loss"), other if other is not None else got.pop("m1.loss")]) == [0.5, 1.5]
    assert got == {"n": 3, "nan": "NaN", "big": 1 << 60, "up": "Infinity", "accuracy": 0.25}
    json.dumps(got, allow_nan=False)
    many = gen.RecordDict()
    gen.put(many, "m", gen.MetricRecord({f"{'k' * 300}{i}": i for i in range(3000)}))
    assert len(json.dumps(numbers(gen, many))) < 1 << 19


@pytest.mark.parametrize(
    ("group", "config", "want"),
    [
        ("3", {}, 3),
        ("", {"server-round": 4}, 4),
        ("warm-up", {"round": 5}, 5),
        ("", {"server_round": "six"}, None),
        ("", {"round": True}, None),
        ("12345678901234567890", {}, None),
        ("²", {}, None),
        ("-1", {}, None),
    ],
)
def test_the_round(gen: Generation, group: str, config: dict[str, Any], want: int | None) -> None:
    content = gen.RecordDict()
    gen.put(content, "config", gen.ConfigRecord(config))
    assert round_of(gen, gen.new_message(7, content, "train", 1, group, None)) == want


# -- the way in -------------------------------------------------------------------------------------------------------


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BOOT), *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )


def test_the_self_check_passes(gen: Generation) -> None:
    p = run("check")
    assert p.returncode == 0 and p.stdout.count("\n") == 1, p.stderr
    assert json.loads(p.stdout) == {"ok": True, "flwr": generations.version(), "protocol": 1, "generation": gen.name}
    assert p.stderr == ""


@pytest.mark.once
def test_the_self_check_says_why_it_fails() -> None:
    """Each thing that the engine takes from Flower, made to behave in another way, is noticed."""
    code = f"""
import sys; sys.path.insert(0, {str(BOOT.parent)!r})
import boot; boot.import_package()
from _pergola_native import check, codec, generations
exec(sys.argv[1])
sys.exit(check.main())
"""
    for patch, why in (
        ("generations.Generation.run = lambda *a: object()", "TypeError"),
        ("codec.fill = lambda *a: None", ""),
        ("from flwr.client import NumPyClient; NumPyClient.to_client = lambda self: None", "legacy fit"),
    ):
        p = subprocess.run([sys.executable, "-c", code, patch], capture_output=True, text=True, timeout=120)
        said = json.loads(p.stdout)
        assert p.returncode == 0 and said["ok"] is False and why in said["why"], (patch, said, p.stderr)


@pytest.mark.once
def test_usage() -> None:
    for args in ((), ("worker",), ("server", "x")):
        p = run(*args)
        assert p.returncode == 2 and "usage: boot.py server|client|check" in p.stderr
    p = run("client")
    assert p.returncode == 1 and "descriptor 3 is not a socket to a runner" in p.stderr
