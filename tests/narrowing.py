"""Masked programs: what a narrowed one has to compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from stepfold.ir.analysis.channels import Channels
from stepfold.ir.edit import copy_graph, finish, set_weight
from stepfold.ir.program import Program, attribute

EXACT = 1e-5
"""Relative L2 on the probe, the tolerance of float32."""


def some(channels: Channels, share: float = 0.6) -> dict[str, list[int]]:
    """A seeded choice of the units of every group, at least one of each."""
    generator = torch.Generator().manual_seed(0)
    return {
        group.name: sorted(
            torch.randperm(len(group.units), generator=generator)[: max(1, int(share * len(group.units)))].tolist()
        )
        for group in channels.groups
    }


def masked(program: Program, channels: Channels, keep: Mapping[str, Sequence[int]]) -> Program:
    """The whole program with zeros in the columns that read the removed units."""
    for stage in program.stages:
        graph = copy_graph(stage)
        for name, kept in keep.items():
            group = channels.named(name)
            for place in group.places:
                if place.stage == stage.name and place.axis == 1:
                    numbers = group.positions(place)
                    gone = (numbers >= 0) & ~torch.isin(numbers, torch.tensor(list(kept)))
                    weight = attribute(graph, place.target).detach().clone()
                    weight[:, gone] = 0
                    set_weight(graph, place.target, weight)
        program = program.with_stage(finish(stage, graph))
    return program
