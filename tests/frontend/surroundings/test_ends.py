"""What pipelines do around their loop, captured and compared with the pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
import transformers
from conditions import CONDITIONS, TEXTS, encoded
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from safetensors.torch import save_file

from stepfold.frontend.load import Checkpoint, load_checkpoint
from stepfold.frontend.overview import overview
from stepfold.frontend.surroundings import SURROUNDINGS
from stepfold.frontend.surroundings.ends import CapturedEnds, Seen, capture_ends
from stepfold.frontend.surroundings.surroundings import Decoder, Prompt
from stepfold.loop.errors import StepfoldError, UsageError
from stepfold.loop.pipeline_call import PipelineCall

MAKERS: dict[str, Callable[[Path], Path]] = {
    "StableDiffusion3Pipeline": pipelines.sd3,
    "FluxPipeline": pipelines.flux,
    "StableDiffusionPipeline": pipelines.stable_diffusion,
    "StableDiffusionXLPipeline": pipelines.sdxl,
    "WanPipeline": pipelines.wan,
    "CogVideoXPipeline": pipelines.cogvideox,
    "LTXPipeline": pipelines.ltx,
    "PixArtAlphaPipeline": pipelines.pixart,
    "PixArtSigmaPipeline": lambda folder: pipelines.pixart(folder, "PixArtSigmaPipeline"),
    "DiTPipeline": pipelines.dit,
}
IN_BUNDLES = ("PixArtAlphaPipeline", "WanPipeline", "CogVideoXPipeline", "LTXPipeline")
"""Families whose ends tests/cli/test_families.py compares with the pipeline after they were compiled."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Checkpoint, CapturedEnds]]:
    made: dict[str, tuple[Checkpoint, CapturedEnds]] = {}

    def load(name: str) -> tuple[Checkpoint, CapturedEnds]:
        if name not in made:
            checkpoint = load_checkpoint(MAKERS[name](tmp_path_factory.mktemp(name) / "pipeline"))
            ends = checkpoint.capture_ends()
            assert ends is not None
            made[name] = checkpoint, ends
        return made[name]

    return load


def token_numbers(ends: CapturedEnds, texts: list[str]) -> dict[str, np.ndarray]:
    return {name: value for reader in ends.readers for name, value in reader.read(texts).items()}


def test_every_family_is_tried() -> None:
    assert set(MAKERS) == set(SURROUNDINGS)
    assert all(kind.source.startswith("diffusers") for kind in SURROUNDINGS.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONDITIONS if name not in IN_BUNDLES])
def test_prompts_become_the_conditions_of_the_pipeline(name: str, loaded: Any) -> None:
    """Another number of prompts than it was captured with: none, one that is cut, and one that some clean."""
    checkpoint, ends = loaded(name)
    pipeline = checkpoint.around.surroundings.pipeline
    expected = encoded(pipeline, TEXTS)
    received = dict(zip(ends.text.outputs, ends.text.bind().evaluate(token_numbers(ends, TEXTS)), strict=True))
    assert received.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(received[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MAKERS if name not in IN_BUNDLES])
def test_latents_become_the_images_of_the_pipeline(name: str, loaded: Any) -> None:
    """Another number than it was captured with; judged by the pipeline's own code, which is given the latents."""
    checkpoint, ends = loaded(name)
    pipeline, shape = checkpoint.around.surroundings.pipeline, checkpoint.loop.latent.shape
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    made = pipeline.scheduler.step

    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **_: Any) -> SchedulerOutput:
        made(model_output, timestep, sample)
        return SchedulerOutput(torch.cat([latents] * (len(sample) // len(latents))))  # DiT carries both branches

    object.__setattr__(pipeline.scheduler, "step", step)
    try:
        answer = checkpoint.run.watched(lambda *_: None, answer=True, images=True)
    finally:
        object.__delattr__(pipeline.scheduler, "step")
    wanted = 2 * np.moveaxis(np.asarray(answer[0]), -1, 1) - 1
    for rows in (slice(0, 1), slice(0, 2)):
        (received,) = ends.decoder.bind().evaluate({"latents": latents[rows].numpy()})
        np.testing.assert_allclose(received, wanted[rows], atol=1e-4)


def test_flux_draws_at_the_size_that_it_was_called_with(tmp_path: Path) -> None:
    folder = pipelines.flux(tmp_path / "flux")
    save_file({"height": torch.tensor(32), "width": torch.tensor(64)}, tmp_path / "in.safetensors")
    checkpoint = load_checkpoint(folder, inputs=tmp_path / "in.safetensors")
    assert checkpoint.around is not None
    ends = replace(checkpoint, around=replace(checkpoint.around, prompts=None)).capture_ends()
    assert ends is not None and ends.decoder is not None
    assert ends.decoder.stages[0].outputs[0].shape == (None, 3, 32, 64)


@pytest.mark.slow
def test_what_the_pipeline_sets_itself_is_kept(loaded: Any) -> None:
    """FLUX is told a guidance scale."""
    assert loaded("FluxPipeline")[1].given == {"guidance": 3.5}
    assert loaded("StableDiffusion3Pipeline")[1].given == {}
    assert loaded("StableDiffusionXLPipeline")[1].given == {"added_cond_kwargs.time_ids": [16, 16, 0, 0, 16, 16]}


def test_both_branches_of_the_recording_are_kept(loaded: Any) -> None:
    checkpoint, _ = loaded("StableDiffusion3Pipeline")
    assert checkpoint.unconditional.keys() == {"encoder_hidden_states", "pooled_projections"}
    given, empty = checkpoint.kwargs["pooled_projections"], checkpoint.unconditional["pooled_projections"]
    assert torch.equal(empty[0], empty[1]) and not torch.equal(given[0], empty[0])
    assert loaded("DiTPipeline")[0].unconditional == {}, "its unconditional class is written down in the loop"


@pytest.mark.slow
def test_without_t5_there_are_zeros(tmp_path: Path) -> None:
    ends = load_checkpoint(pipelines.sd3(tmp_path / "sd3", with_t5=False)).capture_ends()
    assert ends is not None and ends.text is not None
    assert [reader.input for reader in ends.readers] == ["input_ids", "input_ids_2"]
    hidden = ends.text.bind().evaluate(token_numbers(ends, ["a"]))[0]
    assert hidden.shape == (1, pipelines.LENGTH + 256, 24) and not hidden[:, pipelines.LENGTH :].any()


def test_conditions_that_are_not_those_of_the_pipeline_fail(loaded: Any) -> None:
    checkpoint, _ = loaded("StableDiffusionPipeline")
    around, loop = checkpoint.around, checkpoint.loop
    conditions = {"encoder_hidden_states": checkpoint.kwargs["encoder_hidden_states"]}
    wrong = {name: value * 1.01 for name, value in conditions.items()}
    for pair in ((wrong, checkpoint.unconditional), (conditions, wrong)):
        seen = Seen(around.prompts, pair[0], around.negative, pair[1], around.drawn)
        with pytest.raises(StepfoldError, match="encoder_hidden_states: expected the captured text encoders to give"):
            capture_ends(around.surroundings, seen, loop.latent.shape)


def test_a_decoder_that_is_not_the_pipelines_fails(loaded: Any) -> None:
    """The pipeline draws at another size, or otherwise, than what is captured."""
    checkpoint, _ = loaded("StableDiffusionPipeline")
    around, loop = checkpoint.around, checkpoint.loop

    def mirrored() -> tuple[np.ndarray, np.ndarray]:
        latents, images = around.drawn()
        return latents, images[..., ::-1]

    def smaller() -> tuple[np.ndarray, np.ndarray]:
        latents, images = around.drawn()
        return latents, images[..., :8]

    for drawn in (mirrored, smaller):
        seen = Seen(None, {}, None, {}, drawn)
        with pytest.raises(StepfoldError, match="decoder: expected the images of StableDiffusionPipeline of the same"):
            capture_ends(around.surroundings, seen, loop.latent.shape)


@pytest.mark.slow
def test_images_are_resized_as_the_pipeline_does(tmp_path: Path) -> None:
    """PixArt draws at the nearest size that it was trained for, and makes the size that was asked for of that."""
    folder = pipelines.pixart(tmp_path / "pixart", sample_size=32)
    call = PipelineCall(height=160, width=260, steps=2)
    checkpoint = load_checkpoint(folder, call=call)
    assert checkpoint.loop is not None and checkpoint.loop.latent.shape == (4, 96, 160)  # 192 x 320 at a half
    ends = replace(checkpoint, around=replace(checkpoint.around, prompts=None)).capture_ends()
    assert ends is not None and ends.decoder is not None
    assert ends.decoder.stages[0].outputs[0].shape == (None, 3, 160, 260)


@pytest.mark.slow
def test_without_a_negative_prompt_there_are_zeros(loaded: Any) -> None:
    """Of Stable Diffusion XL; what a pipeline gives the other branch instead is noticed."""
    checkpoint, ends = loaded("StableDiffusionXLPipeline")
    around, loop, other = checkpoint.around, checkpoint.loop, checkpoint.unconditional
    assert ends.unprompted == "zeros" and around.negative is None
    assert not any(other[name].any() for name in ends.text.outputs)
    tensors = {
        "encoder_hidden_states": checkpoint.kwargs["encoder_hidden_states"],
        **{f"added_cond_kwargs.{name}": value for name, value in checkpoint.kwargs["added_cond_kwargs"].items()},
    }
    text, sizes = "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"
    for name, changed, message in (
        (text, other[text] + 1, f"{text}: expected zeros in the other branch"),
        (sizes, other[sizes] + 1, f"{sizes}: the pipeline makes this condition"),
    ):
        seen = Seen(around.prompts, tensors, None, {**other, name: changed}, around.drawn)
        with pytest.raises((StepfoldError, UsageError), match=message):
            capture_ends(around.surroundings, seen, loop.latent.shape)


@pytest.mark.slow
def test_latents_that_noise_is_added_to_are_not_decoded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of LTX-Video; the timestep that its autoencoder is told is no reason."""
    folder = pipelines.ltx(tmp_path / "ltx", timestep_conditioning=True)
    told = load_checkpoint(folder, call=PipelineCall(arguments={"decode_timestep": 0.05, "decode_noise_scale": 0.0}))
    noisy = load_checkpoint(folder, call=PipelineCall(arguments={"decode_timestep": 0.05}))
    first, second = (replace(c, around=replace(c.around, prompts=None)) for c in (told, noisy))
    ends, latents = first.capture_ends(), second.capture_ends()
    assert ends is not None and ends.decoder is not None, "equal to the pipeline's frames, or it had been refused"
    assert latents is not None and latents.decoder is None
    assert "vae: the bundle draws latents, because the pipeline adds noise to what it decodes" in caplog.text
    (row,) = [row for row in overview(second)["networks"] if row["name"] == "vae"]
    assert not row["in_bundle"] and "decode_noise_scale=0.0" in row["reason"]
    within = pipelines.ltx(tmp_path / "within", decoder_inject_noise=(True, False))
    assert load_checkpoint(within).around.surroundings.undecoded == "its autoencoder adds noise within its decoder"


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_layers_are_skipped_as_the_pipeline_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the only branch; of two, pipelines skip them in one."""
    if not hasattr(transformers.CLIPTextModel, "text_model"):  # transformers 5, where diffusers 0.42 looks for it still
        monkeypatch.setattr(transformers.CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    folder, skipped = MAKERS[name](tmp_path / "pipeline"), {"clip_skip": 1}
    checkpoint = load_checkpoint(folder, call=PipelineCall(steps=2, guidance=1.0, arguments=skipped))
    assert checkpoint.around is not None and checkpoint.around.prompts is not None
    surroundings, prompts = checkpoint.around.surroundings, list(checkpoint.around.prompts)
    text, plain = surroundings.text(), type(surroundings)(surroundings.pipeline).text()
    assert text is not None and plain is not None
    numbers = {
        name: getattr(surroundings.pipeline, prompt.tokenizer)(
            prompts, padding="max_length", max_length=prompt.length, truncation=True, return_tensors="pt"
        ).input_ids
        for name, prompt in text.prompts.items()
    }
    with torch.no_grad():
        received, without = (each.encoder(**numbers)["encoder_hidden_states"] for each in (text, plain))
    torch.testing.assert_close(received, checkpoint.kwargs["encoder_hidden_states"])
    assert not torch.allclose(received, without)
    with pytest.raises(UsageError, match=f"--call clip_skip: expected none with two branches.* {name} skips layers"):
        load_checkpoint(folder, call=PipelineCall(steps=2, arguments=skipped))


def test_a_prompt_for_one_of_the_encoders_is_refused(tmp_path: Path) -> None:
    folder = pipelines.sdxl(tmp_path / "sdxl")
    with pytest.raises(UsageError, match="--call prompt_2: expected one prompt for all text encoders"):
        load_checkpoint(folder, call=PipelineCall(steps=2, arguments={"prompt_2": "rain"}))


def test_embeddings_leave_no_prompts(loaded: Any) -> None:
    checkpoint, _ = loaded("StableDiffusionPipeline")
    ends = replace(checkpoint, around=replace(checkpoint.around, prompts=None)).capture_ends()
    assert (ends.text, ends.readers, ends.given) == (None, (), {}) and ends.decoder is not None


def test_a_tokenizer_without_a_file_is_refused(loaded: Any) -> None:
    from stepfold.frontend.surroundings import ends

    class Pipeline:
        tokenizer = object()

    with pytest.raises(UsageError, match="tokenizer: object has no form of the `tokenizers` library"):
        ends._reader(Pipeline(), "input_ids", Prompt("tokenizer", 12))


def test_a_condition_that_nobody_can_give_is_refused() -> None:
    from stepfold.frontend.surroundings import ends

    assert ends._given("size", torch.tensor([[4.0, 4.0]] * 2)) == [4.0, 4.0]
    for value in (torch.zeros(2, ends.MOST_GIVEN + 1), torch.tensor([1.0, 2.0])):
        with pytest.raises(UsageError, match="mask: the pipeline makes this condition"):
            ends._given("mask", value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("scaling_factor", value) for value in ("x", None, True, 0, float("nan"), 1e300, [1.0])]
    + [("shift_factor", value) for value in ("x", float("inf"), [0.1])],
)
def test_factors_of_an_autoencoder_are_numbers(name: str, value: Any) -> None:
    config = SimpleNamespace(**{"scaling_factor": 0.5, "shift_factor": 0.0, name: value})
    with pytest.raises(UsageError, match=rf"vae/config.json: {name}: expected a "):
        Decoder(SimpleNamespace(config=config), shifted=True)
