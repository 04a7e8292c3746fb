"""Pipeline folders as they are published: with the keys, names and files that diffusers takes and we once refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch

from stepfold.frontend.load import load_checkpoint
from stepfold.frontend.sampler import probe
from stepfold.loop.errors import UsageError
from stepfold.loop.pipeline_call import pipeline_call


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pipelines.stable_diffusion(tmp_path / "sd")


def scheduler_of(folder: Path, scheduler: Any, **keys: Any) -> None:
    """Put another scheduler into a folder, with keys of none of its class's."""
    scheduler.save_pretrained(folder / "scheduler")
    edit_json(folder / "scheduler" / "scheduler_config.json", **keys)
    edit_json(folder / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])


FOREIGN = {
    "as Stable Diffusion 1.5 is published": (
        diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        {"clip_sample": False},
    ),
    "as a swap of schedulers leaves it": (diffusers.EulerDiscreteScheduler(), {"clip_sample": True, "eta": 0.0}),
    "as SDXL is published": (
        diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "sample_max_value": 1.0},
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_keys_that_a_scheduler_does_not_have_are_told_and_not_read(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, keys = FOREIGN[name]
    scheduler_of(folder, scheduler, **keys)
    with caplog.at_level(logging.INFO, "stepfold.frontend.ignored"):
        loop = load_checkpoint(folder).loop
    assert loop is not None and not keys.keys() & loop.sampler.config.keys()
    scheduler.set_timesteps(loop.sampler.steps)
    np.testing.assert_allclose(probe(loop.sampler).timesteps, scheduler.timesteps)
    lines = [record.getMessage() for record in caplog.records if record.name == "stepfold.frontend.ignored"]
    told = f"scheduler: {type(scheduler).__name__} has no {', '.join(keys)}; ignored, as diffusers ignores them"
    assert lines == [told]


def test_eta_that_a_pipeline_gives_is_recorded(folder: Path) -> None:
    """TCD adds noise by the default of its step; pipelines ask for none."""
    scheduler_of(folder, diffusers.TCDScheduler())
    loop = load_checkpoint(folder).loop
    assert loop is not None and loop.sampler.step == {"eta": 0.0}
    assert probe(loop.sampler).calls == 50


def test_eta_of_zero_that_is_the_default_anyway_is_not_written_down(folder: Path) -> None:
    scheduler_of(folder, diffusers.DDIMScheduler(clip_sample=False))
    loop = load_checkpoint(folder).loop
    assert loop is not None and loop.sampler.step == {}


def test_a_pipeline_is_called_as_it_is_asked_to(folder: Path) -> None:
    """Steps, one branch and size, as the card of a distilled model says."""
    call = pipeline_call(steps=3, guidance=0.0, height=8, width=24)
    loop = load_checkpoint(folder, call=call).loop
    assert loop is not None and loop.guidance is None
    assert (loop.sampler.steps, loop.latent.shape) == (3, (4, 4, 12))


def test_the_negative_prompt_is_that_of_the_other_branch(folder: Path) -> None:
    ours, empty = (load_checkpoint(folder, call=pipeline_call(negative_prompt=text)) for text in ("rain", None))
    name = "encoder_hidden_states"
    assert not torch.equal(ours.unconditional[name], empty.unconditional[name])
    assert torch.equal(ours.kwargs[name], empty.kwargs[name])


def test_a_grid_of_its_own_says_how_many_steps(folder: Path) -> None:
    scheduler_of(folder, diffusers.EulerDiscreteScheduler())
    loop = load_checkpoint(folder, call=pipeline_call(arguments={"timesteps": [900, 500, 100]})).loop
    assert loop is not None and loop.sampler.steps == 3
    assert probe(loop.sampler).timesteps.tolist() == [900, 500, 100]


def test_a_call_beside_a_loop_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").write_text("")
    with pytest.raises(
        UsageError, match=r"^steps: expected a pipeline folder without a loop file.*loop.yaml says them"
    ):
        load_checkpoint(folder, loop=tmp_path / "loop.yaml", call=pipeline_call(steps=3))
    with pytest.raises(UsageError, match=r"^steps: .*unet is no pipeline folder"):
        load_checkpoint(folder / "unet", call=pipeline_call(steps=3))
