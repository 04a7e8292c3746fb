"""Pipeline folders as they are published: with the keys, names and files that diffusers takes and we once refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from safetensors.torch import save_file
from transformers import ClapTextConfig, ClapTextModelWithProjection, SpeechT5HifiGan, SpeechT5HifiGanConfig

from stepfold.frontend.components import read_index
from stepfold.frontend.load import load_checkpoint
from stepfold.frontend.pipeline import record
from stepfold.frontend.proof import PipelineRun, prove
from stepfold.frontend.sampler import probe
from stepfold.loop.errors import UsageError
from stepfold.loop.pipeline_call import pipeline_call

NOTES = "stepfold.frontend.notes"


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == NOTES]


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
    with caplog.at_level(logging.INFO, NOTES):
        loop = load_checkpoint(folder).loop
    assert loop is not None and not keys.keys() & loop.sampler.config.keys()
    scheduler.set_timesteps(loop.sampler.steps)
    np.testing.assert_allclose(probe(loop.sampler).timesteps, scheduler.timesteps)
    line = f"scheduler: {type(scheduler).__name__} has no {', '.join(keys)}; ignored, as diffusers ignores them"
    assert told(caplog) == [line]


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


# -- names


def test_flax_names_beside_weights_of_pytorch(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The index and a configuration as the Flax release of Stable Diffusion 1.5 has them."""
    names = {"scheduler": "FlaxPNDMScheduler", "unet": "FlaxUNet2DConditionModel", "vae": "FlaxAutoencoderKL"}
    edit_json(
        folder / "model_index.json",
        _class_name="FlaxStableDiffusionPipeline",
        text_encoder=["transformers", "FlaxCLIPTextModel"],
        safety_checker=["stable_diffusion", "FlaxStableDiffusionSafetyChecker"],
        **{name: ["diffusers", class_name] for name, class_name in names.items()},
    )
    edit_json(folder / "unet" / "config.json", _class_name="FlaxUNet2DConditionModel")
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="FlaxPNDMScheduler")
    with caplog.at_level(logging.INFO, NOTES):
        checkpoint = load_checkpoint(folder)
    assert checkpoint.class_name == "UNet2DConditionModel" and checkpoint.around is not None
    lines = told(caplog)
    assert "model_index.json: FlaxStableDiffusionPipeline is read as StableDiffusionPipeline" in lines
    assert "model_index.json: unet: FlaxUNet2DConditionModel is read as UNet2DConditionModel" in lines
    left_out = "left out of the bundle, which neither checks nor reads images; the folder lacks it"
    assert f"safety_checker (StableDiffusionSafetyChecker): {left_out}" in lines


def test_the_index_names_the_class_that_a_configuration_does_not(folder: Path, tmp_path: Path) -> None:
    """As the copies of user interfaces have it; with a loop file, too."""
    config = folder / "unet" / "config.json"
    content = {name: value for name, value in json.loads(config.read_text()).items() if name != "_class_name"}
    config.write_text(json.dumps(content))
    checkpoint = load_checkpoint(folder)
    assert checkpoint.class_name == "UNet2DConditionModel" and checkpoint.loop is not None
    (tmp_path / "loop.yaml").write_text(json.dumps(checkpoint.loop.model_dump(mode="json")))
    assert load_checkpoint(folder, loop=tmp_path / "loop.yaml").class_name == "UNet2DConditionModel"


def test_keys_that_a_network_does_not_have_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_json(folder / "vae" / "config.json", _note="ours", force_upcastt=True, attention_type="default")
    with caplog.at_level(logging.INFO, NOTES):
        load_checkpoint(folder)
    assert told(caplog) == [
        "vae: AutoencoderKL has no force_upcastt, attention_type; ignored, as diffusers ignores them"
    ]


def test_values_beside_components_are_no_components(folder: Path) -> None:
    edit_json(folder / "model_index.json", boundary_ratio=0.875, size=[64, 64], text_encoder_3=[None, None])
    index = read_index(folder)
    assert {name: index.values[name] for name in ("boundary_ratio", "size")} == {
        "boundary_ratio": 0.875,
        "size": [64, 64],
    }
    assert index.components["text_encoder_3"] is None
    assert load_checkpoint(folder).loop is not None


def test_a_pipeline_that_has_another_name_by_now(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="TextToVideoMSPipeline")
    assert read_index(folder).class_name == "TextToVideoSDPipeline"


def test_components_of_onnx_are_refused_by_name(folder: Path) -> None:
    edit_json(folder / "model_index.json", unet=["diffusers", "OnnxRuntimeModel"])
    with pytest.raises(UsageError, match=r"component 'unet' is an ONNX file \(OnnxRuntimeModel\); .* for PyTorch"):
        load_checkpoint(folder)


# -- files


def test_infinities_in_a_configuration(folder: Path) -> None:
    """DPM-Solver is published with a bare -Infinity, which is no JSON."""
    scheduler_of(folder, diffusers.DPMSolverMultistepScheduler())
    file = folder / "scheduler" / "scheduler_config.json"
    assert "-Infinity" in file.read_text()
    edit_json(folder / "unet" / "config.json", unknown=float("-inf"))
    loop = load_checkpoint(folder).loop
    assert loop is not None and "lambda_min_clipped" not in loop.sampler.config


POINTED = [
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
]


@pytest.mark.parametrize("name", POINTED)
def test_a_pointer_in_the_place_of_a_file_is_named_as_such(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n")
    with pytest.raises(UsageError, match=rf"{name}: expected .*; received a Git LFS pointer .* git lfs pull"):
        load_checkpoint(folder)


def test_weights_of_flax_alone_are_refused_by_name(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_flax_model.msgpack")
    with pytest.raises(UsageError, match=r"unet: its weights are those of Flax \(diffusion_flax_model.msgpack\)"):
        load_checkpoint(folder)


# -- other calls


def test_an_unconditional_pipeline_is_asked_for_a_batch(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(
        pipelines.unconditional(tmp_path / "ddim", clip_sample=False), call=pipeline_call(steps=5)
    )
    loop = checkpoint.loop
    assert loop is not None and loop.conditions == [] and loop.guidance is None
    assert loop.latent.shape == (3, 8, 8) and loop.sampler.steps == 5
    load_checkpoint(pipelines.unconditional(tmp_path / "clips"), call=pipeline_call(steps=5))


def test_a_scale_that_a_network_is_told_is_a_condition_of_the_pipeline(tmp_path: Path) -> None:
    """LCM: 256 numbers for the guidance scale, no second branch, and prompts all the same."""
    folder = pipelines.stable_diffusion(tmp_path / "lcm", time_cond_proj_dim=256)
    checkpoint = load_checkpoint(folder, call=pipeline_call(steps=4))
    assert checkpoint.loop is not None and checkpoint.loop.guidance is None
    ends = checkpoint.capture_ends()
    assert ends is not None and ends.text is not None and len(ends.given["timestep_cond"]) == 256


def test_nothing_for_an_argument_without_a_default(tmp_path: Path) -> None:
    """AudioLDM gives its UNet no text but a class embedding."""
    torch.manual_seed(0)
    text: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    sizes: dict[str, Any] = {
        "model_in_dim": 8,
        "upsample_initial_channel": 8,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
    }
    made: Any = diffusers.AudioLDMPipeline
    pipeline = made(
        vae=pipelines.vae(in_channels=1, out_channels=1),
        text_encoder=ClapTextModelWithProjection(ClapTextConfig(vocab_size=8, max_position_embeddings=8, **text)),
        tokenizer=None,
        unet=pipelines.unet(
            cross_attention_dim=(16, 32), class_embed_type="simple_projection", projection_class_embeddings_input_dim=8
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        vocoder=SpeechT5HifiGan(SpeechT5HifiGanConfig(**sizes)),
    )
    pipeline.save_pretrained(tmp_path / "audio")
    inputs = {name: torch.randn(2, 8) for name in ("prompt_embeds", "negative_prompt_embeds")}
    save_file(inputs | {"audio_length_in_s": torch.tensor(0.01)}, tmp_path / "audio" / "inputs.safetensors")
    checkpoint = load_checkpoint(tmp_path / "audio", call=pipeline_call(steps=4))
    assert checkpoint.loop is not None and checkpoint.loop.constants["encoder_hidden_states"] is None
    assert checkpoint.kwargs["encoder_hidden_states"] is None and checkpoint.loop.conditions == ["class_labels"]


def test_a_pipeline_that_needs_an_image_is_refused_by_that(folder: Path) -> None:
    edit_json(
        folder / "model_index.json", _class_name="StableDiffusionInstructPix2PixPipeline", image_encoder=[None] * 2
    )
    with pytest.raises(
        UsageError, match=r"StableDiffusionInstructPix2PixPipeline is called with an image .* from noise to"
    ):
        load_checkpoint(folder)


def test_an_inpainting_pipeline_is_refused_by_its_strength(folder: Path) -> None:
    """Its constructor reads the version of diffusers that wrote the UNet and the index."""
    edit_json(folder / "model_index.json", _class_name="StableDiffusionInpaintPipeline", image_encoder=[None] * 2)
    with pytest.raises(UsageError, match="starts in the middle of its grid, where its `strength` says"):
        load_checkpoint(folder)


def test_frames_that_a_scheduler_gets_as_rows(tmp_path: Path) -> None:
    """The fold holds the latent [C, F, H, W] of the denoiser."""
    call = pipeline_call(steps=3, height=16, width=16, frames=3)
    loop = load_checkpoint(pipelines.text_to_video(tmp_path / "video"), call=call).loop
    assert loop is not None and loop.latent.shape == (4, 3, 8, 8)
    assert loop.guidance is not None and loop.guidance.scale == 9.0


class WithItsOwnGuidance:
    """A pipeline whose guidance is clipped for each sample unless it is told otherwise."""

    scheduler: Any = diffusers.DDIMScheduler(clip_sample=False)
    components: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.denoiser = pipelines.unet()

    def __call__(
        self,
        prompt: list[str],
        num_inference_steps: int = 2,
        cfg_normalization: bool = True,
        guidance_rescale: float = 0.7,
    ) -> None:
        self.scheduler.set_timesteps(num_inference_steps)
        latent, text = torch.randn(len(prompt), 4, 8, 8), torch.randn(len(prompt), 4, 24)
        for t in self.scheduler.timesteps:
            output = self.denoiser(latent, t, text, return_dict=False)[0]
            latent = self.scheduler.step(output.clamp(-0.1, 0.1), t, latent, return_dict=False)[0]


def test_what_a_pipeline_does_to_its_guidance_is_named_with_its_options(tmp_path: Path) -> None:
    pipeline = WithItsOwnGuidance()
    run = PipelineRun(pipeline, pipeline.denoiser, {"prompt": ["a", "b"]}, 2)
    with pytest.raises(
        UsageError, match=r"clips .* Call it without: --call cfg_normalization=false --call guidance_resc"
    ):
        record(tmp_path, run)
    plain = replace(run, arguments={**run.arguments, "cfg_normalization": False, "guidance_rescale": 0.0})
    with pytest.raises(UsageError, match=r"clips .* Turn that off"):
        record(tmp_path, plain)


def test_a_call_keeps_its_prompts() -> None:
    """ZImagePipeline writes its template into the list of prompts that it is given."""
    run = PipelineRun(None, torch.nn.Identity(), {"prompt": ["a cat"], "num_inference_steps": 3}, 1)
    run.given()["prompt"][0] = "<user> a cat"
    assert run.given() == {"prompt": ["a cat"], "num_inference_steps": 3}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text_to_video", "chroma"])
def test_the_program_is_that_of_the_pipeline(name: str, tmp_path: Path) -> None:
    video = {"frames": 3} if name == "text_to_video" else {"arguments": {"max_sequence_length": 12}}
    call = pipeline_call(steps=3, height=16, width=16, **video)
    checkpoint = load_checkpoint(getattr(pipelines, name)(tmp_path / name), call=call)
    assert checkpoint.run is not None
    assert prove(checkpoint.run, checkpoint.capture(), None, lambda *_: None).latent_db > 100
