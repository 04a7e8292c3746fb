"""`optimize` ends with the proof of a pipeline: printed, in the JSON, in the manifest and in the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import changed
import pipelines
import pytest
import torch
from checkpoints import HOIST, Remembered

from stepfold.backends.onnxruntime import lower as onnxruntime_lower
from stepfold.frontend import pipeline
from stepfold.frontend.surroundings import SURROUNDINGS
from stepfold.frontend.surroundings.dit import DitSurroundings
from stepfold.frontend.surroundings.ltx import LTXSurroundings
from stepfold.frontend.surroundings.surroundings import Decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with changed.change(""), pytest.MonkeyPatch.context() as patch:
        patch.setitem(SURROUNDINGS, "ChangedPipeline", DitSurroundings)
        patch.setattr("stepfold.runtime.quality.HELD_OUT", 2)
        yield changed.folder(tmp_path_factory.mktemp("changed") / "pipeline")


@pytest.fixture(scope="module")
def remembered() -> Remembered:
    return Remembered()


@pytest.mark.slow
def test_the_proof_is_told_everywhere(
    stepfold: Any, folder: Path, tmp_path: Path, remembered: Remembered, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered.stand_in(monkeypatch)
    result = stepfold("optimize", folder, "--out", tmp_path / "json", "--recipe", HOIST, "--json")
    assert result.code == 0, result.err
    proof = result.document()["proof"]
    assert proof["samples"] == 2 and proof["latent_db"] > 100 and proof["image_db"] > 100
    assert json.loads((tmp_path / "json" / "manifest.json").read_text())["proof"] == proof
    sentence = "Proof: the unoptimized program against the pipeline's own code: latents 1"
    page = (tmp_path / "json" / "report.html").read_text()
    assert sentence.replace("'", "&#39;") in page
    assert sentence in stepfold("inspect", tmp_path / "json").out
    told = stepfold("optimize", folder, "--out", tmp_path / "text", "--recipe", HOIST, "--no-proof")
    assert "Proof: skipped (--no-proof)" in told.out
    manifest = json.loads((tmp_path / "text" / "manifest.json").read_text())
    assert manifest["proof"] == {"skipped": "--no-proof"}
    assert stepfold("verify", tmp_path / "text").code == 0


@pytest.mark.slow
def test_a_wrong_capture_leaves_nothing(
    stepfold: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that the recorder takes for another one."""
    infer: Any = pipeline.record

    def other_scale(*words: Any) -> Any:
        inferred = infer(*words)
        assert inferred.loop.guidance is not None
        guidance = inferred.loop.guidance.model_copy(update={"scale": 3.5})
        return replace(inferred, loop=inferred.loop.model_copy(update={"guidance": guidance}))

    monkeypatch.setattr(pipeline, "record", other_scale)
    result = stepfold("optimize", folder, "--out", tmp_path / "out", "--recipe", HOIST)
    assert result.code == 1 and result.error.startswith("proof: expected latents within 60 dB of those of")
    assert "part at step" in result.error and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_decoder_that_the_engine_gets_wrong_leaves_nothing(
    stepfold: Any, folder: Path, tmp_path: Path, remembered: Remembered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator that the denoiser does not have, so that all but the decoder is right."""
    remembered.stand_in(monkeypatch)
    monkeypatch.setenv("STEPFOLD_CACHE", str(tmp_path / "cache"))
    target = torch.ops.aten.group_norm.default
    right = onnxruntime_lower.LOWERINGS[target]
    monkeypatch.setitem(onnxruntime_lower.LOWERINGS, target, lambda *words, **named: right(*words, **named) * 0.99)
    (tmp_path / "out").mkdir()
    result = stepfold("optimize", folder, "--out", tmp_path / "out" / "bundle", "--recipe", HOIST)
    assert result.code == 1 and "expected onnxruntime to compute what the graph says" in result.error
    assert "aten.group_norm.default" in result.error and list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_decoder_that_is_captured_wrong_leaves_nothing(
    stepfold: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a video, as though its channels had neither mean nor deviation and its latents were no patches."""
    video = pipelines.ltx(tmp_path / "ltx")
    monkeypatch.setattr(
        LTXSurroundings, "decoder", lambda self, latent: _InRows(self.pipeline.vae, self.argument("width") // 8)
    )
    (tmp_path / "out").mkdir()
    result = stepfold("optimize", video, "--out", tmp_path / "out" / "bundle", "--recipe", HOIST, "--steps", "2")
    assert result.code == 1 and result.error.startswith(
        "decoder: expected the images of LTXPipeline of the same latents"
    )
    assert list((tmp_path / "out").iterdir()) == []


class _InRows(Decoder):
    """Every patch a pixel of one frame's latents, the frames below each other in place of one after the other."""

    def __init__(self, vae: Any, width: int):
        super().__init__(vae)
        self.width = width

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.transpose(1, 2).reshape(-1, latents.shape[-1], 1, latents.shape[1] // self.width, self.width)


def test_a_checkpoint_that_is_no_pipeline_has_no_proof(read_only_bundle: Path) -> None:
    assert json.loads((read_only_bundle / "manifest.json").read_text())["proof"] is None
