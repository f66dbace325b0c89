"""Frames and packs: what is sent arrives, and what must not be is refused."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from _pergola_native import packs
from _pergola_native.blobs import FROM, Blob, File, TornError
from _pergola_native.frames import MAX_HEAD, Frame, Link, ProtocolError

pytestmark = pytest.mark.once


@pytest.fixture
def pair() -> Iterator[tuple[Link, socket.socket]]:
    a, b = socket.socketpair()
    b.settimeout(20)
    yield Link(a), b
    a.close()
    b.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("size", [0, 1, 200_000, 3_000_000])
def test_a_frame_arrives_as_it_was(pair: tuple[Link, socket.socket], size: int) -> None:
    link, other = pair
    fd = packs.new_file("x")
    packs.write(fd, [b"abc"])
    before = open_fds()
    sent = Frame({"t": "msg", "id": "ä", "fds": ["p", "q"]}, os.urandom(size), os.urandom(size // 2), [fd, fd])
    sender = threading.Thread(target=link.send, args=(sent,))
    sender.start()
    got = Link(other).receive()
    sender.join()
    assert (got.head["t"], got.head["id"], got.proto, got.state) == ("msg", "ä", sent.proto, sent.state)
    q, p = got.take("q"), got.take("p")
    assert q is not None and p is not None and got.take("r") is None
    assert os.pread(q, 9, 0) == os.pread(p, 9, 0) == b"abc" and not os.get_inheritable(p)
    got.close()
    os.close(p)
    os.close(q)
    assert open_fds() == before
    os.close(fd)


def raw(head: object, *more: bytes) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<I", len(text)) + text + b"".join(more)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00\x00\x00",
        struct.pack("<I", MAX_HEAD + 1),
        b"\xff\xff\xff\xff",
        b"Segmentation fault (core dumped)\n",
        raw(b"{not json"),
        raw([1]),
        raw({"t": "msg", "plen": -1}),
        raw({"t": "msg", "plen": 1 << 31}),
        raw({"t": "msg", "plen": "7"}),
        raw({"t": "msg", "plen": True}),
        raw({"t": "msg", "slen": 1.5}),
        raw({"t": "msg", "fds": ["p"]}),
        raw({"t": "msg", "fds": "p"}),
        raw({"t": "msg", "plen": 10}, b"short"),
        raw({"t": "msg"})[:-3],
        b"\x01\x00",
    ],
)
def test_garbage_is_refused(pair: tuple[Link, socket.socket], data: bytes) -> None:
    link, other = pair
    other.sendall(data)
    other.close()
    with pytest.raises(ProtocolError):
        link.receive()


def test_any_bytes_are_refused_or_read(pair: tuple[Link, socket.socket]) -> None:
    """Damaged frames: an error of the protocol, or the frame; never anything else, and no descriptor is left behind."""
    rng = random.Random(5)
    good = raw({"t": "msg", "id": "x", "plen": 3, "slen": 2, "fds": ["p"]}, b"abcde")
    before = open_fds()
    for _ in range(500):
        data = bytearray(good)
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        del data[rng.randrange(len(data) + 1) + (0 if rng.randrange(2) else len(data)) :]
        a, b = socket.socketpair()
        fd = packs.new_file("x")
        if data:
            socket.send_fds(b, [data], [fd] * rng.randrange(4))
        os.close(fd)
        b.close()
        try:
            frame = Link(a).receive()
            frame.kind
            frame.close()
        except (ProtocolError, EOFError):
            if "frame" in locals():
                frame.close()
        a.close()
    assert open_fds() == before


def test_the_end_is_told_from_garbage(pair: tuple[Link, socket.socket]) -> None:
    link, other = pair
    other.close()
    with pytest.raises(EOFError):
        link.receive()


def test_a_frame_that_is_too_large_is_not_sent(pair: tuple[Link, socket.socket]) -> None:
    link, _ = pair
    with pytest.raises(ProtocolError):
        link.send(Frame({"t": "x" * (MAX_HEAD + 1)}))


# -- packs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blobs",
    [
        [],
        [b""],
        [b"a", b"", b"bc"],
        [bytes([i % 256]) * 4096 for i in range(3000)],
        [b"x" * packs.SMALL, b"y" * (packs.SMALL + 1), b"z", os.urandom(9_000_000)],
    ],
)
def test_what_is_written_is_read(blobs: list[bytes]) -> None:
    fd = packs.new_file("x")
    packs.write(fd, [b"what was there before" * 1000] * 500)
    packs.write(fd, blobs)
    lens = list(map(len, blobs))
    file = File(fd, os.close)
    assert packs.read(file, packs.check(fd, lens)) == blobs
    assert packs.read(file, packs.check(fd, [-1, *lens, -1])) == blobs
    left = packs.read(file, lens, lazy=True)
    assert [isinstance(p, packs.Place) for p in left] == [n >= FROM for n in lens]
    assert [p.data() if isinstance(p, Blob) else p for p in packs.held(file, left)] == blobs
    for bad in ([*lens, os.fstat(fd).st_size - sum(lens) + 1], [1 << 60], [-2], ["1"], None, 7, [1.0]):
        with pytest.raises(ProtocolError):
            packs.check(fd, bad)


def test_without_memory_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    fd = packs.new_file("x")
    packs.write(fd, [b"abc", b"d"])
    assert packs.read(File(fd, os.close), [3, 1]) == [b"abc", b"d"]


def test_a_pack_that_becomes_shorter_is_told() -> None:
    fd = packs.new_file("x")
    packs.write(fd, [bytes(FROM)])
    blob = Blob(File(fd, os.close), 0, FROM)
    os.ftruncate(fd, FROM - 1)
    for read in (blob.data, blob.peek, blob.settle):
        with pytest.raises(TornError):
            read()


def test_the_same_arrays_are_written_once_and_files_used_again() -> None:
    before = open_fds()
    p = packs.ServerPacks()
    a, b = os.urandom(1000), os.urandom(1000)
    name, fd, _ = p.put([a, b])
    assert fd is not None and p.put([a, b]) == (name, None, []) and p.writes == 1
    other, _, _ = p.put([b, a])
    assert other != name and p.writes == 2
    p.forgot(name)  # the runner lost it
    assert p.put([a, b]) == (name, fd, []) and p.writes == 2
    p.forgot("s.99")
    dropped: list[str] = []
    big = packs.ROOM // 2 + 1  # no message is answered
    for _ in range(3):
        dropped += p.put([bytes(big)])[2]
    assert dropped[:2] == [other, name]
    assert len(dropped) == 4, "the last one stays, however large"
    files = open_fds()
    for d in dropped:
        p.forgot(d)
    assert open_fds() == files - 2, "two files are kept for what comes next"
    p.put([bytes(big)])
    assert open_fds() == files - 2
    p.put([b"x"])
    assert open_fds() == files - 2, "one that is left is far too long for that"
    assert p.writes == 7 and open_fds() > before


def test_a_new_pack_ends_those_that_no_message_waits_for() -> None:
    p = packs.ServerPacks()
    a, b, c, d, e = (os.urandom(1000) for _ in range(5))
    one, two = p.put([a])[0], p.put([b])[0]
    assert p.put([a]) == (one, None, [])
    p.answered(two)
    assert p.put([a]) == (one, None, []), "one that is there ends none"
    three, _, dropped = p.put([c])
    assert dropped == [two]
    for _ in range(3):
        p.answered(one)
    p.answered(three)
    four, _, dropped = p.put([d])
    assert sorted(dropped) == [one, three]
    p.answered(four)
    again, fd, dropped = p.put([c])
    assert again != three and fd is not None and dropped == [], "it goes once more"
    p.answered(again)
    assert p.put([e])[2] == [] and p.put([d])[1:] == (None, []), "from then on all are kept"


def test_what_has_the_identity_of_an_ended_pack_is_another() -> None:
    p = packs.ServerPacks()
    seen, last = set(), ""
    for i in range(50):
        array = os.urandom(1 << 20)  # of the same memory as the last but one
        name, _, dropped = p.put([array])
        assert dropped == [last] * (i > 0)
        seen.add(id(array))
        p.forgot(last)
        p.answered(name)
        last = name
    assert len(seen) < 50


def test_what_was_not_sent_is_sent_with_the_next() -> None:
    p = packs.ServerPacks()
    a, b, c = (os.urandom(1000) for _ in range(3))
    one = p.put([a])[0]
    p.answered(one)
    two, fd, dropped = p.put([b])
    assert fd is not None and dropped == [one]
    p.answered(two)
    p.unsent(two, fd, dropped)
    assert p.put([b]) == (two, fd, [one])
    p.unsent(two, None, [])
    assert p.put([b]) == (two, None, []), "the runner has it"
    assert p.put([c])[2] == []


def test_packs_that_nobody_frees_take_no_descriptors() -> None:
    """Each of a site's nodes may have its state in one, and there are a thousand descriptors."""
    before = open_fds()
    p = packs.WorkerPacks("c")
    names = [p.put([b"state"])[0] for _ in range(3 * packs.OPEN)]
    assert open_fds() == before + packs.OPEN
    fds = {f.fd for f in p._busy.values()}
    for name in names:
        p.free(name)
    assert not p._busy and open_fds() == before + packs.Idle.KEEP
    assert p.put([b"next"])[1] in fds, "what was kept is used again"


def test_a_reader_says_what_it_drops() -> None:
    before = open_fds()
    r = packs.ReadPacks()

    def give(name: str, blob: bytes) -> list[bytes | Blob]:
        fd = packs.new_file(name)
        packs.write(fd, [blob])
        return r.get(name, [len(blob)], fd)

    assert give("a", b"abc") == [b"abc"] and r.get("a", [3], None) == [b"abc"] and r.forget() == []
    with pytest.raises(ProtocolError):
        r.get("b", [3], None)
    give("b", bytes(packs.ROOM))
    assert r.forget() == ["a"]
    with pytest.raises(ProtocolError):
        r.get("a", [3], None)
    for i in range(packs.FEW + 1):
        give(f"c{i}", b"x")
    assert r.forget() == ["b", "c0"] and r.forget() == []
    assert open_fds() == before + packs.FEW, "those that are kept"
    r._packs.clear()
    assert open_fds() == before
