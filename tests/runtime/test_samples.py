"""Samples that are not finite leave neither a function nor a command."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from folders import empty

from stepfold.cli import main
from stepfold.loop.errors import StepfoldError
from stepfold.runtime import engine, unoptimized
from stepfold.runtime.ends import Ends
from stepfold.runtime.samples import finite
from stepfold.runtime.unoptimized import Unoptimized

REFUSAL = (
    r"samples: expected finite numbers; received 2 that are NaN or infinite, in 1 of 3, the first of them number 1"
)


@pytest.fixture(params=[np.nan, np.inf, -np.inf])
def samples(request: pytest.FixtureRequest) -> np.ndarray:
    """Three samples, the second of which is wrong in two places."""
    values = np.zeros((3, 1, 2, 2), np.float32)
    values[1, 0, 0] = request.param
    return values


def test_an_engine(samples: np.ndarray, read_only_bundle: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(engine, "run_loop", lambda *_: samples)
    with pytest.raises(StepfoldError, match=REFUSAL):
        engine.load(read_only_bundle).generate(3)
    assert main(["generate", str(read_only_bundle), "--count", "3", "--npy", str(tmp_path / "x.npy")]) == 1
    assert capsys.readouterr().err.startswith("error: samples: expected finite numbers") and empty(tmp_path)


def test_the_loop_of_pytorch(samples: np.ndarray, read_only_bundle: Path, monkeypatch: Any) -> None:
    opened = engine.load(read_only_bundle)
    assert opened.loop is not None and opened.tables.recurrence is not None
    sampler = Unoptimized(opened.loop, opened.tables.recurrence, opened.program, opened.ends)
    monkeypatch.setattr(unoptimized, "run_loop", lambda *_: samples)
    with pytest.raises(StepfoldError, match=REFUSAL):
        sampler.sample(np.zeros((3, 1, 2, 2), np.float32), conditions={"class_labels": np.zeros(3, np.int64)})


def test_images_of_finite_latents(samples: np.ndarray) -> None:
    decoder: Any = SimpleNamespace(evaluate=lambda values: [samples[values["latents"]]])
    with pytest.raises(StepfoldError, match=REFUSAL.replace("samples", "images")):
        Ends(decoder=decoder).images(np.arange(3))


def test_finite_samples_are_given_as_they_are() -> None:
    values = np.linspace(-1e38, 1e38, 8, dtype=np.float32).reshape(2, 4)
    assert finite(values) is values
