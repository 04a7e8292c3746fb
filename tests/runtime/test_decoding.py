"""Quality of decoded images: what is reported, and what a budget is about where a bundle gets a decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from checkpoints import QUICK
from folders import empty, hashes

import stepfold
from stepfold.bundle.manifest import Manifest
from stepfold.calibration.conditions import sample_request
from stepfold.cli import main
from stepfold.frontend import load
from stepfold.frontend.capture import capture
from stepfold.frontend.surroundings.ends import CapturedEnds
from stepfold.ir.program import Program
from stepfold.loop.budget import PsnrFigures, QualityBudget
from stepfold.loop.driver import run_loop
from stepfold.loop.errors import GateError
from stepfold.loop.metrics import lower_bound, psnr
from stepfold.loop.noise import SampleSet, noise
from stepfold.loop.pipeline_call import PipelineCall
from stepfold.loop.plan import fold
from stepfold.loop.spec import LoopSpec
from stepfold.passes.base import silent
from stepfold.report.bundle_report import write_bundle_report
from stepfold.runtime import decoding as module
from stepfold.runtime.comparison import Pictures
from stepfold.runtime.compiler import Job, optimize
from stepfold.runtime.decoding import Decoding
from stepfold.runtime.ends import Ends
from stepfold.runtime.refit import refit
from stepfold.runtime.unoptimized import Unoptimized

Array = np.ndarray
Plant = Callable[[float], Program]


class Waves(torch.nn.Module):
    """Images within [-1, 1] of latents of any size; small differences of latents become `gain` times as large."""

    def __init__(self, gain: float):
        super().__init__()
        self.gain = gain

    def forward(self, latents: torch.Tensor) -> Mapping[str, torch.Tensor]:
        scaled = self.gain * latents
        return {"image": torch.cat([torch.sin(scaled), torch.cos(scaled), torch.sin(scaled + 1)], dim=1)}


def waves(gain: float, latents: Array) -> Array:
    scaled = gain * latents.astype(np.float64)
    return np.concatenate([np.sin(scaled), np.cos(scaled), np.sin(scaled + 1)], axis=1)


@pytest.fixture
def plant(tiny_program: Program, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Let the tiny DiT be a pipeline whose latents such a decoder makes images of."""
    assert tiny_program.loop is not None
    latent = {"shape": list(tiny_program.loop.latent.shape), "values": "latents"}
    loop = LoopSpec.model_validate(tiny_program.loop.model_dump() | {"latent": latent})
    program, real = replace(tiny_program, loop=loop), load.load_checkpoint

    def planted(gain: float) -> Program:
        decoder = capture(Waves(gain).eval(), {"latents": torch.randn(2, 1, 8, 8)})
        ends = CapturedEnds("PlantedPipeline", (), None, decoder, {}, "empty")
        checkpoint = SimpleNamespace(capture=lambda: program, capture_ends=lambda: ends, run=None)

        def loaded(path: Path, **more: Any) -> Any:
            given = [value for value in more.values() if value is not None and getattr(value, "given", True)]
            return checkpoint if path == tiny_checkpoint and not given else real(path, **more)

        monkeypatch.setattr(load, "load_checkpoint", loaded)
        return program

    return planted


def build(checkpoint: Path, out: Path, budget: QualityBudget | None = None, **options: Any) -> dict[str, Any]:
    recipe = {"passes": ["hoist", {"schedule": {**QUICK, **options}}]}
    return optimize(Job(checkpoint, out, recipe=recipe, min_psnr=budget), silent)


def chosen(manifest: Manifest) -> Any:
    return manifest.passes[-1].details["2.0"]["chosen"]  # type: ignore[index,call-overload]


def figures(values: Array) -> dict[str, Any]:
    mean, worst, tail = values.mean(), values.min(), np.percentile(values, 5)
    expected = {"mean": mean, "min": worst, "low": lower_bound(values), "p05": tail}
    return {name: pytest.approx(value, abs=0.01) for name, value in expected.items()}


# -- what is reported


def test_figures_of_latents_and_images_are_those_of_numpy(plant: Plant, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Latents that leave [-1, 1], neither clipped nor of a range of 2; images of a peak of 2."""
    program = plant(3.0)
    document = build(tiny_checkpoint, tmp_path / "bundle", evaluations=3)
    quality, labels = document["quality"], np.arange(64) % 4
    start = noise([0, 3], (64, 1, 8, 8))
    with stepfold.load(tmp_path / "bundle") as engine:
        samples = engine.sample(noise=start, class_labels=labels)
        np.testing.assert_allclose(engine.ends.images(samples), waves(3.0, samples), atol=1e-4)
    reference = whole_loop(program).sample(start, conditions={"class_labels": labels})
    assert np.abs(reference).max() > 1.5
    peaks = np.ptp(reference.reshape(64, -1), axis=1)
    of_latents = 10 * np.log10(peaks**2 / np.square(samples - reference).reshape(64, -1).mean(axis=1))
    error = waves(3.0, samples) - waves(3.0, reference)
    of_images = 10 * np.log10(4 / np.square(error).reshape(64, -1).mean(axis=1))
    assert quality["of"] == "images" and (quality["samples"], quality["set"]) == (64, "held-out")
    assert quality["psnr_db"] == figures(of_images)
    assert quality["latent_psnr_db"] == figures(of_latents)
    assert of_latents.mean() > of_images.mean() + 5


@pytest.mark.slow
def test_images_are_those_of_the_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Stable Diffusion, with a budget: diffusers decodes the latents of the bundle and those of the whole loop."""
    monkeypatch.setattr("stepfold.runtime.quality.HELD_OUT", 3)
    folder, call = pipelines.stable_diffusion(tmp_path / "sd"), PipelineCall(steps=6)
    recipe = {"passes": ["hoist", {"schedule": {**QUICK, "evaluations": 3}}]}
    job = Job(folder, tmp_path / "bundle", recipe=recipe, call=call, min_psnr=QualityBudget(mean=1))
    quality = optimize(job, silent)["quality"]
    program = load.load_checkpoint(folder, call=call).capture()
    assert program.loop is not None and program.loop.guidance is not None and program.recurrence is not None
    request, scale = sample_request(program, SampleSet("held-out", 0, 3)), program.loop.guidance.scales[0]
    reference = run_loop(program.bind(), program.loop, request, fold(program.recurrence, scale))
    with stepfold.load(tmp_path / "bundle") as engine:
        samples = run_loop(engine.program, program.loop, request, engine.plan())
        row = engine.manifest.passes[-1].details[str(scale)]["chosen"]  # type: ignore[index,call-overload]
    vae = diffusers.StableDiffusionPipeline.from_pretrained(folder).vae
    images, wanted = (decoded(vae, latents) for latents in (samples, reference))
    values = 10 * np.log10(4 / np.square(images - wanted).reshape(3, -1).mean(axis=1))
    assert quality["of"] == "images" and quality["psnr_db"] == figures(values)
    assert quality["latent_psnr_db"] != figures(values)
    assert set(row["validation_images_db"]) == {"mean", "low", "p05"}  # type: ignore[arg-type,index]


def decoded(vae: Any, latents: Array) -> Array:
    with torch.no_grad():
        return vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample.clamp(-1, 1).numpy()


def whole_loop(program: Program) -> Unoptimized:
    assert program.loop is not None and program.recurrence is not None
    return Unoptimized(program.loop, program.recurrence, program.bind(), Ends())


def test_the_first_images_and_the_worst_are_drawn(plant: Plant, tiny_checkpoint: Path, tmp_path: Path) -> None:
    plant(3.0)
    seen: list[Any] = []
    recipe = {"passes": ["hoist", {"schedule": {**QUICK, "evaluations": 3}}]}

    def finish(folder: Path, manifest: Manifest, summary: Any, pictures: Pictures, model: Any) -> None:
        seen.append(pictures)
        write_bundle_report(folder, manifest, summary, pictures, model)

    optimize(Job(tiny_checkpoint, tmp_path / "bundle", recipe=recipe), silent, finish)
    (pictures,) = seen
    page = (tmp_path / "bundle" / "report.html").read_text()
    first, pair = pictures.first, pictures.worst["compiled"]
    assert {name: value.shape for name, value in first.items()} == dict.fromkeys(
        ("reference", "compiled"), (10, 3, 8, 8)
    )
    with stepfold.load(tmp_path / "bundle") as engine:
        assert engine.manifest.quality is not None
        assert psnr(pair[1:], pair[:1])[0] == pytest.approx(engine.manifest.quality.psnr_db.min, abs=1e-3)
    assert "worst of compiled" in page and "images are" in page and "with a latent PSNR of" in page


# -- budgets


def test_a_decoder_that_amplifies_errors_fails_the_build(
    plant: Plant, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every budget of latents is met by all calls of the loop; rounding alone spoils these images."""
    plant(1e7)
    out = tmp_path / "out" / "bundle"
    out.parent.mkdir()
    search = [word for name, value in QUICK.items() for word in ("--set", f"schedule.{name}={value}")]
    words = ["optimize", str(tiny_checkpoint), "--out", str(out), "--recipe", "fp32", "--min-psnr", "40", *search]
    assert main(words) == 3 and empty(out.parent)
    told = " ".join(capsys.readouterr().err.split())
    assert "schedule: no schedule reaches 40 dB of images; the best was " in told
    assert "where latents reach " in told and "Lower min_psnr, or use a recipe" in told


def test_images_that_miss_the_budget_raise_that_of_latents(plant: Plant, tiny_checkpoint: Path, tmp_path: Path) -> None:
    evaluations = []
    for gain in (0.5, 8.0):
        plant(gain)
        document = build(tiny_checkpoint, tmp_path / str(gain), QualityBudget(mean=30))
        evaluations.append(document["schedule"]["evaluations"])
        row = chosen(manifest_of(tmp_path / str(gain)))
        assert row["validation_images_db"]["low"] >= 30
    assert evaluations[0] < evaluations[1]
    assert row["validation_low_db"] > 40


def manifest_of(folder: Path) -> Manifest:
    with stepfold.load(folder) as engine:
        return engine.manifest


def test_images_that_meet_what_latents_miss_are_enough(plant: Plant, tiny_checkpoint: Path, tmp_path: Path) -> None:
    plant(1e-3)
    recipe = {"passes": ["hoist", {"quantize": {}}, {"schedule": {**QUICK, "evaluations": 8}}]}
    optimize(Job(tiny_checkpoint, tmp_path / "bundle", recipe=recipe, min_psnr=QualityBudget(mean=90)), silent)
    row = chosen(manifest_of(tmp_path / "bundle"))
    assert row["validation_images_db"]["low"] >= 90 > row["validation_low_db"]


def test_a_tail_of_images(plant: Plant, tiny_checkpoint: Path, tmp_path: Path) -> None:
    plant(8.0)
    build(tiny_checkpoint, tmp_path / "mean", QualityBudget(mean=25))
    met = chosen(manifest_of(tmp_path / "mean"))["validation_images_db"]
    build(tiny_checkpoint, tmp_path / "tail", QualityBudget(mean=25, p05=met["p05"] + 2))
    assert chosen(manifest_of(tmp_path / "tail"))["validation_images_db"]["p05"] >= met["p05"] + 2


def test_a_budget_without_a_schedule_is_one_of_images(plant: Plant, tiny_checkpoint: Path, tmp_path: Path) -> None:
    plant(2000.0)
    job = Job(tiny_checkpoint, tmp_path / "bundle", recipe={"passes": ["quantize"]}, min_psnr=QualityBudget(mean=30))
    with pytest.raises(GateError, match=r"expected 30 dB of images; the best .* where latents reach [3-9]\d\.\d\d dB"):
        optimize(job, silent)
    assert empty(tmp_path)


def test_refit_judges_images_too(plant: Plant, tiny_checkpoint: Path, tmp_path: Path) -> None:
    plant(8.0)
    build(tiny_checkpoint, tmp_path / "bundle", QualityBudget(mean=30))
    decoder = hashes(tmp_path / "bundle", "decoder/")
    document = refit(tmp_path / "bundle", tiny_checkpoint, None, silent)
    assert decoder and hashes(tmp_path / "bundle", "decoder/") == decoder
    assert not document["searched"] and document["quality"]["of"] == "images"
    before, after = (state["quality"] for state in (document["before"], document))
    assert after["psnr_db"]["mean"] == pytest.approx(before["psnr_db"]["mean"], abs=0.5)
    assert after["latent_psnr_db"]["mean"] > after["psnr_db"]["mean"] + 10
    again = refit(tmp_path / "bundle", tiny_checkpoint, QualityBudget(mean=after["psnr_db"]["mean"] + 6), silent)
    assert again["searched"] and again["schedule"]["evaluations"] > document["schedule"]["evaluations"]


def test_the_budget_of_latents_that_images_ask_for() -> None:
    latents, images = PsnrFigures(46.0, 45.0, 40.0, 0.0), PsnrFigures(39.0, 38.0, 36.0, 0.0)
    assert QualityBudget(mean=40).of_latents(latents, images) == QualityBudget(mean=47)
    assert QualityBudget(mean=30, p05=37).of_latents(latents, images) == QualityBudget(mean=37, p05=41)
    assert QualityBudget(mean=10, p05=5).of_latents(latents, images) == QualityBudget(mean=17, p05=9)


# -- batches


class Fake:
    """A decoder that remembers how many latents it was given at once."""

    def __init__(self, factor: float):
        self.factor, self.batches = factor, list[int]()
        self.inputs = [SimpleNamespace(name="z")]

    def evaluate(self, values: Mapping[str, Array]) -> list[Array]:
        self.batches.append(len(values["z"]))
        return [self.factor * values["z"]]


def test_few_images_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven latents of 6 numbers, 13 numbers at once; the error is that of the compiled decoder, and of one latent."""
    monkeypatch.setattr(module, "VALUES", 13)
    reference = np.random.default_rng(0).uniform(-1, 1, (7, 1, 2, 3)).astype(np.float32)
    latents, told = reference.copy(), list[tuple[int, int]]()
    latents[4] += 0.5
    original, compiled = Fake(0.5), Fake(0.6)
    decoding = Decoding(lambda: original, lambda: compiled, lambda done, total: told.append((done, total)))  # type: ignore[arg-type,return-value]
    found = decoding.compared(latents, reference, 3)
    error = (0.6 * latents - 0.5 * reference).reshape(7, -1)
    np.testing.assert_allclose(found.psnr, 10 * np.log10(4 / np.square(error).mean(axis=1)), rtol=1e-5)
    np.testing.assert_array_equal(found.psnr, decoding.psnr(latents, reference))
    assert original.batches == compiled.batches == [2, 2, 2, 1] * 2
    assert told[:4] == [(2, 7), (4, 7), (6, 7), (7, 7)]
    np.testing.assert_allclose(found.samples, 0.6 * latents[:3], rtol=1e-6)
    np.testing.assert_allclose(found.worst, np.stack([0.5 * reference[4], 0.6 * latents[4]]), rtol=1e-6)
