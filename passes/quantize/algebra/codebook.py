"""Vector quantization: runs of a weight are named by their place in a codebook (VQ4DiT, arXiv 2408.17131).

The part of the method that needs no gradients: k-means, then for each run the choice among its nearest codewords and
the codebook itself are fitted to the outputs, in turn and in closed form, instead of by training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ....loop.errors import UsageError
from .errors import expect_gram, output_error
from .grids import nearest_divisor

LARGEST_CODEBOOK = 256  # an index is one byte
RUNS_PER_CODEWORD = 4  # with fewer, the codebook would be no smaller than what it codes
LEARNED_FROM = 1 << 16
"""How many runs k-means learns from at most."""
CHUNK = 1 << 14  # bounds the table of distances
ROUNDS = 3
SOLVER_STEPS = 20


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """A weight [N, M] as `scale * codebook[index]`.

    Attributes:
        indices: [N, M / run] uint8.
        codebook: [codewords, run].
        scale: [N], of each output channel.
    """

    indices: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """[N, M] what the indices stand for."""
        return self.codebook[self.indices.long()].flatten(1) * self.scale[:, None]

    @property
    def bits_per_weight(self) -> float:
        """Bits of each element with indices of a byte and a codebook and scales of float32."""
        stored = 8 * self.indices.numel() + 32 * (self.codebook.numel() + self.scale.numel())
        return stored / (self.indices.numel() * self.codebook.shape[1])


def encode(weight: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor) -> CodedWeight:
    """Name every run of a weight [N, M] by its nearest codeword [codewords, run], under the scales [N]."""
    runs = (weight / scale[:, None]).reshape(-1, codebook.shape[1])
    indices = _nearest(runs, codebook, 1)[:, 0].reshape(weight.shape[0], -1)
    return CodedWeight(indices.to(torch.uint8), codebook, scale)


def learn_codebook(
    weight: torch.Tensor, run: int = 4, codewords: int = 256, iterations: int = 25, seed: int = 0
) -> CodedWeight:
    """Learn a codebook by k-means on the runs of a weight, each row scaled by its largest magnitude.

    Args:
        weight: [N, M].
        run: input channels named by one index; with 256 codewords, 4 are 2 bits a weight.
        codewords: number of codewords, at most 256.
        iterations: iterations of k-means.
        seed: seed of the first codewords, and of the runs that are learned from when there are very many.

    Raises:
        UsageError: the run does not divide M, or the codebook is too large for a byte or for the weight.
    """
    _expect_sizes(weight, run, codewords)
    largest = weight.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    runs = (weight / scale[:, None]).reshape(-1, run)
    generator = torch.Generator().manual_seed(seed)
    shuffled = runs[torch.randperm(runs.shape[0], generator=generator)[:LEARNED_FROM]]
    return encode(weight, _k_means(shuffled, codewords, iterations), scale)


def _expect_sizes(weight: torch.Tensor, run: int, codewords: int) -> None:
    N, M = weight.shape
    if run < 1 or M % run:
        near = nearest_divisor(M, run)
        raise UsageError(f"run: expected a divisor of the {M} input features; received {run}. Try {near}.")
    most = min(LARGEST_CODEBOOK, N * M // run // RUNS_PER_CODEWORD)
    if not 1 <= codewords <= most:
        raise UsageError(f"codewords: expected 1 to {most} for a weight of {N} x {M}; received {codewords}.")


def _k_means(runs: torch.Tensor, codewords: int, iterations: int) -> torch.Tensor:
    """[codewords, run] the centres of runs [P, run] in random order; a centre without runs takes the farthest one."""
    centres = runs[:codewords].clone()
    for _ in range(iterations):
        nearest = _nearest(runs, centres, 1)[:, 0]
        count = torch.bincount(nearest, minlength=codewords)
        total = torch.zeros_like(centres).index_add_(0, nearest, runs)
        empty = torch.nonzero(count == 0)[:, 0]
        distance = (runs - centres[nearest]).square().sum(dim=1)
        centres = total / count.clamp(min=1)[:, None]
        centres[empty] = runs[torch.topk(distance, len(empty)).indices]
    return centres


def _nearest(runs: torch.Tensor, codebook: torch.Tensor, count: int) -> torch.Tensor:
    """[P, count] the nearest codewords of runs [P, run], the nearest first."""
    half = codebook.square().sum(dim=1) / 2
    found = [torch.topk(half - chunk @ codebook.T, count, dim=1, largest=False).indices for chunk in runs.split(CHUNK)]
    return torch.cat(found)


def fit_codes(
    weight: torch.Tensor, coded: CodedWeight, gram: torch.Tensor, candidates: int = 2, site: str = "weight"
) -> CodedWeight:
    """Choose among the nearest codewords of each run by the output error, and fit the codebook to the choice.

    Args:
        weight: [N, M].
        coded: its code by distance.
        gram: [M, M] mean of x x^T over the inputs.
        candidates: how many nearest codewords of each run are tried.
        site: named in errors.

    Returns:
        A code whose output error is no larger.

    Raises:
        UsageError: the Gram does not fit or is not finite, or there are more candidates than codewords.
    """
    expect_gram(weight, gram, site)
    if not 1 <= candidates <= coded.codebook.shape[0]:
        most = coded.codebook.shape[0]
        raise UsageError(f"{site}: candidates: expected 1 to {most}, the codewords; received {candidates}.")
    gram = gram.to(weight.dtype)
    best, least = coded, output_error(coded.weight - weight, gram)
    for _ in range(ROUNDS):
        tried = _refitted(weight, _reassigned(weight, best, gram, candidates), gram)
        error = output_error(tried.weight - weight, gram)
        if error >= least:
            break
        best, least = tried, error
    return best


def _reassigned(weight: torch.Tensor, coded: CodedWeight, gram: torch.Tensor, candidates: int) -> CodedWeight:
    """Go through the runs of all rows at once and take the candidate that leaves the least output error.

    Changing a run by d changes `tr(D G D^T)` by `2 d (D G) + d G d^T`; not changing it is one of the choices.
    """
    run = coded.codebook.shape[1]
    runs = (weight / coded.scale[:, None]).reshape(-1, run)
    options = _nearest(runs, coded.codebook, candidates).reshape(*coded.indices.shape, candidates)
    indices = coded.indices.long()
    options = torch.cat([indices[..., None], options], dim=-1)
    gradient = (coded.weight - weight) @ gram
    for place in range(indices.shape[1]):
        columns = slice(place * run, (place + 1) * run)
        words = coded.codebook[options[:, place]]  # [N, candidates + 1, run]
        changes = (words - words[:, :1]) * coded.scale[:, None, None]
        linear = (changes * gradient[:, None, columns]).sum(dim=-1)
        gain = 2 * linear + ((changes @ gram[columns, columns]) * changes).sum(dim=-1)
        pick = gain.argmin(dim=1)
        rows = torch.arange(len(pick))
        indices[:, place] = options[rows, place, pick]
        gradient += changes[rows, pick] @ gram[columns]
    return replace(coded, indices=indices.to(torch.uint8))


def _refitted(weight: torch.Tensor, coded: CodedWeight, gram: torch.Tensor) -> CodedWeight:
    """The codebook of least output error for given indices: conjugate gradients on a quadratic of its elements."""
    codebook = coded.codebook.clone()
    residual = _gathered((weight - coded.weight) @ gram, coded)
    direction, square = residual.clone(), float(residual.square().sum())
    for _ in range(SOLVER_STEPS):
        image = _gathered(replace(coded, codebook=direction).weight @ gram, coded)
        curvature = float((direction * image).sum())
        if curvature <= 0:  # solved: the residual is zero
            break
        codebook += direction * (square / curvature)
        residual -= image * (square / curvature)
        square, before = float(residual.square().sum()), square
        direction = residual + direction * (square / before)
    return replace(coded, codebook=codebook)


def _gathered(values: torch.Tensor, coded: CodedWeight) -> torch.Tensor:
    """[codewords, run] the sum of values [N, M] over the runs that name each codeword, times their scales."""
    rows = (values * coded.scale[:, None]).reshape(-1, coded.codebook.shape[1])
    return torch.zeros_like(coded.codebook).index_add_(0, coded.indices.flatten().long(), rows)
