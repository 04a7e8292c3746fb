"""Pipelines that are changed in one place: refused by the name of the change, or folded as they are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import changed
import diffusers
import numpy as np
import pytest
import torch
from programs import run
from safetensors.torch import save_file

from stepfold.frontend.capture import with_draws, with_strength
from stepfold.frontend.identity import weights_hash
from stepfold.frontend.load import load_checkpoint
from stepfold.frontend.sampler import probe
from stepfold.ir.program import Program
from stepfold.loop.classes import class_conditions
from stepfold.loop.driver import Request, run_loop
from stepfold.loop.errors import UsageError
from stepfold.loop.plan import fold
from stepfold.passes.hoist.hoist import Hoist, HoistOptions

REFUSED = {
    "second network on the input": "step 4 of 6: the pipeline calls two networks of one class in one step",
    "rescaled by another rule": "rescales its guided output by a factor that follows neither the norm nor the deviation",
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


EQUAL: dict[str, tuple[list[float] | None, dict[str, Any] | None]] = {
    # strength of the guidance, rule of its size
    "": (None, None),
    "negated output": (None, None),
    "other eta": (None, None),
    "guidance in an interval": ([1, 1, 1, 0, 0, 0], None),
    "guidance that begins later": ([0, 0, 1, 1, 1, 0], None),
    "dynamic guidance": ([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1], None),
    "rescaled by deviation": (None, {"over": "sample", "measure": "deviation", "share": 0.7, "limit": None}),
    "rescaled by rows": (None, {"over": "row", "measure": "norm", "share": 1.0, "limit": None}),
    "rescaled at most": (None, {"over": "sample", "measure": "norm", "share": 1.0, "limit": 0.9}),
}


@pytest.fixture(scope="module")
def network(folder: Path) -> Program:
    """The denoiser, captured once: what a change makes of the loop is put around it."""
    with changed.change(""):
        return load_checkpoint(folder).capture()


@pytest.mark.parametrize("name", EQUAL)
def test_equal(name: str, folder: Path, network: Program) -> None:
    with changed.change(name) as load:
        loop = load_checkpoint(folder).loop
        assert loop is not None and loop.guidance is not None
        strength, rescale = EQUAL[name]
        assert loop.guidance.strength == (None if strength is None else pytest.approx(strength, abs=1e-4))
        assert (None if loop.guidance.rescale is None else loop.guidance.rescale.model_dump()) == rescale
        recurrence = with_strength(probe(loop.sampler), loop)
        program = replace(network, loop=with_draws(loop, recurrence.draws), recurrence=recurrence)
        got, wanted = drawn_twice(load, folder, program, DRAWS if name == "other eta" else 0)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())


CLIPPING = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "thresholding": partial(diffusers.DPMSolverMultistepScheduler, thresholding=True),
}


@pytest.mark.parametrize(
    "name", ["ddim", *(pytest.param(one, marks=pytest.mark.slow) for one in ("ddpm", "thresholding"))]
)
def test_samplers_that_bound_what_they_predict(name: str, tmp_path: Path) -> None:
    """With guidance, at sizes at which nearly every value is out of range."""
    folder = changed.folder(tmp_path / "pipeline", CLIPPING[name]())
    with changed.change("") as load:
        program = load_checkpoint(folder).capture()
        assert program.recurrence is not None and program.recurrence.prediction is not None
        got, wanted = drawn_twice(load, folder, program, DRAWS if name == "ddpm" else 0)
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
        folder = changed.folder(tmp_path / "pipeline", NOISY[name]())
        got, wanted = drawn_twice(load, folder, load_checkpoint(folder).capture(), DRAWS)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())


def drawn_twice(load: Any, folder: Path, program: Program, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the captured loop, and of the pipeline."""
    wanted = load(folder)([0, 1], generator=torch.Generator().manual_seed(0), output_type="latent").images
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randn(2, 4, 8, 8, generator=generator) for _ in range(1 + draws)], dim=1)
    return samples(program, drawn if draws else drawn[:, 0], draws), wanted.numpy()


def samples(program: Program, noise: torch.Tensor, draws: int) -> Any:
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


def test_networks_that_take_turns(folder: Path) -> None:
    """Each runs at its own calls, and other weights of the second give other samples."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with changed.change("second network") as load:
        checkpoint = load_checkpoint(folder)
        program = checkpoint.capture()
        (slot,) = program.computing
        assert slot.by_call == (0, 0, 0, 1, 1, 1) and [stage.name for stage in slot.variants] == ["step", "step_1"]
        got, wanted = drawn_twice(load, folder, program, 0)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max())
        assert checkpoint.experts is not None
        with torch.no_grad():
            for parameter in checkpoint.experts.networks[1].parameters():
                parameter.mul_(1.5)
        after, _ = drawn_twice(load, folder, program, 0)  # the program holds the same weights
    assert np.abs(after - got).max() > 0.01 * np.abs(got).max()
    assert weights_hash(*checkpoint.experts.called()) != checkpoint.weights_sha256
    hoisted = run(program, Hoist(HoistOptions()))
    assert len(hoisted.computing[0].variants) == 2 and len(hoisted.stages) > 2
    np.testing.assert_allclose(samples(hoisted, noise, 0), samples(program, noise, 0), rtol=0, atol=CLOSE)
