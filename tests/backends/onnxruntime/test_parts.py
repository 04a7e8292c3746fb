"""A batch in parts gives what it gives whole."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from stepfold.backends.onnxruntime import session
from stepfold.backends.onnxruntime.options import OnnxruntimeOptions
from stepfold.backends.onnxruntime.parts import InParts, divisible, number_of_parts
from stepfold.loop.errors import BundleError
from stepfold.loop.ports import Port

Array = np.ndarray
TOKENS = Port("tokens", (None, 3, 2), "float32")
ROWS = Port("rows", (2, None), "float32")  # the batch need not be the first dimension
TABLE = Port("table", (3, 2), "float32")
INPUTS = (TOKENS, ROWS, TABLE)
OUTPUTS = (Port("sum", (None, 3, 2), "float32"), Port("twice", (2, None), "float32"))


class Stage:
    """tokens + table, and 2 rows; remembers how it was opened and how many rows each call had."""

    def __init__(self) -> None:
        self.opened: list[int | None] = []
        self.batches: list[int] = []

    def open_with(self, threads: int | None):
        self.opened.append(threads)
        return self._call

    def _call(self, values: Mapping[str, Array]) -> list[Array]:
        self.batches.append(len(values["tokens"]))
        return [values["tokens"] + values["table"], 2 * values["rows"]]


def values_of(batch: int) -> dict[str, Array]:
    rng = np.random.default_rng(batch)
    return {
        "tokens": rng.standard_normal((batch, 3, 2)).astype(np.float32),
        "rows": rng.standard_normal((2, batch)).astype(np.float32),
        "table": rng.standard_normal((3, 2)).astype(np.float32),
    }


@given(batch=st.integers(1, 60), rows=st.integers(1, 9), cores=st.integers(1, 5))
def test_a_batch_in_parts_gives_what_it_gives_whole(batch: int, rows: int, cores: int) -> None:
    stage, values = Stage(), values_of(batch)
    total, twice = InParts(stage.open_with, INPUTS, OUTPUTS, rows, cores)(values)
    np.testing.assert_array_equal(total, values["tokens"] + values["table"])
    np.testing.assert_array_equal(twice, 2 * values["rows"])
    assert sum(stage.batches) == batch
    assert len(stage.batches) == number_of_parts(batch, rows, cores)


@given(batch=st.integers(1, 200), rows=st.integers(1, 9), cores=st.integers(1, 8))
def test_parts_are_even_and_large_enough(batch: int, rows: int, cores: int) -> None:
    number = number_of_parts(batch, rows, cores)
    if number == 1:
        assert batch < 2 * cores * rows
    else:
        assert number % cores == 0 and batch // number >= rows


@pytest.mark.parametrize(("batch", "parts"), [(20, 4), (19, 2), (10, 2), (9, 1), (1, 1)])
def test_parts_on_two_cores(batch: int, parts: int) -> None:
    assert number_of_parts(batch, 5, 2) == parts


def test_sessions_are_opened_when_they_are_needed() -> None:
    stage = Stage()
    call = InParts(stage.open_with, INPUTS, OUTPUTS, 2, 3)
    call(values_of(5))
    assert stage.opened == [3]  # too few rows for parts
    call(values_of(6))
    call(values_of(12))
    assert stage.opened == [3, 1]


def test_one_thread_needs_one_session() -> None:
    stage = Stage()
    call = InParts(stage.open_with, INPUTS, OUTPUTS, 2, 1)
    call(values_of(8))
    assert stage.opened == [1] and stage.batches == [2, 2, 2, 2]


def test_parts_run_side_by_side() -> None:
    """Each of two parts waits for the other: one after the other they would never meet."""
    both = threading.Barrier(2, timeout=30)

    def meet(values: Mapping[str, Array]) -> list[Array]:
        both.wait()
        return [values["tokens"], values["rows"]]

    InParts(lambda threads: meet, INPUTS, OUTPUTS, 4, 2)(values_of(8))
    assert not both.broken


def test_callers_do_not_disturb_each_other() -> None:
    call = InParts(Stage().open_with, INPUTS, OUTPUTS, 2, 2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: call(values_of(batch))[1], range(4, 24)))
    for batch, twice in zip(range(4, 24), found, strict=True):
        np.testing.assert_array_equal(twice, 2 * values_of(batch)["rows"])


@pytest.mark.parametrize("bad", [0, 3])
def test_the_error_of_a_part_is_the_error(bad: int) -> None:
    """Whichever thread it is in; the next call is as good as any."""
    mended = threading.Event()

    def call(values: Mapping[str, Array]) -> list[Array]:
        if not mended.is_set() and values["rows"][0, 0] == bad:
            raise BundleError(f"part {bad}")
        return [values["tokens"], values["rows"]]

    values = values_of(8) | {"rows": np.repeat(np.arange(4, dtype=np.float32), 2)[None].repeat(2, axis=0)}
    stage = InParts(lambda threads: call, INPUTS, OUTPUTS, 2, 2)
    with pytest.raises(BundleError, match=rf"^part {bad}$"):
        stage(values)
    mended.set()
    np.testing.assert_array_equal(stage(values)[1], values["rows"])


@pytest.mark.parametrize(
    ("inputs", "outputs", "wanted"),
    [
        (INPUTS, OUTPUTS, True),
        ((ROWS, TABLE), OUTPUTS, False),  # vectors only
        ((ROWS, Port("table", (3, 2, 4), "float32")), OUTPUTS, False),
        (INPUTS, (*OUTPUTS, TABLE), False),  # which of the parts would it be of
        ((), OUTPUTS, False),
    ],
)
def test_what_is_divisible(inputs: tuple[Port, ...], outputs: tuple[Port, ...], wanted: bool) -> None:
    assert divisible(inputs, outputs) is wanted


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sum = tokens + table, twice = rows + rows."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["tokens", "table"], ["sum"]), helper.make_node("Add", ["rows", "rows"], ["twice"])],
        "stage",
        [
            helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["B", 3, 2]),
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, [2, "B"]),
            helper.make_tensor_value_info("table", TensorProto.FLOAT, [3, 2]),
        ],
        [
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["B", 3, 2]),
            helper.make_tensor_value_info("twice", TensorProto.FLOAT, [2, "B"]),
        ],
    )
    path = tmp_path_factory.mktemp("models") / "stage.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.mark.parametrize("rows", [None, 1, 3, 5])
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_sessions_give_the_same_in_parts(file: Path, rows: int | None, threads: int | None) -> None:
    call = session.open_session(file, INPUTS, OUTPUTS, threads=threads, options=OnnxruntimeOptions(rows=rows))
    for batch in (1, 7, 24):
        values = values_of(batch)
        total, twice = call(values)
        np.testing.assert_array_equal(total, values["tokens"] + values["table"])
        np.testing.assert_array_equal(twice, 2 * values["rows"])
