"""Best approximations of low rank, exact and randomized."""

from __future__ import annotations

import torch

OVERSAMPLING = 16
POWER_ITERATIONS = 2

Factors = tuple[torch.Tensor, torch.Tensor]
"""up [N, R] and down [R, M] with `matrix ~ up @ down`."""


def truncated(matrix: torch.Tensor, rank: int) -> Factors:
    """The best approximation of a matrix [N, M] of a rank, computed in float64 and returned in the matrix's dtype."""
    u, s, v = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]).to(matrix.dtype), v[:rank].to(matrix.dtype)


def sketched(matrix: torch.Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Nearly the best approximation of a matrix [N, M] of a rank, in time proportional to the rank.

    Randomized range finder with oversampling and power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061,
    algorithms 4.4 and 5.1).
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    probe = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    up, down = truncated(basis.T @ matrix, rank)
    return basis @ up, down
