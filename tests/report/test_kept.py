"""What a bench keeps for the next one: used when it is whole, made again when it is damaged, missed by nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepfold.bundle.cache import Cache
from stepfold.report.measure import KeptReference
from stepfold.report.plan import Models

SAMPLES = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 1, 2, 2)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def kept(cache: Path, tmp_path: Path) -> KeptReference:
    request = tmp_path / "request"
    request.write_bytes(b"noise")
    return KeptReference.of(cache, "key", request)


def test_reference_samples(kept: KeptReference, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert kept.read() is None
    kept.write(SAMPLES)
    np.testing.assert_array_equal(kept.read(), SAMPLES)
    assert KeptReference.of(cache, "other", tmp_path / "request").read() is None
    (file,) = cache.glob("references/*/samples.npy")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert kept.read() is None and "the stored reference sample is damaged and is made again" in caplog.text


def test_models_of_baselines(cache: Path, tmp_path: Path) -> None:
    first, second = (Models(tmp_path / name, Cache(cache, "baseline")) for name in ("first", "second"))
    assert not first.take("openvino", "key") and not (first.folder / "openvino").exists()
    (first.folder / "openvino").mkdir()
    for name in ("model.xml", "model.bin"):
        (first.folder / "openvino" / name).write_text(name)
    first.keep("openvino", "key")
    assert second.take("openvino", "key") and not second.take("onnxruntime", "key")
    assert sorted(path.name for path in (second.folder / "openvino").iterdir()) == ["model.bin", "model.xml"]


@pytest.mark.parametrize("folder", [None, "a file"])
def test_without_a_cache(cache: Path, tmp_path: Path, kept: KeptReference, folder: Any, caplog: Any) -> None:
    cache.write_text("no folder")
    kept.write(SAMPLES)
    assert kept.read() is None
    models = Models(tmp_path / "models", None if folder is None else Cache(cache, "baseline"))
    assert not models.take("onnxruntime", "key")
    (models.folder / "onnxruntime").mkdir()
    (models.folder / "onnxruntime" / "model.onnx").write_text("model")
    models.keep("onnxruntime", "key")
    assert "the reference sample of a bench cannot be kept: " in caplog.text
