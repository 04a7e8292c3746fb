"""The pass `quantize` on its own, and its sites in the tiny DiT."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from programs import calls, context_of, operators
from torch import fx

from stepfold.ir.names import module_path
from stepfold.ir.program import Program, Stage
from stepfold.passes.base import Context, PassResult
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize

BLOCK = "transformer_blocks.0"
SITES = [
    f"{BLOCK}.{name}"
    for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
]
QLINEAR = torch.ops.stepfold.qlinear.default


def quantize(program: Program, context: Context | None = None, **options: Any) -> PassResult:
    """Run it with options as a recipe has them; without a context, there is no store and no engine."""
    operation = Quantize(QuantizeOptions.model_validate(options))
    return operation.run(program, context or context_of(program, Path("unused")))


def sites(stage: Stage) -> dict[str, fx.Node]:
    """Quantized layers by module path."""
    return {module_path(node): node for node in calls(stage) if node.target is QLINEAR}


def counted(stage: Stage) -> Counter[str]:
    """How often a stage has each operator of ours, and linear layers."""
    return Counter(name for name in operators(stage) if name.startswith(("stepfold", "linear")))
