"""The schemes of the `quantize` pass, one file for each family of formats."""

from __future__ import annotations

from ..scheme import Scheme
from .blocks import Int4, Int8Weights
from .codebook import Codebook
from .floats import Fp8, Nvfp4
from .int8 import Int8
from .mixed import Mixed
from .modelopt import Modelopt
from .svdquant import Svdquant

SCHEMES: dict[str, type[Scheme]] = {
    kind.name: kind for kind in (Int8, Int8Weights, Int4, Svdquant, Fp8, Nvfp4, Codebook, Mixed, Modelopt)
}
"""By the name that recipes use."""
