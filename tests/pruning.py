"""A small transformer of four blocks to prune: what each of them adds is scaled differently."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from hoisting import hoist
from programs import context_of, denoiser
from torch import nn

from stepfold.ir.program import Program
from stepfold.passes.base import Context, PassResult
from stepfold.passes.prune.options import PruneOptions
from stepfold.passes.prune.prune import Prune

F = nn.functional
D, HIDDEN, H, T = 8, 32, 4, 5
WEIGHTS = (1.0, 0.05, 0.4, 0.8)
"""How much each block adds."""


class Block(nn.Module):
    """x + gate(t, c) down(gelu(up(norm(x)))) after x + out(attention(norm(x)))."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight, self.norm = weight, nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down, self.gate = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D), nn.Linear(D, D)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x [B, T, D], condition [B, D] -> [B, T, D]."""
        q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.weight * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.weight * self.gate(condition)[:, None] * self.down(F.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    """First and last layer around blocks; each block is modulated by timestep and class."""

    def __init__(self, weights: tuple[float, ...] = WEIGHTS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.time, self.classes = (
            nn.Linear(D, D),
            nn.Linear(D, D),
            nn.Linear(1, D),
            nn.Embedding(4, D),
        )
        self.blocks = nn.ModuleList(Block(weight) for weight in weights)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x [B, T, D], t [B], c [B] -> [B, T, D]."""
        condition = torch.sin(self.time(t[:, None] / 1000)) + self.classes(c)
        h = self.first(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.last(h)


def program_of(model: nn.Module) -> Program:
    """The program of a model that is called as `Network` is."""
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(1))
    return denoiser(model, x, torch.full((2,), 500.0), torch.arange(2))


@cache
def network() -> Program:
    """The hoisted program of `Network`, captured once; passes leave it as it is."""
    return hoist(program_of(Network())).program


def prune(program: Program, cache: Path, context: Context | None = None, **options: Any) -> PassResult:
    """Run the pass with options as a recipe has them."""
    operation = Prune(PruneOptions.model_validate({"multiple": 8, **options} if _of_width(options) else options))
    return operation.run(program, context or context_of(program, cache))


def _of_width(options: dict[str, Any]) -> bool:
    return options.get("method", "width") == "width"
