"""The patterns that `sparsify_attention` can be asked for. A new one is one file and one line here."""

from __future__ import annotations

from .bank import Bank
from .cross import Cross
from .frames import Frames
from .pattern import Pattern
from .window import Window

PATTERNS: dict[str, Pattern] = {one.name: one for one in (Window(), Cross(), Frames(), Bank())}
