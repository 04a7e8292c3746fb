"""Repair of a feed-forward pair without data: inputs are drawn as a modulated LayerNorm would make them.

Unified Data-Free Compression (Bai et al., arXiv 2308.07209) lets the next layer absorb what a damaged one lost. Its
linear formulas do not hold through GELU; here the loss is measured on synthetic inputs of `fc1 -> activation -> fc2`:
the input of fc1 is `LN(x) (1 + scale) + shift`, and scale and shift of every timestep are known without images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from ....loop.errors import UsageError
from .errors import drift

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges that are tried, relative to the mean variance of the hidden values."""

EPSILON = 1e-6  # of the LayerNorm of diffusion transformers


@dataclass(frozen=True, eq=False)
class Pair:
    """`fc2(activation(fc1(x)))`.

    Attributes:
        first: weight of fc1 [hidden, D].
        first_bias: [hidden].
        second: weight of fc2 [N, hidden].
        second_bias: [N].
        activation: acts on each hidden value.
    """

    first: torch.Tensor
    first_bias: torch.Tensor
    second: torch.Tensor
    second_bias: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]

    def hidden(self, inputs: torch.Tensor) -> torch.Tensor:
        """[T, hidden] what fc2 reads for inputs [T, D]."""
        return self.activation(inputs @ self.first.T + self.first_bias)

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """[T, N] of inputs [T, D]."""
        return self.hidden(inputs) @ self.second.T + self.second_bias


@dataclass(frozen=True, eq=False)
class Repaired:
    """A pair after its repair.

    Attributes:
        pair: pair with another second layer; the damaged pair itself where no repair helped.
        error: relative output error on held-out synthetic inputs.
        baseline: the same without repair, never smaller.
    """

    pair: Pair
    error: float
    baseline: float


def synthetic_inputs(count: int, scale: torch.Tensor, shift: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw `LN(noise) (1 + scale) + shift`, the modulations taken in turn.

    Args:
        count: how many tokens T.
        scale: [S, D] of each timestep (and condition); zeros where the norm has none.
        shift: [S, D].
        seed: seed of the noise.

    Returns:
        [T, D] in the dtype of scale.
    """
    if scale.ndim != 2 or scale.shape != shift.shape:
        received = f"{tuple(scale.shape)} and {tuple(shift.shape)}"
        raise UsageError(f"modulation: expected scale and shift of one shape [S, D]; received {received}.")
    S, D = scale.shape
    noise = torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=scale.dtype)
    turn = torch.arange(count) % S
    return torch.nn.functional.layer_norm(noise, (D,), eps=EPSILON) * (1 + scale[turn]) + shift[turn]


def compensate(original: Pair, damaged: Pair, inputs: torch.Tensor, held_out: torch.Tensor) -> Repaired:
    """Refit fc2 of a damaged pair to the outputs of the original: least squares with bias, ridge towards no change.

    Args:
        original: the pair before.
        damaged: the pair with fewer hidden units or a rounded fc1; its fc2 is still in full precision.
        inputs: [T, D] to fit with.
        held_out: [T', D] to choose the ridge with, and whether to repair at all.
    """
    hidden, missing = damaged.hidden(inputs), original.outputs(inputs) - damaged.outputs(inputs)
    centre = hidden.mean(dim=0)
    centred = (hidden - centre).to(torch.float64)
    covariance = centred.T @ centred / len(centred)
    cross = missing.to(torch.float64).T @ centred / len(centred)
    mean = covariance.diagonal().mean()

    def refitted(strength: float) -> Pair:
        ridge = covariance + strength * mean * torch.eye(len(covariance), dtype=torch.float64)
        change = torch.linalg.solve(ridge, cross.T).T.to(hidden.dtype)
        bias = damaged.second_bias + missing.mean(dim=0) - change @ centre
        return replace(damaged, second=damaged.second + change, second_bias=bias)

    return _best(original, damaged, map(refitted, STRENGTHS) if mean > 0 else [], held_out)


def _best(original: Pair, damaged: Pair, repaired: Iterable[Pair], held_out: torch.Tensor) -> Repaired:
    """The pair of least error on inputs that fitted nothing; the damaged one if none is better."""
    wanted = original.outputs(held_out)
    baseline = drift(damaged.outputs(held_out), wanted)
    found = Repaired(damaged, baseline, baseline)
    for pair in repaired:
        error = drift(pair.outputs(held_out), wanted)
        if error < found.error:
            found = Repaired(pair, error, baseline)
    return found
