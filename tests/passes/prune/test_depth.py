"""Fewer blocks: what is left computes what a network without them does, and the best of them are chosen."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from narrowing import EXACT
from programs import context_of, samples_of
from pruning import D, Network, network, program_of, prune
from torch import nn

from stepfold.ir.analysis.sites.block import find_blocks
from stepfold.ir.cost import program_flops
from stepfold.ir.program import Program, Refusal
from stepfold.ir.remove import remove_blocks
from stepfold.ir.verify import verify
from stepfold.loop.errors import GateError, UsageError
from stepfold.loop.metrics import drift
from stepfold.passes.prune import depth
from stepfold.passes.quantize.sensitivity import SampleDrift

BLOCKS = [f"blocks.{i}" for i in range(4)]


def removed(program: Program, *names: str) -> Program:
    sites = [site for site in find_blocks(program.step.graph.graph).sites if site.name in names]
    made = remove_blocks(program, [site.nodes for site in sites])
    assert isinstance(made, Program)
    return made


@pytest.mark.parametrize("gone", [(1,), (0,), (3,), (1, 2), (0, 1, 3)])
def test_what_is_left_is_the_network_without_the_blocks(gone: tuple[int, ...]) -> None:
    model = Network()
    model.blocks = nn.ModuleList(block for i, block in enumerate(model.blocks) if i not in gone)
    made = removed(network(), *(f"blocks.{i}" for i in gone))
    verify(made)
    assert drift(samples_of(made), samples_of(program_of(model))) < EXACT
    assert [site.name for site in find_blocks(made.step.graph.graph).sites] == [
        name for i, name in enumerate(BLOCKS) if i not in gone
    ] or len(gone) == 3, "a single block is no list of blocks"


def test_modulations_of_removed_blocks_are_not_computed() -> None:
    made, whole = removed(network(), "blocks.1", "blocks.2"), network()
    assert len(made.steps[0].inputs) == len(whole.steps[0].inputs) - 2
    assert sum(len(stage.outputs) for stage in made.stages) == sum(len(stage.outputs) for stage in whole.stages) - 2
    assert not [name for stage in made.stages for name in stage.tensors() if "blocks.1" in name or "blocks.2" in name]


class Growing(nn.Module):
    """The second block returns another shape than it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Wider(D), Wider(2 * D)])
        self.last = nn.Linear(4 * D, D)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x) + (t * c)[:, None, None]


class Wider(nn.Module):
    """[..., M] -> [..., 2 M]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.layer(x))


def test_a_block_that_adds_nothing_to_what_it_reads_is_refused(tmp_path: Path) -> None:
    program = program_of(Growing())
    block = find_blocks(program.step.graph.graph).sites[1]
    made = remove_blocks(program, [block.nodes])
    assert isinstance(made, Refusal) and "no sum of what it reads" in made.reason
    result = prune(program, tmp_path, method="depth", ratio=0.5)
    assert result.changed == 0 and [refusal.site for refusal in result.refused] == ["blocks.0", "blocks.1"]


def drifts(count: int, tmp_path: Path) -> dict[tuple[str, ...], float]:
    measured = SampleDrift(network(), context_of(network(), tmp_path))
    return {names: measured.of(removed(network(), *names)) for names in combinations(BLOCKS, count)}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_selection_is_that_of_brute_force(tmp_path: Path, count: int) -> None:
    result = prune(network(), tmp_path, method="depth", ratio=count / 4)
    every = drifts(count, tmp_path)
    assert tuple(result.details["removed"]) == min(every, key=every.__getitem__) and result.changed == count
    assert "blocks.1" in result.details["removed"], "the block that adds least goes first"


def test_swaps_from_the_knapsack_find_what_is_never_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all selections are tried, the knapsack's is where the search begins."""
    monkeypatch.setattr(depth, "TRIED", 4)
    result = prune(network(), tmp_path, method="depth", ratio=0.5)
    every = drifts(2, tmp_path)
    assert result.details["drift"] == pytest.approx(every[tuple(result.details["removed"])])
    assert result.details["drift"] <= result.details["drift of the knapsack"]
    random = np.random.default_rng(0).choice(list(every.values()), 4)
    assert result.details["drift"] <= random.min()


def test_the_knapsack_is_exact() -> None:
    """Against all subsets of eight blocks, for a cost and a damage each."""
    random = np.random.default_rng(0)
    site = find_blocks(network().step.graph.graph).sites[0]
    units = {f"b{i}": depth.Unit(site, int(random.integers(1, 40)), float(random.exponential())) for i in range(8)}
    for limit in (20, 60, 100):
        chosen = depth.affordable(units, limit)
        allowed = [
            names
            for count in range(9)
            for names in combinations(units, count)
            if sum(unit.cost for name, unit in units.items() if name not in names) <= limit
        ]
        least = min(sum(units[name].damage for name in names) for names in allowed)
        assert chosen in allowed and sum(units[name].damage for name in chosen) == pytest.approx(least)


def test_a_budget_is_met(tmp_path: Path) -> None:
    result = prune(network(), tmp_path, method="depth", budget={"flops": 0.6})
    assert program_flops(result.program) <= 0.6 * program_flops(network()) and result.changed == 2


def test_a_budget_that_no_blocks_reach(tmp_path: Path) -> None:
    with pytest.raises(
        GateError, match=r"share of FLOPs .*received 0\.1, and the closest is 0\.\d+\. Raise it"
    ) as caught:
        prune(network(), tmp_path, method="depth", budget={"flops": 0.1})
    assert caught.value.exit_code == 3


def test_a_ratio_that_leaves_no_block(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"option 'ratio': expected a block left of 4, of which 4 can be removed; received 0\.95, which are 4\. Lower it",
    ):
        prune(network(), tmp_path, method="depth", ratio=0.95)


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_no_block_asked_is_none_removed(tmp_path: Path, ratio: float) -> None:
    result = prune(network(), tmp_path, method="depth", ratio=ratio)
    assert result.identity and result.program is network()
