"""From the folder of a pipeline, without a file written by hand, to what it draws, in a process without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from commands import NOT_OF_THE_CORE, command
from conditions import TEXTS, encoded
from safetensors.numpy import save_file

from stepfold.bundle import read
from stepfold.bundle.verify import verify
from stepfold.loop.metrics import drift
from stepfold.loop.pipeline_call import PipelineCall
from stepfold.runtime.compiler import Job, optimize
from stepfold.runtime.engine import load, open_stage

pytestmark = pytest.mark.slow
PROMPT, NEGATIVE = "A cat in the  sun ", "rain"
STEPS = 3
LARGEST_DRIFT = 1e-3  # float32 on two engines, of images


@dataclass(frozen=True)
class Family:
    """A pipeline, what it is called with beside a prompt, and how many samples are drawn."""

    pipeline: str
    make: Callable[[Path], Path]
    call: dict[str, Any] = field(default_factory=dict)
    count: int = 2

    def __str__(self) -> str:
        return self.pipeline

    def asked(self) -> PipelineCall:
        """What `optimize` is asked for."""
        return PipelineCall(steps=STEPS, arguments=self.call)

    def draw(self, folder: Path, noise: np.ndarray, **more: Any) -> np.ndarray:
        """What diffusers draws from this noise, [B, C, H, W] or [B, C, F, H, W] in [-1, 1]."""
        pipeline = getattr(diffusers, self.pipeline).from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        answer = pipeline(
            prompt=[PROMPT] * len(noise),
            latents=torch.from_numpy(noise),
            num_inference_steps=STEPS,
            output_type="np",
            **self.call,
            **more,
        )
        return 2 * np.moveaxis(np.asarray(answer[0]), -1, 1) - 1


FAMILIES = [
    Family("StableDiffusionPipeline", pipelines.stable_diffusion),
    Family("StableDiffusionXLPipeline", pipelines.sdxl),
    Family("PixArtAlphaPipeline", pipelines.pixart, {"use_resolution_binning": False}),
    Family("WanPipeline", pipelines.wan, pipelines.WAN_CALL),
    Family("CogVideoXPipeline", pipelines.cogvideox, pipelines.COGVIDEOX_CALL),
    Family("LTXPipeline", pipelines.ltx, pipelines.LTX_CALL),
]


@dataclass(frozen=True)
class Built:
    """A family, its folder, and the bundle of that."""

    family: Family
    folder: Path
    bundle: Path


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    family: Family = request.param
    place = tmp_path_factory.mktemp(str(family))
    folder = family.make(place / "pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepfold.runtime.quality.HELD_OUT", 2)
        job = Job(folder, place / "bundle", recipe={"passes": ["hoist"]}, call=family.asked())
        document = optimize(job, lambda task, done, total: None)
    assert document["proof"]["latent_db"] > 100 and document["proof"]["image_db"] > 100
    yield Built(family, folder, place / "bundle")


def generated(built: Built, noise: Path, *words: str) -> np.ndarray:
    """What the command draws without PyTorch."""
    target = noise.with_name("samples.npy")
    picture = noise.with_name("picture.png")
    command(
        *("generate", built.bundle, *words, "--noise", noise, "--npy", target, "--out", picture),
        blocked=NOT_OF_THE_CORE,
    )
    samples = np.load(target)
    frames = samples.shape[2] if samples.ndim == 5 else 0
    assert len(list(noise.parent.glob("picture*.png"))) == (frames or 1)
    return samples


def test_what_is_drawn_is_what_the_pipeline_draws(built: Built, tmp_path: Path) -> None:
    """With a negative prompt, with an empty one, and with none, which some pipelines tell apart."""
    family, (state,) = built.family, [port for port in read(built.bundle).manifest.inputs if port.role == "state"]
    noise = np.random.default_rng(3).standard_normal((family.count, *state.shape[1:])).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    seen = []
    for negative in (NEGATIVE, "", None):
        words, more = ([], {}) if negative is None else (["--negative-prompt", negative], {"negative_prompt": negative})
        received = generated(built, tmp_path / "noise.npy", "--prompt", PROMPT, *words)
        if negative is not None:
            more = {"negative_prompt": [negative] * len(noise)}
        wanted = family.draw(built.folder, noise, **more)
        assert received.shape == wanted.shape and drift(received, wanted) < LARGEST_DRIFT, negative
        seen.append(received)
    assert drift(seen[0], seen[1]) > LARGEST_DRIFT, "the negative prompt has a say"


def test_prompts_become_the_conditions_of_the_pipeline(built: Built) -> None:
    """Another number of prompts than it was captured with: none, one that is cut, and one that some clean."""
    pipeline = getattr(diffusers, built.family.pipeline).from_pretrained(built.folder)
    wanted = encoded(pipeline, TEXTS)
    with load(built.bundle) as engine:
        received = engine.ends.conditions(TEXTS)
    for name, value in wanted.items():
        np.testing.assert_allclose(received[name], value, rtol=1e-4, atol=2e-5, err_msg=name)


def test_saved_embeddings_draw_what_the_prompt_draws(built: Built, tmp_path: Path) -> None:
    """One row for all samples, both branches, without what the pipeline sets itself."""
    with load(built.bundle) as engine:
        told = engine.ends.conditions([PROMPT])
        other = engine.ends.unconditional(NEGATIVE, told)
        noise = np.random.default_rng(4).standard_normal((2, *engine.manifest.loop.latent.shape)).astype(np.float32)
    save_file(told | {f"unconditional/{name}": value for name, value in other.items()}, tmp_path / "saved.safetensors")
    np.save(tmp_path / "noise.npy", noise)
    wanted = generated(built, tmp_path / "noise.npy", "--prompt", PROMPT, "--negative-prompt", NEGATIVE)
    received = generated(built, tmp_path / "noise.npy", "--conditions", str(tmp_path / "saved.safetensors"))
    np.testing.assert_allclose(received, wanted, atol=1e-5)


def test_the_bundle_is_verified(built: Built) -> None:
    manifest = read(built.bundle).manifest
    assert manifest.pipeline is not None and manifest.pipeline.folders == ("text", "decoder")
    assert verify(built.bundle, open_stage) == ([], [])
