"""Prune: fewer channels, heads and blocks, as an ordinary smaller network."""

from __future__ import annotations

from ...ir.program import Program
from ...loop.errors import UsageError
from ..base import Context, Pass, PassResult, Phase
from .depth import prune_depth
from .options import PruneOptions
from .width import prune_width

METHODS = {"width": prune_width, "depth": prune_depth}
"""By the name that recipes use."""


class Prune(Pass[PruneOptions]):
    """Remove the channels, heads or blocks that matter least, without training.

    What is left is a smaller network of the same operators, which every engine runs faster. Layers that read less than
    before are fitted to give back what they lost.
    """

    name = "prune"
    family = "prune"
    phase = Phase.PRUNE
    source = "docs/passes/prune.md names the source of each method and criterion"
    idempotent = False
    options_type = PruneOptions

    def not_applicable(self, program: Program) -> str | None:
        """Scores are those of the loop."""
        return None if program.loop is not None else "the program has no loop"

    def requires(self, program: Program) -> None:
        """Channels are followed through one float network.

        Raises:
            UsageError: an earlier pass has cut or quantized the network.
        """
        nodes = [node for stage in program.stages for node in stage.graph.graph.nodes]
        if len(program.steps) > 1 or any(str(node.target).startswith("stepfold") for node in nodes):
            raise UsageError(
                "prune: expected one float stage that computes every evaluation; received a program that was cut or "
                "quantized before. Put prune before cut and quantize in the recipe."
            )

    def run(self, program: Program, context: Context) -> PassResult:
        """Prune by the chosen method."""
        return METHODS[self.options.method](program, self.options, context)
