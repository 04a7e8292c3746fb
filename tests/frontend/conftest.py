"""Captures and folders shared by the tests of the frontend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from zoo import DIT, ZooModel

from stepfold.frontend.capture import capture
from stepfold.ir.program import Program


@pytest.fixture(scope="session")
def captured() -> Callable[[ZooModel], Program]:
    """The program of a zoo model, captured once."""
    programs: dict[str, Program] = {}

    def get(model: ZooModel) -> Program:
        if model.name not in programs:
            programs[model.name] = capture(model.build(), model.kwargs(2), model.loop(), method=model.method)
        return programs[model.name]

    return get


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint of a small DiT, to change."""
    return DIT.save(tmp_path / "dit")
