"""The tiny DiT as `quantize` finds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import context_of
from quantizing import quantize

from stepfold.ir.program import Program
from stepfold.passes.base import PassResult
from stepfold.passes.hoist.hoist import Hoist, HoistOptions


@pytest.fixture(scope="session")
def hoisted(tiny_program: Program) -> Program:
    return Hoist(HoistOptions()).run(tiny_program, context_of(tiny_program, Path("unused"))).program


@pytest.fixture(scope="session")
def dynamic(hoisted: Program) -> PassResult:
    return quantize(hoisted)


@pytest.fixture(scope="session")
def static(hoisted: Program) -> PassResult:
    return quantize(hoisted, activations="static")
