"""What searches for a schedule share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference trajectories, shared: their key has everything they depend on."""
    return tmp_path_factory.mktemp("cache")
