"""What a criterion of width has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from ..moments import Moments


class Criterion(ABC):
    """How much each channel that a linear layer reads matters to its outputs.

    Class attributes name it in recipes and its source; `reads_moments` says whether it has to know what the layer reads.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    reads_moments: ClassVar[bool] = True

    @abstractmethod
    def scores(self, weight: torch.Tensor, moments: Moments | None) -> torch.Tensor:
        """The scores of the channels of a layer; those of a head are added up.

        Args:
            weight: [N, M] float64.
            moments: moments of what the layer reads; None for a criterion that does not read them.

        Returns:
            [M] float64, larger for channels that matter more.
        """
