"""Which classes the samples of a seed have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepfold.loop.classes import check_unconditional, class_conditions, class_input
from stepfold.loop.errors import UsageError
from stepfold.loop.ports import InputPort, Port
from stepfold.loop.spec import LoopSpec

STATE = InputPort(Port("x", (None, 1, 2, 2), "float32"), "state")
TIME = InputPort(Port("t", (None,), "float32"), "timestep")
TEXT = InputPort(Port("text", (None, 7, 8), "float32"), "condition")


def labels(cardinality: int | None = 5, dtype: str = "int64") -> InputPort:
    return InputPort(Port("labels", (None,), dtype), "condition", cardinality)


def loop(unconditional: Any = None, **inputs: str) -> LoopSpec:
    guidance = None if unconditional is None else {"scale": 2.0, "unconditional": unconditional}
    return LoopSpec.model_validate(
        {
            "inputs": {"x": "state", "t": "timestep", **inputs},
            "sampler": {"scheduler": "DDIMScheduler", "steps": 4},
            "guidance": guidance,
            "latent": {"shape": [1, 2, 2]},
        }
    )


@pytest.mark.parametrize(
    ("spec", "classes"),
    [
        (loop({"labels": 4}, labels="condition"), (0, 1, 2, 3)),
        (loop({"labels": 0}, labels="condition"), (1, 2, 3, 4)),
        (loop("input", labels="condition"), (0, 1, 2, 3, 4)),
        (loop(labels="condition"), (0, 1, 2, 3, 4)),
    ],
)
def test_the_unconditional_row_is_not_a_class(spec: LoopSpec, classes: tuple[int, ...]) -> None:
    found = class_input([STATE, TIME, labels()], spec)
    assert found is not None and found.classes == classes


@pytest.mark.parametrize(
    ("chosen", "expected"), [(None, [0, 1, 2, 3, 0, 1]), ([2], [2] * 6), ([3, 1, 0, 0], [3, 1, 0, 0, 3, 1])]
)
def test_classes_of_samples(chosen: list[int] | None, expected: list[int]) -> None:
    spec = loop({"labels": 4}, labels="condition")
    conditions = class_conditions([STATE, TIME, labels(dtype="int32")], spec, 6, chosen)
    assert conditions["labels"].dtype == np.int32 and conditions["labels"].tolist() == expected


@pytest.mark.parametrize(
    ("inputs", "chosen", "message"),
    [
        ([labels()], [0, 4], "classes: expected indices from 0 to 3; received 4."),
        ([labels()], [-1], "classes: expected indices from 0 to 3; received -1."),
        ([labels()], [], "classes: expected at least one; received an empty list."),
        ([TEXT], None, "this one needs text [B, 7, 8] float32. Give these arrays by name"),
        ([labels(), TEXT], [1], "this one needs labels [B] int64, text [B, 7, 8] float32."),
        ([labels(None)], None, "this one needs labels [B] int64."),
        ([], [1], "classes: expected none, because this model has no conditions; received [1]."),
    ],
)
def test_refusals(inputs: list[InputPort], chosen: list[int] | None, message: str) -> None:
    spec = loop({"labels": 4}, labels="condition")
    with pytest.raises(UsageError) as error:
        class_conditions([STATE, TIME, *inputs], spec, 3, chosen)
    assert message in str(error.value)


def test_a_model_without_conditions_needs_none() -> None:
    assert class_conditions([STATE, TIME], loop(), 3) == {}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, None),
        (0.0, None),
        (1.5, "a whole number"),
        (5, "an index from 0 to 4"),
        (-1, "an index from 0 to 4"),
        ([1], "a number"),
        ([1, 2, 3], "a number"),
    ],
)
def test_an_unconditional_label_is_one_that_the_model_has(value: Any, expected: str | None) -> None:
    spec = loop({"labels": value}, labels="condition")
    if expected is None:
        check_unconditional([STATE, TIME, labels()], spec)
        return
    with pytest.raises(UsageError, match=rf"^guidance\.unconditional\.labels: expected {expected}; received "):
        check_unconditional([STATE, TIME, labels()], spec)


@pytest.mark.parametrize("value", [0, 0.5, [0.1] * 8, [[0.1]] * 7])
def test_an_unconditional_embedding_broadcasts(value: Any) -> None:
    check_unconditional([STATE, TIME, TEXT], loop({"text": value}, text="condition"))


@pytest.mark.parametrize("value", [[0.1] * 7, [[[0.1]]]])
def test_an_unconditional_embedding_of_another_shape(value: Any) -> None:
    with pytest.raises(UsageError, match=r"expected a number or an array \[7, 8\]"):
        check_unconditional([STATE, TIME, TEXT], loop({"text": value}, text="condition"))
