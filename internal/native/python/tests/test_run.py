"""Whole runs: a ServerApp and workers that speak to a relay, on the Flower that is installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

import flwr.common
import pytest
from _pergola_native import generations
from _pergola_native.frames import Frame
from flwr.common.constant import ErrorCode
from relay import Peer, Relay, start

# To 1.12 or so, the SuperLink took messages for any node, and said nothing of ids that it did not know.
KNOWS_UNKNOWN = hasattr(ErrorCode, "MESSAGE_UNAVAILABLE")
LOOP = Path(__file__).resolve().parent / "apps" / "loop"
LARGE = LOOP.parent / "large"
SAME = LOOP.parent / "same"


def test_the_version_is_the_one_asked_for() -> None:
    assert os.environ.get("PERGOLA_EXPECT_FLWR") in (None, importlib.metadata.version("flwr"), generations.version())


def results(relay: Relay) -> dict[str, Any]:
    """Give what the scenarios printed."""
    out: dict[str, Any] = {}
    for line in relay.printed("RESULT"):
        out.update(json.loads(line))
    return out


class Run:
    """A run that is over."""

    def __init__(self, scenarios: list[str], isolation: str = "warm", nodes: int = 2, workers: int = 2, words: str = "") -> None:
        self.relay = Relay(LOOP, nodes, workers, isolation, [f'scenarios="{",".join(scenarios)}"', *([words] if words else [])])
        self.done = self.relay.go()
        self.said = results(self.relay)
        assert self.done.get("ok"), self.relay.text()


@pytest.fixture(scope="session")
def warm() -> Run:
    return Run(
        [
            "about",
            "echo",
            "records",
            "many",
            "large",
            "big_state",
            "raises",
            "exits",
            "nothing",
            "hangs",
            "pulls",
            "unknown",
            "invalid",
            "threads",
        ]
    )


def test_the_process_is_as_under_flower(warm: Run) -> None:
    about = warm.said["about"]
    assert about["path"][0] == str(LOOP) and about["argv"] == [about["path"][1] + "/flwr-serverapp"]
    assert about["cwd"] == str(LOOP.parent) and about["main_thread"]
    seen = warm.said["echo"][0]["seen"]
    assert seen["path"][0] == str(LOOP) and seen["argv"] == [seen["path"][1] + "/flwr-clientapp"]
    assert seen["modules"] == [] and seen["main_thread"] and seen["threads"] == 1
    assert seen["file"] == str(LOOP / "loop" / "client.py")
    assert 3 not in about["fds"] or about["fds"] == [0, 1, 2, 3]  # the listing itself takes one


def test_what_an_app_is_told(warm: Run) -> None:
    about, relay = warm.said["about"], warm.relay
    assert sorted(about["nodes"]) == sorted(relay.nodes)
    assert (
        about["run"]["run_id"] == relay.run and about["run"]["fab_id"] == "acme/loop" and about["run"]["fab_version"] == "1.2.3"
    )
    assert about["run_id"] in (relay.run, None)
    assert about["run_config"]["number"] == 1 and about["run_config"]["nested.value"] == 7.5
    for reply in warm.said["echo"]:
        seen = reply["seen"]
        assert seen["node_id"] == seen["dst"] == reply["src"] and seen["src"] == reply["dst"] == about["node_id"]
        assert seen["run_id"] in (relay.run, None) and seen["message_run"] == reply["run"] == relay.run
        assert reply["reply_to"] == seen["message_id"] and reply["id"] and seen["message_id"]
        assert reply["group"] == seen["group"] == "1" and reply["type"] == seen["type"] == "train"
        assert seen["node_config"] == {"partition-id": relay.nodes.index(reply["src"]), "num-partitions": 2}
        assert seen["run_config"] == about["run_config"]
        assert seen["calls"] == seen["count"] == 1
    for first, again in zip(warm.said["records"]["first"], warm.said["records"]["again"]):
        assert (
            again["seen"]["run_config"]["mine"] == again["seen"]["node_config"]["mine"] == 1
        )  # under Flower the whole context goes on
        assert again["seen"]["count"] == first["seen"]["count"] + 1 == 3


def test_records_there_and_back(warm: Run) -> None:
    big = 50_000 * 49_999 / 2
    for reply in warm.said["records"]["first"] + warm.said["records"]["again"]:
        for sums in (reply["sums"], reply["seen"]["sums"]):
            assert sums == {
                "a": [3.0, 0.0],
                "none": [],
                "z": [pytest.approx(big, rel=1e-6), pytest.approx(2 * big, rel=1e-6)],
            }
        assert reply["seen"]["metrics"] == {"m0": {}, "m1": {"x": 1, "y": [0.5, 1.5]}}
        assert reply["metrics"] == {"m": {"loss": "0.5", "n": "3", "bad": "nan", "far": "-inf", "list": "[1.0, 2.0]"}}
        assert reply["flag"] is True and reply["bytes"] == [0, 255]
    assert warm.said["records"]["unchanged"][0] == pytest.approx(big, rel=1e-6)


def test_arrays_are_written_once(warm: Run) -> None:
    sent = [m for m in warm.relay.messages if "pack" in m]
    names = list(dict.fromkeys(m["pack"] for m in sent))
    assert [len([m for m in sent if m["pack"] == n]) for n in names] == [4, 2, 4, 2]  # records, many, large, big_state
    assert all(warm.relay.received[n] == 1 for n in names)
    assert warm.said["many"] == [[2000, 1000.0 * 2000 * 1999 / 2]] * 2
    assert warm.said["large"] == [25_000_000.0] * 4
    assert all(m.get("plen", 0) < 64 << 10 or len(m["lens"]) == 2000 for m in sent)


def test_numbers_are_read_off_replies(warm: Run) -> None:
    for head in warm.relay.replies[:2]:
        assert head["numbers"] == {"loss": 0.5, "n": 3, "bad": "NaN", "far": "-Infinity"}
        assert head["round"] == 1 and head["type"] == "train" and head["seconds"] > 0 and "error" not in head


def test_state_lasts(warm: Run) -> None:
    counts = warm.said["big_state"]
    assert counts == [counts[0]] * 2 + [counts[0] + 1] * 2 + [counts[0] + 2] * 2


def test_what_raises_is_answered(warm: Run) -> None:
    before = warm.said["big_state"][-1]
    raised = warm.said["raises"]
    for reply in raised["replies"]:
        assert reply["error"] == [2, "<class 'ZeroDivisionError'>:<'asked to'>"]
        assert reply["src"] in warm.relay.nodes and reply["reply_to"]
    assert [r["seen"]["count"] for r in raised["after"]] == [before + 2] * 2  # kept, as Flower does
    exited = warm.said["exits"]
    for reply in exited["replies"]:
        assert reply["error"][0] in (2, 8) and reply["error"][1] == "ClientApp stopped responding."
    assert [r["seen"]["count"] for r in exited["after"]] == [before + 3] * 2  # lost: the process would be gone
    assert warm.relay.replaced == 0
    nothing = warm.said["nothing"]
    assert [r["error"][0] for r in nothing["replies"]] == [2, 2]


def test_timeouts_are_exact_and_late_replies_kept(warm: Run) -> None:
    hangs = warm.said["hangs"]
    slow = warm.said["about"]["nodes"][0]
    assert hangs["got"] == [] and hangs["early"] == 0
    assert [r["src"] for r in hangs["fast"]] == warm.said["about"]["nodes"][1:]
    assert [r["src"] for r in hangs["late"]] == [slow]
    assert hangs["late"][0]["seen"]["count"] == warm.said["nothing"]["after"][0]["seen"]["count"] + 2


def test_pushing_and_pulling(warm: Run) -> None:
    pulls = warm.said["pulls"]
    assert sorted(r["reply_to"] for r in pulls["got"]) == sorted(pulls["ids"])
    assert pulls["zero"] == [] and pulls["empty"] == []
    if not KNOWS_UNKNOWN:
        assert pulls["again"] == pulls["never"] == []
    for reply, asked in [
        *zip(pulls["again"], pulls["ids"]),
        *zip(pulls["never"], ["11111111-1111-1111-1111-111111111111"]),
    ]:
        assert reply["error"][0] == 3 and reply["error"][1].startswith("Error: Message Unavailable - ")
        assert reply["reply_to"] == asked and reply["src"] == reply["dst"] == warm.said["about"]["node_id"]
    assert warm.said["invalid"] == "Invalid message:"
    assert warm.said["threads"] == [[i, [str(i)]] for i in range(24)]


def test_a_node_that_never_was(warm: Run) -> None:
    replies = warm.said["unknown"]
    assert len(replies) == 2
    errors = [r for r in replies if "error" in r]
    assert len(errors) == 1 and errors[0]["error"][0] == 3
    assert errors[0]["error"][1].startswith("Error: Message Unavailable - " if KNOWS_UNKNOWN else "Error: Node Unavailable - ")


ISOLATED = ["echo", "records", "big_state", "raises", "exits", "dies", "threads"]


@pytest.fixture(scope="session")
def forked() -> Run:
    return Run([*ISOLATED, "leaves"], "fork")


@pytest.fixture(scope="session")
def processes() -> Run:
    return Run(["echo", "records", "dies"], "process", nodes=1, workers=1)


@pytest.fixture(params=["forked", pytest.param("processes", marks=pytest.mark.once)])
def isolated(request: pytest.FixtureRequest) -> Run:
    run: Run = request.getfixturevalue(request.param)
    return run


def test_nothing_stays_in_a_process(isolated: Run) -> None:
    seen = [r["seen"] for r in isolated.said["echo"] + isolated.said["records"]["first"] + isolated.said["records"]["again"]]
    assert [s["calls"] for s in seen] == [1] * len(seen)
    assert len({s["pid"] for s in seen}) == len(seen)
    # Each process has random numbers of its own, as under Flower.
    assert len({s["random"] for s in seen}) == len({s["np_random"] for s in seen}) == len(seen)
    assert all(s["main_thread"] and s["threads"] == 1 for s in seen)


def test_records_and_state_of_isolated_messages(isolated: Run) -> None:
    test_records_there_and_back(isolated)
    assert {r["seen"]["count"] for r in isolated.said["records"]["again"]} == {3}
    if "big_state" in isolated.said:
        test_state_lasts(isolated)


def test_an_app_that_dies(isolated: Run) -> None:
    """Whatever ends the process, the strategy sees an error, and the node goes on with the state that it had."""
    before = isolated.said["exits"]["after"] if "exits" in isolated.said else isolated.said["records"]["again"]
    count = before[0]["seen"]["count"]
    for what, died in isolated.said["dies"].items():
        for reply in died["replies"]:
            assert reply["error"][1] == "ClientApp stopped responding." and reply["error"][0] in (2, 8), what
            assert reply["src"] in isolated.relay.nodes and reply["group"] == "1" and reply["type"] == "train"
        count += 1
        assert [r["seen"]["count"] for r in died["after"]] == [count] * len(isolated.relay.nodes), what
    if isolated.relay.isolation == "fork":
        assert isolated.relay.replaced == 0
        assert (
            sorted(h["died"] for h in isolated.relay.replies if "died" in h)
            == ["it exited with 7"] * 2 + ["it was ended by SIGSEGV"] * 2
        )
    else:
        assert isolated.relay.replaced == 2


def test_forked_messages_otherwise(forked: Run) -> None:
    test_numbers_are_read_off_replies(forked)
    assert [r["error"] for r in forked.said["raises"]["replies"]] == [[2, "<class 'ZeroDivisionError'>:<'asked to'>"]] * 2
    assert [r["error"][1] for r in forked.said["exits"]["replies"]] == ["ClientApp stopped responding."] * 2
    assert forked.said["threads"] == [[i, [str(i)]] for i in range(24)]
    # What an app leaves behind is what it would leave behind under Flower: daemonic children of multiprocessing end, what runs at exit runs.
    assert sorted(forked.relay.printed("LEFT")) == ["at exit"] * 2 + ["thread"] * 2
    for reply in forked.said["leaves"]:
        for name in ("daemon", "self"):
            with pytest.raises(ProcessLookupError):
                os.kill(int(float(reply["metrics"]["m"][name])), 0)


def test_the_legacy_api() -> None:
    """DefaultWorkflow with strategies, SecAgg+, mods and differential privacy, and with a client that fails."""
    relay = Relay(LOOP.parent / "legacy", 3, 2, "warm", ["modes='plain,asks,fails,adam,secagg,dp,central'"])
    done = relay.go()
    assert done.get("ok"), relay.text()
    said = results(relay)

    def losses(mode: str) -> list[float]:
        return [loss for _, loss in said[mode]["loss"]]

    # Three clients of equal weight add 1, 2 and 3.
    for mode in ("plain", "asks"):
        assert losses(mode) == pytest.approx([2, 4], rel=1e-6), mode
        assert said[mode]["fit"] == {"partitions": [[1, 3], [2, 3]]}
    assert losses("fails") == pytest.approx([2, 4], rel=1e-6)  # 1 and 3
    assert said["fails"]["fit"] == {"partitions": [[1, 2], [2, 2]]}
    assert losses("secagg") == pytest.approx([2, 4], abs=1e-2)  # quantised
    assert all(0 < loss < 1 for loss in losses("adam"))
    clipped = 0.5 / 30_000**0.5  # a step of norm 0.5 in each coordinate
    assert losses("dp") == pytest.approx([clipped, 2 * clipped], rel=1e-3)
    assert losses("central") == pytest.approx([clipped, 2 * clipped], rel=1e-3)
    errors = [h["error"] for h in relay.replies if "error" in h]
    assert errors == [{"code": 2, "reason": "<class 'ValueError'>:<'no data'>"}] * 2
    evaluated = [h["numbers"] for h in relay.replies if h["type"] == "evaluate"]
    assert all(set(n) == {"loss", "num_examples", "nan"} and n["nan"] == "NaN" for n in evaluated)
    assert {h["round"] for h in relay.replies if "round" in h} == {0, 1, 2}  # 0: the first parameters are asked for


@pytest.mark.skipif(not hasattr(flwr.common, "ArrayRecord"), reason="the app wants records that are not in this Flower")
@pytest.mark.parametrize(
    ("isolation", "leaves"), [("warm", False), ("fork", True), pytest.param("process", False, marks=pytest.mark.once)]
)
def test_a_run_whose_numbers_are_all_looked_at(isolation: str, leaves: bool) -> None:
    """Nodes and server keep everything, while files are used again for others, and the runner's are spoilt."""
    relay = Relay(LARGE, 2, 2 if isolation == "warm" else 1, isolation, [f"leaves={str(leaves).lower()}"], spoils=True)
    assert relay.go().get("ok"), relay.text()
    (line,) = relay.printed("RESULT")
    said = json.loads(line)
    assert said["errors"] == [] and said["right"] == [True] * 18
    assert (max(said["kept"]) > 5) == (isolation == "warm")
    assert relay.printed("LINGERED") == ["[True, True, True]"] * (18 if leaves else 0), relay.text()
    assert len([m for m in relay.messages if "pack" in m]) == 18 and any("pack" in h for h in relay.replies)


@pytest.mark.skipif(not hasattr(flwr.common, "ArrayRecord"), reason="the app wants records that are not in this Flower")
@pytest.mark.parametrize(
    ("isolation", "always"),
    [
        ("fork", False),
        ("fork", True),
        *(pytest.param(i, a, marks=pytest.mark.once) for i, a in (("warm", False), ("warm", True), ("process", True))),
    ],
)
def test_arrays_that_are_in_the_reply_and_in_the_state(isolation: str, always: bool) -> None:
    """One file has both, and is not used again before both are done with it."""
    relay = Relay(SAME, 2, 1, isolation, [f"always={str(always).lower()}"], spoils=True)
    assert relay.go().get("ok"), relay.text()
    (line,) = relay.printed("RESULT")
    assert json.loads(line) == [[number, True, []] for number in range(1, 6) for _ in range(2)]


# -- how a server ends --------------------------------------------------------------------------------------------


def alone(scenario: str, *words: str) -> Relay:
    """Run a server that has no nodes."""
    relay = Relay(LOOP, 0, 0, "warm", [f'scenarios="{scenario}"', *words])
    relay.go()
    return relay


def test_a_server_that_raises() -> None:
    relay = alone("about,raise_here")
    assert not relay.done["ok"] and relay.done["error"] == "LookupError: the server was asked to"
    assert 'raise LookupError("the server was asked to")' in relay.done["exception"]
    assert relay.server.status == 1 and "ServerApp raised an exception" in relay.text()


@pytest.mark.once
def test_a_server_that_exits() -> None:
    relay = alone("exit_here")
    assert not relay.done["ok"] and relay.done["error"] == "SystemExit: 5" and relay.server.status == 5


@pytest.mark.once
def test_configuration_that_cannot_be_read() -> None:
    relay = alone("about", "number=[")
    assert not relay.done["ok"] and relay.done["error"]


def test_a_client_app_that_cannot_be_loaded(tmp_path: Path) -> None:
    app = tmp_path / "app"
    shutil.copytree(LOOP, app)
    (app / "loop" / "client.py").write_text("from flwr.client import ClientApp\nnot_app = ClientApp()\n")
    relay = Relay(app, 1, 1, "fork", ['scenarios="echo"'])
    assert relay.go()["ok"], relay.text()
    assert results(relay)["echo"][0]["error"] == [1, "An exception was raised when attempting to load `ClientApp`"]
    assert "Unable to load attribute app" in relay.workers[0].ready["error"]


@pytest.mark.parametrize("scenario", ["forever", pytest.param("stubborn", marks=pytest.mark.once)])
def test_a_runner_that_goes_away(scenario: str) -> None:
    """The app hears of it where it waits; where it does not listen it is ended."""
    code = (
        f"import sys; sys.path.insert(0, {str(LOOP.parents[2])!r}); import boot; boot.import_package(); "
        f"from _pergola_native import server; server.GRACE = {30 if scenario == 'forever' else 0.05}; sys.exit(server.main())"
    )
    process, link = start("server", command=["-c", code])
    peer = Peer(process, link)
    assert link.receive().kind == "hello"
    link.send(
        Frame(
            {
                "t": "start",
                "run": 1,
                "task": 1,
                "app": str(LOOP),
                "config": [f"scenarios='{scenario}'"],
                "nodes": [5],
                "cwd": str(LOOP),
            }
        )
    )
    peer.wait_for(b"WAITING")
    if scenario == "forever":
        while link.receive().kind != "msg":
            pass
    assert peer.end() == (1 if scenario == "forever" else 70)
    assert (b"GONE RunnerGoneError" in peer.output) == (scenario == "forever")


@pytest.mark.once
@pytest.mark.parametrize("role", ["server", "client"])
def test_a_runner_that_sends_garbage(role: str) -> None:
    process, link = start(role)
    peer = Peer(process, link)
    hello = link.receive().head
    assert (hello["role"], hello["pid"], hello["protocol"], hello["flwr"]) == (role, process.pid, 1, generations.version())
    link.send(Frame({"t": "garbage"}))
    peer.wait_for(b"ProtocolError: 'garbage' came instead of start")
    assert peer.end() == 1
