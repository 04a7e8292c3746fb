"""What a scheme of the `quantize` pass owes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from .inputs import Inputs, Need
from .layers import Group, LinearLayer
from .realize import Realization
from .rotate import Rotation

if TYPE_CHECKING:
    from ...ir.program import Program
    from ..base import Context
    from .options import QuantizeOptions

SEQUENTIAL = "sequential-gptq"
"""GPTQ in the order of the graph, each layer under the moments that the layers before it leave to it."""


class Scheme(ABC):
    """A way to quantize the layers that read one value.

    The pass asks for the scale that the value is to be divided by, folds it, and then for what takes the place of the
    layers; their weights and inputs are then those after the fold.

    Attributes:
        name: name of the scheme in recipes.
        source: paper or engine it comes from.
        reads: options of `quantize` that it reads beside those that choose layers, with the values it takes; nothing
            listed means any.
        saves_time: whether its layers are there to be faster than in floats, and not only smaller.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    reads: ClassVar[Mapping[str, tuple[str, ...]]]
    saves_time: ClassVar[bool] = False

    def __init__(self, options: QuantizeOptions):
        self.options = options

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    @property
    def need(self) -> Need:
        """What it has to know about the inputs of layers."""
        return Need.NOTHING

    @property
    def in_sequence(self) -> bool:
        """Whether each group is realized under what it reads after the groups before it are realized."""
        return self.options.rounding == SEQUENTIAL

    def scales_at_run_time(self, group: Group) -> bool:
        """Whether a scale that cannot be folded is worth a multiplication at run time."""
        return False

    def unfit(self, layer: LinearLayer) -> str | None:
        """Why a layer cannot be quantized this way, or None."""
        return None

    def scale(self, group: Group, inputs: Inputs) -> torch.Tensor | None:
        """The scale [M] that what a group reads is to be divided by, or None for no change."""
        return None

    def rotations(self, groups: Sequence[Group], inputs: Mapping[str, Inputs], seed: int) -> Mapping[str, Rotation]:
        """Rotations within the heads of attentions, by the key of the group that reads the result.

        Args:
            groups: groups of the step stage, scales folded in.
            inputs: what is known about the inputs of the groups, by key.
            seed: seed of the random rotations.
        """
        return {}

    def prepare(
        self, program: Program, groups: Sequence[Group], inputs: Mapping[str, Inputs], context: Context
    ) -> Mapping[str, object]:
        """Decide what concerns all groups together, before the first is realized.

        Args:
            program: program after the folds, its layers still in floats.
            groups: groups of its step stage.
            inputs: what is known about the inputs of the groups, by key.
            context: context of the pass.

        Returns:
            What was decided, for the record of the pass.
        """
        return {}

    @abstractmethod
    def realize(self, group: Group, inputs: Inputs | None) -> Realization | None:
        """What takes the place of the layers, or None to leave them.

        Args:
            group: group of layers, with their weights after the fold.
            inputs: what is known about its input after the fold; None when the scheme needs to know nothing.
        """


class RoundingScheme(Scheme):
    """A scheme that can say beforehand what weights become, so that the layers after it may be refitted to it."""

    @abstractmethod
    def rounded(self, group: Group, inputs: Inputs | None) -> Sequence[torch.Tensor]:
        """The weights [N, M] that products will be made with, one for each layer."""
