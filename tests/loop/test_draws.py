"""Noise that a sampler draws on its way: given with the request, weighed by the plan, kept with the bundle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from loops import LATENT, LOOP, SCALE, S, assert_close, plain, recurrence, request

from stepfold.bundle.tables import Tables
from stepfold.loop.driver import LoopRun, Request, run_loop
from stepfold.loop.errors import BundleError, UsageError
from stepfold.loop.noise import noise
from stepfold.loop.plan import Plan, fold
from stepfold.loop.recurrence import Recurrence
from stepfold.runtime.request import check_noise

DRAWS = 3
WEIGHTS = np.zeros((S, DRAWS))
WEIGHTS[[0, 2, 3], [0, 1, 2]] = 0.5, 0.25, 1.5
LOOP_OF_DRAWS = LOOP.model_copy(update={"draws": DRAWS})


def stochastic(depth: int = 2) -> Recurrence:
    return replace(recurrence(depth), noise=WEIGHTS)


def drawn(batch: int, seed: int = 1) -> Request:
    return replace(request(batch), noise=noise(seed, (batch, *LOOP_OF_DRAWS.noise_shape)))


def test_noise_has_the_start_first() -> None:
    assert LOOP.noise_shape == LATENT and LOOP_OF_DRAWS.noise_shape == (1 + DRAWS, *LATENT)


@pytest.mark.parametrize("positions", [None, [0, 1, 4]])
def test_the_loop_adds_what_was_drawn(positions: list[int] | None) -> None:
    """Stepped by hand: the deterministic loop from the same start, and each draw carried on by the latents after it."""
    plan, req = fold(stochastic(), SCALE, positions, order=1), drawn(4)
    run = LoopRun(plain(), LOOP_OF_DRAWS, req, plan)
    x = req.noise[:, 0] * np.float32(plan.initial_scale)
    np.testing.assert_array_equal(run.latent, x)
    for k in range(plan.evaluations):
        run.evaluate(k)
        x = plan.state[k] * run.latent + np.tensordot(plan.noise[k], req.noise[:, 1:], axes=([0], [1]))
        for j, (c, u) in run.history.items():
            x = x + plan.conditional[k, j] * c + plan.unconditional[k, j] * u
        run.advance(k, plan)
        assert_close(run.latent, x)
    np.testing.assert_array_equal(run.latent, run_loop(plain(), LOOP_OF_DRAWS, req, plan))


def test_skipped_calls_add_their_noise() -> None:
    """A draw of a call that is not evaluated reaches the next landing through the latents between."""
    r = stochastic()
    plan = fold(r, None, [0, 4])
    state = r.state
    np.testing.assert_allclose(plan.noise[0], [0.5 * state[1:4].prod(), 0.25 * state[3], 1.5])
    assert not plan.noise[1].any() and plan.draws == DRAWS


def test_another_draw_is_another_sample() -> None:
    plan, req = fold(stochastic(), SCALE), drawn(2)
    other = replace(req, noise=np.concatenate([req.noise[:, :3], drawn(2, 9).noise[:, 3:]], axis=1))
    first, second = (run_loop(plain(), LOOP_OF_DRAWS, one, plan) for one in (req, other))
    assert np.abs(first - second).max() > 0.1


def test_a_deterministic_plan_takes_the_start_alone() -> None:
    """Another solver of the same model beside it, as a baseline: no noise on its way."""
    plan, req = fold(recurrence(2), SCALE), drawn(3)
    alone = replace(req, noise=req.noise[:, 0])
    np.testing.assert_array_equal(run_loop(plain(), LOOP_OF_DRAWS, req, plan), run_loop(plain(), LOOP, alone, plan))


def test_a_plan_of_more_draws_than_the_loop_has() -> None:
    with pytest.raises(ValueError, match="the plan weighs 3 draws of noise, and the loop has 0"):
        LoopRun(plain(), LOOP, request(2), fold(stochastic(), SCALE))


def test_arrays_and_back() -> None:
    plan = fold(stochastic(), SCALE, [0, 2, 3])
    assert plan.same_as(Plan.from_arrays(plan.arrays()))
    assert "noise" not in fold(recurrence(), SCALE).arrays(), "a deterministic plan is what it was"
    with pytest.raises(ValueError, match=r"weights of draws must be \[3, D\]"):
        replace(plan, noise=np.ones((2, DRAWS)))
    with pytest.raises(ValueError, match="noise weights of a plan must be finite"):
        replace(plan, noise=np.full((3, DRAWS), np.nan))


def test_tables_and_back() -> None:
    tables = Tables(stochastic(), {SCALE: fold(stochastic(), SCALE, [0, 3])})
    back = Tables.from_arrays(tables.arrays())
    assert back.recurrence is not None
    np.testing.assert_array_equal(back.recurrence.noise, WEIGHTS)
    np.testing.assert_array_equal(back.fitted[SCALE].noise, tables.fitted[SCALE].noise)
    with pytest.raises(BundleError, match="weighs 0 draws of noise; the sampler makes 3"):
        Tables.from_arrays(Tables(stochastic(), {SCALE: fold(recurrence(2), SCALE)}).arrays())


def test_noise_of_the_wrong_shape() -> None:
    with pytest.raises(
        UsageError, match=r"noise: expected shape \[B, 4, 2, 3\] with B at least 1; received \[5, 2, 3\]"
    ):
        check_noise(np.zeros((5, *LATENT), np.float32), LOOP_OF_DRAWS.noise_shape)
