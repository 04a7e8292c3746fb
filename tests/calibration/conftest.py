"""A finished store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from calibrated import calibrated, standard


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store; for tests that do not change it."""
    folder = tmp_path_factory.mktemp("stores") / "whole"
    calibrated(standard(), folder)
    return folder


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A finished store to damage."""
    return Path(shutil.copytree(whole, tmp_path / "store"))
