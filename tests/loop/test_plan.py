"""Plan: what the fold promises, against the recurrence stepped by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepfold.loop.plan import Plan, fold, with_guidance
from stepfold.loop.recurrence import Recurrence

SEEDS = st.integers(0, 999)
WIDTH = 4


def random_recurrence(calls: int, seed: int) -> Recurrence:
    generator = np.random.default_rng(seed)
    return Recurrence(
        timesteps=np.linspace(999.0, 1.0, calls),
        input_scale=generator.uniform(0.5, 1.0, calls),
        state=generator.uniform(0.6, 1.1, calls),
        outputs=np.tril(generator.uniform(-0.5, 0.5, (calls, calls))),
        initial_scale=2.0,
    )


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[int]]:
    """S calls and the evaluated ones, ascending from 0."""
    calls = draw(st.integers(1, 14))
    later = draw(st.lists(st.integers(1, max(calls - 1, 1)), unique=True))
    return calls, [0, *sorted(c for c in later if c < calls)]


def stepped(recurrence: Recurrence, x0: np.ndarray, outputs: np.ndarray) -> list[np.ndarray]:
    """x[0..S] of the recurrence for the given guided outputs [S, D], by its definition."""
    latents = [x0]
    for i in range(recurrence.calls):
        x = recurrence.state[i] * latents[-1]
        for j in range(i + 1):
            x = x + recurrence.outputs[i, j] * outputs[j]
        latents.append(x)
    return latents


def planned(plan: Plan, x0: np.ndarray, conditional: np.ndarray, unconditional: np.ndarray) -> list[np.ndarray]:
    """The latent before the first and after each update of a plan, by its definition."""
    latents = [x0]
    for k in range(plan.evaluations):
        x = plan.state[k] * latents[-1]
        for j in range(k + 1):
            x = x + plan.conditional[k, j] * conditional[j] + plan.unconditional[k, j] * unconditional[j]
        latents.append(x)
    return latents


def branches(calls: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x0 [D] and both outputs [S, D]."""
    generator = np.random.default_rng([seed, 1])
    return generator.standard_normal(WIDTH), *generator.standard_normal((2, calls, WIDTH))


@given(calls=st.integers(1, 12), seed=SEEDS, scale=st.one_of(st.none(), st.floats(0.0, 8.0)))
def test_everything_computed_is_the_recurrence(calls: int, seed: int, scale: float | None) -> None:
    recurrence = random_recurrence(calls, seed)
    x0, c, u = branches(calls, seed)
    guided = c if scale is None or scale <= 1 else u + scale * (c - u)
    plan = fold(recurrence, scale)
    np.testing.assert_allclose(planned(plan, x0, c, u), stepped(recurrence, x0, guided), atol=1e-8)
    np.testing.assert_array_equal(plan.positions, np.arange(calls))
    np.testing.assert_array_equal(plan.landings, np.arange(1, calls + 1))
    np.testing.assert_array_equal(plan.timesteps, recurrence.timesteps)
    np.testing.assert_array_equal(plan.input_scale, recurrence.input_scale)
    assert plan.initial_scale == recurrence.initial_scale
    assert plan.guided.all() == (scale is not None and scale > 1.0)


@given(schedule=schedules(), seed=SEEDS)
def test_reuse_repeats_the_newest_output(schedule: tuple[int, list[int]], seed: int) -> None:
    calls, positions = schedule
    recurrence = random_recurrence(calls, seed)
    x0, c, u = branches(calls, seed)
    newest = [max(p for p in positions if p <= i) for i in range(calls)]
    expected = stepped(recurrence, x0, c[newest])
    plan = fold(recurrence, None, positions)
    received = planned(plan, x0, c[positions], u[positions])
    np.testing.assert_allclose(received[1:], np.stack(expected)[plan.landings], atol=1e-8)
    np.testing.assert_array_equal(plan.landings, [*positions[1:], calls])
    np.testing.assert_array_equal(plan.timesteps, recurrence.timesteps[positions])


@settings(max_examples=60)
@given(schedule=schedules(), order=st.integers(0, 3), seed=SEEDS)
def test_forecast_is_exact_for_polynomials(schedule: tuple[int, list[int]], order: int, seed: int) -> None:
    """Outputs of degree m in the call index are forecast exactly from m + 1 anchors; so each call up to the one
    that completes them is evaluated here."""
    calls, positions = schedule
    positions = sorted(set(positions) | set(range(min(order + 1, calls))))
    coefficients = np.random.default_rng([seed, 2]).standard_normal((order + 1, WIDTH))
    index = np.arange(calls) / calls
    outputs = index[:, None] ** np.arange(order + 1) @ coefficients
    recurrence = random_recurrence(calls, seed)
    x0, _, _ = branches(calls, seed)
    received = planned(fold(recurrence, None, positions, order), x0, outputs[positions], outputs[positions])
    np.testing.assert_allclose(received[-1], stepped(recurrence, x0, outputs)[-1], atol=1e-6)


def test_forecast_of_a_lower_order_is_not_exact() -> None:
    """The test above can fail: a parabola is not forecast by a line."""
    recurrence = random_recurrence(8, seed=3)
    outputs = (np.arange(8.0)[:, None] / 8) ** 2 * np.ones(WIDTH)
    positions = [0, 1, 2, 5]
    x0, _, _ = branches(8, 3)
    exact = stepped(recurrence, x0, outputs)[-1]
    for order, right in ((1, False), (2, True)):
        received = planned(fold(recurrence, None, positions, order), x0, outputs[positions], outputs[positions])[-1]
        assert np.allclose(received, exact, atol=1e-9) == right


def test_first_forecasts_use_the_anchors_there_are() -> None:
    """Euler with unit steps: with one anchor the forecast is reuse, with two the line through them."""
    recurrence = Recurrence(np.arange(6.0), np.ones(6), np.ones(6), np.eye(6), 1.0)
    plan = fold(recurrence, None, [0, 2], order=1)
    np.testing.assert_allclose(plan.conditional[0], [2.0, 0.0])  # calls 0 and 1
    # calls 2..5 are v2 + t (v2 - v0) / 2 for t = 0..3: 4 v2 + 6/2 (v2 - v0)
    np.testing.assert_allclose(plan.conditional[1], [-3.0, 7.0])


@given(schedule=schedules(), seed=SEEDS, scale=st.floats(1.0, 10.0), order=st.integers(0, 2))
def test_guidance_is_linear_in_the_branches(
    schedule: tuple[int, list[int]], seed: int, scale: float, order: int
) -> None:
    calls, positions = schedule
    recurrence = random_recurrence(calls, seed)
    x0, c, u = (value if value.ndim == 1 else value[positions] for value in branches(calls, seed))
    received = planned(fold(recurrence, scale, positions, order), x0, c, u)
    combined = u + scale * (c - u)
    expected = planned(fold(recurrence, None, positions, order), x0, combined, np.zeros_like(u))
    np.testing.assert_allclose(received, expected, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize(("scale", "guided"), [(None, 0), (1.0, 0), (0.5, 0), (0.0, 0), (-1.0, 0), (2.0, 3)])
def test_the_second_branch_runs_only_when_it_counts(scale: float | None, guided: int) -> None:
    """A scale of at most 1 is the conditional branch alone, as diffusers pipelines take it."""
    recurrence = random_recurrence(3, 0)
    plan = fold(recurrence, scale)
    if not guided:
        np.testing.assert_array_equal(plan.conditional, fold(recurrence, None).conditional)
    assert plan.guided_evaluations == guided
    assert bool(plan.unconditional.any()) == (guided > 0)


def test_last_reader_is_the_last_update_that_weighs_an_output() -> None:
    recurrence = Recurrence(np.arange(4.0), np.ones(4), np.ones(4), np.eye(4) + 0.5 * np.eye(4, k=-1), 1.0)
    plan = fold(recurrence, 2.0)
    assert [plan.last_reader(j) for j in range(4)] == [1, 2, 3, 3]
    only_unconditional = plan.conditional.copy()
    only_unconditional[1, 0] = 0.0
    assert replace(plan, conditional=only_unconditional).last_reader(0) == 1
    assert fold(Recurrence(np.arange(2.0), np.ones(2), np.ones(2), np.zeros((2, 2)), 1.0)).last_reader(0) == 0


@given(schedule=schedules(), seed=SEEDS, scale=st.one_of(st.none(), st.floats(0.0, 8.0)))
def test_arrays_round_trip(schedule: tuple[int, list[int]], seed: int, scale: float | None) -> None:
    calls, positions = schedule
    plan = fold(random_recurrence(calls, seed), scale, positions, order=1)
    arrays = plan.arrays()
    rebuilt = Plan.from_arrays(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(rebuilt.arrays()[name], value)
        assert rebuilt.arrays()[name].dtype == value.dtype
    assert rebuilt.guided.dtype == bool and isinstance(rebuilt.initial_scale, float)
    np.testing.assert_array_equal(rebuilt.conditional, plan.conditional)


@pytest.mark.parametrize("positions", [[], [1, 2], [0, 2, 1], [0, 0, 1], [0, 5], [-1, 0]])
def test_positions_are_checked(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="positions must ascend from 0 and stay below 5; received"):
        fold(random_recurrence(5, 0), None, positions)


def test_order_is_checked() -> None:
    with pytest.raises(ValueError, match=r"order of a forecast must be 0 \(reuse\) or more; received -1"):
        fold(random_recurrence(5, 0), None, [0, 2], order=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": np.zeros(2)}, r"timesteps of a plan of 3 evaluations must be \[3\]"),
        ({"guided": np.ones((3, 1), bool)}, r"guided of a plan of 3 evaluations must be \[3\]"),
        ({"landings": np.zeros(4, np.int64)}, r"landings of a plan of 3 evaluations must be \[3\]"),
        ({"conditional": np.ones((3, 3))}, r"conditional of a plan of 3 evaluations must be lower triangular"),
        ({"unconditional": np.zeros((3, 2))}, r"unconditional of a plan .* must be lower triangular \[3, 3\]"),
        ({"state": np.array([1.0, np.nan, 1.0])}, "state weights of a plan must be finite"),
        ({"conditional": np.diag([1.0, np.inf, 1.0])}, "conditional weights of a plan must be finite"),
        ({"guided": np.array([True, False, True])}, "an unguided evaluation has no unconditional output to weigh"),
    ],
)
def test_tables_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(fold(random_recurrence(3, 0), 2.0), **change)


def test_with_guidance_weighs_guided_outputs() -> None:
    recurrence = random_recurrence(6, 1)
    positions, outputs = np.array([0, 2, 5]), np.tril(np.arange(1.0, 10.0).reshape(3, 3))
    plan = with_guidance(recurrence, 3.0, positions, np.array([1.0, 0.5, 2.0]), outputs)
    np.testing.assert_allclose(plan.conditional, 3.0 * outputs)
    np.testing.assert_allclose(plan.unconditional, -2.0 * outputs)
    np.testing.assert_array_equal(plan.landings, [2, 5, 6])
    np.testing.assert_array_equal(plan.input_scale, recurrence.input_scale[[0, 2, 5]])
