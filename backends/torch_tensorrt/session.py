"""Run a plan that Torch-TensorRT built: it is one like any other."""

from __future__ import annotations

from ..tensorrt.session import open_session

__all__ = ["open_session"]
