"""The noise that a diffusers scheduler draws in its steps: given to it, or written down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DRAW = "randn_tensor"
"""What the schedulers of diffusers draw noise with; each module has imported it under its name."""

Draw = Callable[..., torch.Tensor]
"""Takes the arguments of `randn_tensor`, the shape first."""


@contextmanager
def drawing_with(scheduler: Any, draw: Callable[[Draw], Draw]) -> Iterator[None]:
    """Let a scheduler draw in another way as long as the block lasts.

    Args:
        scheduler: scheduler of diffusers; one that draws by other means is left alone.
        draw: the new way to draw, made from the old one.
    """
    modules = {sys.modules.get(kind.__module__) for kind in type(scheduler).__mro__}
    patched = [module for module in modules if module is not None and hasattr(module, DRAW)]
    before = [getattr(module, DRAW) for module in patched]
    for module, old in zip(patched, before, strict=True):
        setattr(module, DRAW, draw(old))
    try:
        yield
    finally:
        for module, old in zip(patched, before, strict=True):
            setattr(module, DRAW, old)
