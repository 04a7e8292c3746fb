"""Statistics of the small transformer, collected once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where passes keep what they collect, so that the tests of one run share it."""
    return tmp_path_factory.mktemp("statistics")
