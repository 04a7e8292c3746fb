"""Captures and folders shared by the tests of the frontend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from zoo import DIT, ZooModel

from stepfold.ir.program import Program


@pytest.fixture(scope="session")
def captured() -> Callable[[ZooModel], Program]:
    """The program of a zoo model."""
    return lambda model: model.program


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint of a small DiT, to change."""
    return DIT.save(tmp_path / "dit")
