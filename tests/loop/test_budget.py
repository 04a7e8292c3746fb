"""Quality budgets of a mean and a tail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from stepfold.loop.budget import PsnrFigures, QualityBudget
from stepfold.loop.metrics import lower_bound
from stepfold.loop.options import Options, option_problem


class Asked(Options):
    """Options with a budget.

    Attributes:
        min_psnr: the budget.
    """

    min_psnr: QualityBudget | None = None


def test_figures_by_hand() -> None:
    """Of 21 samples the 5th percentile is the second worst: 0.05 * 20 = 1."""
    values = np.array([20.0, 30.0, *[40.0] * 19])
    found = PsnrFigures.of(values)
    assert (found.p05, found.min) == (30.0, 20.0)
    assert found.mean == pytest.approx(810 / 21) and found.low == lower_bound(values)


@pytest.mark.parametrize(
    ("written", "mean", "p05"),
    [(40, 40.0, None), (0.0, 0.0, None), ({"mean": 40}, 40.0, None), ({"mean": 40, "p05": 34.5}, 40.0, 34.5)],
)
def test_what_a_recipe_says(written: Any, mean: float, p05: float | None) -> None:
    budget = Asked.model_validate({"min_psnr": written}).min_psnr
    assert budget == QualityBudget(mean=mean, p05=p05)
    assert Asked.model_validate({"min_psnr": budget}).min_psnr == budget


@pytest.mark.parametrize("written", [40.0, {"mean": 40.0, "p05": 34.0}])
def test_a_budget_is_recorded_as_it_is_written(written: Any) -> None:
    assert Asked.model_validate({"min_psnr": written}).model_dump(mode="json") == {"min_psnr": written}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"mean": 40, "p50": 34}, "a mean with a tail, as in {mean: 40, p05: 34}; received {'mean': 40, 'p50': 34}."),
        ({"p05": 34}, "expected a number of decibels, 0 or more, or a mean with a tail"),
        (True, "received True."),
        ("much", "received 'much'."),
        (-1, "expected greater than or equal to 0; received -1."),
        ({"mean": 40, "p05": -2}, "expected greater than or equal to 0; received -2."),
        (float("nan"), "expected a finite number; received nan."),
    ],
)
def test_what_no_budget_is(written: Any, expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Asked.model_validate({"min_psnr": written})
    problem = option_problem(Asked, "pass", caught.value)
    assert problem.startswith("option 'min_psnr': ") and expected in problem


FIGURES = PsnrFigures(mean=42.0, low=40.0, p05=34.0, min=20.0)


@pytest.mark.parametrize(
    ("mean", "p05", "shortfall"),
    [
        (40.0, None, 0.0),
        (40.5, None, 0.5),
        (40.0, 34.0, 0.0),
        (39.0, 36.0, 2.0),
        (43.0, 35.0, 3.0),
        (30.0, 20.0, -10.0),
    ],
)
def test_a_budget_is_met_by_the_lower_bound_and_the_tail(mean: float, p05: float | None, shortfall: float) -> None:
    budget = QualityBudget(mean=mean, p05=p05)
    assert budget.shortfall(FIGURES) == shortfall
    assert budget.met_by(FIGURES) == (shortfall <= 0)


def test_which_bound_is_missed_is_told() -> None:
    assert QualityBudget(mean=41).reached(FIGURES, " over 64 samples") == (
        "40.00 dB (lower 95 % bound of the mean over 64 samples)"
    )
    assert QualityBudget(mean=40, p05=35).reached(FIGURES) == (
        "40.00 dB (lower 95 % bound of the mean; met) and 34.00 dB at the 5th percentile (missed)"
    )
    assert "mean; missed) and 34.00 dB at the 5th percentile (met)" in QualityBudget(mean=41, p05=34).reached(FIGURES)
    assert str(QualityBudget(mean=40)) == "40 dB"
    assert str(QualityBudget(mean=40, p05=34.5)) == "40 dB and 34.5 dB at the 5th percentile"
