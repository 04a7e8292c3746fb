"""Diffusion of the latents with their captions: what a batch is, what the loss is, what one step does.

With x the scaled latents of a canvas and a(t) the cumulated alphas of the schedule, the model sees
sqrt(a(t)) x + sqrt(1 - a(t)) noise, the timestep t, drawn uniformly, and the caption, and predicts the velocity
sqrt(a(t)) noise - sqrt(1 - a(t)) x. The text encoder learns together with the U-Net.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from averaged import Pace, Training, begin, descend
from canvases import CAPTIONS
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.func import functional_call
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel
from words import POSITIONS, make_tokenizer, tokens_of

UNET: Mapping[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (48, 96),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,  # diffusers takes it for the number of heads
    "norm_num_groups": 16,
}
TEXT: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "projection_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
SCHEDULE: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}
EMPTY = len(CAPTIONS)  # the row of the tokens that stands for the empty prompt
EVALUATED_BATCHES, EVALUATED_BATCH = 8, 64


@dataclass(frozen=True)
class Settings(Pace):
    """What decides the weights besides data and steps; a run resumes only with the same.

    Attributes:
        unet: configuration of the U-Net.
        text: configuration of the text encoder, but for its vocabulary.
        vae_steps: steps of the autoencoder's training.
        seed: of initialization and of every batch.
        batch: canvases a step.
        caption_dropout: share of canvases shown with the empty prompt, for classifier-free guidance.
    """

    unet: Mapping[str, Any]
    text: Mapping[str, Any]
    vae_steps: int
    seed: int
    batch: int
    _: KW_ONLY
    caption_dropout: float = 0.1
    learning_rate: float = 1e-3
    warmup: int = 200
    ema: float = 0.998


class Drawer(torch.nn.Module):
    """A U-Net and the text encoder whose words it looks at."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, state: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The velocity [B, 4, 8, 8] of latents [B, 4, 8, 8], timesteps [B] and tokens [B, 16]."""
        return self.unet(state, timestep, self.text_encoder(tokens).last_hidden_state).sample


def build(settings: Settings) -> Drawer:
    """Fresh models, with the vocabulary of the captions."""
    tokenizer = make_tokenizer()
    marks = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    unet = UNet2DConditionModel(**settings.unet)
    return Drawer(unet, CLIPTextModel(CLIPTextConfig(**settings.text, **marks)))


@dataclass(frozen=True)
class Latents:
    """Scaled latents [samples, 4, 8, 8], and the places of their captions in `CAPTIONS`, int64 [samples]."""

    values: torch.Tensor
    captions: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Noised latents [B, 4, 8, 8], timesteps int64 [B], captions int64 [B], and velocities [B, 4, 8, 8]."""

    state: torch.Tensor
    timestep: torch.Tensor
    captions: torch.Tensor
    velocity: torch.Tensor


def make_batch(data: Latents, seed: int, step: int, size: int, dropout: float) -> Batch:
    """The batch of a step: a function of its number, so that a resumed run draws what an unbroken one would."""
    rng = np.random.default_rng([seed, step])
    scheduler = DDIMScheduler(**SCHEDULE)
    index = torch.from_numpy(rng.integers(len(data.captions), size=size))
    x = data.values[index]
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    timestep = torch.from_numpy(rng.integers(len(scheduler.betas), size=size))
    dropped = torch.from_numpy(rng.random(size) < dropout)
    captions = data.captions[index].masked_fill(dropped, EMPTY)
    noised = scheduler.add_noise(x, noise, timestep)  # type: ignore[arg-type]
    return Batch(noised, timestep, captions, scheduler.get_velocity(x, noise, timestep))  # type: ignore[arg-type]


def caption_tokens() -> torch.Tensor:
    """Tokens int64 [captions + 1, 16] of all captions, and of the empty prompt."""
    return tokens_of([*map(str, CAPTIONS), ""])


def loss_of(
    model: Drawer, batch: Batch, tokens: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Mean squared error of the predicted velocity, a scalar; with `weights` in the place of the model's own."""
    device = model.unet.device
    inputs = (batch.state, batch.timestep, tokens[batch.captions])
    received = functional_call(model, dict(weights or {}), tuple(value.to(device) for value in inputs))
    return F.mse_loss(received, batch.velocity.to(device))


def start(settings: Settings, device: str) -> Training[Drawer]:
    """A run at step 0."""
    torch.manual_seed(settings.seed)
    return begin(build(settings).train().to(device), settings)


def advance(training: Training[Drawer], settings: Settings, data: Latents, tokens: torch.Tensor) -> float:
    """Take one step; its loss.

    Raises:
        StepfoldError: the loss is not finite.
    """
    batch = make_batch(data, settings.seed, training.step, settings.batch, settings.caption_dropout)
    return descend(training, settings, loss_of(training.model, batch, tokens))


@torch.no_grad()
def held_out_loss(
    model: Drawer, data: Latents, tokens: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
) -> float:
    """The loss over 512 draws from held-out canvases with their captions; the same draws at each call."""
    draws = range(EVALUATED_BATCHES)
    batches = (make_batch(data, seed=0, step=draw, size=EVALUATED_BATCH, dropout=0.0) for draw in draws)
    return float(np.mean([loss_of(model, batch, tokens, weights).item() for batch in batches]))
