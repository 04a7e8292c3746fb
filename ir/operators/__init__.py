"""The `stepfold::` operators, each in a file of its own. Importing this package defines all of them."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .record import RECORDS, Operator, couples_batch, operator

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["RECORDS", "Operator", "couples_batch", "operator"]
