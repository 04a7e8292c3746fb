"""What the step stage reads along the loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from programs import Program, component, context_of, modulated

from stepfold.calibration.conditions import sample_request
from stepfold.calibration.stage_inputs import step_inputs
from stepfold.loop.noise import SampleSet
from stepfold.passes.hoist.hoist import Hoist, HoistOptions

SET = SampleSet("calibration", 0, 3)


@pytest.fixture(scope="module")
def program() -> Program:
    return modulated()


def test_every_evaluation_of_both_branches(program: Program) -> None:
    """Four Euler calls, guided: six rows each, the first of them the noise at the first timestep."""
    kept = step_inputs(program, SET)
    assert program.recurrence is not None
    assert len(kept) == 4 and [list(batch) for batch in kept] == [["x", "t", "c"]] * 4
    request = sample_request(program, SET)
    np.testing.assert_allclose(kept[0]["x"], np.concatenate([request.noise] * 2))
    for batch, timestep in zip(kept, program.recurrence.timesteps, strict=True):
        assert batch["x"].shape[0] == 6 and (batch["t"] == timestep).all()
    assert set(kept[0]["c"]) == {0, 1, 3}  # the conditions of the example, and the unconditional one


def test_kept_evaluations_are_spread_with_both_ends(program: Program) -> None:
    every = step_inputs(program, SET)
    ends = step_inputs(program, SET, evaluations=2)
    assert len(ends) == 2
    for received, wanted in zip(ends, (every[0], every[-1]), strict=True):
        np.testing.assert_array_equal(received["x"], wanted["x"])


def test_inputs_of_a_hoisted_stage_are_those_of_the_stage(program: Program, tmp_path) -> None:
    hoisted = Hoist(HoistOptions()).run(program, context_of(program, tmp_path)).program
    kept = step_inputs(hoisted, SET)
    names = {port.name for port in hoisted.step.inputs}
    assert all(set(batch) == names for batch in kept) and "t" not in names
    bound = hoisted.bind()
    step = next(stage for stage in bound.stages if stage.name == hoisted.step.name)
    wanted = step_inputs(program, SET)
    received = step.call(kept[2])[0]
    np.testing.assert_allclose(received, program.bind().evaluate(wanted[2])[0], atol=1e-5)


def test_a_component_has_its_example(tmp_path) -> None:
    layer = component(torch.nn.Linear(4, 2), torch.randn(2, 3, 4))
    (batch,) = step_inputs(layer, SET)
    (name,) = batch
    np.testing.assert_array_equal(batch[name], layer.example[name].numpy())


def test_progress(program: Program) -> None:
    calls: list[tuple[str, int, int]] = []
    step_inputs(program, SET, 2, lambda *call: calls.append(call))
    assert calls == [("recording inputs", i, 4) for i in (1, 2, 3, 4)]
