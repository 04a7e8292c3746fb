"""How much of its probability each block of queries gives to each block of keys, along the real loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ...calibration.stage_inputs import Inputs, step_inputs
from ...ir.analysis.geometry import SDPA
from ...ir.edit import module_of
from ...ir.program import Program, Stage
from ...loop.noise import SampleSet
from ..base import Context
from .tiles import Tiles

SAMPLES, CALLS = 4, 8
"""Calibration samples, and calls of the loop, spread over it, at which they are looked at."""

QUERIES = 8
"""Queries of each block that are looked at; neighbours attend alike."""

Cut = Mapping[fx.Node, tuple[Tiles, int]]


def block_masses(program: Program, cut: Cut, context: Context) -> dict[fx.Node, torch.Tensor]:
    """[H, n, n] for each attention: the mean probability that block i of the image gives to block j.

    Args:
        program: program with dense attention.
        cut: tiles of each attention, and the place of its first image token.
        context: context of the pass, for the seed and progress.
    """
    samples = SampleSet("calibration", context.seed, SAMPLES)
    watch = _Watch(cut)
    for inputs in step_inputs(program, samples, CALLS, context.progress):
        for stage in program.steps:
            watch.run(stage, inputs)
    return {node: total / watch.calls[node] for node, total in watch.totals.items()}


class _Watch:
    """Sums of the masses of attentions that were computed."""

    def __init__(self, cut: Cut):
        self._cut = cut
        self.totals: dict[fx.Node, torch.Tensor] = {}
        self.calls: dict[fx.Node, int] = {}

    def run(self, stage: Stage, inputs: Inputs) -> None:
        """Compute a stage, and add the masses of its attentions."""
        with torch.no_grad():
            _Interpreter(stage, self).run(*(torch.from_numpy(inputs[port.name]) for port in stage.inputs))

    def add(self, node: fx.Node, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Add the masses of one attention [B, H, T, K], whose mask of keys is [B, 1, 1 or T, T]."""
        tiles, start = self._cut[node]
        scale = node.kwargs.get("scale") or query.shape[-1] ** -0.5
        assert isinstance(scale, float)
        mass = _masses(query * scale, key, mask, tiles, start)
        self.totals[node] = self.totals.get(node, torch.zeros(())) + mass
        self.calls[node] = self.calls.get(node, 0) + 1


class _Interpreter(fx.Interpreter):
    def __init__(self, stage: Stage, watch: _Watch):
        super().__init__(module_of(next(iter(stage.graph.graph.nodes))), graph=stage.graph.graph)
        self._watch, self._cut = watch, watch._cut

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and look at it where it is an attention."""
        if n.target is SDPA and n in self._cut:
            query, key = (self.env[argument] for argument in n.args[:2])  # type: ignore[index]
            mask = n.args[3] if len(n.args) > 3 else n.kwargs.get("attn_mask")
            self._watch.add(n, query, key, None if mask is None else self.env[mask])  # type: ignore[index]
        return super().run_node(n)


def _masses(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, tiles: Tiles, start: int
) -> torch.Tensor:
    """[H, n, n]: means over the batch and a few queries of each block."""
    order, n = tiles.order(), tiles.number
    step = max(1, tiles.block // QUERIES)
    asking = order.reshape(n, tiles.block)[:, ::step] + start  # [n, queries]
    logits = query[:, :, asking.reshape(-1)] @ key.transpose(-1, -2)
    if mask is not None:
        keys = mask[:, :, :1]
        logits = logits.masked_fill(~keys, float("-inf")) if keys.dtype is torch.bool else logits + keys
    probabilities = logits.softmax(dim=-1)[..., order + start]  # of the image, tile after tile
    return probabilities.unflatten(-1, (n, tiles.block)).sum(-1).unflatten(2, (n, -1)).mean(dim=(0, 3))
