"""Weights as places in a codebook: small on disk (Q7 of the method cards)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from ..algebra.codebook import LARGEST_CODEBOOK, RUNS_PER_CODEWORD, fit_codes, learn_codebook
from ..inputs import Inputs, Need
from ..layers import Group, LinearLayer
from ..realize import Realization, Reconstructed
from ..scheme import Scheme

RUN = 4
"""Input channels named by one index: 2 bits a weight with 256 codewords."""


class Codebook(Scheme):
    """Runs of 4 weights named by a byte: 2 bits a weight, a storage format; products stay in floats.

    The choice among the nearest codewords and the codebook are fitted to outputs in closed form, without training.
    """

    name = "codebook"
    source = "VQ4DiT, arXiv 2408.17131, its part without gradients"
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def need(self) -> Need:
        """The Gram that outputs are judged by."""
        return Need.STATISTICS

    def unfit(self, layer: LinearLayer) -> str | None:
        """See `Scheme.unfit`."""
        N, M = layer.weight.shape
        if M % RUN:
            return f"its {M} inputs are no multiple of {RUN}"
        fewest = RUNS_PER_CODEWORD * LARGEST_CODEBOOK
        return (
            f"its {N * M // RUN} runs are fewer than the {fewest} a codebook pays for"
            if N * M // RUN < fewest
            else None
        )

    def realize(self, group: Group, inputs: Inputs | None) -> Realization:
        """See `Scheme.realize`."""
        assert inputs is not None
        gram, weights = inputs.gram(), []
        for layer in group.layers:
            coded = fit_codes(layer.weight, learn_codebook(layer.weight, RUN, LARGEST_CODEBOOK), gram, site=layer.name)
            weights.append({"indices": coded.indices, "codebook": coded.codebook, "scale": coded.scale})
        return Reconstructed(torch.ops.stepfold.decode_codebook.default, weights)
