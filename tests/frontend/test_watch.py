"""Pipelines that are changed in one place: refused by the name of the change, or folded as they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import changed
import diffusers
import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import save_file

from stepfold.frontend.load import Checkpoint, load_checkpoint
from stepfold.loop.classes import class_conditions
from stepfold.loop.driver import Request, run_loop
from stepfold.loop.errors import UsageError
from stepfold.loop.plan import fold

REFUSED = {
    "second network": r"step 4 of 6: .* calls second \(DiTTransformer2DModel\) within its loop, in the place of",
    "second network on the input": r"step 4 of 6: .* second \(DiTTransformer2DModel\) within its loop, besides",
    "guidance in an interval": "step 4 of 6: the pipeline turns guidance off, which is on before",
    "one more call": "behind step 6: the pipeline calls its denoiser 1 more times",
    "timesteps from step 3 on": "step 3 of 6: .* is given the timestep",
    "clipped latent": r"step 2 of 6: the pipeline changes the latent .* \(clipped to -1 and 1\)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed.folder(tmp_path_factory.mktemp("changed") / "pipeline")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, folder: Path) -> None:
    with changed.change(name), pytest.raises(UsageError, match=REFUSED[name]):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", [pytest.param("", marks=pytest.mark.slow), "negated output", "other eta"])
def test_equal(name: str, folder: Path) -> None:
    with changed.change(name) as load:
        got, wanted = drawn_twice(load, folder, DRAWS if name == "other eta" else 0)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())


DRAWS = changed.STEPS - 1
"""After every step but the last."""
CLOSE = 1e-4
NOISY = {
    "ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "ddpm": partial(diffusers.DDPMScheduler, clip_sample=False),
    "lcm": partial(diffusers.LCMScheduler, original_inference_steps=12),
    "sde": partial(diffusers.DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in NOISY if name != "ancestral"]


@pytest.mark.parametrize("name", ["ancestral", *SLOW])
def test_noise_in_the_steps(name: str, tmp_path: Path) -> None:
    """On the same draws, taken from the same generator in the order in which the pipeline takes them."""
    with changed.change("") as load:
        got, wanted = drawn_twice(load, changed.folder(tmp_path / "pipeline", NOISY[name]()), DRAWS)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())


def drawn_twice(load: Any, folder: Path, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the captured loop, and of the pipeline."""
    checkpoint = load_checkpoint(folder)
    wanted = load(folder)([0, 1], generator=torch.Generator().manual_seed(0), output_type="latent").images
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randn(2, 4, 8, 8, generator=generator) for _ in range(1 + draws)], dim=1)
    return samples(checkpoint, drawn if draws else drawn[:, 0], draws), wanted.numpy()


def samples(checkpoint: Checkpoint, noise: torch.Tensor, draws: int) -> Any:
    program = checkpoint.capture()
    loop = program.loop
    assert loop is not None and loop.guidance is not None and program.recurrence is not None
    assert isinstance(loop.guidance.unconditional, dict) and loop.draws == draws
    conditions = class_conditions(program.inputs, loop, len(noise))
    unconditional = {"class_labels": np.full(len(noise), loop.guidance.unconditional["class_labels"])}
    request = Request(noise.numpy(), conditions, unconditional)
    return run_loop(program.bind(), loop, request, fold(program.recurrence, loop.guidance.scales[0]))


def test_a_network_that_is_not_called_is_mentioned(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with changed.change(""):
        load_checkpoint(folder)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(text.startswith("second (DiTTransformer2DModel): the loop of the pipeline does not") for text in told)


def test_guidance_of_at_most_one_is_one_branch(folder: Path, tmp_path: Path) -> None:
    save_file({"guidance_scale": torch.tensor(0.5)}, tmp_path / "in.safetensors")
    with changed.change(""):
        loop = load_checkpoint(folder, inputs=tmp_path / "in.safetensors").loop
    assert loop is not None and loop.guidance is None


def wan(path: Path) -> Path:
    """Wan 2.2: two experts behind one another."""
    torch.manual_seed(0)
    config: dict[str, Any] = zoo.WAN.config | {"num_layers": 1}
    build: Any = diffusers.WanPipeline
    pipeline = build(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=diffusers.WanTransformer3DModel(**config),
        transformer_2=diffusers.WanTransformer3DModel(**config),
        boundary_ratio=0.875,
    )
    pipeline.save_pretrained(path)
    embeds = {f"{sign}prompt_embeds": torch.randn(2, 6, 24) for sign in ("", "negative_")}
    sizes = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 8}
    save_file(embeds | {name: torch.tensor(value) for name, value in sizes.items()}, path / "inputs.safetensors")
    return path


def test_two_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"calls transformer_2 \(WanTransformer3DModel\) within its loop"):
        load_checkpoint(wan(tmp_path / "wan"))
