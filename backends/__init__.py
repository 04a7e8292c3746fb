"""Engines: one folder each, with `backend.py`, `capability.py`, `session.py` (all torch-free) and `lower.py`.

Nothing heavy is imported before an engine is used, so that a missing one never breaks another.
"""

from .backend import Backend
from .registry import backends, get

__all__ = ["Backend", "backends", "get"]
