"""The pass `quantize` on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from programs import context_of

from stepfold.ir.program import Program
from stepfold.passes.base import Context, PassResult
from stepfold.passes.quantize.options import QuantizeOptions
from stepfold.passes.quantize.quantize import Quantize


def quantize(program: Program, context: Context | None = None, **options: Any) -> PassResult:
    """Run it with options as a recipe has them; without a context, there is no store and no engine."""
    operation = Quantize(QuantizeOptions.model_validate(options))
    return operation.run(program, context or context_of(program, Path("unused")))
