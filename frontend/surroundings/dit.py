"""DiT: classes instead of prompts."""

from __future__ import annotations

from .surroundings import Surroundings, Text


class DitSurroundings(Surroundings):
    """`DiTPipeline`."""

    source = "diffusers, DiTPipeline"

    def text(self) -> Text | None:
        """None: a class is the condition."""
        return None
