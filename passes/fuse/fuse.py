"""Fuse: the rules that pay on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import fx

from ...ir import operators  # noqa: F401  (registers the stepfold:: operators)
from ...ir.edit import copy_graph, drop_dead_code, finish
from ...ir.names import module_path
from ...ir.program import Program, Refusal
from ...ir.rewriting import Rewrite
from ..base import Context, Options, Pass, PassResult, Phase
from ..marks import made, mark
from .attention import FuseAttention
from .rms_norm import FuseRMSNorm
from .rotary import FuseRotary

RULES: tuple[Rewrite[Any], ...] = (FuseRMSNorm(), FuseRotary(), FuseAttention())
FUSED = {
    "rms_norm": torch.ops.aten.rms_norm.default,
    "attention": torch.ops.stepfold.attention.default,
    "rotary": torch.ops.stepfold.rotary.default,
}
"""The operator that each rule makes."""


class FuseOptions(Options):
    """Options of `fuse`.

    Attributes:
        rules: names of the rules to apply; all by default.
    """

    rules: tuple[Literal["rms_norm", "rotary", "attention"], ...] = ("rms_norm", "rotary", "attention")


class Fuse(Pass[FuseOptions]):
    """Put operators together into the ones that are fast on ONNX Runtime.

    Norms by the root of the mean square and rotary embeddings become one operator each; attention takes its head split
    and merge along.
    """

    name = "fuse"
    family = "fuse"
    phase = Phase.FUSE
    source = "ONNX Runtime contrib operators; figures in docs/performance.md"
    exact = True
    options_type = FuseOptions

    def not_applicable(self, program: Program) -> str | None:
        """Whether any rule begins to match, or its operator is there already."""
        begun = any(
            any(node.target in FUSED.values() for node in stage.graph.graph.nodes)
            or any(rule.begins(stage.graph) for rule in RULES)
            for stage in program.stages
        )
        return None if begun else "the program has neither attention nor rotary embeddings nor norms to put together"

    def run(self, program: Program, context: Context) -> PassResult:
        """Apply every chosen rule to every stage."""
        changed, refused, counts = 0, list[Refusal](), dict[str, int]()
        stages = []
        for stage in program.stages:
            graph, found = copy_graph(stage), 0
            for rule in RULES:
                if rule.name in self.options.rules:
                    count, missed = _apply(rule, graph)
                    found += count
                    counts[rule.name] = counts.get(rule.name, 0) + count
                    refused += missed
            changed += found
            stages.append(finish(stage, graph) if found else stage)
        identity = not changed and (not self.options.rules or self._nothing_left(program, refused))
        return PassResult(
            program.with_stages(stages), changed, tuple(refused), identity=identity, details={"rules": counts}
        )

    def _nothing_left(self, program: Program, refused: Sequence[Refusal]) -> bool:
        """Whether all that the chosen rules look for has its final form: they made it, or the capture has it so.

        What a rule refused beside what it made was refused when it made that, and is in the record of that run.
        """
        nodes = [node for stage in program.stages for node in stage.graph.graph.nodes]
        if any(made(node, "fuse") in self.options.rules for node in nodes):
            return True
        return not refused and any(node.target is FUSED[rule] for node in nodes for rule in self.options.rules)


def _apply(rule: Rewrite[Any], graph: fx.GraphModule) -> tuple[int, list[Refusal]]:
    """Apply a rule in place, mark what it made, and say what it refused."""
    applied = rule.apply(graph)
    for node in applied.made:
        mark(node, "fuse", rule.name)
    drop_dead_code(graph.graph)  # it would count as a reader for the rules that follow
    return len(applied.made), [
        Refusal(f"{rule.name}: {module_path(missed.at or node)}", missed.reason) for node, missed in applied.refused
    ]
