"""Documents with one value replaced, removed or renamed: what a careless or hostile hand makes of a valid file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from stepfold.loop.errors import StepfoldError

VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [None, True, -1, 0, 1, 10**12, 10**30, -0.5, 1.5, 1e300, "", "x", "../x", "a\0b", "\x1b[2J", "\ud800", [], {}]
    ),
    st.sampled_from([[1, [2, 3]], [[]], {"a": {"b": []}}, ["x"] * 20, {"": 1}, {"a.b": 2}]),
    st.integers(),
    st.text(max_size=8),
)


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file with some bytes replaced, cut somewhere."""
    edits = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)

    def apply(changes: list[tuple[int, int]], end: int) -> bytes:
        content = bytearray(whole)
        for at, value in changes:
            content[at] = value
        return bytes(content[:end])

    return st.builds(apply, edits, st.integers(0, len(whole)))


def mutated(document: Any) -> st.SearchStrategy[Any]:
    """The document with one or two of its values changed."""
    places = list(_places(document, ()))
    edit = st.tuples(st.sampled_from(places), st.sampled_from(["replace", "remove", "rename"]), VALUES)

    def apply(edits: list[tuple[tuple[Any, ...], str, Any]]) -> Any:
        changed = copy.deepcopy(document)
        for place, how, value in edits:
            _change(changed, place, how, value)
        return changed

    return st.lists(edit, min_size=1, max_size=2).map(apply)


def _places(value: Any, at: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from _places(item, (*at, key))


def _change(document: Any, place: tuple[Any, ...], how: str, value: Any) -> None:
    *parents, last = place
    try:
        for key in parents:
            document = document[key]
        old = document[last]
    except (KeyError, IndexError, TypeError):
        return  # an earlier change took the place away
    if isinstance(document, str):
        return
    if how == "remove":
        del document[last]
    elif how == "rename" and isinstance(document, dict):
        document[f"{last}x"] = document.pop(last)
    else:
        document[last] = copy.deepcopy(value) if how == "replace" else [old, old]


def check_bytes(whole: bytes, use: Callable[[bytes], object]) -> None:
    """Use many damaged files, each of which works or is an error of ours; the whole one has to work."""
    use(whole)

    @settings(max_examples=60, deadline=None)
    @given(damaged(whole))
    def changed(received: bytes) -> None:
        try:
            use(received)
        except StepfoldError as error:
            assert str(error).strip()

    changed()


def check(document: Any, use: Callable[[Any], object]) -> None:
    """Use many changed documents, each of which works or is an error of ours; the one as it was has to work."""
    use(document)

    @settings(max_examples=60, deadline=None)
    @given(mutated(document))
    def changed(received: Any) -> None:
        try:
            use(received)
        except StepfoldError as error:
            assert str(error).strip()

    changed()
