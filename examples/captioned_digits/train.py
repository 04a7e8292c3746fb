"""Train a small text-conditioned latent diffusion, and write it as a folder of StableDiffusionPipeline.

    python examples/captioned_digits/train.py --data mnist --out out/captioned           # again: goes on where it was
    python examples/captioned_digits/train.py --data mnist --evaluate examples/captioned_digits
    python examples/captioned_digits/train.py --smoke --out out/smoke                    # seconds, on generated data

First the autoencoder is trained (`autoencoder.py`), on canvases that `canvases.py` draws from MNIST's original files;
then the U-Net and the text encoder (`drawing.py`), on its latents. README.md has the figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers.utils import logging

sys.path.append(str(Path(__file__).resolve().parents[1] / "shared"))

import autoencoder
import drawing
from averaged import Training
from canvases import SEEN, UNSEEN, Canvases, canvases_of
from drawing import Drawer, Latents
from mnist import generated, read_mnist
from running import exit_code, parser_of, positive, walk
from states import STATE, read_state, require_run, write, write_pipeline, write_state
from words import make_tokenizer

from stepfold.loop.errors import UsageError

VAE_STATE = STATE.with_name("autoencoder.safetensors")
LATENTS = STATE.with_name("latents.safetensors")
UNSEEN_FILE = "unseen.txt"
VAE_STEPS, STEPS, BATCH = 3000, 6000, 32
EVALUATED_IMAGES = 1000
SMOKE_STEPS, SMOKE_BATCH, SMOKE_IMAGES = 4, 4, 40
SMOKE_VAE: Mapping[str, Any] = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4}
SMOKE_UNET: Mapping[str, Any] = {"block_out_channels": (16, 16), "cross_attention_dim": 16, "norm_num_groups": 8}
SMOKE_TEXT: Mapping[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


@dataclass(frozen=True)
class Data:
    """Canvases of training images with seen captions, and of held-out images with seen and with unseen ones."""

    training: Canvases
    seen: Canvases
    unseen: Canvases


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; argparse leaves with exit code 2 on wrong ones."""
    parser = parser_of(__doc__)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="FOLDER", help="the pipeline to write, or to go on with")
    target.add_argument("--evaluate", type=Path, metavar="PIPELINE", help="print its held-out losses, train nothing")
    parser.add_argument("--images", type=positive, help="of MNIST to draw on canvases (default: all)")
    parser.add_argument("--vae-steps", type=positive, help=f"(default {VAE_STEPS}; --smoke: {SMOKE_STEPS})")
    parser.add_argument("--steps", type=positive, help=f"after those (default {STEPS}; --smoke: {SMOKE_STEPS})")
    parser.add_argument("--batch", type=positive, help=f"canvases a step (default {BATCH}; --smoke: {SMOKE_BATCH})")
    return parser.parse_args(arguments)


def data_of(options: argparse.Namespace) -> Data:
    """The canvases, drawn anew in each run, always the same."""
    if options.smoke:
        digits, held_out = generated(SMOKE_IMAGES, seed=0), generated(SMOKE_IMAGES, seed=1)
    else:
        digits = read_mnist(options.data, "train").first(options.images)
        held_out = read_mnist(options.data, "t10k").first(EVALUATED_IMAGES)
    return Data(canvases_of(digits, SEEN, 0), canvases_of(held_out, SEEN, 1), canvases_of(held_out, UNSEEN, 2))


def settings_of(options: argparse.Namespace) -> tuple[autoencoder.Settings, drawing.Settings]:
    """The settings of the shipped checkpoint, or small ones for a smoke run."""
    vae, unet, text = autoencoder.CONFIG, drawing.UNET, drawing.TEXT
    if options.smoke:
        vae, unet, text = {**vae, **SMOKE_VAE}, {**unet, **SMOKE_UNET}, {**text, **SMOKE_TEXT}
    batch = options.batch or (SMOKE_BATCH if options.smoke else BATCH)
    vae_steps = options.vae_steps or (SMOKE_STEPS if options.smoke else VAE_STEPS)
    return (
        autoencoder.Settings(vae, options.seed, batch),
        drawing.Settings(unet, text, vae_steps, options.seed, batch),
    )


def train_autoencoder(
    settings: autoencoder.Settings, steps: int, data: Data, options: argparse.Namespace
) -> AutoencoderKL | None:
    """The autoencoder with its averaged weights, trained first if need be; None when that was interrupted."""
    training = autoencoder.start(settings, options.device)
    path = options.out / VAE_STATE
    read_state(training, settings, path, options.device)
    if training.step < steps:
        (options.out / LATENTS).unlink(missing_ok=True)
    finished = walk(
        training,
        steps,
        options.every or max(1, steps // 10),
        advance=lambda: autoencoder.advance(training, settings, data.training),
        save=lambda: write_state(training, settings, path),
        report=lambda: f"error {autoencoder.reconstruction_error(training.model, data.seen, training.average):.5f}",
    )
    training.model.load_state_dict(training.average)
    return training.model.eval().requires_grad_(False) if finished else None


def latents_of(model: AutoencoderKL, data: Data, out: Path) -> dict[str, Latents]:
    """Latents by the names of `Data`, of deviation 1; the model's scaling factor says by what they were scaled."""
    path = out / LATENTS
    if not path.exists() or len(load_file(path)["training"]) != len(data.training.captions):
        encoded = {name: autoencoder.encode(model, canvases) for name, canvases in vars(data).items()}
        write(path, lambda temporary: save_file(encoded, temporary))
    encoded = load_file(path)
    factor = round(1 / encoded["training"].std().item(), 5)
    model.register_to_config(scaling_factor=factor)
    return {
        name: Latents(encoded[name] * factor, torch.from_numpy(canvases.captions))
        for name, canvases in vars(data).items()
    }


def save(training: Training[Drawer], settings: drawing.Settings, vae: AutoencoderKL, out: Path) -> None:
    """Write the training state, then a pipeline of the averaged weights, and the captions that were held out."""
    write_state(training, settings, out / STATE)
    averaged = drawing.build(settings)
    averaged.load_state_dict(training.average)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=averaged.text_encoder,
        tokenizer=make_tokenizer(),
        unet=averaged.unet,
        scheduler=DDIMScheduler(**drawing.SCHEDULE),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    write_pipeline(pipeline, out)
    write(out / UNSEEN_FILE, lambda path: path.write_text("".join(f"{caption}\n" for caption in UNSEEN)))


def held_out_losses(
    model: Drawer,
    latents: Mapping[str, Latents],
    tokens: torch.Tensor,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> str:
    """The losses on held-out images, with captions that were trained on and with those that were not, in words."""
    losses = {name: drawing.held_out_loss(model, latents[name], tokens, weights) for name in ("seen", "unseen")}
    return " ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def train(options: argparse.Namespace) -> bool:
    """Train up to `--steps`, saving on the way; whether it got there."""
    vae_settings, settings = settings_of(options)
    out = options.out
    require_run(out)
    data = data_of(options)
    training = drawing.start(settings, options.device)
    read_state(training, settings, out / STATE, options.device)
    vae = train_autoencoder(vae_settings, settings.vae_steps, data, options)
    if vae is None:
        return False
    latents, tokens = latents_of(vae, data, out), drawing.caption_tokens()
    steps = options.steps or (SMOKE_STEPS if options.smoke else STEPS)
    if training.step >= steps:
        print(f"{out}: at step {training.step} already; raise --steps to go on")

    return walk(
        training,
        steps,
        options.every or max(1, steps // 20),
        advance=lambda: drawing.advance(training, settings, latents["training"], tokens),
        save=lambda: save(training, settings, vae, out),
        report=lambda: held_out_losses(training.model, latents, tokens, training.average),
    )


def evaluate(options: argparse.Namespace) -> None:
    """Print the held-out losses of a pipeline's models."""
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            options.evaluate, local_files_only=True, use_safetensors=True, safety_checker=None
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{options.evaluate}: expected a folder of StableDiffusionPipeline; received: {reason}"
        ) from None
    data, vae = data_of(options), pipeline.vae
    latents = {
        name: Latents(
            autoencoder.encode(vae, canvases) * vae.config.scaling_factor, torch.from_numpy(canvases.captions)
        )
        for name, canvases in (("seen", data.seen), ("unseen", data.unseen))
    }
    model = Drawer(pipeline.unet, pipeline.text_encoder).eval().to(options.device)
    print(f"{options.evaluate}: held-out losses {held_out_losses(model, latents, drawing.caption_tokens())}")


def main(arguments: list[str]) -> int:
    """Run the script; its exit code."""
    options = parse(arguments)
    logging.disable_progress_bar()

    def work() -> bool:
        if options.evaluate is None:
            return train(options)
        evaluate(options)
        return True

    return exit_code(work, options.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
