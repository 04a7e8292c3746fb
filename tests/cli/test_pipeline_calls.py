"""Options that say what a pipeline is called with, on `inspect`, `optimize` and `calibrate`."""

from __future__ import annotations

import json
from pathlib import Path

import pipelines
import pytest
from checkpoints import Remembered

from stepfold.frontend.load import load_checkpoint
from stepfold.frontend.overview import overview


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.stable_diffusion(tmp_path_factory.mktemp("sd") / "pipeline")


def test_inspect_shows_the_loop_of_the_call(stepfold, folder: Path) -> None:
    words = ("inspect", folder, "--steps", 3, "--guidance", 0, "--height", 8, "--width", 24, "--json")
    loop = stepfold(*words).document()["loop"]
    assert (loop["sampler"]["steps"], loop["latent"]["shape"], loop.get("guidance")) == (3, [4, 4, 12], None)


def test_a_pipeline_in_a_screenful(stepfold, folder: Path) -> None:
    """What a person asks before compiling: networks, loop, guidance, sizes, what a request gives."""
    result = stepfold("inspect", folder, "--steps", 4)
    assert result.code == 0 and len(result.out.splitlines()) < 24
    for text in (
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        "text_encoder",
        "Loop: PNDMScheduler, 4 steps, latent [4, 8, 8], guidance 7.5.",
        "Guidance: two branches at scale 7.5, the request gives the other.",
        "Image: 16 x 16 pixels",
        "tokenizer reads 12 tokens",
    ):
        assert text in result.out


def test_a_pipeline_of_noise_alone(stepfold, tmp_path: Path) -> None:
    """Nothing is known about what surrounds an unconditional model, and nothing does."""
    folder = pipelines.unconditional(tmp_path / "ddim", clip_sample=False)
    document = stepfold("inspect", folder, "--json").document()
    pipeline = document["pipeline"]
    assert (pipeline["takes"], pipeline["guidance"], pipeline["image"]) == (["noise alone"], "one branch", [8, 8])
    assert [(entry["name"], entry["in_bundle"]) for entry in pipeline["networks"]] == [("unet", True)]
    assert document["class"] == "UNet2DModel" and document["rates"] and document["loop"]["sampler"]["steps"] == 50


def test_a_slow_tokenizer_is_told_before_compiling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(folder)
    assert checkpoint.run is not None
    monkeypatch.setattr(type(checkpoint.run.pipeline.tokenizer), "backend_tokenizer", None)
    found = overview(checkpoint)
    assert found is not None and found["refused"][0].startswith("tokenizer: CLIPTokenizer has no form of the")


BAD: dict[str, tuple[list[object], str]] = {
    "no such argument": (["--frames", 9], "--frames: StableDiffusionPipeline takes no num_frames"),
    "no value": (["--call", "clip_skip"], "--call: expected NAME=VALUE, as in max_sequence_length=64"),
    "twice": (["--call", "clip_skip=1", "--call", "clip_skip=2"], "--call clip_skip: expected it once"),
    "no number": (["--guidance", "nan"], "the pipeline's call: guidance"),
    "not YAML": (["--call", "clip_skip=[1"], "--call clip_skip: expected a YAML value"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_for(stepfold, folder: Path, name: str) -> None:
    words, message = BAD[name]
    result = stepfold("inspect", folder, *words)
    assert result.code == 2 and message in result.error


@pytest.mark.parametrize("verb", ["optimize", "calibrate"])
def test_a_loop_file_beside_it_is_refused(stepfold, tiny_checkpoint: Path, tmp_path: Path, verb: str) -> None:
    result = stepfold(verb, tiny_checkpoint, "--out", tmp_path / "out", "--steps", 4)
    assert result.code == 2 and result.error.startswith("steps: expected a pipeline folder without a loop file")


def test_a_bundle_is_called_with_nothing(stepfold, read_only_bundle: Path) -> None:
    result = stepfold("inspect", read_only_bundle, "--steps", 4, "--call", "eta=0.0")
    assert result.code == 2 and result.error.startswith("--steps, --eta: expected a checkpoint beside it")


@pytest.mark.slow
def test_the_manifest_keeps_the_call_and_the_store_fits_it(
    stepfold, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Remembered().stand_in(monkeypatch)
    monkeypatch.setattr("stepfold.runtime.quality.HELD_OUT", 2)
    (tmp_path / "plain.yaml").write_text("passes: [hoist]\n")
    call = ("--steps", 4, "--guidance", 1, "--call", "guidance_rescale=0.0")
    calibrated = stepfold("calibrate", folder, "--out", tmp_path / "store", "--samples", 2, *call)
    assert calibrated.code == 0, calibrated.err
    words = ("optimize", folder, "--recipe", tmp_path / "plain.yaml", "--calibration", tmp_path / "store")
    built = stepfold(*words, "--out", tmp_path / "out", *call)
    assert built.code == 0, built.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["loop"]["sampler"]["steps"] == 4 and manifest["loop"]["guidance"] is None
    asked = {name: value for name, value in manifest["call"].items() if value not in (None, {})}
    assert asked == {"steps": 4, "guidance": 1.0, "arguments": {"guidance_rescale": 0.0}}
    other = stepfold(*words, "--out", tmp_path / "other", "--steps", 5)
    assert other.code == 2 and "loop.sampler.steps: 4 in the store, 5 here" in other.error
