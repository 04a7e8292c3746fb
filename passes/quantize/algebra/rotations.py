"""Orthogonal matrices that spread a few large channels over all of them."""

from __future__ import annotations

import torch


def rotation(size: int, seed: int) -> torch.Tensor:
    """An orthogonal matrix [size, size] float64: Hadamard with random signs where the size is a power of two.

    Sylvester's matrix mixes all channels evenly (QuaRot, arXiv 2404.00456, section 3); other sizes get the Q of a
    Gaussian matrix with the signs of R's diagonal, which is uniform over all rotations (Mezzadri, math-ph/0609050).
    """
    generator = torch.Generator().manual_seed(seed)
    if size & (size - 1):
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        return q * r.diagonal().sign()
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    signs = 2.0 * torch.randint(2, (size,), generator=generator) - 1
    return signs[:, None] * matrix / size**0.5
