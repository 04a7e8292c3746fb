"""A file of weights holds equal bytes once, where engines can map them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepfold.backends import Backend, get
from stepfold.backends.shared import (
    LARGE_BYTES,
    LINE,
    PAGE,
    SMALLEST_BYTES,
    Span,
    WeightFile,
    chunks,
    common,
    digest_of,
)

SIZES = (0, 1, 8, 63, SMALLEST_BYTES - 1, SMALLEST_BYTES, LARGE_BYTES, LARGE_BYTES + 5)
TENSORS = st.lists(st.tuples(st.sampled_from(SIZES), st.integers(0, 2)), max_size=6)


def added(path: Path, tensors: list[bytes]) -> tuple[list[int], int]:
    with WeightFile(path) as weights:
        return [weights.add(digest_of(tensor), tensor) for tensor in tensors], weights.saved_bytes


@given(TENSORS)
def test_what_was_added_is_found_at_its_place(tmp_path_factory: pytest.TempPathFactory, drawn: list) -> None:
    tensors = [bytes([fill]) * size for size, fill in drawn]
    path = tmp_path_factory.mktemp("weights") / "weights"
    offsets, saved = added(path, tensors)
    content = path.read_bytes()
    assert all(content[at : at + len(t)] == t for at, t in zip(offsets, tensors, strict=True))
    assert all(at % LINE == 0 for at, t in zip(offsets, tensors, strict=True) if len(t) >= SMALLEST_BYTES)
    assert all(at % PAGE == 0 for at, t in zip(offsets, tensors, strict=True) if len(t) >= LARGE_BYTES)
    assert saved == sum(map(len, tensors)) - sum(map(len, set(tensors)))
    assert len(content) == max((at + len(t) for at, t in zip(offsets, tensors, strict=True)), default=0)


def test_bytes_of_a_file_are_those_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "source"
    content = bytes(range(256)) * (LARGE_BYTES // 100)
    file.write_bytes(content)
    span = Span(file, 7, len(content) - 100)
    wanted = content[7:-93]
    assert b"".join(chunks(span)) == wanted and max(map(len, chunks(span))) < len(wanted)
    assert digest_of(span) == digest_of(wanted)
    with WeightFile(tmp_path / "target") as weights:
        assert weights.add(digest_of(span), span) == weights.add(digest_of(wanted), wanted) == 0
    assert (tmp_path / "target").read_bytes() == wanted


def test_a_file_that_ends_too_early_is_no_tensor(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"1234")
    with pytest.raises(EOFError, match="source: it ends before 5 bytes"):
        digest_of(Span(tmp_path / "source", 1, 4))


def test_small_and_single_tensors_are_not_shared() -> None:
    large, small = SMALLEST_BYTES, SMALLEST_BYTES - 1
    first, second = {"a": large, "b": small, "c": large}, {"a": large, "b": small, "d": large}
    assert common([first, second]) == common([first, second, first | second]) - {"c", "d"} == {"a"}
    assert common([first]) == common([]) == set()


def test_an_engine_without_the_function_shares_nothing(tmp_path: Path) -> None:
    file = tmp_path / "step.so"
    file.write_bytes(bytes(2 * SMALLEST_BYTES))
    backend: Backend = get("inductor")
    assert backend.share([file, file]) is None and [path.name for path in tmp_path.iterdir()] == ["step.so"]
