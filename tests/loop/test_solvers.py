"""The two-step Adams-Bashforth method on Euler grids, uneven ones included, and the calls of TaylorSeer Lite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.hooks import TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin

from stepfold.loop.errors import UsageError
from stepfold.loop.plan import fold
from stepfold.loop.recurrence import Recurrence
from stepfold.loop.solvers import adams_bashforth2, taylorseer_lite


def euler(grid: np.ndarray) -> Recurrence:
    """Euler from grid[0] to grid[-1]; the denoiser is called at all but the last."""
    S = len(grid) - 1
    return Recurrence(grid[:-1], np.ones(S), np.ones(S), np.diag(np.diff(grid)), 1.0)


def integrate(recurrence: Recurrence, slope, start: float) -> list[float]:
    x, outputs, states = start, [], [start]
    for i in range(recurrence.calls):
        outputs.append(slope(recurrence.timesteps[i], x))
        x = recurrence.state[i] * x + recurrence.outputs[i, : i + 1] @ outputs
        states.append(x)
    return states


def test_even_grid_has_the_textbook_coefficients() -> None:
    outputs = adams_bashforth2(euler(np.linspace(1.0, 0.0, 5))).outputs
    h = -0.25
    expected = h * np.array([[1, 0, 0, 0], [-0.5, 1.5, 0, 0], [0, -0.5, 1.5, 0], [0, 0, -0.5, 1.5]])
    np.testing.assert_allclose(outputs, expected, atol=1e-15)


def test_uneven_grid_integrates_a_linear_slope_exactly_after_the_first_step() -> None:
    grid = np.array([1.0, 0.83, 0.55, 0.5, 0.21, 0.0])
    states = integrate(adams_bashforth2(euler(grid)), lambda s, x: 3.0 * s - 1.0, start=0.4)
    primitive = 1.5 * grid**2 - grid
    np.testing.assert_allclose(np.diff(states)[1:], np.diff(primitive)[1:], atol=1e-14)
    assert math.isclose(states[1] - states[0], (grid[1] - grid[0]) * 2.0)  # Euler's: slope 3 - 1 at s = 1


def test_second_order_convergence() -> None:
    def error(steps: int) -> float:
        grid = np.linspace(1.0, 0.0, steps + 1) ** 1.3
        return abs(integrate(adams_bashforth2(euler(grid)), lambda s, x: -x, 1.0)[-1] - math.e)

    assert 3.5 < error(40) / error(80) < 4.5  # first order gives 2


def test_everything_but_the_weights_is_kept() -> None:
    base = euler(np.linspace(1.0, 0.0, 4))
    result = adams_bashforth2(base)
    assert result.timesteps is base.timesteps and result.input_scale is base.input_scale
    assert result.initial_scale == base.initial_scale and result.depth == 2


def test_one_step_is_euler() -> None:
    np.testing.assert_array_equal(adams_bashforth2(euler(np.array([1.0, 0.0]))).outputs, [[-1.0]])


@pytest.mark.parametrize(
    ("state", "outputs"),
    [
        (np.array([0.9, 1.0]), np.diag([-0.5, -0.5])),
        (np.ones(2), np.array([[-0.5, 0.0], [0.1, -0.5]])),
        (np.ones(2), np.diag([-0.5, 0.0])),
    ],
)
def test_other_samplers_are_refused(state: np.ndarray, outputs: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"'ab2' replaces an Euler step .* Name a diffusers scheduler instead"):
        adams_bashforth2(Recurrence(np.arange(2.0), np.ones(2), state, outputs, 1.0))


# -- TaylorSeer Lite


class Doubles(torch.nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[int] = []
        self.call = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.computed.append(self.call)
        return 2 * x


class Network(torch.nn.Module, CacheMixin):
    """A network of diffusers, whose caches act on its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out = Doubles()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj_out(x)


@pytest.mark.parametrize("calls", [12, 28, 50])
def test_calls_and_forecasts_are_those_of_diffusers(calls: int) -> None:
    """With the settings of OpenVINO GenAI."""
    network = Network()
    numbers = {"cache_interval": 3, "disable_cache_before_step": 6, "disable_cache_after_step": calls - 2}
    network.enable_cache(TaylorSeerCacheConfig(**numbers, taylor_factors_dtype=torch.float32, use_lite_mode=True))
    values = np.random.default_rng(0).standard_normal(calls).astype(np.float32)
    outputs = []
    with network.cache_context("loop"):
        for network.proj_out.call, value in enumerate(values):
            outputs.append(float(network(torch.full((1,), float(value)))))
    positions = taylorseer_lite(calls)
    assert network.proj_out.computed == positions
    sampler = euler(np.linspace(1.0, 0.0, calls + 1))
    plan = fold(sampler, None, positions, order=1)
    wanted, made = 0.0, 0.0
    for h, output in zip(np.diag(sampler.outputs), outputs, strict=True):
        wanted += h * output
    for k in range(plan.evaluations):
        made += plan.conditional[k, : k + 1] @ (2 * values[positions[: k + 1]])
    assert made == pytest.approx(wanted, abs=1e-5)


def test_a_number_of_evaluations_is_an_interval() -> None:
    assert len(taylorseer_lite(50)) == 22 and taylorseer_lite(50, 22) == taylorseer_lite(50)
    assert len(taylorseer_lite(50, 17)) == 17
    with pytest.raises(UsageError, match=r"taylorseer_lite evaluates .*22.* of 50 calls, by its interval; received 21"):
        taylorseer_lite(50, 21)
