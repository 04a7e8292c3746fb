"""The noise that a diffusers scheduler draws in its steps: given to it, or written down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

DRAW = "randn_tensor"
"""What the schedulers of diffusers draw noise with; each module has imported it under its name."""

Draw = Callable[..., torch.Tensor]
"""Takes the arguments of `randn_tensor`, the shape first."""

Drawing = Callable[[Draw], Draw]
"""Makes a way to draw from the one that is there."""


@contextmanager
def drawing(scheduler: Any, way: Drawing) -> Iterator[None]:
    """Let a scheduler draw in another way as long as the block lasts.

    Args:
        scheduler: scheduler of diffusers; one that draws by other means is left alone.
        way: way to draw.
    """
    modules = {sys.modules.get(kind.__module__) for kind in type(scheduler).__mro__}
    patched = [module for module in modules if module is not None and hasattr(module, DRAW)]
    before = [getattr(module, DRAW) for module in patched]
    for module, old in zip(patched, before, strict=True):
        setattr(module, DRAW, way(old))
    try:
        yield
    finally:
        for module, old in zip(patched, before, strict=True):
            setattr(module, DRAW, old)


def noting(drawn: list[torch.Tensor]) -> Drawing:
    """Draw as before, and write down what was drawn."""

    def way(old: Draw) -> Draw:
        def draw(*args: Any, **kwargs: Any) -> torch.Tensor:
            drawn.append(old(*args, **kwargs))
            return drawn[-1]

        return draw

    return way


def giving(draws: np.ndarray) -> Drawing:
    """Draw what is given, [draws, values], one after the other; asking for more is a RuntimeError."""
    left = iter(draws)

    def draw(shape: Any, *_: Any, **__: Any) -> torch.Tensor:
        values = next(left, None)
        if values is None:
            raise RuntimeError(f"expected {len(draws)} draws of noise, as before; received one more")
        return torch.from_numpy(values).reshape(tuple(shape))

    return lambda old: draw
