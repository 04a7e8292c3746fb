"""Conditions of calibration samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from analytic import analytic_program, euler, loop
from programs import component

from stepfold.calibration.conditions import sample_request
from stepfold.ir.program import Program
from stepfold.loop.driver import Request
from stepfold.loop.errors import StepfoldError
from stepfold.loop.noise import SampleSet, noise
from stepfold.loop.ports import InputPort, Port
from stepfold.loop.spec import LoopSpec

SAMPLES = SampleSet("calibration", 3, 5)


def with_text(unconditional: Any) -> Program:
    """A model of two conditions: text [B, 2, 3], and a class beside it."""
    base = loop(None)
    document = base.model_dump()
    document["inputs"]["text"] = {"role": "condition"}
    document["guidance"] = {"scale": 2.0, "unconditional": unconditional}
    program = analytic_program(euler(4), LoopSpec.model_validate(document))
    text = InputPort(Port("text", (None, 2, 3), "float32"), "condition")
    example = {**program.example, "text": torch.arange(12.0).reshape(2, 2, 3), "c": torch.tensor([2, 3])}
    return replace(program, inputs=(*program.inputs, text), example=example)


def request(program: Program, samples: SampleSet = SAMPLES) -> Request:
    return sample_request(program, samples)


def test_classes_in_turn_without_the_unconditional_row() -> None:
    """Row 4 of the five is the unconditional one."""
    received = request(analytic_program(euler(4), loop(2.0)), SampleSet("calibration", 0, 9))
    assert received.conditions["c"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert received.conditions["c"].dtype == np.int64
    assert received.unconditional is not None and received.unconditional["c"].tolist() == [4] * 9


def test_without_guidance_every_row_is_a_class() -> None:
    received = request(analytic_program(euler(4), loop(None)))
    assert received.conditions["c"].tolist() == [0, 1, 2, 3, 4] and received.unconditional is None


def test_noise_is_that_of_the_set() -> None:
    received = request(analytic_program(euler(4), loop(2.0)))
    np.testing.assert_array_equal(received.noise, noise([3, 1], (5, 6)))  # calibration is the first set
    assert received.noise.dtype == np.float32


def test_the_three_sets_are_disjoint() -> None:
    program = analytic_program(euler(4), loop(2.0))
    drawn = [request(program, SampleSet(name, 3, 5)).noise for name in ("calibration", "validation", "held-out")]
    assert len({value.tobytes() for value in np.concatenate(drawn)}) == 15


def test_other_conditions_cycle_through_the_example() -> None:
    program = with_text({"text": 0})
    received = request(program)
    example = program.example["text"].numpy()
    np.testing.assert_array_equal(received.conditions["text"], example[[0, 1, 0, 1, 0]])
    assert received.conditions["c"].tolist() == [2, 3, 2, 3, 2]


def test_a_condition_without_a_declared_value_keeps_it_in_the_other_branch() -> None:
    received = request(with_text({"text": -1}))
    assert received.unconditional is not None
    assert (received.unconditional["text"] == -1).all() and received.unconditional["text"].shape == (5, 2, 3)
    np.testing.assert_array_equal(received.unconditional["c"], received.conditions["c"])


def test_a_declared_array_is_of_one_sample() -> None:
    received = request(with_text({"text": [1.0, 2.0, 3.0]}))
    assert received.unconditional is not None
    np.testing.assert_array_equal(received.unconditional["text"][4], [[1, 2, 3], [1, 2, 3]])


def test_a_supplied_negative_prompt_is_zeros_while_calibrating() -> None:
    received = request(with_text("input"))
    assert received.unconditional is not None
    assert not received.unconditional["text"].any() and not received.unconditional["c"].any()


def test_a_component_has_no_trajectories() -> None:
    program = component(torch.nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(StepfoldError, match="calibration: the program has no loop; there are no trajectories to run"):
        request(program)
