"""Gauss-Newton on all weights of a plan, in the closed loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from analytic import Counter, analytic_program, euler, loop
from hypothesis import given, settings
from hypothesis import strategies as st

from stepfold.calibration.trajectories import Trajectories, trajectories
from stepfold.loop.metrics import psnr
from stepfold.loop.noise import SampleSet
from stepfold.passes.schedule.fit import Fit, Fitter
from stepfold.passes.schedule.outline import Outline
from stepfold.passes.schedule.polish import Normal, polish
from stepfold.passes.schedule.positions import warped
from stepfold.passes.schedule.terms import Terms

STEPS, COUNT = 12, 20  # more samples than one batch of the driver


def reference(folder: Path, name: str, scale: float | None) -> Trajectories:
    program = analytic_program(euler(STEPS), loop(scale))
    samples = SampleSet(name, 0, COUNT)
    return trajectories(program, Counter().bound(), samples, scale, folder, lambda done, total: None)


@pytest.fixture(scope="module", params=[None, 2.0])
def sets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache")
    return request.param, *(reference(folder, name, request.param) for name in ("calibration", "held-out"))


def fitter_of(scale: float | None, data: Trajectories, gain: float = 1.0) -> Fitter:
    return Fitter(Counter(gain).bound(), loop(scale), euler(STEPS), scale, data)


def quality(fitter: Fitter, fit: Fit, data: Trajectories) -> float:
    return float(psnr(fitter.samples(fit.plan, data), data.latents[-1]).mean())


def polished(fitter: Fitter, fit: Fit, terms: Terms) -> Fit:
    return polish(fitter, fit, terms, lambda done, total: None)


@pytest.mark.parametrize("evaluations", [3, 4, 5])
def test_it_gains_on_samples_it_has_not_seen(sets, evaluations: int) -> None:
    scale, calibration, held_out = sets
    fitter, terms = fitter_of(scale, calibration), Terms(3, 2 if scale else 0)
    fit = fitter.fit(Outline(warped(STEPS, evaluations, 1.4, 0.85)), terms)
    better = polished(fitter, fit, terms)
    assert quality(fitter, better, held_out) > quality(fitter, fit, held_out) + 0.3
    np.testing.assert_array_equal(fitter.samples(better.plan), better.samples)


def test_the_rounding_of_the_engine_is_part_of_it(sets) -> None:
    """An engine whose outputs are a tenth short: the weights make up for it."""
    scale, calibration, held_out = sets
    exact, short = fitter_of(scale, calibration), fitter_of(scale, calibration, gain=0.9)
    terms = Terms(3, 2 if scale else 0)
    start = exact.fit(Outline(warped(STEPS, 5, 1.4, 0.85)), terms)
    spoiled = replace(start, samples=short.samples(start.plan))
    better = polished(short, spoiled, terms)
    assert quality(short, better, held_out) > quality(short, spoiled, held_out) + 3


@settings(max_examples=15)
@given(st.integers(2, 7), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**31))
def test_it_never_loses_on_the_calibration_samples(
    sets, evaluations: int, outputs: int, directions: int, seed: int
) -> None:
    scale, calibration, _ = sets
    fitter, terms = fitter_of(scale, calibration), Terms(outputs, directions if scale else 0)
    others = np.random.default_rng(seed).choice(np.arange(1, STEPS), evaluations - 1, replace=False)
    fit = fitter.fit(Outline((0, *sorted(int(i) for i in others))), terms)
    better = polished(fitter, fit, terms)
    assert quality(fitter, better, calibration) >= quality(fitter, fit, calibration)
    assert (better.plan.positions == fit.plan.positions).all()


def test_evaluations_without_guidance(tmp_path: Path) -> None:
    calibration = reference(tmp_path, "calibration", 2.0)
    fitter, terms = fitter_of(2.0, calibration), Terms(2, 1)
    fit = fitter.fit(Outline((0, 3, 5, 8), frozenset({3, 8})), terms)
    better = polished(fitter, fit, terms)
    assert better is not fit and not better.plan.guided[[1, 3]].any()
    assert quality(fitter, better, calibration) > quality(fitter, fit, calibration)


def test_samples_that_are_no_numbers_are_left_alone(sets) -> None:
    scale, calibration, _ = sets
    fitter, terms = fitter_of(scale, calibration), Terms(2)
    fit = fitter.fit(Outline((0, 4, 8)), terms)
    broken = replace(fit, samples=np.full_like(fit.samples, np.nan))
    assert polished(fitter, broken, terms) is broken


def test_progress_reaches_its_end(sets) -> None:
    scale, calibration, _ = sets
    fitter, terms, seen = fitter_of(scale, calibration), Terms(1), list[tuple[int, int]]()
    fit = fitter.fit(Outline((0, 4, 8)), terms)
    polish(fitter, fit, terms, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1)) and seen[-1] == (len(seen), len(seen))


def test_the_step_solves_a_linear_problem() -> None:
    """samples(w) = A w: from any start one undamped step reaches the least-squares solution, batch by batch."""
    generator = np.random.default_rng(0)
    a, goal, start = generator.normal(size=(40, 5)), generator.normal(size=40), generator.normal(size=5)
    normal = Normal(np.zeros((5, 5)), np.zeros(5))
    for rows in (slice(0, 15), slice(15, 40)):
        normal.add(a[rows].T, (a @ start - goal)[rows])
    np.testing.assert_allclose(start + normal.step(0.0), np.linalg.lstsq(a, goal, rcond=None)[0], rtol=1e-9)
    assert np.abs(normal.step(10.0)).max() < np.abs(normal.step(1e-6)).max()
