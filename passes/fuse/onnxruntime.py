"""Fuse: the rules that pay on ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from ...ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ...ir.edit import copy_graph, finish
from ...ir.program import Program, Refusal
from ..base import Context, Options, Pass, PassResult
from .attention import FuseAttention
from .gelu import FuseGelu
from .modulate import FuseModulatedNorm
from .rms_norm import FuseRMSNorm
from .rotary import FuseRotary
from .rules import Rule, apply_rule

RULES: tuple[Rule[Any], ...] = (FuseRMSNorm(), FuseRotary(), FuseAttention(), FuseGelu(), FuseModulatedNorm())
FUSED = (
    torch.ops.aten.rms_norm.default,
    torch.ops.stepfold.attention.default,
    torch.ops.stepfold.fast_gelu.default,
    torch.ops.stepfold.modulated_norm.default,
    torch.ops.stepfold.rotary.default,
)
FUSIBLE = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.gelu.default,
    torch.ops.aten.layer_norm.default,
)


class FuseOptions(Options):
    """Options of `fuse`.

    Attributes:
        rules: names of the rules to apply; all by default.
    """

    rules: tuple[Literal["rms_norm", "rotary", "attention", "gelu", "modulate"], ...] = (
        "rms_norm",
        "rotary",
        "attention",
        "gelu",
        "modulate",
    )


class FuseOnnxRuntime(Pass[FuseOptions]):
    """Put operators together into the ones that are fast on ONNX Runtime.

    Norms by the root of the mean square and rotary embeddings become one operator each; attention takes its head split
    and merge along; the tanh form of GELU becomes the contrib kernel; a norm takes the scale and shift of each sample
    along.
    """

    name = "fuse"
    family = "fuse"
    source = "ONNX Runtime contrib operators; figures in docs/performance.md"
    exact = True
    options_type = FuseOptions

    def not_applicable(self, program: Program) -> str | None:
        """Whether the program has anything the rules act on."""
        targets = {node.target for stage in program.stages for node in stage.graph.graph.nodes}
        return (
            None if targets.intersection((*FUSIBLE, *FUSED)) else "the program has neither attention nor GELU nor norm"
        )

    def run(self, program: Program, context: Context) -> PassResult:
        """Apply every chosen rule to every stage."""
        changed, refused, counts = 0, list[Refusal](), dict[str, int]()
        stages = []
        for stage in program.stages:
            graph, found = copy_graph(stage), 0
            for rule in RULES:
                if rule.name in self.options.rules:
                    count, missed = apply_rule(graph, rule)
                    found += count
                    counts[rule.name] = counts.get(rule.name, 0) + count
                    refused += missed
            changed += found
            stages.append(finish(stage, graph) if found else stage)
        fused = any(node.target in FUSED for stage in program.stages for node in stage.graph.graph.nodes)
        result = replace(program, stages=tuple(stages))
        identity = not changed and (fused or not self.options.rules)
        return PassResult(result, changed, tuple(refused), identity=identity, details={"rules": counts})
