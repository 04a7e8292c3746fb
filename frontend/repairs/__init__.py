"""Small exact graph rewrites that mend what `torch.export` accepts and engines refuse."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ...ir.rewriting import Rewrite
from ...ir.shapes import propagate
from ...loop.ports import Port
from .boolean import BooleanMaskedFill, BooleanWhere
from .complex_rotary import complex_to_real
from .constants import fold_constants, share_equal_weights
from .masks import ExpandedMask
from .no_ops import NoOp
from .reshape import ViewToReshape
from .shapes_only import FilledLike, GivenLike
from .squeeze import NoOpSqueeze
from .writes import FunctionalCopy, InterleavedWrite

logger = logging.getLogger(__name__)

Repair = Callable[[fx.GraphModule], int]


def _rewriting(rewrite: Rewrite[Any]) -> tuple[str, Repair]:
    return rewrite.name, lambda graph: len(rewrite.apply(graph).made)


REPAIRS: tuple[tuple[str, Repair], ...] = (
    _rewriting(ViewToReshape()),
    _rewriting(NoOp()),
    _rewriting(FilledLike()),
    _rewriting(GivenLike()),
    _rewriting(FunctionalCopy()),
    _rewriting(InterleavedWrite()),
    _rewriting(NoOpSqueeze()),
    ("constants", fold_constants),
    ("equal-weights", share_equal_weights),
    ("complex", complex_to_real),
    _rewriting(BooleanMaskedFill()),
    _rewriting(BooleanWhere()),
    _rewriting(ExpandedMask()),
)
"""Every repair by name, in the order of application: folding leaves the complex rewrite only what depends on inputs."""


def repair(graph: fx.GraphModule, inputs: Sequence[Port]) -> dict[str, int]:
    """Apply every repair in place; returns how many nodes each one rewrote.

    Outputs stay equal: bit for bit, except for the sign of a zero and the rounding of complex products.
    """
    counts = {name: apply(graph) for name, apply in REPAIRS}
    if any(counts.values()):
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.delete_all_unused_submodules()
        graph.recompile()
        propagate(graph, inputs)
    logger.info("repairs: %s", {name: count for name, count in counts.items() if count})
    return counts
