"""Small exact graph rewrites that mend what `torch.export` accepts and engines refuse."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import fx

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

REPAIRS: tuple[tuple[str, Repair], ...] = (
    ("view-to-reshape", ViewToReshape().apply),
    ("no-op", NoOp().apply),
    ("filled-like", FilledLike().apply),
    ("given-like", GivenLike().apply),
    ("copy", FunctionalCopy().apply),
    ("interleaved-write", InterleavedWrite().apply),
    ("no-op-squeeze", NoOpSqueeze().apply),
    ("constants", fold_constants),
    ("equal-weights", share_equal_weights),
    ("complex", complex_to_real),
    ("boolean-masked-fill", BooleanMaskedFill().apply),
    ("boolean-where", BooleanWhere().apply),
    ("mask", ExpandedMask().apply),
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
