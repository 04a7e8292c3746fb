"""Run a bundle: `load` gives an `Engine`. Torch-free."""

from .engine import Engine, load

__all__ = ["Engine", "load"]
