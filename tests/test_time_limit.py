"""A run of tests with a limit ends in time and says what it left out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("until", "passed", "skipped"), [("1", 0, 2), ("9e9", 2, 0)])
def test_no_test_begins_after_the_limit(tmp_path: Path, until: str, passed: int, skipped: int) -> None:
    """Nor does what a test needs first."""
    (tmp_path / "conftest.py").symlink_to(ROOT / "tests" / "conftest.py")
    (tmp_path / "test_two.py").write_text(
        "import os, pathlib, pytest\n"
        "@pytest.fixture\n"
        "def long():\n    pathlib.Path(os.environ['MARK']).touch()\n"
        "def test_one(long):\n    pass\n"
        "def test_other():\n    pass\n"
    )
    environment = {**os.environ, "TESTS_UNTIL": until, "MARK": str(tmp_path / "mark")}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)]
    done = subprocess.run(
        words, check=False, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "mark").exists() == bool(passed)
    assert ("2 tests were not run. `make test-all` runs them." in done.stdout) == bool(skipped)
    assert f"{passed} passed" in done.stdout if passed else f"{skipped} skipped" in done.stdout
