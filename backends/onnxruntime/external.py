"""The files that an ONNX graph reads its weights from, found without the package `onnx`.

ONNX Runtime opens whatever an initializer names beside the model. Here the names are read from the bytes of the model
first, so that they can be compared with the files of the bundle. Only messages in which the word `location` occurs are
looked into, which leaves out the weights themselves and nearly all nodes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

KEY = b"location"
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types of protocol buffers."""
LONGEST_VARINT = 10

# Message -> field -> the message in it, of all that leads to a tensor (onnx.proto).
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "tensor": {13: "entry"},
}
ENTRY = "entry"  # a key (field 1) and a value (field 2)


def external_files(model: bytes) -> set[str]:
    """The names of the files that the tensors of a model refer to, as they stand in it.

    Raises:
        ValueError: the bytes are no ONNX model.
    """
    return set(_locations(model, "model", 0, len(model), _places(model)))


def _places(model: bytes) -> list[int]:
    """Where the word begins, in ascending order."""
    found, place = [], model.find(KEY)
    while place >= 0:
        found.append(place)
        place = model.find(KEY, place + len(KEY))
    return found


def _locations(model: bytes, message: str, start: int, stop: int, places: Sequence[int]) -> Iterator[str]:
    inner = MESSAGES[message]
    for field, first, last in _fields(model, start, stop):
        child = inner.get(field)
        at = bisect_left(places, first)
        if child is None or at == len(places) or places[at] >= last:
            continue
        if child == ENTRY:
            yield from _value(model, first, last)
        else:
            yield from _locations(model, child, first, last, places)


def _value(model: bytes, start: int, stop: int) -> Iterator[str]:
    """The value of an entry whose key is the word; of a field that stands twice, the last one counts."""
    entry = {field: model[first:last] for field, first, last in _fields(model, start, stop)}
    if entry.get(1) == KEY:
        yield entry.get(2, b"").decode("utf-8", "backslashreplace")


def _fields(model: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, first and last byte of every field of a message."""
    while start < stop:
        tag, start = _varint(model, start, stop)
        kind = tag & 7
        if kind == VARINT:
            first, (_, start) = start, _varint(model, start, stop)
        elif kind == BYTES:
            size, first = _varint(model, start, stop)
            start = first + size
        elif kind in (FIXED64, FIXED32):
            first, start = start, start + (8 if kind == FIXED64 else 4)
        else:
            raise ValueError(f"it has a field of the unknown wire type {kind}")
        if start > stop:
            raise ValueError("it ends in the middle of a field")
        yield tag >> 3, first, start


def _varint(model: bytes, start: int, stop: int) -> tuple[int, int]:
    """A number and the place after it."""
    value = 0
    for i in range(min(LONGEST_VARINT, stop - start)):
        byte = model[start + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, start + i + 1
    raise ValueError("it ends in the middle of a number")
