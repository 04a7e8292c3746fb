"""The tiny DiT as `quantize` finds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import context_of

from stepfold.ir.program import Program
from stepfold.passes.schedule.hoist import Hoist, HoistOptions


@pytest.fixture(scope="session")
def hoisted(tiny_program: Program) -> Program:
    return Hoist(HoistOptions()).run(tiny_program, context_of(tiny_program, Path("unused"))).program
