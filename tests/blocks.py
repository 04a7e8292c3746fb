"""One transformer block as a program, its linear layers in 8 bits, and where its integers run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import component

from stepfold.ir.program import Program, Stage
from stepfold.passes.base import Context
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize

CPU = Path("/proc/cpuinfo")
TOKENS = 9

needs_vnni = pytest.mark.skipif(
    not CPU.is_file() or "vnni" not in CPU.read_text(), reason="this processor has no VNNI, which token groups need"
)


class Block(torch.nn.Module):
    """One transformer block, x [B, T, D] -> [B, T, D]: layers that share their input, attention, a feed-forward."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.query, self.key, self.value, self.merge = (torch.nn.Linear(width, width) for _ in range(4))
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width, bias=False)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]."""
        y = self.norm(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        merged = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.merge(merged)
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))


@cache
def block(width: int = 32) -> Program:
    """The program of one block, captured once a process."""
    return component(Block(width), torch.randn(2, TOKENS, width, generator=torch.Generator().manual_seed(1)))


def tokens(batch: int, width: int = 32, seed: int = 2) -> np.ndarray:
    """x [B, T, D] float32."""
    return np.random.default_rng(seed).standard_normal((batch, TOKENS, width)).astype(np.float32)


def quantized(program: Program, activations: str, kept: Path) -> Stage:
    """The stage that computes the output, with its linear layers in 8 bits."""
    context = Context(program, Program.bind, program.bind, "openvino", 0, kept, fitted_on="reference")
    options = QuantizeOptions.model_validate({"activations": activations})
    return Quantize(options).run(program, context).program.step
