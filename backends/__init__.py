"""Engines: one folder each, with `capability.py`, `session.py` (torch-free) and `lower.py`.

Nothing heavy is imported before an engine is used, so that a missing one never breaks another.
"""

from .registry import Backend, backends, get

__all__ = ["Backend", "backends", "get"]
