"""A whole bench of the tiny checkpoint with real workers: reference, baselines, cache, page."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepfold.loop.errors import UsageError
from stepfold.report.bench import bench
from stepfold.report.records import Report
from stepfold.runtime import load

COUNT, QUALITY, SEED = 3, 4, 11


def run(bundle: Path, checkpoint: Path, baselines: list[str], **options: Any) -> Report:
    settings = {"count": COUNT, "quality_count": QUALITY, "repeats": 2, "seed": SEED}
    return bench([bundle], reference=checkpoint, baselines=baselines, **{**settings, **options})


@pytest.mark.slow
def test_bench_with_baselines(
    compiled_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["eager", "onnxruntime", "onnxruntime-int8", "onnxruntime@4:ab2", "eager:ddim"]
    seen: list[str] = []
    report = run(
        compiled_bundle,
        tiny_checkpoint,
        names,
        out=tmp_path / "out",
        cache=tmp_path / "cache",
        progress=lambda task, done, total: seen.append(task),
    )
    assert [row.name for row in report.rows] == [compiled_bundle.name, *names[:-1]]
    assert [entry.name for entry in report.skipped] == ["eager:ddim"]
    assert "DDIMScheduler is of another family" in report.skipped[0].reason
    rows = {row.name: row for row in report.rows}
    for row in report.rows:
        assert row.psnr_db is not None and row.ssim is not None and row.drift is not None
        assert row.speedup == pytest.approx(rows["eager"].latency_ms.median / row.latency_ms.median)
    assert rows["eager"].psnr_db.mean == pytest.approx(126.02, abs=0.01)
    assert rows["onnxruntime"].psnr_db.min > 90
    assert rows["onnxruntime@4:ab2"].evaluations == 4 and rows["onnxruntime"].evaluations == 8
    assert rows["onnxruntime@4:ab2"].psnr_db.mean < rows["onnxruntime"].psnr_db.mean
    # An engine of its own does not carry PyTorch's memory.
    assert rows["onnxruntime"].peak_memory_bytes < 0.6 * rows["eager"].peak_memory_bytes
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The checkpoint" in page and "Quality over cost" in page
    assert "worst of onnxruntime@4:ab2" in page and "worst of eager" not in page  # which is the reference

    seen.clear()
    again = run(compiled_bundle, tiny_checkpoint, ["onnxruntime"], cache=tmp_path / "cache")
    assert again.rows[0].psnr_db == rows[compiled_bundle.name].psnr_db
    assert "reference" not in seen  # its samples come from the cache
    assert {path.parent.parent.name for path in (tmp_path / "cache").glob("*/*/entry.json")} == {
        "references",
        "baselines",
    }


@pytest.mark.slow
def test_quality_is_measured_over_the_samples_of_the_seed(
    compiled_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The bundle's PSNR, computed again here from the noise of the seed and the classes in turn."""
    from stepfold.loop.metrics import drift, psnr
    from stepfold.loop.noise import noise

    cache = tmp_path / "cache"
    report = run(compiled_bundle, tiny_checkpoint, [], cache=cache)
    (kept,) = cache.glob("references/*/samples.npy")
    reference = np.load(kept)
    assert reference.shape == (QUALITY, 1, 8, 8)
    engine = load(compiled_bundle)
    whole = noise(SEED, (6, 1, 8, 8))  # two batches of three, so that no engine sees another size
    labels = np.arange(6) % 4
    batches = [engine.sample(whole[i : i + 3], class_labels=labels[i : i + 3]) for i in (0, 3)]
    samples = np.concatenate(batches)[:QUALITY]
    (row,) = report.rows
    assert row.psnr_db is not None and row.drift is not None
    assert row.psnr_db.mean == pytest.approx(psnr(samples, reference).mean(), abs=0.05)
    assert row.psnr_db.min == pytest.approx(psnr(samples, reference).min(), abs=0.05)
    assert row.drift == pytest.approx(drift(samples, reference), rel=0.01)
    assert row.speedup is None
    assert report.protocol.reference is not None
    assert report.protocol.reference["class"] == "DiTTransformer2DModel"


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_is_wrong_use(
    compiled_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"--reference .*broken: "):
        run(compiled_bundle, broken, [])
