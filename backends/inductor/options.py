"""Options of the AOTInductor backend."""

from __future__ import annotations

from typing import Literal

from ...loop.options import Options


class InductorOptions(Options):
    """Options of the engine.

    Attributes:
        precision: type of products and of what lies between them; norms and timesteps stay in float32.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
