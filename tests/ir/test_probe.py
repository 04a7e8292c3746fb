"""The probe, and the program as callables."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from programs import Modulated, component, denoiser, loop_around, modulated, modulated_example

from stepfold.ir.probe import outputs_drift, probe_calls, probe_inputs, probe_outputs
from stepfold.ir.program import Program, attribute, reference, slots_of
from stepfold.loop.ports import Rate
from stepfold.loop.recurrence import Recurrence, as_timesteps


@pytest.fixture(scope="module")
def program() -> Program:
    return modulated()


def with_calls(program: Program, calls: int) -> Program:
    times = np.linspace(1000, 10, calls)
    ones = np.ones(calls)
    return replace(program, recurrence=Recurrence(times, ones, ones, -np.eye(calls) / calls, 1.0))


@pytest.mark.parametrize(
    ("calls", "expected"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (8, [0, 4, 7]), (50, [0, 25, 49])]
)
def test_first_middle_and_last_call(program: Program, calls: int, expected: list[int]) -> None:
    assert probe_calls(with_calls(program, calls)) == expected


def test_a_component_is_probed_once() -> None:
    model = component(lambda x: (x.relu(), x.exp()), torch.tensor([[-1.0], [2.0]]))
    assert probe_calls(model) == [None]
    assert probe_inputs(model, None)["x"].tolist() == [[-1.0], [2.0]]
    relu, exp = probe_outputs(model)
    assert relu.tolist() == [[0.0], [2.0]]
    np.testing.assert_allclose(exp, np.exp([[-1.0], [2.0]]), rtol=1e-6)


def test_outputs_are_those_of_the_model_at_each_call(program: Program) -> None:
    model = Modulated()
    x, _, c = modulated_example()
    received = probe_outputs(program)
    assert program.recurrence is not None and list(program.recurrence.timesteps) == [1000, 750, 500, 250]
    for value, timestep in zip(received, (1000.0, 500.0, 250.0), strict=True):  # calls 0, 2 and 3
        wanted = model(x, torch.full((2,), timestep), c).detach().numpy()
        np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-6)


def test_a_row_of_the_tables_belongs_to_its_call(program: Program) -> None:
    """The timestep input as a table: the probe reads the row of each call."""
    assert program.recurrence is not None
    tabled = replace(program, inputs=(program.inputs[0], program.inputs[2]), tables={"t": np.full(4, 7, np.float32)})
    tabled.tables["t"][:] = program.recurrence.timesteps
    for value, wanted in zip(probe_outputs(tabled), probe_outputs(program), strict=True):
        np.testing.assert_array_equal(value, wanted)


def test_integer_timesteps_are_rounded() -> None:
    """A grid of 979.99997 is the integer 980, as the driver has it."""
    times = np.array([979.99997, 20.4])
    assert as_timesteps(times, "int64").tolist() == [980, 20]
    assert as_timesteps(times, "float32").dtype == np.float32
    model = denoiser(lambda x, t: x + t[:, None], torch.zeros(2, 3), torch.tensor([1, 1]))
    ones = np.ones(2)
    model = replace(model, recurrence=Recurrence(times, ones, ones, np.eye(2), 1.0))
    assert model.recurrence is not None and model.recurrence.timesteps_as("int64").tolist() == [980, 20]
    assert probe_inputs(model, 0)["t"].tolist() == [980, 980]
    assert probe_inputs(model, 0)["t"].dtype == np.int64


def test_drift_is_the_largest_and_sees_nan_everywhere() -> None:
    one = np.ones(4)
    assert outputs_drift([one, one * 1.5], [one, one]) == pytest.approx(0.5)
    for outputs in ([one * np.nan, one], [one, one * np.nan]):
        assert np.isnan(outputs_drift(outputs, [one, one]))


def test_drift_needs_the_same_outputs() -> None:
    with pytest.raises(ValueError, match="zip"):
        outputs_drift([np.ones(2)], [])


def test_the_computing_slots_run_at_the_rate_of_the_prediction(program: Program) -> None:
    other = replace(program.step, name="other", outputs=(replace(program.step.outputs[0], name="z"),))
    once = replace(program, slots=slots_of(replace(other, rate=Rate.ONCE), program.step))
    assert once.step is program.step and program.step.rate is Rate.STEP
    both = replace(program, slots=slots_of(other, program.step))
    assert both.steps == (other, program.step)
    with pytest.raises(ValueError, match="too many values"):
        _ = both.step


def test_parameters_and_tensors(program: Program) -> None:
    """classes 4 x 6, time 6 + 6, gain and shift 6 x 5 + 5 each, body 5 x 5 + 5."""
    assert program.parameters() == 24 + 12 + 35 + 35 + 30 == sum(p.numel() for p in Modulated().parameters())
    assert set(program.step.tensors()) == set(Modulated().state_dict())
    assert attribute(program.step.graph, "body.weight").shape == (5, 5)


def test_reference_takes_arrays_of_any_layout(program: Program) -> None:
    x, t, c = (value.numpy() for value in modulated_example())
    transposed = np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0)
    assert not transposed.flags.c_contiguous
    (received,) = reference(program.step)({"x": transposed, "t": t, "c": c})
    (wanted,) = reference(program.step)({"x": x, "t": t, "c": c})
    np.testing.assert_array_equal(received, wanted)


def test_bind_has_stages_in_order(program: Program) -> None:
    bound = program.bind()
    assert [(stage.name, stage.rate) for stage in bound.stages] == [("step", Rate.STEP)]
    assert bound.inputs == program.inputs and bound.outputs == ("y",)


def test_with_stage_replaces_the_one_of_its_name(program: Program) -> None:
    renamed = replace(program.step, rate=Rate.ONCE)
    assert program.with_stage(renamed).stages == (renamed,)
    assert program.with_stage(replace(renamed, name="other")).stages == program.stages


def test_loop_around_has_the_roles_of_the_names() -> None:
    assert loop_around(["x", "t"], [3]).guidance is None
