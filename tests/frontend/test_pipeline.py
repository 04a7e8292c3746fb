"""Pipeline folders: the loop as the pipeline really runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
import zoo
from folders import edit_config
from safetensors.torch import load_file, save_file
from zoo import ZooModel

from stepfold.frontend.load import load_checkpoint
from stepfold.frontend.sampler import probe
from stepfold.loop.driver import Request, run_loop
from stepfold.loop.errors import UsageError
from stepfold.loop.plan import fold

LENGTH = 6  # of a prompt, in tokens
SD3_TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


def denoiser(model: ZooModel, **changes: Any) -> Any:
    torch.manual_seed(0)
    return getattr(diffusers, model.class_name)(**(model.config | changes))


def vae(channels: int = 4) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(**(zoo.VAE_DECODER.config | {"latent_channels": channels}))


def dit(folder: Path, **scheduler: Any) -> Path:
    pipeline = diffusers.DiTPipeline(
        transformer=denoiser(zoo.DIT, num_embeds_ada_norm=1000),
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(**({"clip_sample": False} | scheduler)),
    )
    pipeline.save_pretrained(folder)
    return folder


def sd3(folder: Path) -> Path:
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=denoiser(zoo.SD3),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(SD3_TEXT),
    )
    pipeline.save_pretrained(folder)
    texts = {f"{sign}prompt_embeds": torch.randn(2, LENGTH, 24) for sign in ("", "negative_")}
    pooled = {f"{sign}pooled_prompt_embeds": torch.randn(2, 20) for sign in ("", "negative_")}
    save_file(texts | pooled, folder / "inputs.safetensors")
    return folder


def flux(folder: Path) -> Path:
    pipeline = diffusers.FluxPipeline(
        transformer=denoiser(zoo.FLUX),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    pipeline.save_pretrained(folder)
    embeds = {"prompt_embeds": torch.randn(2, LENGTH, 24), "pooled_prompt_embeds": torch.randn(2, 20)}
    save_file(embeds, folder / "inputs.safetensors")
    return folder


def pixart(folder: Path) -> Path:
    pipeline = diffusers.PixArtAlphaPipeline(
        transformer=denoiser(zoo.PIXART, sample_size=32),  # its resolutions are binned for known sizes
        vae=vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        text_encoder=None,
        tokenizer=None,
    )
    pipeline.save_pretrained(folder)
    embeds = {f"{sign}prompt_embeds": torch.randn(2, LENGTH, 24) for sign in ("", "negative_")}
    masks = {f"{s}prompt_attention_mask": torch.ones(2, LENGTH, dtype=torch.int64) for s in ("", "negative_")}
    save_file(embeds | masks, folder / "inputs.safetensors")
    return folder


def stable_diffusion(folder: Path) -> Path:
    """With a text encoder and a tokenizer of letters."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text = {k: v for k, v in zoo.CLIP_TEXT.config.items() if k[0] != "_"} | {"hidden_size": 24}
    text |= {"eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2}
    pipeline = diffusers.StableDiffusionPipeline(
        unet=denoiser(zoo.UNET),
        vae=vae(),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "sd")
    return folder / "sd"


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "dit": dit,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "stable_diffusion": stable_diffusion,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = BUILDERS[name](tmp_path_factory.mktemp(name) / name)
        return built[name]

    return get


def test_dit(folders: Callable[[str], Path]) -> None:
    """Conditional rows first, the null class written down, the variance cut off."""
    checkpoint = load_checkpoint(folders("dit"))
    loop = checkpoint.loop
    assert loop is not None and checkpoint.class_name == "DiTTransformer2DModel"
    assert (loop.state, loop.timestep, loop.conditions) == ("hidden_states", "timestep", ["class_labels"])
    assert loop.guidance is not None and loop.guidance.unconditional == {"class_labels": 1000}
    assert loop.guidance.scale == pytest.approx(4.0)
    assert loop.latent.shape == (4, 8, 8) and loop.sampler.steps == 50 and loop.sampler.timestep_scale == 1
    assert checkpoint.kwargs["class_labels"].tolist() == [0, 1]


def test_sd3(folders: Callable[[str], Path]) -> None:
    """Unconditional rows first, embeddings supplied by the caller."""
    loop = load_checkpoint(folders("sd3")).loop
    assert loop is not None and loop.guidance is not None
    assert loop.guidance.unconditional == "input" and loop.guidance.scale == pytest.approx(7.0)
    assert loop.sampler.steps == 28 and loop.sampler.config["shift"] == 3.0
    assert sorted(loop.conditions) == ["encoder_hidden_states", "pooled_projections"]


def test_the_conditional_branch_is_the_example(folders: Callable[[str], Path]) -> None:
    kwargs = load_checkpoint(folders("sd3")).kwargs
    given = load_file(folders("sd3") / "inputs.safetensors")
    torch.testing.assert_close(kwargs["pooled_projections"], given["pooled_prompt_embeds"])


def test_flux(folders: Callable[[str], Path]) -> None:
    """The timestep in thousandths, shifted sigmas, constant positions, guidance as an input."""
    checkpoint = load_checkpoint(folders("flux"))
    loop = checkpoint.loop
    assert loop is not None and loop.guidance is None
    assert loop.sampler.timestep_scale == pytest.approx(0.001)
    assert loop.sampler.set_timesteps["sigmas"] == "linspace" and 0 < loop.sampler.set_timesteps["mu"] < 2
    assert loop.inputs["img_ids"].role == loop.inputs["txt_ids"].role == "constant"
    assert loop.inputs["guidance"].role == "condition"
    assert probe(loop.sampler).timesteps.max() == pytest.approx(1.0)
    assert checkpoint.kwargs["img_ids"].shape[1] == 3


def test_pixart(folders: Callable[[str], Path]) -> None:
    loop = load_checkpoint(folders("pixart")).loop
    assert loop is not None and loop.guidance is not None and loop.guidance.scale == pytest.approx(4.5)
    assert loop.inputs["encoder_attention_mask"].role == "condition"
    assert loop.sampler.scheduler == "DPMSolverMultistepScheduler" and loop.sampler.steps == 20


def test_stable_diffusion_with_a_tokenizer(folders: Callable[[str], Path]) -> None:
    loop = load_checkpoint(folders("stable_diffusion")).loop
    assert loop is not None and loop.guidance is not None
    assert (loop.state, loop.guidance.scale, loop.sampler.scheduler) == ("sample", 7.5, "PNDMScheduler")


def test_a_pipeline_captures(folders: Callable[[str], Path]) -> None:
    checkpoint = load_checkpoint(folders("dit"))
    program = checkpoint.capture()
    with torch.no_grad():
        wanted = checkpoint.model(**checkpoint.kwargs)[0][:, : program.step.outputs[0].shape[1]]
    got = program.bind().evaluate({n: v.numpy() for n, v in program.example.items()})[0]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


def test_an_inferred_loop_can_be_written_down(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """The loop of the pipeline, as loop.yaml beside the denoiser, gives the same roles and grid."""
    inferred = load_checkpoint(folders("dit")).loop
    assert inferred is not None
    file = tmp_path / "loop.yaml"
    file.write_text(yaml.safe_dump(json.loads(inferred.model_dump_json())))
    again = load_checkpoint(folders("dit"), loop=file)
    assert again.loop == inferred and again.kwargs["class_labels"].dtype == torch.int64


def test_the_pipeline_is_left_as_it_was(folders: Callable[[str], Path]) -> None:
    model = load_checkpoint(folders("dit")).model
    assert "forward" not in vars(model)


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text()) | changes
    (folder / "model_index.json").write_text(json.dumps(index))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "index_not_json": (
        lambda f: (f / "model_index.json").write_text("{"),
        "model_index.json: expected the JSON of a diffusers pipeline; received no usable JSON",
    ),
    "index_a_list": (lambda f: (f / "model_index.json").write_text("[]"), "expected a JSON object with `_class_name`"),
    "unknown_pipeline": (
        lambda f: edit_index(f, _class_name="DiTPipelin"),
        "diffusers has no pipeline 'DiTPipelin'; did you mean 'DiTPipeline'?",
    ),
    "custom_code": (
        lambda f: edit_index(f, transformer=["my_model", "MyModel"]),
        "component 'transformer' is my_model.MyModel; .* no code from a checkpoint is run",
    ),
    "a_class_that_chooses_code": (
        lambda f: edit_index(f, vae=["diffusers", "AutoModel"]),
        "component 'vae' is diffusers.AutoModel; .* no code from a checkpoint is run",
    ),
    "kernels_from_elsewhere": (
        lambda f: edit_config(f / "vae", attn_implementation="someone/kernel"),
        "vae/config.json: attn_implementation: expected eager or sdpa",
    ),
    "no_denoiser": (
        lambda f: edit_index(f, transformer=[None, None]),
        "expected a pipeline with a scheduler and a transformer or a unet or a prior or a decoder; it has",
    ),
    "pickled_vae": (
        lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").rename(f / "vae" / "diffusion_pytorch_model.bin"),
        "the weights are pickled",
    ),
    "lacks_components": (
        lambda f: edit_index(f, _class_name="StableDiffusionPipeline"),
        "StableDiffusionPipeline cannot be run: ValueError: .*expected",
    ),
    "truncated_denoiser": (
        lambda f: (f / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"1234"),
        "transformer/.*damaged or truncated",
    ),
    "a_denoiser_that_is_no_network": (
        lambda f: edit_index(f, transformer=["diffusers", "DDIMScheduler"]),
        "component 'transformer': expected a network of diffusers; received",
    ),
    "a_component_that_is_no_name": (
        lambda f: edit_index(f, vae=["diffusers", 5]),
        "component 'vae': expected a library and a class; received",
    ),
    "a_folder_that_is_missing": (
        lambda f: (f / "vae").rename(f / "vea"),
        "vae: expected the folder of component 'vae', as model_index.json lists it",
    ),
    "a_component_of_other_weights": (
        lambda f: edit_config(f / "vae", latent_channels=3),
        "vae: the weights do not fit AutoencoderKL|vae/config.json: AutoencoderKL cannot be built",
    ),
    "unknown_argument": (
        lambda f: save_file({"class_label": torch.zeros(2)}, f / "inputs.safetensors"),
        "'class_label' is no argument of DiTPipeline; did you mean 'class_labels'?",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pipeline(name: str, tmp_path: Path) -> None:
    folder = dit(tmp_path / "pipeline")
    edit, message = BAD[name]
    edit(folder)
    with pytest.raises(UsageError, match=message):
        load_checkpoint(folder)


def test_weights_of_a_variant_and_components_that_are_not_compiled(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every component has half precision weights only, and the safety checker cannot be loaded at all."""
    folder = stable_diffusion(tmp_path / "sd")
    edit_index(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    for file in folder.rglob("*.safetensors"):
        weights = {name: v.half() if v.is_floating_point() else v for name, v in load_file(file).items()}
        save_file(weights, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    steps = torch.tensor(7)  # an argument of the call that is a number
    save_file({"num_inference_steps": steps}, tmp_path / "steps.safetensors")
    capfd.readouterr()
    checkpoint = load_checkpoint(folder, inputs=tmp_path / "steps.safetensors")
    assert "it/s" not in capfd.readouterr().err, "no progress bars of the libraries"
    assert checkpoint.loop is not None and checkpoint.loop.sampler.steps == 7
    assert checkpoint.around is not None and checkpoint.around.surroundings.has("vae", "text_encoder")


def test_image_to_image_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path / "sd")
    edit_index(folder, _class_name="StableDiffusionImg2ImgPipeline", image_encoder=[None, None])
    with pytest.raises(UsageError, match="starts in the middle of its grid, where its `strength` says"):
        load_checkpoint(folder)


def test_missing_tokenizer(tmp_path: Path) -> None:
    """Without embeddings the SD3 folder cannot be run; the error says what to write."""
    folder = sd3(tmp_path / "sd3")
    (folder / "inputs.safetensors").unlink()
    with pytest.raises(UsageError, match=r"(?s)cannot be run.*prompt_embeds.*inputs: \{hidden_states: state"):
        load_checkpoint(folder)


@pytest.mark.slow
def test_our_loop_makes_what_the_pipeline_makes(folders: Callable[[str], Path]) -> None:
    """SD3 with guidance, all 28 steps: roles, branches, scale, grid and update agree."""
    checkpoint = load_checkpoint(folders("sd3"))
    loop, given = checkpoint.loop, load_file(folders("sd3") / "inputs.safetensors")
    assert loop is not None and loop.guidance is not None
    noise = torch.randn(2, *loop.latent.shape)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(
        folders("sd3"), **dict.fromkeys(SD3_TEXT), transformer=checkpoint.model
    )
    wanted = pipeline(**given, prompt=None, latents=noise, output_type="latent").images
    program = checkpoint.capture()
    names = {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"}
    assert program.recurrence is not None
    request = Request(
        noise.numpy(),
        {name: given[value].numpy() for name, value in names.items()},
        {name: given[f"negative_{value}"].numpy() for name, value in names.items()},
    )
    got = run_loop(program.bind(), loop, request, fold(program.recurrence, loop.guidance.scales[0]))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
