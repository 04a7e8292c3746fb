"""Rotate the channels of each head between a value projection and the output projection, exactly: fold F5.

An attention mixes tokens and treats the channels of a head alike, so for any orthogonal R [K, K]

    rows of a head of the value projection -> R^T rows,  columns of that head of the output projection -> columns R

leave the output as it is. Large channels spread over their head, and groups of a few bits waste less on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from ...ir.analysis.writers import Heads, find_heads
from ...ir.edit import Copies, add_buffer, module_of
from ...ir.program import Program, attribute
from .algebra.rotations import rotation
from .inputs import Inputs
from .layers import Group

Error = Callable[[torch.Tensor, torch.Tensor], float]
"""Output error of rounding a weight [N, M] under the Gram [M, M] of what it reads."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """A rotation that was tried.

    Attributes:
        heads: heads of the attention.
        matrix: R [K, K] float64.
        before: output error of the rounded output projection without it.
        after: error with the rotation.
    """

    heads: Heads
    matrix: torch.Tensor
    before: float
    after: float

    @property
    def helps(self) -> bool:
        """Whether the error is smaller with it."""
        return self.after < self.before

    @property
    def errors(self) -> tuple[float, float]:
        """The error without it and with it."""
        return self.before, self.after


def tried_rotations(
    groups: Sequence[Group], inputs: Mapping[str, Inputs], error: Error, seed: int
) -> dict[str, Rotation]:
    """One rotation for each group that alone reads the result of an attention, by the key of the group.

    Args:
        groups: groups of the computing slots.
        inputs: what they read.
        error: see `Error`.
        seed: seed of the rotations.
    """
    found = {}
    for group in groups:
        heads = find_heads(group.source) if set(group.source.users) == {layer.node for layer in group.layers} else None
        if heads is None:
            continue
        matrix, weight, gram = rotation(heads.columns.shape[1], seed), group.weight, inputs[group.key].gram()
        whole = heads.spread(matrix)
        turned = (weight.to(whole.dtype) @ whole).to(weight.dtype)
        found[group.key] = Rotation(heads, matrix, error(weight, gram), error(turned, whole.T @ gram @ whole))
    return found


def rotate(program: Program, groups: Sequence[Group], rotations: Mapping[str, Rotation]) -> Program:
    """The program with the heads that groups read rotated.

    Args:
        program: program of the groups.
        groups: layers that read one value.
        rotations: rotations by the key of a group; groups without one are left alone.
    """
    copies = Copies(program)
    for group in groups:
        if group.key in rotations:
            heads, matrix = rotations[group.key].heads, rotations[group.key].matrix
            whole = heads.spread(matrix)
            for layer in group.layers:
                _change(copies.twins[layer.node], 1, partial(torch.matmul, other=whole))
            for at in (1, 2):
                _change(copies.twins[heads.linear], at, partial(_turned, rows=heads.rows, matrix=matrix))
    return copies.program()


def _turned(held: torch.Tensor, rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """A weight [N, M] or bias [N] with the rows of each head multiplied by R^T."""
    result = held.clone()
    for head in rows:
        result[head] = matrix.T @ held[head]
    return result


def _change(layer: fx.Node, at: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change a weight or bias that a layer holds, in float64; a bias that it has not stays away."""
    if len(layer.args) > at and isinstance(layer.args[at], fx.Node):
        held = attribute(module_of(layer), str(layer.args[at].target)).detach()  # type: ignore[union-attr]
        with layer.graph.inserting_before(layer):
            name = add_buffer(module_of(layer), f"{layer.name}.rotated", change(held.to(torch.float64)).to(held.dtype))
            layer.update_arg(at, layer.graph.get_attr(name))
