"""Bounded predictions and rescaled guidance: by their definitions, in NumPy and in diffusers' own code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st
from loops import LOOP, SCALE, S, recurrence

from stepfold.loop.forms import Bound, Prediction, guided, rescaled_branches
from stepfold.loop.plan import Plan, fold
from stepfold.loop.recurrence import Recurrence
from stepfold.loop.spec import GuidanceSpec, LoopSpec, RescaleSpec

CLOSE = 1e-5


def branches(rows: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = generator.uniform(0.2, 3.0, (2, rows, 1, 1))
    c, u = sizes * generator.standard_normal((2, rows, 5, 8))
    return c.astype(np.float32), u.astype(np.float32)


def rescaled(scale: float, **rule: Any) -> np.ndarray:
    """The guided output behind the form, as an update weighs it; its direction is that of the branches."""
    c, u = branches()
    one, other = rescaled_branches(c, u, scale, RescaleSpec(**rule))
    np.testing.assert_allclose(one - other, c - u, atol=CLOSE)
    return guided(one, other, scale)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_deviations_are_rescaled_as_in_diffusers(share: float) -> None:
    c, u = branches()
    wanted = rescale_noise_cfg(torch.from_numpy(guided(c, u, 4.0)), torch.from_numpy(c), guidance_rescale=share)
    np.testing.assert_allclose(rescaled(4.0, measure="deviation", share=share), wanted.numpy(), atol=CLOSE)


def test_rows_have_the_norm_of_the_conditional_rows() -> None:
    c, _ = branches()
    found = rescaled(5.0, over="row")
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), np.linalg.norm(c, axis=-1), rtol=CLOSE)


def test_a_limit_makes_nothing_larger() -> None:
    c, u = branches()
    c[0] = 0.01 * u[0] + 3 * c[0]  # one sample whose guided output is the smaller one
    output = guided(c, u, 0.5)
    one, other = rescaled_branches(c, u, 0.5, RescaleSpec(limit=1.0))
    norms = [np.linalg.norm(value.reshape(len(c), -1), axis=1) for value in (guided(one, other, 0.5), output, c)]
    np.testing.assert_allclose(norms[0], np.minimum(norms[1], norms[2]), rtol=1e-4)
    assert (norms[1] < norms[2]).any() and (norms[1] > norms[2]).any()


@given(st.floats(0.1, 4.0), st.integers(1, 4))
def test_a_fixed_bound_clips(limit: float, rows: int) -> None:
    values = np.linspace(-5, 5, 12 * rows).reshape(rows, 3, 4)
    np.testing.assert_array_equal(Bound(limit)(values), np.clip(values, -limit, limit))


def test_a_quantile_is_that_of_each_sample() -> None:
    values = np.stack([np.linspace(-0.5, 0.5, 101), np.linspace(-3, 3, 101), np.linspace(-9, 9, 101)])
    found = Bound(5.0, 0.9)(values)
    np.testing.assert_array_equal(found[0], values[0])  # never narrower than [-1, 1]
    np.testing.assert_allclose(found[1], np.clip(values[1] / 2.7, -1, 1), atol=1e-12)
    np.testing.assert_allclose(found[2], np.clip(values[2] / 5.0, -1, 1), atol=1e-12)  # never wider than its limit


@pytest.mark.parametrize("numbers", [(0.0,), (-1.0,), (np.inf,), (1.0, 1.5), (1.0, -0.1)])
def test_bounds_that_bound_nothing_are_refused(numbers: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="expected a"):
        Bound.from_array(np.asarray(numbers))
    with pytest.raises(ValueError, match="one or two numbers"):
        Bound.from_array(np.ones(3))


def bounded(depth: int = 2) -> Recurrence:
    plain = recurrence(depth)
    prediction = Prediction(np.linspace(1, 2, S), np.linspace(-1, 0, S), 0.1 * np.tril(np.ones((S, S))), Bound(1.0))
    return Recurrence(
        plain.timesteps,
        plain.input_scale,
        plain.state,
        plain.outputs,
        plain.initial_scale,
        prediction=prediction,
        strength=np.asarray([0, 1, 1, 0.5, 0, 0]),
    )


def test_forms_are_kept_in_tables() -> None:
    one = bounded()
    again = Recurrence.from_arrays(one.arrays())
    assert again.arrays().keys() == one.arrays().keys()
    plan = fold(one, SCALE)
    assert plan.same_as(Plan.from_arrays(plan.arrays())) and plan.same_as(fold(again, SCALE))
    assert again.prediction is not None and again.prediction.bound == Bound(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": np.ones(S + 1)}, "need shapes"),
        ({"weights": np.ones((S, S))}, "only read predictions that exist"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    arrays = {"latent": np.ones(S), "output": np.ones(S), "weights": np.eye(S)} | change
    with pytest.raises(ValueError, match=message):
        Prediction(arrays["latent"], arrays["output"], arrays["weights"], Bound(1.0))


def test_guidance_has_the_strength_of_its_call() -> None:
    plan = fold(bounded(), SCALE)
    np.testing.assert_allclose(plan.scales, 1 + np.asarray([0, 1, 1, 0.5, 0, 0]) * (SCALE - 1))
    np.testing.assert_array_equal(plan.guided, [False, True, True, True, False, False])
    np.testing.assert_allclose(plan.conditional + plan.unconditional, bounded().outputs)
    assert not fold(bounded(), 1.0).guided.any() and not fold(bounded()).guided.any()


def test_another_number_of_calls_has_the_strength_of_the_nearest() -> None:
    found = recurrence().guided_by([0, 1, 0])
    np.testing.assert_array_equal(found.strength, [0, 0, 1, 1, 0, 0])
    assert recurrence().guided_by(None).arrays().keys() == recurrence().arrays().keys()


@pytest.mark.parametrize(
    "guidance",
    [
        {"strength": [1.0, -0.5]},
        {"strength": [float("nan")]},
        {"rescale": {"over": "column"}},
        {"rescale": {"share": 0.0}},
        {"rescale": {"limit": -1.0}},
        {"rescale": {"limits": 1.0}},
    ],
)
def test_what_a_file_says_is_checked(guidance: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        GuidanceSpec.model_validate({"scale": 2.0, "unconditional": "input"} | guidance)


def test_a_loop_with_forms_is_the_same_after_a_file() -> None:
    guidance = {"scale": SCALE, "unconditional": {"c": 10}, "strength": [1.0] * S, "rescale": {"share": 0.5}}
    spec = LoopSpec.model_validate(LOOP.model_dump(exclude_unset=True) | {"guidance": guidance})
    assert LoopSpec.model_validate_json(spec.model_dump_json()) == spec
