"""Flower's Array, taught to leave its bytes in a memory file until somebody asks for them.

An app sees nothing of it: an Array has its `data`, the very bytes that Flower would have made, whenever it is asked for.
"""

from __future__ import annotations

import gc
import importlib
import io
import math
import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from . import blobs
from .blobs import Arena, Blob, File, Mapping

_HEAD = 4096  # bytes; an array's header has 128 if its dtype is a simple one
_METHODS = "from_array_dict", "from_numpy_ndarrays", "to_numpy_ndarrays", "count_bytes"  # of ArrayRecord: they ask for all data
_KEY = "_pergola_blob"  # of an Array's own dictionary


def of(array: Any) -> Blob | None:
    """Give the blob that stands for an Array's bytes; nothing if it has the bytes themselves."""
    own = array.__dict__
    box = None if "data" in own else own.get(_KEY)
    return None if box is None else box.item()


def attach(array: Any, blob: Blob) -> None:
    """Put a blob in the place of an Array's bytes."""
    # NumPy's arrays are nothing that Python's collector looks into. Otherwise it would, of an Array in a cycle, end the file and
    # the weak references first, and then call finalizers of the app's, which may read the Array, or have it live on.
    box = importlib.import_module("numpy").empty((), dtype=object)
    box[()] = blob
    array.__dict__.pop("data", None)
    array.__dict__[_KEY] = box


def thin(array: Any) -> Any:
    """Give a copy of an Array, without its bytes."""
    new = object.__new__(type(array))
    new.__dict__.update(array.__dict__)
    new.__dict__.pop(_KEY, None)
    new.data = b""
    return new


def _lengths(arrays: Any) -> Any:
    return (len(array.data) for array in arrays)


_SIZING = next(c for c in _lengths.__code__.co_consts if isinstance(c, CodeType))


def _only_sizes(frame: FrameType | None, array: Any) -> bool:
    """Tell whether the code of a frame wants no more of an Array's bytes than their number.

    Flower logs how large a model is by an expression of which Python makes the same code as of ours. To make the bytes of
    a large one takes as long as its way to a site.
    """
    if frame is None:
        return False
    code = frame.f_code
    return (
        code.co_names == _SIZING.co_names
        and code.co_varnames == _SIZING.co_varnames
        and code.co_consts == _SIZING.co_consts
        and code.co_code == _SIZING.co_code
        and "len" not in frame.f_globals
        and frame.f_builtins.get("len") is len
        and frame.f_locals.get("array") is array
    )


class _Data:
    """`Array.data`, where the bytes are in a file. One that has its bytes has them in its dictionary, which comes first."""

    def __get__(self, array: Any, owner: type) -> bytes | range:
        blob = of(array) if array is not None else None
        if blob is None:
            raise AttributeError(f"{owner.__name__!r} object has no attribute 'data'", name="data", obj=array or owner)
        if _only_sizes(sys._getframe().f_back, array):  # noqa: SLF001 - there is no public way to know who asks
            return range(len(blob))  # its length is the same
        found: bytes = blob.data()
        return found


class Lazy:
    """What one process does with arrays that are large."""

    def __init__(self) -> None:
        self.reads = False  # Arrays may be made of blobs
        self.maps = False  # and numbers be those of a file's pages
        self.arena: Arena | None = None  # where those go that the app makes

    def install(self, array_type: Any, record_type: Any) -> None:
        """Teach Flower's classes; those of another shape stay as they are."""
        if self.reads or not all(hasattr(array_type, n) for n in ("numpy", "from_numpy_ndarray")):
            return
        if hasattr(array_type, "data") or not all(hasattr(record_type, n) for n in _METHODS):
            return
        numpy = importlib.import_module("numpy")
        example = array_type.from_numpy_ndarray(numpy.zeros(0, dtype=numpy.float32))
        if set(example.__dict__) - {"_is_dirty", "is_dirty"} != {"dtype", "shape", "stype", "data"}:
            return
        # NumPy up to 2.3 gives an array that owns its memory, which one of a file's pages cannot.
        self.maps = blobs.can_map() and example.numpy().base is not None
        array_type.data = _Data()
        array_type.__getstate__ = _state
        array_type.numpy = self._reader(array_type.numpy, example.stype, numpy)
        array_type.from_numpy_ndarray = classmethod(self._maker(array_type.from_numpy_ndarray, numpy))
        record_type.from_array_dict = classmethod(_sharer(record_type.from_array_dict))
        record_type.from_numpy_ndarrays = classmethod(_taker(record_type.from_numpy_ndarrays, array_type, record_type))
        record_type.to_numpy_ndarrays = _giver(record_type.to_numpy_ndarrays)
        record_type.count_bytes = _counter(record_type.count_bytes)
        # A process that the app forks may outlive what its files are held for here, and is not to write into them.
        os.register_at_fork(before=blobs.settle, after_in_child=self._leave)
        self.reads = True

    def may_stay(self) -> bool:
        """Tell whether arrays of another file may stay in it."""
        return self.reads and blobs.count() < blobs.MOST

    def _leave(self) -> None:
        self.arena = None
        blobs.settle()  # what other threads have made in the very moment

    def _maker(self, plain: Any, numpy: Any) -> Callable[[Any, Any], Any]:
        def from_numpy_ndarray(cls: Any, ndarray: Any) -> Any:
            del cls  # Flower's makes an Array whatever it is called on
            arena = self.arena
            # NumPy writes the others element by element, or by a method of their own.
            if arena is None or type(ndarray) is not numpy.ndarray or ndarray.nbytes < blobs.FROM or not ndarray.flags.forc:
                return plain(ndarray)
            made = plain(numpy.zeros(0, dtype=ndarray.dtype))
            try:
                blob = arena.add(lambda f: numpy.save(f, ndarray, allow_pickle=False))
            except OSError:  # no room, or no descriptor
                blob = None
            if blob is None:
                return plain(ndarray)
            made.shape = type(made.shape)(ndarray.shape)
            attach(made, blob)
            return made

        from_numpy_ndarray.__doc__ = plain.__doc__
        return from_numpy_ndarray

    def _reader(self, plain: Any, stype: str, numpy: Any) -> Callable[[Any], Any]:
        def read(array: Any) -> Any:
            blob = of(array)
            file = blob.file if blob is not None else None
            if blob is None or file is None or array.stype != stype:
                return plain(array)
            try:
                found = _mapped(blob, file, numpy) if self.maps else None
                if found is not None:
                    return found
                with file.open("rb") as f:
                    f.seek(blob.offset)
                    found = numpy.load(f, allow_pickle=False)
                    # Settled meanwhile by another thread, the file may have been of others already.
                    if isinstance(found, numpy.ndarray) and f.tell() == blob.offset + blob.size and blob.file is file:
                        return found
            except Exception:  # noqa: BLE001 - whatever is wrong with the bytes, Flower's own way tells
                found = None
            del found  # before there is another
            return plain(array)

        read.__doc__ = plain.__doc__
        read.__name__ = read.__qualname__ = "numpy"
        return read


def _state(array: Any) -> dict[str, Any]:
    """Give what a copy, or a pickle, of an Array has: it may be read where nobody knows of files."""
    blob = of(array)
    state = dict(array.__dict__)
    state.pop(_KEY, None)
    if blob is not None:
        state["data"] = blob.data()
    return state


def _mapped(blob: Blob, file: File, numpy: Any) -> Any:
    """Give an array of the file's own pages, as numpy.load makes one; nothing where that would be another."""
    if blob.size < blobs.MAP_FROM or blob.offset % blobs.ALIGNED or not blobs.may_map():
        return None
    head = io.BytesIO(file.pread(min(blob.size, _HEAD), blob.offset))
    form = numpy.lib.format
    if form.read_magic(head) != (1, 0):
        return None
    shape, fortran, dtype = form.read_array_header_1_0(head)
    count = math.prod(shape)
    if dtype.hasobject or not dtype.itemsize or head.tell() % blobs.ALIGNED or head.tell() + count * dtype.itemsize != blob.size:
        return None
    pages = Mapping.of(file, blob.offset, blob.size)
    if blob.file is not file:  # settled meanwhile by another thread, which did not see the mapping
        return None
    found = numpy.frombuffer(pages, dtype, count, pages.begin + head.tell())
    return found.reshape(shape[::-1]).transpose() if fortran else found.reshape(shape)


def _sharer(plain: Any) -> Callable[..., Any]:
    def from_array_dict(cls: Any, array_dict: Any, *, keep_input: bool = True) -> Any:
        del cls
        held = {k: blob for k, a in array_dict.items() if (blob := of(a)) is not None}
        if not held:
            return plain(array_dict, keep_input=keep_input)
        record = plain({k: thin(a) if k in held else a for k, a in array_dict.items()}, keep_input=True)
        for k, blob in held.items():
            attach(record[k], blob)
        if not keep_input:
            array_dict.clear()
        return record

    from_array_dict.__doc__ = plain.__doc__
    return from_array_dict


def _taker(plain: Any, array_type: Any, record_type: Any) -> Callable[..., Any]:
    def from_numpy_ndarrays(cls: Any, ndarrays: Any, *, keep_input: bool = True) -> Any:
        del cls
        if keep_input:
            return plain(ndarrays, keep_input=True)
        record = record_type()
        for i in range(len(ndarrays)):
            record[str(i)] = array_type.from_numpy_ndarray(ndarrays[i])
            ndarrays[i] = None
        ndarrays.clear()
        gc.collect()
        return record

    from_numpy_ndarrays.__doc__ = plain.__doc__
    return from_numpy_ndarrays


def _giver(plain: Any) -> Callable[..., Any]:
    def to_numpy_ndarrays(self: Any, *, keep_input: bool = True) -> Any:
        if keep_input:
            return plain(self, keep_input=True)
        found = [self.pop(k).numpy() for k in list(self.keys())]
        gc.collect()
        return found

    to_numpy_ndarrays.__doc__ = plain.__doc__
    return to_numpy_ndarrays


def _counter(plain: Any) -> Callable[[Any], Any]:
    def count_bytes(self: Any) -> Any:
        held = {k: blob for k, a in self.items() if (blob := of(a)) is not None}
        rest = type(self)()
        for k, a in self.items():
            rest[k] = thin(a) if k in held else a
        return plain(rest) + sum(map(len, held.values()))

    count_bytes.__doc__ = plain.__doc__
    return count_bytes
