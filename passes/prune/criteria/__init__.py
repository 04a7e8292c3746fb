"""Criteria of the width of layers, one file each: how much a channel matters to the layer that reads it."""

from __future__ import annotations

from .criterion import Criterion
from .fluctuation import Fluctuation
from .magnitude import Magnitude
from .wanda import Wanda

CRITERIA: dict[str, Criterion] = {kind.name: kind() for kind in (Fluctuation, Wanda, Magnitude)}
"""By the name that recipes use."""
