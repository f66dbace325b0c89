"""Parts by themselves: the generation that is found, random numbers after a fork, numbers read off replies, the self-check."""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import random
import select
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from _pergola_native import forking, generations, grid, packs, randomness
from _pergola_native.client import Worker
from _pergola_native.frames import Frame, Link
from _pergola_native.generations import CRASHED, EXPIRED, NO_REPLY, NODE_GONE, Generation
from _pergola_native.readings import numbers, round_of

BOOT = Path(__file__).resolve().parent.parent / "boot.py"


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


# -- the server's end ---------------------------------------------------------------------------------------------------


def exchange(gen: Generation, receive: Any = None) -> grid.Exchange:
    return grid.Exchange(gen, SimpleNamespace(send=lambda frame: None, receive=receive), 7, [99])  # type: ignore[arg-type]


def test_an_expired_message_is_unknown_to_the_superlink(gen: Generation) -> None:
    end = exchange(gen)
    (mid,) = end.push([gen.new_message(7, gen.RecordDict(), "train", 99, "3", 60.0)])
    end.take(Frame({"t": "lost", "id": mid, "code": EXPIRED}))
    (reply,) = end.pull([mid])
    utils = generations.importlib.import_module(gen.state_utils)
    make = getattr(utils, "create_message_error_unavailable_ins_message", None)
    if make is None:  # it had none of messages, to 1.16 or so
        assert (reply.metadata.group_id, reply.metadata.ttl == 0) == (("", True) if gen.answers_unknown_ids else ("3", False))
        return
    fields = {"reply_to_message_id": uuid.UUID(mid) if gen.name == "record dicts" else mid, "run_id": 7}
    want = make(**{k: v for k, v in fields.items() if k in inspect.signature(make).parameters})
    for name in ("run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "message_type", "ttl"):
        assert getattr(reply.metadata, name) == getattr(want.metadata, name), name
    assert (reply.error.code, reply.error.reason) == (want.error.code, want.error.reason)


def test_what_cannot_be_taken_in_ends_the_wait(gen: Generation) -> None:
    def receive() -> Frame:
        raise MemoryError("no room")

    end = exchange(gen, receive)
    ids = end.push([gen.new_message(7, gen.RecordDict(), "train", 99, "1", None)])
    end.receive()
    with pytest.raises(grid.RunnerGoneError, match="no room"):
        end.wait(ids, None)


@pytest.mark.once
def test_replies_are_taken_while_the_runner_has_messages_wait(gen: Generation) -> None:
    """Two ends that both wait for the other to read would do so for ever."""
    ours, theirs = socket.socketpair()
    link, runner = Link(ours), Link(theirs)
    e = grid.Exchange(gen, link, 7, [99])
    writing = threading.Thread(target=lambda: link.send(Frame({"t": "msg", "id": "m"}, bytes(64 << 20))), daemon=True)
    writing.start()
    select.select([theirs], [], [])  # it has begun, and goes on only when this is read
    reading = threading.Thread(target=e.receive, daemon=True)
    reading.start()
    for i in range(3):
        fd = packs.new_file("test")
        packs.write(fd, [b"abc"])
        runner.send(Frame({"t": "reply", "id": f"unknown.{i}", "pack": f"r.{i}", "lens": [3], "fds": [f"r.{i}"]}, b"", b"", [fd]))
        os.close(fd)
    runner.send(Frame({"t": "nodes", "nodes": [1, 2]}))
    with e._changed:
        assert e._changed.wait_for(lambda: e._nodes == [1, 2], 60)
    assert writing.is_alive()
    assert runner.receive().kind == "msg"
    assert [runner.receive().head["pack"] for _ in range(3)] == ["r.0", "r.1", "r.2"]
    writing.join()
    theirs.close()
    runner.close()
    reading.join()
    assert e._freeing is not None
    e._freeing.join()


def test_waiting_for_many_costs_the_same_for_each(gen: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(dict[str, Any]):
        looks = 0

        def __contains__(self, key: object) -> bool:
            self.looks += 1
            return super().__contains__(key)

    end = exchange(gen)
    ids = end.push([gen.new_message(7, gen.RecordDict(), "train", 99, "1", None) for _ in range(500)])
    end._waiting = waiting = Counted(end._waiting)
    coming = iter(ids)
    monkeypatch.setattr(
        end._changed, "wait", lambda timeout: end.take(Frame({"t": "lost", "id": next(coming), "code": NODE_GONE}))
    )
    end.wait(ids, None)
    assert not waiting and waiting.looks < 3 * len(ids) and len(end.pull(ids)) == len(ids)


@pytest.mark.parametrize("letters", [10, 5 << 20])
def test_an_error_of_any_length_is_answered(gen: Generation, letters: int) -> None:
    def app(message: Any, context: Any) -> Any:
        raise ValueError("x" * letters)

    worker = Worker(gen, 7, {}, app, "c")
    message = gen.new_message(7, gen.RecordDict(), "train", 99, "1", None)
    gen.stamp(message, 7, "the-id")
    proto, _ = worker.codec.encode(message, run_id=7, src_node_id=gen.server_id, message_id="the-id")
    answer = worker.answer(Frame({"t": "msg", "id": "the-id", "node": 99}, proto))
    gen.set_identity(7, gen.server_id, 1)
    assert answer.head["error"]["code"] == 2 and len(json.dumps(answer.head)) < 10_000
    reply = worker.codec.decode(answer.proto, [], [])
    assert reply.error.reason == f"<class 'ValueError'>:<'{'x' * letters}'>"


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


OPENMP = f"""
import ctypes, os, signal, sys
sys.path.insert(0, {str(BOOT.parent)!r})
import boot; boot.import_package()
from _pergola_native import forking
gomp = ctypes.CDLL("libgomp.so.1")
region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
gomp.GOMP_parallel(region, None, 3, 0)
forking.rest()
pid = os.fork()
if not pid:
    signal.alarm(20)  # without rest it waits for ever
    gomp.GOMP_parallel(region, None, 3, 0)
    os._exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.once
def test_openmp_works_in_a_child_though_it_has_worked_in_its_template() -> None:
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        pytest.skip("this machine has no libgomp")
    p = subprocess.run([sys.executable, "-c", OPENMP], capture_output=True, text=True, timeout=120)
    assert p.returncode == 7, p.stderr


@pytest.mark.once
def test_a_fork_that_fails_is_not_the_runners_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError("too many processes")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(RuntimeError, match="no process can be forked for a message: too many processes"):
        forking.Template(None, None, None)._fork()  # type: ignore[arg-type]


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
