"""The backend `inductor`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..own import PreparingBackend
from .options import InductorOptions


@dataclass(frozen=True)
class Inductor(PreparingBackend):
    """See `Backend`."""

    name: ClassVar[str] = "inductor"
    suffix: ClassVar[str] = ".so"
    native: ClassVar[bool] = True

    options: InductorOptions = field(default_factory=InductorOptions)
