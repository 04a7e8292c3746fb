"""Fitting updates one after the other in the closed loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analytic import Counter, adams_bashforth, analytic_program, euler, loop, velocity
from hypothesis import given, settings
from hypothesis import strategies as st

from stepfold.calibration.trajectories import Trajectories, first, trajectories
from stepfold.loop.forms import Bound, Prediction
from stepfold.loop.noise import SampleSet
from stepfold.loop.plan import Plan, fold
from stepfold.loop.recurrence import Recurrence
from stepfold.loop.spec import GuidanceSpec
from stepfold.passes.schedule.fit import Fitter
from stepfold.passes.schedule.outline import Outline
from stepfold.passes.schedule.polish import polish
from stepfold.passes.schedule.positions import warped
from stepfold.passes.schedule.terms import Terms

STEPS, COUNT = 12, 20  # more samples than one batch of the driver
COEFFICIENT = 1e-4
FIRST_OUTPUT = Terms(outputs=1)


def reference(recurrence: Recurrence, scale: float | None, folder: Path) -> Trajectories:
    program = analytic_program(recurrence, loop(scale))
    samples = SampleSet("calibration", 0, COUNT)
    return trajectories(program, Counter().bound(), samples, scale, folder, lambda done, total: None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return reference(euler(STEPS), 2.0, tmp_path_factory.mktemp("cache"))


def fitter(data: Trajectories, scale: float | None = 2.0, gain: float = 1.0, recurrence=None) -> Fitter:
    return Fitter(Counter(gain).bound(), loop(scale), recurrence or euler(STEPS), scale, data)


def error(samples: np.ndarray, data: Trajectories) -> float:
    return float(((samples - data.latents[-1]) ** 2).mean())


# -- a sampler that draws noise


def noisy(steps: int = STEPS) -> Recurrence:
    """Euler, with noise of a tenth after each step but the last."""
    return replace(euler(steps), noise=0.1 * np.eye(steps, steps - 1))


def test_noise_is_no_error_to_be_made_up_for(tmp_path: Path) -> None:
    """All calls: the sampler's own coefficients; half of them: nearer to the trajectories than the unfitted fold."""
    spec = loop(2.0).model_copy(update={"draws": STEPS - 1})
    program = analytic_program(noisy(), spec)
    samples = SampleSet("calibration", 0, COUNT)
    data = trajectories(program, Counter().bound(), samples, 2.0, tmp_path, lambda done, total: None)
    found = Fitter(Counter().bound(), spec, noisy(), 2.0, data)
    plan = found.fit(Outline(tuple(range(STEPS))), FIRST_OUTPUT).plan
    wanted = fold(noisy(), 2.0)
    for name in ("state", "conditional", "unconditional", "noise"):
        np.testing.assert_allclose(getattr(plan, name), getattr(wanted, name), atol=COEFFICIENT)
    half = found.fit(Outline(tuple(range(0, STEPS, 2))), Terms(2))
    assert error(half.samples, data) < 0.5 * error(found.samples(fold(noisy(), 2.0, range(0, STEPS, 2))), data)


# -- forms


def clips(steps: int = STEPS) -> Recurrence:
    """Euler towards a prediction that is kept in a narrow range, and an output that is not."""
    first = euler(steps)
    prediction = Prediction(np.ones(steps), -first.timesteps / 1000, 0.5 * np.eye(steps) / steps, Bound(0.3))
    return replace(first, prediction=prediction)


FORMS: dict[str, tuple[Recurrence, dict[str, Any]]] = {
    "clipped": (clips(), {}),
    "rescaled": (euler(STEPS), {"rescale": {"over": "row", "measure": "norm"}}),
    "in an interval": (replace(euler(STEPS), strength=np.repeat([0.0, 1.0, 0.0], STEPS // 3)), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_updates_are_fitted_behind_a_form(form: str, tmp_path: Path) -> None:
    """All calls: the trajectory itself; a third of them, polished: nearer to it than the unfitted fold."""
    sampler, guidance = FORMS[form]
    spec = loop(2.0)
    assert spec.guidance is not None
    spec = spec.model_copy(update={"guidance": GuidanceSpec.model_validate(spec.guidance.model_dump() | guidance)})
    samples = SampleSet("calibration", 0, COUNT)
    program = analytic_program(sampler, spec)
    data = trajectories(program, Counter().bound(), samples, 2.0, tmp_path, lambda done, total: None)
    found = Fitter(Counter().bound(), spec, sampler, 2.0, data)
    terms = Terms(2, directions=1, predictions=2 if form == "clipped" else 0)
    whole = found.fit(Outline(tuple(range(STEPS))), terms)
    np.testing.assert_allclose(whole.samples, data.latents[-1], atol=COEFFICIENT)
    fit = found.fit(Outline(tuple(range(0, STEPS, 3))), terms)
    better = polish(found, fit, terms, lambda done, total: None)
    unfitted = error(found.samples(fold(sampler, 2.0, range(0, STEPS, 3))), data)
    assert error(better.samples, data) <= error(fit.samples, data) < 0.5 * unfitted
    np.testing.assert_array_equal(found.samples(better.plan), better.samples)
    assert better.plan.same_as(Plan.from_arrays(better.plan.arrays()))


# -- the sampler's own coefficients


@pytest.mark.parametrize("scale", [None, 1.0, 2.0, 7.5])
def test_every_call_evaluated_gives_the_samplers_own_coefficients(tmp_path: Path, scale: float | None) -> None:
    data = reference(euler(STEPS), scale, tmp_path)
    plan = fitter(data, scale).fit(Outline(tuple(range(STEPS))), FIRST_OUTPUT).plan
    wanted = fold(euler(STEPS), scale)
    for name in ("state", "conditional", "unconditional"):
        np.testing.assert_allclose(getattr(plan, name), getattr(wanted, name), atol=COEFFICIENT)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_the_coefficients_come_from_the_data(tmp_path: Path, scale: float | None) -> None:
    """The trajectories are of a sampler whose steps are 0.7 as long; the unfitted update is another."""
    data = reference(euler(STEPS, stretch=0.7), scale, tmp_path)
    plan = fitter(data, scale).fit(Outline(tuple(range(STEPS))), FIRST_OUTPUT).plan
    wanted = fold(euler(STEPS, stretch=0.7), scale)
    assert np.abs(wanted.conditional - fold(euler(STEPS), scale).conditional).max() > 0.02
    for name in ("state", "conditional", "unconditional"):
        np.testing.assert_allclose(getattr(plan, name), getattr(wanted, name), atol=COEFFICIENT)


def test_a_multistep_method_is_found_with_two_outputs(tmp_path: Path) -> None:
    """Adams-Bashforth trajectories from the prior of Euler: outputs of two evaluations, 3/2 and -1/2."""
    data = reference(adams_bashforth(STEPS), None, tmp_path)
    plan = fitter(data, None).fit(Outline(tuple(range(STEPS))), Terms(outputs=2)).plan
    wanted = fold(adams_bashforth(STEPS))
    np.testing.assert_allclose(plan.conditional, wanted.conditional, atol=20 * COEFFICIENT)  # neighbours are alike
    assert np.abs(wanted.conditional - fold(euler(STEPS)).conditional).max() > 0.03


# -- quality


@settings(max_examples=25)
@given(st.integers(2, STEPS - 1), st.floats(0.6, 1.8), st.floats(0.5, 1.5), st.integers(1, 4), st.integers(0, 2))
def test_a_fit_is_better_on_its_own_samples_than_the_unfitted_fold(
    data: Trajectories, evaluations: int, a: float, b: float, outputs: int, directions: int
) -> None:
    """Of the same outputs: with one, an output is reused; with two, a line through them is the unfitted forecast."""
    positions = warped(STEPS, evaluations, a, b)
    fit = fitter(data).fit(Outline(positions), Terms(outputs, directions))
    orders = (0,) if outputs == 1 else (0, 1)
    unfitted = [error(fitter(data).samples(fold(euler(STEPS), 2.0, positions, order)), data) for order in orders]
    assert error(fit.samples, data) <= min(unfitted) * 1.0001


def test_the_first_update_is_the_least_squares_answer(data: Trajectories) -> None:
    """By hand: the latent and the guided output of the noise against the latent at the next position."""
    outline = Outline((0, 5))
    fit = fitter(data).fit(outline, FIRST_OUTPUT)
    noise = data.request.noise.astype(np.float64)
    t = np.full(COUNT, 1000, np.float32)
    assert data.request.unconditional is not None
    c, u = (
        velocity(data.request.noise, t, rows["c"]) for rows in (data.request.conditions, data.request.unconditional)
    )
    output = (u + 2.0 * (c - u)).astype(np.float64)
    columns = np.stack([noise.ravel(), output.ravel()], 1)
    (state, weight), *_ = np.linalg.lstsq(columns, data.latents[5].astype(np.float64).ravel(), rcond=None)
    assert fit.plan.state[0] == pytest.approx(state, abs=1e-5)
    assert fit.plan.conditional[0, 0] == pytest.approx(2.0 * weight, abs=1e-5)
    assert fit.plan.unconditional[0, 0] == pytest.approx(-1.0 * weight, abs=1e-5)


def test_the_fit_absorbs_the_error_of_the_engine(data: Trajectories) -> None:
    """On an engine with an error the fit for it beats the fit for the exact field."""
    outline, terms, wrong = Outline(warped(STEPS, 6, 1.0, 1.0)), Terms(outputs=3), fitter(data, gain=0.9)
    exact = fitter(data).fit(outline, terms).plan
    assert error(wrong.fit(outline, terms).samples, data) < 0.25 * error(wrong.samples(exact), data)


def test_more_terms_are_not_worse(data: Trajectories) -> None:
    outline = Outline(warped(STEPS, 5, 1.0, 1.0))
    few, many = (error(fitter(data).fit(outline, Terms(outputs=n)).samples, data) for n in (1, 3))
    assert many < few


# -- the closed loop


@pytest.mark.parametrize("terms", [Terms(1), Terms(3), Terms(3, 2)])
def test_the_samples_of_a_fit_are_those_of_its_table(data: Trajectories, terms: Terms) -> None:
    """Bit for bit: the driver applies what the fit applied."""
    one = fitter(data)
    fit = one.fit(Outline((0, 3, 4, 8)), terms)
    np.testing.assert_array_equal(one.samples(fit.plan), fit.samples)


def test_the_same_fit_twice_is_the_same_table(data: Trajectories) -> None:
    first_fit, second_fit = (fitter(data).fit(Outline((0, 2, 7)), Terms(3, 2)).plan for _ in range(2))
    for name, value in first_fit.arrays().items():
        np.testing.assert_array_equal(value, second_fit.arrays()[name])


def test_a_table_has_the_shape_of_its_plan(data: Trajectories) -> None:
    plan = fitter(data).fit(Outline((0, 2, 7, 9)), Terms(outputs=2, directions=1)).plan
    assert plan.positions.tolist() == [0, 2, 7, 9]
    assert plan.landings.tolist() == [2, 7, 9, STEPS]
    assert plan.timesteps.tolist() == pytest.approx([1000 * (STEPS - p) / STEPS for p in (0, 2, 7, 9)])
    assert plan.guided.all() and plan.guided_evaluations == 4
    weights = (plan.conditional != 0) | (plan.unconditional != 0)
    newest = np.abs(np.subtract.outer(np.arange(4), np.arange(4))) < 2
    assert not (weights & ~(np.tril(np.ones((4, 4), bool)) & newest)).any()


def test_samples_of_other_noise(data: Trajectories) -> None:
    """A plan is measured on samples it was not fitted on."""
    one = fitter(first(data, 8))
    plan = one.fit(Outline((0, 4, 8)), Terms(2)).plan
    assert one.samples(plan).shape == (8, 6) and one.samples(plan, data).shape == (COUNT, 6)
    np.testing.assert_allclose(one.samples(plan, data)[:8], one.samples(plan), rtol=1e-5, atol=1e-6)


def test_a_direction_is_kept_over_several_unguided_evaluations(data: Trajectories) -> None:
    outline = Outline((0, 3, 6, 9), unguided=frozenset({3, 6, 9}))
    one = fitter(data)
    fit = one.fit(outline, Terms(outputs=2, directions=1))
    assert fit.plan.guided.tolist() == [True, False, False, False]
    np.testing.assert_array_equal(one.samples(fit.plan), fit.samples)


def test_an_unguided_evaluation_runs_one_branch(data: Trajectories) -> None:
    """Its output is the conditional one; the guidance direction comes from an earlier evaluation."""
    counter = Counter()
    one = Fitter(counter.bound(), loop(2.0), euler(STEPS), 2.0, data)
    outline = Outline((0, 3, 6, 9), unguided=frozenset({3, 9}))
    fit = one.fit(outline, Terms(outputs=2, directions=1))
    plan = fit.plan
    assert plan.guided.tolist() == [True, False, True, False]
    assert counter.rows == COUNT * (2 + 1 + 2 + 1)
    assert not plan.unconditional[:, [1, 3]].any()
    np.testing.assert_array_equal(one.samples(plan), fit.samples)
    halves = one.fit(Outline((0, 6)), Terms(outputs=2, directions=1))
    assert error(fit.samples, data) < error(halves.samples, data)


# -- going on from another fit


@st.composite
def outlines(draw: st.DrawFn) -> Outline:
    """Positions from 0, some of them with one branch; the first is guided, as in every plan that weighs directions."""
    positions = (0, *sorted(draw(st.sets(st.integers(1, STEPS - 1), min_size=1, max_size=6))))
    return Outline(positions, frozenset(draw(st.sets(st.sampled_from(positions[1:]), max_size=2))))


@settings(max_examples=40, deadline=None)
@given(outlines(), outlines(), st.integers(0, 2))
def test_a_fit_that_goes_on_from_another_is_the_same_fit(
    data: Trajectories, model: Outline, outline: Outline, directions: int
) -> None:
    one, terms = fitter(data), Terms(outputs=2, directions=directions)
    wanted = one.fit(outline, terms)
    found = one.traced(outline, terms, one.traced(model, terms))
    for name, value in wanted.plan.arrays().items():
        np.testing.assert_array_equal(found.fit.plan.arrays()[name], value, err_msg=name)
    np.testing.assert_array_equal(found.fit.samples, wanted.samples)
    again = one.traced(outline, terms, found)
    np.testing.assert_array_equal(again.fit.samples, wanted.samples)


@pytest.mark.parametrize(
    ("positions", "saved"), [((0, 3, 6, 9), 4), ((0, 3, 6, 10), 3), ((0, 3, 6), 3), ((0, 4, 6, 9), 1)]
)
def test_what_both_evaluate_is_evaluated_once(data: Trajectories, positions: tuple[int, ...], saved: int) -> None:
    counter = Counter()
    one = Fitter(counter.bound(), loop(2.0), euler(STEPS), 2.0, data)
    terms = Terms(outputs=2, directions=1)
    model = one.traced(Outline((0, 3, 6, 9)), terms)
    before = counter.rows
    one.traced(Outline(positions), terms, model)
    assert counter.rows - before == 2 * COUNT * (len(positions) - saved)
