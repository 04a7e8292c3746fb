"""Options of `quantize`, and which of them go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ...loop.errors import UsageError, nearest
from ..base import Options
from .scheme import SEQUENTIAL
from .schemes import SCHEMES

CHOOSING = frozenset({"scheme", "include", "skip", "min_tokens", "part", "hoisted", "max_drift"})
"""Options that every scheme has."""


class QuantizeOptions(Options):
    """Options of `quantize`; which of them a scheme reads is in its documentation, and setting another is an error.

    Attributes:
        scheme: number format and method.
        weights: granularity of the scales of 8-bit weights.
        activations: `dynamic` scales are computed at run time, in `int8` from each tensor, which couples the samples
            of a batch; `static` scales are calibrated and do not, nor do `symmetric` ones, whose int8 has zero in the
            middle as TensorRT wants it; `float` leaves activations alone; `auto` is the form of `int8` that the engine
            is fastest with.
        smooth: what layers read is divided by a scale for each channel: the SmoothQuant exponent from 0 (activations
            keep the difficulty) to 1, `search` for the exponent of least output error of each site, `salience` for
            that of PTQ4DiT, `awq` for the scale that protects 4-bit weights; null leaves it as it is.
        rounding: weights go to the nearest number, or are compensated by `gptq` under the moments of what their layers
            read in floats, or by `sequential-gptq` under those that the quantized layers before them leave; `auto` is
            `gptq` where enough rows are seen for it, nearest elsewhere.
        group: input channels that share a scale in 4-bit weights.
        rank: rank of the branch in full precision.
        residual: format of what the branch leaves.
        format: format of weights and activations that `modelopt` is to decide.
        rotate: `heads` rotates the channels of each head in front of an output projection where that lowers its output
            error; null does not.
        repair: `data-free` lets the second layer of a feed-forward pair absorb what rounding took from the first, on
            inputs drawn from the model's own modulations; null does not.
        bits: average number of bits of a weight, scales included, that `mixed` may spend.
        time: share, from 0 to 1, of the time that the layers take in floats on the engine, which `mixed` may spend
            instead of `bits`.
        hoisted: weights of layers in stages that run once a request; null leaves them.
        include: module patterns to quantize.
        skip: module patterns to leave alone.
        min_tokens: a linear layer applied to fewer rows per sample gains nothing.
        part: part of the loop, from 0 at the noise to 1 at the sample, whose evaluations are quantized; the others get
            a stage of their own, which another `quantize` may treat.
        max_drift: largest drift of this pass on the probe.
    """

    scheme: Literal["int8", "int8-weights", "int4", "svdquant", "fp8", "nvfp4", "codebook", "mixed", "modelopt"] = (
        "int8"
    )
    weights: Literal["per_channel"] = "per_channel"
    activations: Literal["dynamic", "static", "symmetric", "float", "auto"] = "dynamic"
    smooth: float | Literal["search", "salience", "awq"] | None = Field(default=None)
    rounding: Literal["auto", "nearest", "gptq", "sequential-gptq"] = "nearest"
    group: int = Field(default=64, ge=16, le=1 << 16)
    rank: int = Field(default=32, ge=1, le=1 << 16)
    residual: Literal["int4", "int8", "fp8"] = "int4"
    format: Literal["int8", "fp8", "int4"] = "int8"
    rotate: Literal["heads"] | None = None
    repair: Literal["data-free"] | None = None
    bits: float = Field(default=7.0, gt=0, le=32)
    time: float | None = Field(default=None, gt=0, le=1)
    hoisted: Literal["int8", "int4"] | None = None
    include: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    min_tokens: int = Field(default=2, ge=1, le=1 << 40)
    part: tuple[float, float] = (0.0, 1.0)
    max_drift: float | None = Field(default=None, gt=0)

    @field_validator("part")
    @classmethod
    def _ascending(cls, part: tuple[float, float]) -> tuple[float, float]:
        """Refuse what is no part of the loop; raises ValueError."""
        if not 0 <= part[0] < part[1] <= 1:
            raise ValueError("expected two numbers from 0 to 1, the first below the second")
        return part

    @model_validator(mode="after")
    def _only_what_the_scheme_reads(self) -> QuantizeOptions:
        """Refuse options that would be ignored; raises UsageError."""
        reads = SCHEMES[self.scheme].reads
        for option in sorted(self.model_fields_set - CHOOSING):
            value = getattr(self, option)
            if option not in reads:
                known = sorted(reads)
                raise UsageError(
                    f"pass quantize: option {option!r}: scheme {self.scheme} does not read it; {nearest(option, known)}"
                )
            if not accepts(reads[option], value):
                raise UsageError(
                    f"pass quantize: option {option!r}: expected {' or '.join(reads[option])} with scheme "
                    f"{self.scheme}; received {value!r}."
                )
        return self

    @model_validator(mode="after")
    def _agree(self) -> QuantizeOptions:
        """Refuse options that contradict each other; raises UsageError."""
        if self.time is not None and "bits" in self.model_fields_set:
            raise UsageError(
                f"pass quantize: option 'time': expected null where `bits` is given, because only one of them is spent; "
                f"received {self.time!r} and {self.bits!r} bits."
            )
        if self.scheme == "svdquant" and self.activations == "float" and self.residual != "int4":
            raise UsageError(
                f"pass quantize: option 'activations': expected dynamic with residual {self.residual}, whose products "
                "are of 8 bits on both sides; received 'float'. Only residual int4 leaves activations in float."
            )
        if self.rounding == SEQUENTIAL and self.repair is not None:
            raise UsageError(
                f"pass quantize: option 'repair': expected null with rounding {SEQUENTIAL}, which knows what weights "
                f"become only when those before them have; received {self.repair!r}."
            )
        return self


def accepts(listed: Sequence[str], value: object) -> bool:
    """Whether a value is one of those listed; nothing listed means any."""
    if not listed:
        return True
    if isinstance(value, int | float):
        return "0 to 1" in listed and 0 <= value <= 1
    return ("null" if value is None else value) in listed
