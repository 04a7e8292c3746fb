"""Narrower layers: which units go, what compensation gives back, budgets, and what is said about wrong ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrated
from narrowing import EXACT
from programs import component, context_of, run, samples_of
from pruning import HIDDEN, Block, H, Network, network, program_of, prune
from pydantic import ValidationError
from torch import nn

from stepfold.calibration.read import open_store
from stepfold.ir.analysis.channels import find_channels
from stepfold.ir.cost import program_flops
from stepfold.ir.program import Program
from stepfold.ir.verify import verify
from stepfold.loop.errors import GateError, StepfoldError, UsageError
from stepfold.loop.metrics import drift
from stepfold.passes.cut.cut import Cut, CutOptions
from stepfold.passes.prune.criteria import CRITERIA
from stepfold.passes.prune.options import PruneOptions
from stepfold.passes.prune.prune import Prune
from stepfold.passes.prune.width import with_layers
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize

HELD_OUT = 77
UNIFORM: dict[str, Any] = {"distribute": "uniform"}


def units(program: Program) -> dict[str, int]:
    return {group.name: len(group.units) for group in find_channels(program).groups}


def damage(program: Program) -> float:
    """Drift of samples of a seed that nothing was fitted to."""
    return drift(samples_of(program, count=16, seed=HELD_OUT), samples_of(network(), count=16, seed=HELD_OUT))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_quarter_of_the_channels(statistics: Path, criterion: str) -> None:
    result = prune(network(), statistics, criterion=criterion, **UNIFORM)
    verify(result.program)
    hidden = [group for group in find_channels(result.program).groups if group.kind == "hidden"]
    assert result.changed == len(hidden) == 4 and {len(group.units) for group in hidden} == {HIDDEN * 3 // 4}
    assert {count for name, count in units(result.program).items() if name not in {g.name for g in hidden}} == {H}
    without = prune(network(), statistics, criterion=criterion, compensate="none", **UNIFORM)
    assert damage(result.program) < 0.7 * damage(without.program), "least squares gives back some of it"
    assert result.details["kept"]["blocks.0#2"] == without.details["kept"]["blocks.0#2"] == "24 of 32"


def test_magnitude_without_compensation_needs_no_statistics(tmp_path: Path) -> None:
    prune(network(), tmp_path / "none", criterion="magnitude", compensate="none", **UNIFORM)
    assert not (tmp_path / "none").exists()


def test_the_mean_of_what_is_removed_goes_into_the_bias(statistics: Path) -> None:
    none, mean, squares = (
        damage(prune(network(), statistics, ratio=0.5, compensate=how, **UNIFORM).program)
        for how in ("none", "mean", "least-squares")
    )
    assert squares < mean < none


def test_dead_channels_go_first_and_are_not_missed(statistics: Path) -> None:
    """A quarter of the channels of each block is never read."""
    model = Network()
    for block in model.modules():
        if isinstance(block, Block):
            block.down.weight.data[:, ::4] = 0
    program = program_of(model)
    for criterion in CRITERIA:
        result = prune(program, statistics, criterion=criterion, **UNIFORM)
        assert drift(samples_of(result.program), samples_of(program)) < EXACT


def test_layers_lose_by_sensitivity(statistics: Path) -> None:
    """The block that adds least loses most, and samples drift no more than with the same share for all."""
    result = prune(network(), statistics, ratio=0.25)
    drifts = result.details["drift"]
    assert drifts["by sensitivity"] <= drifts["uniform"]
    kept = {name: count for name, count in units(result.program).items() if name.endswith("#2")}
    assert min(kept, key=kept.__getitem__) == "blocks.1#2" and len(set(kept.values())) > 1
    assert program_flops(result.program) <= program_flops(prune(network(), statistics, **UNIFORM).program)


def test_shares_by_kind(statistics: Path) -> None:
    result = prune(network(), statistics, keep={"heads": 0.5, "feed_forward": 0.75}, **UNIFORM)
    verify(result.program)
    assert set(units(result.program).values()) == {H // 2, HIDDEN * 3 // 4}


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"keep": {}}, {"budget": {"flops": 1.0}}])
def test_nothing_asked_is_nothing_done(tmp_path: Path, options: dict[str, Any]) -> None:
    result = prune(network(), tmp_path, **options)
    assert result.identity and result.program is network()


@pytest.mark.parametrize("what", ["flops", "parameters"])
def test_a_budget_is_met(statistics: Path, what: str) -> None:
    result = prune(network(), statistics, budget={what: 0.8})
    count = program_flops if what == "flops" else Program.parameters
    assert 0.7 * count(network()) < count(result.program) <= 0.8 * count(network())


def test_a_budget_that_no_widths_reach(statistics: Path) -> None:
    with pytest.raises(GateError, match=r"share of flops .*; received 0\.1, and the closest is 0\.\d+") as caught:
        prune(network(), statistics, budget={"flops": 0.1})
    assert caught.value.exit_code == 3 and "lower `floor`" in str(caught.value)
    closest = float(re.search(r"closest is (0\.\d+)", str(caught.value))[1])  # type: ignore[index]
    prune(network(), statistics, budget={"flops": closest + 1e-3})
    with pytest.raises(GateError):
        prune(network(), statistics, budget={"flops": closest - 2e-3})


def test_patterns(statistics: Path) -> None:
    result = prune(network(), statistics, include=["blocks.0*", "blocks.1*"], skip=["blocks.1*"], **UNIFORM)
    assert result.changed == 1 and {r.site for r in result.refused if r.reason == "skipped by the recipe"} >= {
        "blocks.1"
    }
    with pytest.raises(
        UsageError, match=r"option 'skip'.*received 'block\.9', which matches none\. The nearest: blocks"
    ):
        prune(network(), statistics, skip=["block.9"])


def test_a_layer_that_would_be_left_empty(statistics: Path) -> None:
    with pytest.raises(
        UsageError, match=r"received 0\.1 of the 32 channels of blocks\.0#2, which is none in multiples of 8"
    ):
        prune(network(), statistics, ratio=0.9, **UNIFORM)
    with pytest.raises(UsageError, match=r"received 0\.1 of the 4 heads of blocks\.0.*Keep more of it"):
        prune(network(), statistics, keep={"heads": 0.1})


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratios_that_are_none(ratio: float) -> None:
    with pytest.raises(ValidationError, match=r"greater than or equal to 0|less than 1"):
        PruneOptions(ratio=ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ratio": 0.5, "budget": {"flops": 0.7}},
            r"option 'budget': expected one of ratio, keep, budget; received ratio",
        ),
        (
            {"budget": {"flops": 0.7}, "distribute": "uniform"},
            r"option 'distribute': expected sensitivity with a budget",
        ),
        ({"method": "depth", "criterion": "wanda"}, r"option 'criterion': expected none with method depth"),
        ({"method": "depth", "keep": {"heads": 0.5}}, r"option 'keep': expected none with method depth"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PruneOptions.model_validate(options)


@pytest.mark.parametrize("budget", [{}, {"flops": 0.5, "parameters": 0.5}, {"flops": 0.0}, {"flops": 1.2}])
def test_budgets_that_are_none(budget: dict[str, float]) -> None:
    with pytest.raises(
        ValidationError, match=r"expected one of flops and parameters|greater than 0|less than or equal to 1"
    ):
        PruneOptions.model_validate({"budget": budget})


def test_the_store_of_a_user(tmp_path: Path) -> None:
    """It is used, and it is stale after a pass that changed what layers read."""
    calibrated(network(), tmp_path / "store", samples=8)
    store = open_store(tmp_path / "store", network())
    context = context_of(network(), tmp_path / "unused", calibration=store)
    result = prune(network(), tmp_path, context, **UNIFORM)
    assert result.changed == 4 and not (tmp_path / "unused").exists()
    once = run(network(), Prune(PruneOptions(multiple=8, criterion="magnitude", compensate="none")), cache=tmp_path)
    with pytest.raises(UsageError, match=r"received a stale one: passes: .* here.*Calibrate into another folder"):
        prune(once, tmp_path, context_of(once, tmp_path, calibration=store))


def test_a_second_prune_prunes_again(statistics: Path) -> None:
    operation = Prune(PruneOptions(multiple=8, distribute="uniform"))
    first, second = run(network(), operation, operation, cache=statistics).records
    assert (first.outcome, second.outcome) == ("changed", "changed") and second.flops_after < first.flops_after


class Mixing(nn.Module):
    """Hidden channels that an operator mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)).cumsum(-1)) + (t * c)[:, None, None]


def test_groups_that_cannot_be_proven(tmp_path: Path) -> None:
    with pytest.raises(StepfoldError, match=r"changed nothing \(up: at cumsum: channels cannot be followed"):
        run(program_of(Mixing()), Prune(PruneOptions()), cache=tmp_path)


def test_prune_comes_before_cut_and_quantize(tmp_path: Path) -> None:
    operation = Prune(PruneOptions())
    pieces = Cut(CutOptions()).run(network(), context_of(network(), tmp_path)).program
    codes = Quantize(QuantizeOptions(min_tokens=1)).run(network(), context_of(network(), tmp_path)).program
    for program in (pieces, codes):
        with pytest.raises(UsageError, match="Put prune before cut and quantize"):
            operation.requires(program)
    assert operation.not_applicable(component(nn.Linear(3, 3), torch.randn(2, 3))) == "the program has no loop"


def test_weights_of_the_program_are_left_alone(statistics: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network().step.tensors().items()}
    prune(network(), statistics, **UNIFORM)
    assert all(torch.equal(before[name], tensor) for name, tensor in network().step.tensors().items())
    assert with_layers(network(), {}) is network()
