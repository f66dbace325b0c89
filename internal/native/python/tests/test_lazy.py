"""Arrays that stay in memory files: to an app they are what Flower's own are, whatever becomes of the files."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import errno
import functools
import gc
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import multiprocessing
import operator
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import flwr.common
import numpy as np
import pytest
from _pergola_native import arrays, blobs, grid, lazy, packs
from _pergola_native.blobs import FROM, SLACK, Blob, File
from _pergola_native.client import Worker
from _pergola_native.codec import Codec
from _pergola_native.frames import Frame
from _pergola_native.generations import NODE_GONE, Generation
from numpy.lib.recfunctions import repack_fields

pytestmark = pytest.mark.skipif(not hasattr(flwr.common, "ArrayRecord"), reason="Flower's Array was another thing then")

Array: Any = getattr(flwr.common, "Array", None)
ArrayRecord: Any = getattr(flwr.common, "ArrayRecord", None)


@pytest.fixture(autouse=True, params=["copied", "mapped"])
def own(gen: Generation, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[packs.ServerPacks]:
    """Give the packs whose arena the Arrays of a test go to. Their numbers are copied out of the files, or are in their pages."""
    gc.collect()
    if request.param == "mapped":
        monkeypatch.setattr(blobs, "MAP_FROM", FROM)
    else:
        monkeypatch.setattr(gen.lazy, "maps", False)
    p = packs.ServerPacks()
    gen.lazy.arena = p.arena
    yield p
    gen.lazy.arena = None


def plain(function: Any) -> Any:
    """Give Flower's own function in the place of which one of ours stands."""
    return inspect.getclosurevars(function).nonlocals["plain"]


def numbers(seed: int, size: int = FROM) -> Any:
    return np.random.default_rng(seed).random(size, dtype=np.float32)


def npy(array: Any) -> bytes:
    f = io.BytesIO()
    np.save(f, array, allow_pickle=array.dtype.hasobject)
    return f.getvalue()


def in_a_pack(data: bytes, dtype: str = "float32", stype: str = "numpy.ndarray", at: int = 6000) -> Any:
    """Make an Array whose bytes are in the midst of a pack."""
    a = Array(dtype=dtype, shape=plain_array(data).shape, stype=stype, data=b"")
    fd = packs.new_file("test")
    packs.write(fd, [b"x" * at, data, npy(np.arange(FROM))])
    lazy.attach(a, Blob(File(fd, os.close), at, len(data)))
    return a


def plain_array(data: bytes, dtype: str = "float32", stype: str = "numpy.ndarray") -> Any:
    shape = plain(Array.from_numpy_ndarray)(np.zeros(0)).shape  # a list, or a tuple
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def outcome(call: Callable[[], Any]) -> Any:
    """Give what came of it, so that it can be compared."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return seen(call())
    except Exception as e:
        return type(e), str(e)


def seen(found: Any) -> Any:
    """Give all that an app can see of an ndarray."""
    if not isinstance(found, np.ndarray):
        return type(found), {k: seen(found[k]) for k in found.files} if hasattr(found, "files") else found
    # What stands between fields is left as it was where Flower reads them: any bytes.
    numbers = repack_fields(found) if found.dtype.names else found
    return type(found), found.dtype, found.shape, found.strides, str(found.flags), found.base is None, numbers.tobytes()


# -- making -----------------------------------------------------------------------------------------------------------

N = FROM
PADDED = np.dtype({"names": ["a", "b"], "formats": ["i1", "f8"], "itemsize": 24, "offsets": [0, 8]})


def filled(dtype: Any, size: int = N) -> Any:
    """Make an array of bytes at random, those between its fields included."""
    dtype = np.dtype(dtype)
    return np.frombuffer(np.random.default_rng(3).bytes(size * dtype.itemsize), dtype).copy()


# Name, array, whether it goes to a file.
MADE: list[tuple[str, Any, bool]] = [
    *[(t, filled(t), True) for t in ("float32", "float64", "float16", "int8", "complex64", ">f4", ">i2", "S5", "V16")],
    ("bool", np.arange(N) % 3 == 0, True),
    ("datetime64", np.arange(N).astype("datetime64[ns]"), True),
    ("timedelta64", np.arange(N).astype("timedelta64[s]"), True),
    ("unicode", np.array([f"ä{i}" for i in range(N // 8)]), True),
    ("structured", filled([("a", "<f4"), ("b", ">i8", (2,)), ("ü", "i1")]), True),
    ("padded", filled(PADDED), True),
    ("two dimensions", numbers(1).reshape(256, -1), True),
    ("Fortran's order", np.asfortranarray(numbers(1).reshape(256, -1)), True),
    ("Fortran's order, structured", np.asfortranarray(filled(PADDED).reshape(64, -1)), True),
    ("three dimensions, transposed", numbers(1).reshape(16, 64, -1).T, True),
    ("read-only", np.broadcast_to(numbers(1), (1, N)), True),
    ("no dimensions", np.array("x" * FROM), True),
    ("every other", numbers(1)[::2], False),
    ("backwards", numbers(1)[::-1], False),
    ("axes in another order", numbers(1).reshape(16, 64, -1).transpose(1, 0, 2), False),
    ("broadcast", np.broadcast_to(np.float32(1), (N,)), False),
    ("one too few", filled("int8", FROM - 1), False),
    ("just enough", filled("int8", FROM), True),
    ("one more", filled("int8", FROM + 1), True),
    ("none", np.zeros((0, 3)), False),
    ("few", np.ones(3), False),
    ("a number", np.array(3.5), False),
    ("matrix", np.matrix(numbers(1)), False),
    ("masked", np.ma.masked_array(numbers(1), mask=np.arange(N) % 2), False),
    ("records", filled(PADDED).view(np.recarray), False),
    ("objects", np.array([{}] * N), False),
    ("a field of objects", np.zeros(N, dtype=[("a", "f4"), ("b", "O")]), False),
    ("names that need another header", np.zeros(300, dtype=[("n" * 300 + str(i), "i1") for i in range(300)]), True),
]


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize(("name", "array", "large"), MADE, ids=[m[0] for m in MADE])
def test_an_array_is_what_flower_makes(gen: Generation, name: str, array: Any, large: bool, arena: bool) -> None:
    if not arena:
        gen.lazy.arena = None
    makers = [Array.from_numpy_ndarray, Array, lambda a: ArrayRecord([a])["0"]]
    want = outcome(lambda: plain(Array.from_numpy_ndarray)(array))
    if want[0] is not Array:
        assert [outcome(lambda m=m: m(array)) for m in makers] == [want] * 3 and want[0] is ValueError
        return
    flower = want[1]
    for make in makers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            a = make(array)
        assert (lazy.of(a) is not None) == (large and arena)
        assert type(a) is Array and (a.dtype, a.shape, a.stype) == (flower.dtype, flower.shape, flower.stype)
        assert type(a.shape) is type(flower.shape) and getattr(a, "is_dirty", 0) == getattr(flower, "is_dirty", 0)
        assert type(a.data) is bytes and a.data == flower.data and a.data is a.data
        assert a == flower and flower == a and repr(a) == repr(flower)
        assert outcome(a.numpy) == outcome(lambda: plain(Array.numpy)(flower))


def test_the_shim_knows_this_flower(gen: Generation) -> None:
    assert gen.lazy.reads
    assert inspect.getdoc(Array.numpy) and inspect.getdoc(Array.from_numpy_ndarray) and not hasattr(Array, "data")
    with pytest.raises(AttributeError, match="'data'"):
        object.__new__(Array).data


# -- reading ----------------------------------------------------------------------------------------------------------


def header(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    text += " " * (-(len(text.encode()) + (10 if version == (1, 0) else 12)) % 64)  # as NumPy does
    n = len(text.encode())
    return b"\x93NUMPY" + bytes(version) + n.to_bytes(2 if version == (1, 0) else 4, "little") + text.encode()


def described(shape: Any, descr: str = "'<f4'", order: bool = False) -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def zipped(save: Any) -> bytes:
    f = io.BytesIO()
    save(f, a=numbers(1), b=np.arange(3))
    return f.getvalue()


GOOD = npy(numbers(2))
BODY = numbers(2).tobytes()
READ: list[tuple[str, bytes]] = [
    *[(f"made of {name}", npy(a)) for name, a, _ in MADE if not a.dtype.hasobject and name != "names that need another header"],
    ("version 2", header(described((N,)), (2, 0)) + BODY),
    ("version 3", header(described((N // 2,), "[('ü', '<f8')]"), (3, 0)) + BODY),
    ("version 4", header(described((N,)), (4, 0)) + BODY),
    ("of Python 2", header(described(f"({N}L,)")) + BODY),
    ("cut within an element", GOOD[:-1]),
    ("cut between elements", GOOD[:-4]),
    ("cut within the header", GOOD[:50]),
    ("cut within the length", GOOD[:9]),
    ("cut within the magic", GOOD[:4]),
    ("the header alone", GOOD[:128]),
    ("more than there should be", GOOD + b"x" * 9),
    ("two behind each other", GOOD + GOOD),
    ("more elements than there are", header(described((N + 5,))) + BODY),
    ("more of the header than there is", header(described((N,)))[:8] + b"\xff\xff" + BODY[:200]),
    ("a header that ends nowhere", header("{'descr': '''") + BODY),
    ("a negative size", header(described((-1,))) + BODY),
    ("elements of no size", header(described((3,), "'<U0'")) + BODY),
    ("no such type", header(described((N,), "'<q9'")) + BODY),
    ("no dictionary", header("[1]\n") + BODY),
    ("objects", npy(np.array([{"a": 1}] * 9))),
    ("a pickle", pickle.dumps(numbers(1))),
    ("npz", zipped(np.savez)),
    ("npz, compressed", zipped(np.savez_compressed)),
    ("noise", bytes(range(1, 256)) * 300),
]


@pytest.mark.parametrize("stype", ["numpy.ndarray", "other"])
@pytest.mark.parametrize(("name", "data"), READ, ids=[r[0] for r in READ])
def test_bytes_are_read_as_flower_does(name: str, data: bytes, stype: str) -> None:
    a = in_a_pack(data, stype=stype)
    flower = plain_array(data, stype=stype)
    assert lazy.of(a) is not None and outcome(a.numpy) == outcome(lambda: plain(Array.numpy)(flower))
    assert a.data == data and lazy.of(a) is not None and outcome(a.numpy) == outcome(lambda: plain(Array.numpy)(flower))
    assert a == flower


def test_numbers_are_the_apps_own() -> None:
    for a in (Array(numbers(1)), in_a_pack(npy(numbers(1))), in_a_pack(npy(numbers(1)), at=6001)):
        first = a.numpy()
        assert seen(first) == seen(plain(Array.numpy)(plain_array(npy(numbers(1)))))
        first += 1
        assert lazy.of(a).file.read == {}, "no bytes are made for it"  # type: ignore[union-attr]
        assert np.array_equal(a.numpy(), numbers(1)) and np.array_equal(first, numbers(1) + 1) and a.data == npy(numbers(1))
    mine = numbers(1)
    a = Array(mine)
    mine += 1
    assert np.array_equal(a.numpy(), numbers(1))


# -- what an app may do with one ----------------------------------------------------------------------------------------

SET: list[tuple[str, Any]] = [
    ("data", b"x"),
    ("data", npy(np.arange(5))),
    ("dtype", "int8"),
    ("shape", (1,)),
    ("stype", "other"),
    ("more", 7),
]


@pytest.mark.parametrize(("name", "value"), SET, ids=str)
def test_an_array_that_is_changed(name: str, value: Any) -> None:
    a, flower = Array(numbers(1)), plain(Array.from_numpy_ndarray)(numbers(1))
    before = getattr(a, "object_id", None)
    assert before == getattr(flower, "object_id", None)
    for x in (a, flower):
        setattr(x, name, value)
    assert a == flower and repr(a) == repr(flower) and outcome(a.numpy) == outcome(flower.numpy)
    assert getattr(a, "object_id", None) == getattr(flower, "object_id", None)
    assert name == "more" or before is None or a.object_id != before


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {i}": lambda a, i=i: pickle.loads(pickle.dumps(a, i)) for i in range(pickle.HIGHEST_PROTOCOL + 1)},
    "replace": lambda a: dataclasses.replace(a, dtype="int8"),
    "asdict": dataclasses.asdict,
    "astuple": dataclasses.astuple,
    "fields": lambda a: [(f.name, f.type, f.default is dataclasses.MISSING) for f in dataclasses.fields(a)],
    "vars of a copy": lambda a: sorted(vars(copy.copy(a))),
    "object_id": lambda a: getattr(a, "object_id", None),
    "slices": lambda a: [(k, bytes(c.data)) for k, c in a.slice_array()] if hasattr(a, "slice_array") else None,
    "inflate": lambda a: Array.inflate(a.deflate(), a.children) if hasattr(a, "deflate") else None,
    "within a record": lambda a: copy.deepcopy(ArrayRecord(OrderedDict(a=a)))["a"],
    "a dictionary's update": lambda a: (b := object.__new__(Array), vars(b).update(vars(a)))[0],
}


@pytest.mark.parametrize("name", COPIES)
def test_an_array_that_is_copied(name: str) -> None:
    for a in (Array(numbers(1)), in_a_pack(npy(numbers(1)))):
        flower = plain_array(npy(numbers(1)))
        flower.dtype, flower.shape = a.dtype, a.shape
        got, want = COPIES[name](a), COPIES[name](flower)
        assert got == want and type(got) is type(want)
        del a
        gc.collect()
        if isinstance(got, Array):
            assert outcome(got.numpy) == outcome(functools.partial(plain(Array.numpy), flower)) and got.data == flower.data


@pytest.mark.once
def test_a_pickle_is_read_where_nobody_knows_of_files() -> None:
    code = "import pickle, sys, hashlib; a = pickle.load(sys.stdin.buffer); print(hashlib.sha256(a.data).hexdigest(), a.numpy().sum())"
    p = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(Array(numbers(1))), capture_output=True, timeout=120)
    assert p.stdout.decode().split() == [hashlib.sha256(npy(numbers(1))).hexdigest(), str(numbers(1).sum())], p.stderr


def test_records() -> None:
    def made(make: Any) -> Any:
        return OrderedDict((k, make(a)) for k, a in (("x", numbers(1)), ("y", np.arange(3)), ("z", numbers(2))))

    for keep in (True, False):
        ours, theirs = made(Array), made(plain(Array.from_numpy_ndarray))
        held = {k: lazy.of(a) for k, a in ours.items()}
        record = ArrayRecord(ours, keep_input=keep)
        flower = plain(ArrayRecord.from_array_dict)(theirs, keep_input=keep)
        assert list(ours) == list(theirs) and record == flower and record.count_bytes() == flower.count_bytes()
        assert {k: lazy.of(a) for k, a in record.items()} == held and held["x"] and held["y"] is None
        assert all(type(record[k].shape) is type(flower[k].shape) for k in record)
        if keep:
            assert record["x"] is not ours["x"]
            record["x"].data = b""
            assert ours["x"].data == theirs["x"].data  # they share bytes, not themselves
            flower["x"].data = b""
        assert getattr(record, "object_id", None) == getattr(flower, "object_id", None)
    for keep in (True, False):
        ones = [numbers(1), np.arange(3), numbers(2)]
        record = ArrayRecord(ones, keep_input=keep)
        assert len(ones) == (3 if keep else 0)
        assert record.count_bytes() == sum(len(k) + len(npy(a)) for k, a in zip("012", (numbers(1), np.arange(3), numbers(2))))
        blob = lazy.of(record["0"])
        out = record.to_numpy_ndarrays(keep_input=keep)
        assert blob is not None and blob.file is not None and blob.offset not in blob.file.read  # nobody has asked for bytes
        assert len(record) == (3 if keep else 0)
        assert [seen(a) for a in out] == [seen(plain_array(npy(a)).numpy()) for a in (numbers(1), np.arange(3), numbers(2))]


def test_state_dicts_of_torch() -> None:
    torch = pytest.importorskip("torch")
    state = OrderedDict(w=torch.arange(N, dtype=torch.float32).reshape(2, -1), b=torch.ones(3))
    record = ArrayRecord(state)
    assert lazy.of(record["w"]) is not None
    for keep in (True, False):
        back = record.to_torch_state_dict(keep_input=keep)
        assert all(torch.equal(state[k], back[k]) for k in state)
        back["w"] += 1


# -- where they are written -----------------------------------------------------------------------------------------------


def content(gen: Generation, *made: Any) -> Any:
    c = gen.RecordDict()
    record = ArrayRecord()
    for i, a in enumerate(made):
        record[str(i)] = a
    c["arrays"] = record
    return c


def has(fd: int, *parts: Any) -> bool:
    """Tell whether a file begins with those bytes, or arrays."""
    want = b"".join(p if isinstance(p, bytes) else npy(p) for p in parts)
    return os.pread(fd, len(want), 0) == want


def test_arrays_in_order_are_a_pack_already(gen: Generation, own: packs.ServerPacks) -> None:
    made = [Array(numbers(i)) for i in range(4)]
    _, beside = arrays.strip(gen, content(gen, *made))
    name, fd, _ = own.put(beside.blobs)
    assert fd is not None and own.writes == 0 and beside.lens == [len(a.data) for a in made]
    assert has(fd, *[numbers(i) for i in range(4)])
    assert own.put(arrays.strip(gen, content(gen, *made))[1].blobs) == (name, None, []) and own.writes == 0
    later = Array(numbers(9))
    assert has(fd, *[numbers(i) for i in range(4)]), "what comes later goes to another file"
    assert np.array_equal(later.numpy(), numbers(9))


OTHERWISE: list[tuple[str, Callable[[list[Any]], list[Any]]]] = [
    ("the other way round", lambda m: m[::-1]),
    ("not from the start", lambda m: m[1:]),
    ("one is missing", lambda m: [m[0], m[2]]),
    ("one comes twice", lambda m: [m[0], m[0], m[1]]),
    ("bytes among them", lambda m: [m[0], plain_array(npy(numbers(7))), m[1]]),
    ("bytes first", lambda m: [plain_array(npy(numbers(7))), *m]),
    ("one has become bytes", lambda m: [m[0], setattr(m[1], "data", m[1].data) or m[1], m[2]]),
    ("of a message", lambda m: [in_a_pack(npy(numbers(7))), *m]),
    ("much that is small", lambda m: [*m, *[plain_array(bytes([i]) * (FROM - 1)) for i in range(20)]]),
]


@pytest.mark.parametrize(("name", "choose"), OTHERWISE, ids=[o[0] for o in OTHERWISE])
def test_arrays_in_another_order_are_copied(
    gen: Generation, own: packs.ServerPacks, name: str, choose: Callable[[list[Any]], list[Any]]
) -> None:
    chosen = choose([Array(numbers(i)) for i in range(3)])
    _, beside = arrays.strip(gen, content(gen, *chosen))
    _, fd, _ = own.put(beside.blobs)
    assert fd is not None and own.writes == 1 and beside.lens == [len(a.data) for a in chosen]
    assert has(fd, *[a.data for a in chosen])


def test_the_first_of_a_file_are_a_pack_too(gen: Generation, own: packs.ServerPacks) -> None:
    made = [Array(numbers(i)) for i in range(3)]
    for n in (2, 3):
        _, beside = arrays.strip(gen, content(gen, *made[:n]))
        _, fd, _ = own.put(beside.blobs)
        assert fd is not None and own.writes == 0
        assert packs.read(File(os.dup(fd), os.close), list(beside.lens)) == [a.data for a in made[:n]]


def test_small_ones_stay_in_the_protobuf(gen: Generation, own: packs.ServerPacks) -> None:
    made = [numbers(1), np.arange(4.0), numbers(2), np.arange(9)]
    there = content(gen, *map(Array, made))
    thin, beside = arrays.strip(gen, there)
    assert beside.lens == [len(npy(numbers(1))), -1, len(npy(numbers(2))), -1]
    own.put(beside.blobs)
    assert own.writes == 0 and [len(a.data) for a in thin["arrays"].values()] == [0, len(npy(made[1])), 0, len(npy(made[3]))]
    assert all(np.array_equal(a.numpy(), m) for a, m in zip(there["arrays"].values(), made)), "the app's own are as they were"
    message = gen.new_message(7, there, "train", 99, "1", None)
    gen.stamp(message, 7, "the-id")
    proto, beside = Codec(gen).encode(message, run_id=7, src_node_id=gen.server_id, message_id="the-id")
    assert len(proto) < 2000
    back = Codec(gen).decode(proto, beside.lens, beside.blobs).content["arrays"]
    assert all(np.array_equal(a.numpy(), m) for a, m in zip(back.values(), made))


def files() -> list[File]:
    return [f for f in blobs._living(blobs._files) if f.blobs]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_pages_are_used_again(gen: Generation) -> None:
    p = packs.WorkerPacks("c")
    gen.lazy.arena = p.arena
    inodes = set()
    for i in range(5):
        made = [Array(numbers(i)), Array(numbers(i + 1))]
        name, fd = p.put(arrays.strip(gen, content(gen, *made))[1].blobs)
        inodes.add(os.fstat(fd).st_ino)
        assert has(fd, numbers(i), numbers(i + 1))
        del made
        p.free(name)
        Array(numbers(i))
        Array(numbers(i))  # nobody has the one before
        assert p.arena._file is not None and p.arena._file.end == len(npy(numbers(i)))
    assert len(inodes) == 1 and p.writes == 0


def test_a_file_that_is_far_too_long_is_left(gen: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    p = packs.WorkerPacks("c")
    gen.lazy.arena = p.arena
    for i, (many, writes) in enumerate([(30, 0), (1, 1), (1, 1), (30, 1)]):
        made = [Array(numbers(100 * i + j)) for j in range(many)]
        name, fd = p.put(arrays.strip(gen, content(gen, *made))[1].blobs)
        assert has(fd, *[numbers(100 * i + j) for j in range(many)]) and p.writes == writes
        assert os.fstat(fd).st_size < (many + 6) * len(npy(numbers(0)))
        del made
        p.free(name)


def test_what_is_gone_takes_no_room_for_long(monkeypatch: pytest.MonkeyPatch, own: packs.ServerPacks) -> None:
    """An app keeps one array of many that it makes."""
    slack = 20 * FROM
    monkeypatch.setattr(blobs, "SLACK", slack)
    kept = []
    for i in range(200):
        a = Array(numbers(i))
        if i % 20 == 0:
            kept.append(a)
    size = len(kept[0].data)
    used = sum(os.fstat(f.fd).st_blocks * 512 for f in files())
    assert used <= 2 * slack + len(kept) * size, f"{used / size} arrays for {len(kept)}"
    assert all(np.array_equal(a.numpy(), numbers(20 * i)) for i, a in enumerate(kept))


def test_one_array_of_each_reply_does_not_hold_the_replies(gen: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "SLACK", 20 * FROM)
    end = server(gen)
    kept = []
    for i in range(30):
        kept.append(reply_of(gen, end, content(gen, *[in_a_pack(npy(numbers(i + j))) for j in range(5)])).content["arrays"]["2"])
    held = sum(os.fstat(f.fd).st_size for f in files())
    assert held <= 20 * FROM + 10 * 4 * FROM, f"{held / 4 / FROM} arrays for {len(kept)}"
    assert all(np.array_equal(a.numpy(), numbers(i + 2)) for i, a in enumerate(kept))
    assert SLACK > 20 * FROM


def test_there_are_descriptors_for_any_number_of_arrays(gen: Generation, own: packs.ServerPacks) -> None:
    before, kept = open_fds(), []
    for i in range(3 * blobs.MOST):
        kept.append(Array(filled("int8", FROM + i)))
        for name in own.put(arrays.strip(gen, content(gen, kept[-1]))[1].blobs)[2]:
            own.forgot(name)
    assert blobs.count() <= blobs.MOST + packs.FEW and open_fds() <= before + blobs.MOST + packs.FEW + packs.Idle.KEEP
    assert all(np.array_equal(a.numpy(), filled("int8", FROM + i)) for i, a in enumerate(kept))
    fds = open_fds()
    del kept
    assert open_fds() < fds - blobs.MOST + packs.FEW + 10


def test_there_are_descriptors_for_any_number_of_ndarrays() -> None:
    before = open_fds()
    mine = [Array(numbers(i)).numpy() for i in range(2 * blobs.MOST)]
    assert open_fds() <= before + blobs.MOST + 5
    assert all(np.array_equal(a, numbers(i)) for i, a in enumerate(mine)), "though nobody has the Arrays"
    del mine
    assert open_fds() <= before + 5


@pytest.mark.parametrize("where", ["at once", "half way", "no /proc"])
def test_what_cannot_be_written_is_bytes(monkeypatch: pytest.MonkeyPatch, own: packs.ServerPacks, where: str) -> None:
    first = Array(numbers(1))
    with monkeypatch.context() as m:
        save = np.save

        def fail(file: Any, array: Any, **more: Any) -> None:
            if isinstance(file, io.FileIO):
                file.write(b"half of it" * (5000 if where == "half way" else 0))
                raise OSError(errno.ENOSPC, "no room")
            save(file, array, **more)

        if where == "no /proc":
            m.setattr(File, "open", lambda self, mode: os.open("/nowhere/self/fd/7", 0))
        else:
            m.setattr(np, "save", fail)
        second = Array(numbers(2))
        assert lazy.of(second) is None and second.data == npy(numbers(2)) and np.array_equal(first.numpy(), numbers(1))
    third = Array(numbers(3))
    assert lazy.of(third) is not None and lazy.of(first) is not None
    assert all(np.array_equal(a.numpy(), numbers(i + 1)) for i, a in enumerate([first, second, third]))


# -- how long they last ---------------------------------------------------------------------------------------------------


def pack(*made: Any) -> tuple[int, list[int]]:
    fd = packs.new_file("runner")
    packs.write(fd, [npy(a) for a in made])
    return fd, [len(npy(a)) for a in made]


def spoil(fd: int) -> None:
    os.pwrite(fd, b"\xff" * os.fstat(fd).st_size, 0)


def asked(
    gen: Generation, worker: Worker, named: str, fd: int | None, lens: list[int], state: tuple[int, list[int]] | None = None
) -> Frame:
    """Have a worker answer a message with that pack, and that state."""
    message = gen.new_message(7, content(gen, *[plain_array(b"")] * len(lens)), "train", 99, "1", None)
    gen.stamp(message, 7, "the-id")
    proto, _ = worker.codec.encode(message, run_id=7, src_node_id=gen.server_id, message_id="the-id")
    head: dict[str, Any] = {"t": "msg", "id": "the-id", "node": 99, "pack": named, "lens": lens, "fds": []}
    frame = Frame(head, proto)
    if fd is not None:
        head["fds"].append(named)
        frame.fds.append(os.dup(fd))
    if state is not None:
        frame.state, _ = worker.codec.content(content(gen, *[plain_array(b"")] * len(state[1])))
        head.update(spack="state", slens=state[1])
        head["fds"].append("state")
        frame.fds.append(os.dup(state[0]))
    try:
        return worker.answer(frame)
    finally:
        frame.close()
        gen.set_identity(7, gen.server_id, 1)


def test_what_a_worker_keeps_is_right_when_its_packs_are_of_others(gen: Generation) -> None:
    kept: list[tuple[Any, Any]] = []
    mine: list[list[Any]] = []

    def app(message: Any, context: Any) -> Any:
        for of in (message.content["arrays"], context.state["arrays"]):
            assert all(lazy.of(a) is not None and lazy.of(a).file is not None for a in of.values())  # type: ignore[union-attr]
        kept.append((message.content["arrays"], context.state["arrays"]))
        mine.append([a.numpy() for of in kept[-1] for a in of.values()])
        mine[-1][0][:5] += 1
        if len(kept) == 3:
            raise ValueError("asked to")
        return gen.reply(message, content(gen, *message.content["arrays"].values()))

    worker = Worker(gen, 7, {}, app, "c")
    before = open_fds()
    one, two = pack(numbers(1), numbers(2)), pack(numbers(3))
    state = [pack(numbers(10 + i)) for i in range(4)]
    answers = [
        asked(gen, worker, *m, state=s)
        for m, s in zip([("a", *one), ("a", None, one[1]), ("b", *two), ("a", None, one[1])], state)
    ]
    assert [a.head.get("error", {}).get("code") for a in answers] == [None, None, 2, None]
    for fd, _ in (one, two, *state):
        spoil(fd)
        os.close(fd)
    want = [([1, 2], 10), ([1, 2], 11), ([3], 12), ([1, 2], 13)]
    for (got, was), (seeds, last) in zip(kept, want):
        assert [np.array_equal(a.numpy(), numbers(s)) and a.data == npy(numbers(s)) for a, s in zip(got.values(), seeds)] == [
            True
        ] * len(seeds)
        assert np.array_equal(was["0"].numpy(), numbers(last))
    for numbers_of, (seeds, last) in zip(mine, want):
        numbers_of[0][:5] -= 1
        assert [np.allclose(a, numbers(s), atol=1e-6) for a, s in zip(numbers_of, [*seeds, last])] == [True] * (len(seeds) + 1)
    for answer, (seeds, last) in zip(answers, want):
        fds = dict(zip(answer.head["fds"], answer.fds))
        assert has(fds[answer.head["spack"]], numbers(last))
        if "error" not in answer.head:
            assert has(fds[answer.head["pack"]], *[numbers(s) for s in seeds])
    assert open_fds() < before + 40


def test_numbers_that_are_kept_do_not_keep_the_packs(gen: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also pages that are copies keep the file that they were of."""
    monkeypatch.setattr(blobs, "SLACK", 40 * FROM)
    kept: list[Any] = []

    def app(message: Any, context: Any) -> Any:
        kept.append(message.content["arrays"]["1"].numpy())
        return gen.reply(message, content(gen))

    worker = Worker(gen, 7, {}, app, "c")
    before, inodes = open_fds(), set()
    for i in range(40):
        fd, lens = pack(*[numbers(i + j) for j in range(4)])
        inodes.add(os.fstat(fd).st_ino)
        asked(gen, worker, str(i), fd, lens)
        worker.read.forget()
        spoil(fd)
        os.close(fd)
    there = {os.stat(f"/proc/self/fd/{n}").st_ino for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")}
    assert len(inodes & there) <= packs.FEW + 5 and open_fds() < before + packs.FEW + 10
    assert all(np.array_equal(a, numbers(i + 1)) for i, a in enumerate(kept))


def test_what_a_worker_has_sent_stays_while_the_app_has_it(gen: Generation) -> None:
    kept: list[Any] = []

    def app(message: Any, context: Any) -> Any:
        kept.append(Array(numbers(20 + len(kept))))
        return gen.reply(message, content(gen, kept[-1]))

    worker = Worker(gen, 7, {}, app, "c")
    fd, lens = pack(numbers(1))
    for i in range(6):
        answer = asked(gen, worker, "a", fd if i == 0 else None, lens)
        assert has(answer.fds[0], numbers(20 + i)) and worker.written.writes == (i > 3)
        worker.written.free(answer.head["pack"])
        if i == 3:
            del kept[1]
            kept.insert(1, Array(numbers(21)))
    assert all(np.array_equal(a.numpy(), numbers(20 + i)) for i, a in enumerate(kept))
    os.close(fd)


def server(gen: Generation) -> grid.Exchange:
    end = grid.Exchange(gen, SimpleNamespace(send=lambda frame: None), 7, [99])  # type: ignore[arg-type]
    end._start_freeing = lambda: None  # type: ignore[method-assign]
    return end


def reply_of(gen: Generation, end: grid.Exchange, back: Any) -> Any:
    """Have a ServerApp's message answered with a content."""
    (mid,) = end.push([gen.new_message(7, gen.RecordDict(), "train", 99, "1", None)])
    message = gen.new_message(7, gen.RecordDict(), "train", 99, "1", None)
    gen.stamp(message, 7, mid)
    message.metadata.__dict__["_message_id"] = mid
    proto, beside = Codec(gen).encode(gen.reply(message, back), message_id="r")
    fd = packs.new_file("reply")
    packs.write(fd, beside.blobs)
    end.take(Frame({"t": "reply", "id": mid, "pack": f"r.{mid}", "lens": list(beside.lens), "fds": ["r"]}, proto, b"", [fd]))
    (reply,) = end.pull([mid])
    return reply


def test_a_message_that_cannot_be_sent_leaves_nothing_undone(gen: Generation) -> None:
    said: list[dict[str, Any]] = []

    def send(frame: Frame) -> None:
        json.dumps(frame.head, allow_nan=False)
        said.append(frame.head)

    end = grid.Exchange(gen, SimpleNamespace(send=send), 7, [99])  # type: ignore[arg-type]
    first, second = content(gen, Array(numbers(1))), content(gen, Array(numbers(2)))

    def push(what: Any, ttl: float) -> None:
        message = gen.new_message(7, what, "train", 99, "1", None)
        message.metadata.__dict__["_ttl"] = ttl
        end.push([message])

    push(first, 10.0)
    end.take(Frame({"t": "lost", "id": said[0]["id"], "code": NODE_GONE}))
    with pytest.raises(ValueError, match="JSON"):
        push(second, float("inf"))
    push(second, 10.0)
    assert said[1]["fds"] == [said[1]["pack"]] and said[1]["drop"] == [said[0]["pack"]]
    push(second, 10.0)
    assert said[2]["pack"] == said[1]["pack"] and "fds" not in said[2] and "drop" not in said[2]
    assert len(end._named) == len(end._waiting) == 2


def freed(end: grid.Exchange) -> int:
    return end._done.qsize()


def test_a_reply_is_freed_when_nobody_has_anything_of_it(gen: Generation) -> None:
    end = server(gen)
    before = open_fds()
    reply = reply_of(gen, end, content(gen, Array(numbers(1)), Array(np.arange(3)), Array(numbers(2))))
    assert freed(end) == 0
    one = reply.content["arrays"]["2"]
    mine = one.numpy()
    record = ArrayRecord(OrderedDict(x=one))
    del reply
    assert freed(end) == 0 and np.array_equal(one.numpy(), numbers(2))
    del one
    assert freed(end) == 0 and np.array_equal(record["x"].numpy(), numbers(2))
    record["x"] = Array(np.arange(3))
    assert freed(end) == (0 if gen.lazy.maps else 1) and np.array_equal(mine, numbers(2))
    del mine
    assert freed(end) == 1 and open_fds() <= before + 2
    reply_of(gen, end, content(gen, plain_array(b"small" * 20)))
    assert freed(end) == 2
    for _ in range(blobs.MOST + 5):
        record[str(len(record))] = reply_of(gen, end, content(gen, in_a_pack(npy(numbers(3))))).content["arrays"]["0"]
    assert freed(end) >= 7 and all(np.array_equal(a.numpy(), numbers(3)) for k, a in record.items() if k != "x")


def test_garbage_frees_its_reply_while_the_app_waits(gen: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    end = server(gen)
    reply = reply_of(gen, end, content(gen, Array(numbers(1))))
    reply.content.cycle = reply.content  # type: ignore[attr-defined] # as Flower's array_records does in some versions
    del reply
    end.wait([], None)
    assert freed(end) == 0, "it is not much"
    end._enough = FROM
    gc.disable()
    try:
        end.wait([], None)
        assert freed(end) == 0, "the app does without a collector"
    finally:
        gc.enable()
    monkeypatch.setattr(grid, "PER_SECOND", 1 << 60)
    end.wait([], None)
    assert freed(end) == 1 and end._enough > 1 << 40, "what takes longer is done less often"
    end._enough = FROM
    kept = reply_of(gen, end, content(gen, Array(numbers(2))))
    end.wait([], None)
    assert freed(end) == 1 and np.array_equal(kept.content["arrays"]["0"].numpy(), numbers(2))


# Code that is like Flower's, which asks for sizes alone.
ALIKE = {
    "a condition": "[type(x) for x in (array.data for array in arrays if len(array.data))]",
    "another function": "[*(hash(array.data) for array in arrays)]",
    "another name": "[*(len(a.data) for a in arrays)]",
    "a constant": "[*(len(array.data) + 1 for array in arrays)]",
    "both": "[*((len(array.data), array.data) for array in arrays)]",
    "from within": "sum(len(array.data) for array in map(frombuffer, map(attrgetter('data'), arrays), repeat('uint8')))",
    "a list": "[len(array.data) for array in arrays]",
}


def answers(code: str, arrays: list[Any], **names: Any) -> Any:
    """Have an app's code run that has the arrays."""
    names.update(arrays=arrays, frombuffer=np.frombuffer, attrgetter=operator.attrgetter, repeat=itertools.repeat)
    return eval(code, names)


def made_of(arrays: list[Any]) -> int:
    """Tell how many of them have had their bytes made."""
    return sum(blob.file is not None and blob.offset in blob.file.read for blob in map(lazy.of, arrays) if blob is not None)


def test_who_wants_sizes_alone_has_no_bytes_made(gen: Generation) -> None:
    record = ArrayRecord(OrderedDict(a=Array(numbers(1)), b=Array(numbers(2)), c=Array(np.arange(3))))
    arrays = list(record.values())
    assert [lazy.of(a) is not None for a in arrays] == [True, True, False]
    want = sum(map(len, (npy(numbers(1)), npy(numbers(2)), npy(np.arange(3)))))
    assert answers("sum(len(array.data) for array in arrays)", arrays) == want
    if importlib.util.find_spec("flwr.serverapp"):
        result = importlib.import_module("flwr.serverapp.strategy").Result
        assert f"({want / 1024**2:.3f} MB)" in repr(result(arrays=record))
    assert made_of(arrays) == 0


@pytest.mark.parametrize("code", ALIKE.values(), ids=ALIKE)
def test_who_wants_more_has_the_bytes(gen: Generation, code: str) -> None:
    arrays = [Array(numbers(1)), Array(numbers(2))]
    assert answers(code, arrays) == answers(code, [plain_array(npy(numbers(i))) for i in (1, 2)])
    assert made_of(arrays) == 2


def test_a_len_of_the_apps_own_has_the_bytes(gen: Generation) -> None:
    def own(data: Any) -> int:
        return hash(bytes(data)) % 1000

    code = "[*(len(array.data) for array in arrays)]"
    for names in ({"len": own}, {"__builtins__": {**vars(builtins), "len": own}}):
        arrays = [Array(numbers(3)), Array(numbers(4))]
        assert answers(code, arrays, **names) == [own(npy(numbers(i))) for i in (3, 4)] and made_of(arrays) == 2


AT_EXIT = """
import atexit, operator, numpy
from flwr.common import Array
from _pergola_native import blobs, generations, packs
generations.installed("client").lazy.arena = packs.WorkerPacks("c").arena
atexit.register(operator.attrgetter("data"), Array(numpy.zeros(blobs.FROM)))
"""


@pytest.mark.once
def test_bytes_are_there_where_no_code_of_pythons_asks(alone: Callable[[str], str]) -> None:
    assert "Error" not in alone(AT_EXIT)


def test_numbers_that_are_kept_do_not_keep_the_reply(gen: Generation) -> None:
    if not gen.lazy.maps:
        pytest.skip("they are copies")
    end = server(gen)
    reply = reply_of(gen, end, content(gen, Array(numbers(1)), Array(numbers(2, 9 * FROM))))
    one = reply.content["arrays"]["0"]
    file = lazy.of(one).file  # type: ignore[union-attr]
    assert file is not None
    watched = os.dup(file.fd)
    kept = one.numpy()
    del reply, one, file
    assert freed(end) == 0 and os.fstat(watched).st_blocks > 0
    blobs.settle()
    assert freed(end) == 1 and os.fstat(watched).st_blocks == 0 and np.array_equal(kept, numbers(1))
    # A process that was forked has no say.
    os.pwrite(watched, b"x", 0)
    blobs.empty(watched, os.getpid() + 1)
    assert os.fstat(watched).st_blocks > 0
    os.close(watched)


def test_a_cycle_is_read_by_its_finalizer_and_lives_on(gen: Generation) -> None:
    """The collector calls finalizers in any order, and has ended weak references before."""
    saved: list[Any] = []
    read: list[bool] = []

    class Holder:
        def __init__(self, array: Any, seed: int) -> None:
            self.me, self.array, self.seed = self, array, seed

        def __del__(self) -> None:
            read.append(bool(np.array_equal(self.array.numpy(), numbers(self.seed))))
            saved.append((self.array, self.seed))

    end = server(gen)
    for i in range(3):  # before their holder, and after
        made, array = (
            [Array(numbers(i))],
            reply_of(gen, end, content(gen, in_a_pack(npy(numbers(10 + i))))).content["arrays"]["0"],
        )
        Holder(made.pop(), i)
        Holder(array, 10 + i)
        del array
    gc.collect()
    new = [Array(numbers(50 + i)) for i in range(6)]
    assert read == [True] * 6 and all(np.array_equal(a.numpy(), numbers(s)) for a, s in saved)
    assert freed(end) == 0 and all(np.array_equal(a.numpy(), numbers(50 + i)) for i, a in enumerate(new))
    gone = weakref.ref(lazy.of(saved[0][0]))  # type: ignore[arg-type]
    saved.clear()
    gc.collect()
    assert gone() is None and freed(end) == 3


def test_a_finalizer_makes_an_array_in_the_midst_of_another(own: packs.ServerPacks) -> None:
    made: list[Any] = []

    def run() -> None:
        assert own.arena.add(lambda f: (made.append(Array(numbers(2))), f.write(b"x" * FROM))[1]) is not None

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and np.array_equal(made[0].numpy(), numbers(2)) and lazy.of(made[0]) is None


# -- processes and threads --------------------------------------------------------------------------------------------------


def digest(fd: int) -> bytes:
    return hashlib.sha256(os.pread(fd, os.fstat(fd).st_size, 0)).digest()


def judged(kept: list[Any], gen: Generation, own: packs.ServerPacks) -> bool:
    """Tell, in a child, whether what it has is right, and whether it writes into none of its parent's files."""
    was = {f.fd: digest(f.fd) for f in blobs._living(blobs._files)}
    new = [Array(numbers(90 + i)) for i in range(5)]
    return (
        all(np.array_equal(a.numpy(), numbers(i)) and a.data == npy(numbers(i)) for i, a in enumerate(kept))
        and all(np.array_equal(a.numpy(), numbers(90 + i)) for i, a in enumerate(new))
        and all(lazy.of(a) is None for a in new)
        and all(digest(fd) == h for fd, h in was.items())
    )


@pytest.mark.parametrize("how", ["os.fork", "multiprocessing"])
def test_a_child_has_what_its_parent_had(gen: Generation, own: packs.ServerPacks, how: str) -> None:
    fd, lens = pack(numbers(2))
    file = File(fd, os.close)
    there = content(gen, plain_array(b""))
    arrays.fill(gen, there, lens, packs.held(file, packs.read(file, lens, lazy=True)))
    kept = [Array(numbers(0)), Array(numbers(1)), there["arrays"]["0"]]
    go, told = os.pipe(), os.pipe()

    def child() -> None:
        signal.alarm(60)
        os.read(go[0], 1)
        os.write(told[1], b"\x01" if judged(kept, gen, own) else b"\x00")

    if how == "os.fork":
        pid = os.fork()
        if not pid:
            try:
                child()
            finally:
                os._exit(0)
    else:
        process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
        process.start()
    for a in kept:
        assert lazy.of(a).file is None  # type: ignore[union-attr]
    spoil(fd)
    mine = [Array(numbers(60 + i)) for i in range(6)]  # into the file that the first two were in
    assert os.fstat(own.arena._file.fd).st_size == 6 * len(npy(numbers(0)))  # type: ignore[union-attr]
    os.write(go[1], b"x")
    assert os.read(told[0], 1) == b"\x01"
    if how == "os.fork":
        os.waitpid(pid, 0)
    else:
        process.join()
    assert all(np.array_equal(a.numpy(), numbers(60 + i)) and lazy.of(a) is not None for i, a in enumerate(mine))
    for f in (*go, *told):
        os.close(f)


def test_threads(gen: Generation, own: packs.ServerPacks) -> None:
    """Some make and read, some drop, while another has everything do without its files, as a fork does."""
    wrong: list[Any] = []
    over = threading.Event()
    shared = [Array(numbers(500))]

    def work(me: int) -> None:
        try:
            for i in range(30):
                made = [(Array(numbers(me * 100 + i + j)), me * 100 + i + j) for j in range(4)]
                sent = own.put(arrays.strip(gen, content(gen, *[a for a, _ in made]))[1].blobs)[1] if i % 5 == 0 else None
                for a, seed in made[:: 1 if i % 2 else -1]:
                    if not np.array_equal(a.numpy(), numbers(seed)) or (i % 3 == 0 and a.data != npy(numbers(seed))):
                        wrong.append((me, i, seed))
                if sent is not None and not has(sent, *[numbers(me * 100 + i + j) for j in range(4)]):
                    wrong.append((me, i, "sent"))
                if not np.array_equal(shared[0].numpy(), numbers(500)):
                    wrong.append((me, i, "shared"))
                if i % 10 == me:
                    shared[0] = Array(numbers(500))
        except BaseException as e:
            wrong.append(e)

    def settle() -> None:
        while not over.wait(0.005):
            blobs.settle()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        other = threading.Thread(target=settle)
        for t in (*threads, other):
            t.start()
        for t in threads:
            t.join()
        over.set()
        other.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_a_file_that_is_given_away_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader has the file, another thread has it do without it and the next one writes there: the numbers are still right."""
    of, load = blobs.Mapping.of, np.load
    for when in ("before", "after"):
        a = in_a_pack(npy(numbers(1)))
        blob = lazy.of(a)
        assert blob is not None and blob.file is not None

        def meanwhile(file: File = blob.file) -> None:
            blobs.settle(file)
            os.pwrite(file.fd, bytes(FROM), 6000 + FROM)  # of the numbers, not of what says how many there are

        def around(plain: Any, *args: Any, when: str = when, meanwhile: Any = meanwhile, **more: Any) -> Any:
            if when == "before":
                meanwhile()
            found = plain(*args, **more)
            if when == "after":
                meanwhile()
            return found

        with monkeypatch.context() as m:
            m.setattr(np, "load", functools.partial(around, load))
            m.setattr(blobs.Mapping, "of", functools.partial(around, of))
            assert np.array_equal(a.numpy(), numbers(1)) and blob.file is None
    for name in ("data", "peek"):
        blob = lazy.of(in_a_pack(npy(numbers(2))))
        assert blob is not None
        times = []

        def slow(self: File, size: int, offset: int, times: list[int] = times, pread: Any = File.pread) -> bytes:
            times.append(1)
            if len(times) == 1:
                blobs.settle(self)
                spoil(self.fd)
            return bytes(pread(self, size, offset))

        with monkeypatch.context() as m:
            m.setattr(File, "pread", slow)
            assert getattr(blob, name)() == npy(numbers(2)) and blob.file is None and len(times) == 2
