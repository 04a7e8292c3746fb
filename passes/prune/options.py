"""Options of `prune`, and which of them go together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...loop.errors import UsageError
from ..base import Options

OF_WIDTH = frozenset({"criterion", "keep", "compensate", "distribute", "multiple", "floor", "include", "skip"})
AMOUNTS = ("ratio", "keep", "budget")


class Keep(Options):
    """Shares that stay.

    Attributes:
        feed_forward: share of the hidden channels of feed-forward layers.
        heads: share of the attention heads.
    """

    feed_forward: float = Field(default=1.0, gt=0, le=1)
    heads: float = Field(default=1.0, gt=0, le=1)


class Budget(Options):
    """What may be left of the program; exactly one is given.

    Attributes:
        flops: share of the FLOPs of an evaluation.
        parameters: share of the weights.
    """

    flops: float | None = Field(default=None, gt=0, le=1)
    parameters: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _one(self) -> Budget:
        """Refuse none and both; raises ValueError."""
        if (self.flops is None) == (self.parameters is None):
            raise ValueError("expected one of flops and parameters")
        return self


class PruneOptions(Options):
    """Options of `prune`; one of ratio, keep and budget says how much.

    Attributes:
        method: `width` removes hidden channels of feed-forward layers and attention heads, `depth` whole blocks.
        criterion: which channels go first: those of least `fluctuation` (FLAP), `wanda` or `magnitude`.
        ratio: share of the hidden channels, or of the blocks, that goes.
        keep: share of the channels and heads that stays, by kind.
        budget: share of FLOPs or weights that stays.
        compensate: the layer behind removed channels is fitted to give their outputs back by `least-squares`, gets their
            `mean` as a bias, or `none`.
        distribute: layers lose by their `sensitivity`, measured in the loop, or all the same share: `uniform`.
        multiple: kept channels of a layer are a multiple of this, as engines like it; heads count one by one.
        floor: smallest share of a layer that stays where layers lose by sensitivity.
        include: patterns of the layers to narrow.
        skip: patterns of the layers to leave alone.
        max_drift: largest drift of this pass on the probe.
    """

    method: Literal["width", "depth"] = "width"
    criterion: Literal["fluctuation", "wanda", "magnitude"] = "fluctuation"
    ratio: float = Field(default=0.25, ge=0, lt=1)
    keep: Keep | None = None
    budget: Budget | None = None
    compensate: Literal["least-squares", "mean", "none"] = "least-squares"
    distribute: Literal["sensitivity", "uniform"] = "sensitivity"
    multiple: int = Field(default=16, ge=1, le=1 << 16)
    floor: float = Field(default=0.25, gt=0, le=1)
    include: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    max_drift: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _agree(self) -> PruneOptions:
        """Refuse what would be ignored; raises UsageError."""
        given = [name for name in AMOUNTS if name in self.model_fields_set and getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(
                f"pass prune: option {given[1]!r}: expected one of {', '.join(AMOUNTS)}; received {' and '.join(given)}. "
                "Leave one of them out."
            )
        if self.budget is not None and self.distribute == "uniform":
            raise UsageError(
                "pass prune: option 'distribute': expected sensitivity with a budget, which layers spend by what they do to "
                "samples; received 'uniform'. Give ratio or keep for the same share of all."
            )
        ignored = sorted(self.model_fields_set & OF_WIDTH)
        if self.method == "depth" and ignored:
            raise UsageError(
                f"pass prune: option {ignored[0]!r}: expected none with method depth, which removes whole blocks; "
                f"received {getattr(self, ignored[0])!r}. Leave it out, or use method width."
            )
        return self
