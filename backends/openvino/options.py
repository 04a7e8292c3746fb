"""Options of the OpenVINO backend."""

from __future__ import annotations

from typing import Literal

from ...loop.options import Options


class OpenvinoOptions(Options):
    """Options of the engine.

    Attributes:
        precision: type of what is not 8-bit; `bf16` rounds the arguments of products and is faster where the processor
            has instructions for it.
        shapes: `static` compiles a stage for each batch size that it is called with, at the first call of that size:
            steady calls are faster, the first ones slower.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    shapes: Literal["dynamic", "static"] = "dynamic"
