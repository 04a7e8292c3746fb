"""Run commands in this process and see what a person would."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stepfold.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.err
        return line.removeprefix("error: ")

    def document(self) -> Any:
        """The JSON object that is all of standard output."""
        return json.loads(self.out)


Stepfold = Callable[..., Outcome]


@pytest.fixture
def stepfold(capsys: pytest.CaptureFixture[str]) -> Stepfold:
    """Run `stepfold` with these words."""

    def run(*words: str | Path) -> Outcome:
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a bundle goes, in an empty folder of its own."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "bundle"
