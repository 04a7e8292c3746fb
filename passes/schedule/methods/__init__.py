"""Ways to fill a slot from its own earlier outputs. A new one is one file and one line here."""

from __future__ import annotations

from .fitted import Fitted
from .method import Method
from .polynomial import Forecast, Repeat

METHODS: dict[str, Method] = {one.name: one for one in (Fitted(), Repeat(), Forecast())}
