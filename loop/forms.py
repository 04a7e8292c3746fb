"""Forms: what stands between the outputs of an evaluation and the linear update, where a loop is not linear there.

Two kinds are enough for the loops that are published. *Rescaled guidance* gives the guided output a size that follows
that of the conditional one. A *bounded prediction* is the sample that a call predicts, kept in a range: many samplers
weigh it beside the latent and the output. Behind either the update is linear as before, so it folds and is fitted alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .spec import RescaleSpec

Array = np.ndarray
SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Bound:
    """A range of samples: fixed, or as wide as each sample's own values ask for.

    Attributes:
        limit: largest value; with a quantile the widest range.
        quantile: share of a sample's absolute values that the range holds before the sample is divided by the range, which
            is at least 1 (dynamic thresholding: Imagen, arXiv 2205.11487, section 2.3); None for a fixed range.
    """

    limit: float
    quantile: float | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"expected a finite bound above 0; received {self.limit}")
        if self.quantile is not None and not 0 <= self.quantile <= 1:
            raise ValueError(f"expected a quantile from 0 to 1; received {self.quantile}")

    def __call__(self, samples: Array) -> Array:
        """Samples [B, ...] within their range."""
        if self.quantile is None:
            return np.clip(samples, -self.limit, self.limit)
        reached = np.quantile(np.abs(samples.reshape(len(samples), -1)), self.quantile, axis=1)
        widths = np.clip(reached, 1.0, max(1.0, self.limit)).astype(samples.dtype)
        width = widths.reshape(-1, *(1,) * (samples.ndim - 1))
        return np.clip(samples, -width, width) / width

    def array(self) -> Array:
        """The bound as numbers: [1], or [2] with a quantile."""
        return np.asarray([self.limit] if self.quantile is None else [self.limit, self.quantile], np.float64)

    @classmethod
    def from_array(cls, array: Array) -> Bound:
        """Rebuild a bound from `array()`; raises ValueError for anything else."""
        if array.shape not in ((1,), (2,)):
            raise ValueError(f"expected one or two numbers of a bound; received shape {list(array.shape)}")
        return cls(*(float(value) for value in array))


@dataclass(frozen=True, eq=False)
class Prediction:
    """The bounded sample that each of N calls predicts, `f_i = bound(p_i x[i] + q_i v_i)`, and its weights.

    Attributes:
        latent: [N] p, weights of the latent at the call.
        output: [N] q, weights of its guided output.
        weights: [N, N] lower triangular: row i weighs f_0..f_i in x[i+1].
        bound: range.
    """

    latent: Array
    output: Array
    weights: Array
    bound: Bound

    def __post_init__(self) -> None:
        N = len(self.latent)
        if (self.latent.shape, self.output.shape, self.weights.shape) != ((N,), (N,), (N, N)):
            raise ValueError(f"predictions of {N} calls need shapes [{N}], [{N}] and [{N}, {N}]")
        if not np.allclose(self.weights, np.tril(self.weights)):
            raise ValueError("an update may only read predictions that exist: weights must be lower triangular")

    def at(self, call: int, latent: Array, output: Array) -> Array:
        """The bounded sample [B, ...] of a call, from its latent and its guided output."""
        p, q = (latent.dtype.type(values[call]) for values in (self.latent, self.output))
        return self.bound(p * latent + q * output)

    def arrays(self) -> dict[str, Array]:
        """The predictions as named arrays."""
        numbers = {"latent": self.latent, "output": self.output, "weights": self.weights}
        return {name: value.astype(np.float64) for name, value in numbers.items()} | {"bound": self.bound.array()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Prediction | None:
        """Rebuild predictions from `arrays()`; None where there are none."""
        if not arrays:
            return None
        bound = Bound.from_array(arrays["bound"])
        return cls(arrays["latent"], arrays["output"], arrays["weights"], bound)


def guided(conditional: Array, unconditional: Array | None, scale: float) -> Array:
    """`u + scale (c - u)` [B, ...], or c alone where no other branch runs."""
    if unconditional is None:
        return conditional
    return unconditional + np.float32(scale) * (conditional - unconditional)


def rescaled_branches(
    conditional: Array, unconditional: Array, scale: float, rescale: RescaleSpec
) -> tuple[Array, Array]:
    """Two branches whose linear guidance is the rescaled guidance of the given ones.

    So an update goes on weighing two branches. Their difference, the direction of guidance, stays what it is.

    Args:
        conditional: [B, ...].
        unconditional: [B, ...].
        scale: guidance scale of the evaluation.
        rescale: rule by which the guided output is rescaled.

    Returns:
        c' and u' with `u' + scale (c' - u')` the rescaled output and `c' - u' = c - u`.
    """
    direction = conditional - unconditional
    output = guided(conditional, unconditional, scale)
    other = output * rescaling(output, conditional, rescale) - np.float32(scale) * direction
    return other + direction, other


def rescaling(output: Array, conditional: Array, rescale: RescaleSpec) -> Array:
    """The factor of a guided output, one for each sample or each row of its last axis, by which `rescale` multiplies it.

    Args:
        output: [B, ...] guided output.
        conditional: [B, ...] output of the conditional branch.
        rescale: rule, see `RescaleSpec`.
    """
    axes = (-1,) if rescale.over == "row" else tuple(range(1, output.ndim))
    sizes = [_size(value, axes, rescale.measure) for value in (conditional, output)]
    factor = np.float32(rescale.limit or 1.0) * sizes[0] / np.maximum(sizes[1], np.float32(SMALLEST))
    if rescale.limit is not None:
        factor = np.minimum(factor, np.float32(1.0))
    return np.float32(rescale.share) * factor + np.float32(1.0 - rescale.share)


def _size(values: Array, axes: tuple[int, ...], measure: str) -> Array:
    if measure == "deviation":
        return values.std(axis=axes, keepdims=True)
    return np.sqrt(np.square(values).sum(axis=axes, keepdims=True))
