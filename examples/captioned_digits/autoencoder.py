"""The autoencoder of the canvases: its loss, one step, and the deviation of its latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from averaged import Pace, Training, begin, descend
from canvases import SIDE, Canvases
from diffusers import AutoencoderKL
from torch.func import functional_call
from torch.nn import functional as F

CONFIG: Mapping[str, Any] = {
    "sample_size": SIDE,
    "latent_channels": 4,  # [3, 32, 32] -> [4, 8, 8]
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 8,
}
DIVERGENCE = 1e-4  # weight of the latents' divergence from a normal distribution, per element
ENCODED = 256  # canvases at a time


@dataclass(frozen=True)
class Settings(Pace):
    """What decides the autoencoder's weights besides data and steps; a run resumes only with the same.

    Attributes:
        config: of the model.
        seed: of initialization and of every batch.
        batch: canvases a step.
    """

    config: Mapping[str, Any]
    seed: int
    batch: int
    _: KW_ONLY
    learning_rate: float = 2e-3
    warmup: int = 100
    ema: float = 0.99


def start(settings: Settings, device: str) -> Training[AutoencoderKL]:
    """A run at step 0."""
    torch.manual_seed(settings.seed)
    model = AutoencoderKL(**settings.config).train()
    return begin(model.to(device), settings)  # type: ignore[arg-type]  # diffusers' `to` loses its signature


def advance(training: Training[AutoencoderKL], settings: Settings, data: Canvases) -> float:
    """Take one step; its loss: squared error of the pixels, and the latents' divergence.

    Raises:
        StepfoldError: the loss is not finite.
    """
    model = training.model
    rng = np.random.default_rng([settings.seed, training.step])
    pixels = torch.from_numpy(data.pixels(rng.integers(len(data.captions), size=settings.batch))).to(model.device)
    latents = model.encode(pixels).latent_dist  # type: ignore[union-attr]
    noise = torch.from_numpy(rng.standard_normal(latents.mean.shape, dtype=np.float32)).to(model.device)
    decoded = model.decode(latents.mean + latents.std * noise).sample  # type: ignore[union-attr]
    loss = F.mse_loss(decoded, pixels) + DIVERGENCE * latents.kl().sum() / latents.mean.numel()
    return descend(training, settings, loss)


@torch.no_grad()
def reconstruction_error(model: AutoencoderKL, data: Canvases, weights: Mapping[str, torch.Tensor]) -> float:
    """Mean squared error over up to 256 canvases that come back from their latents."""
    pixels = torch.from_numpy(data.pixels(slice(ENCODED))).to(model.device)
    return F.mse_loss(functional_call(model, dict(weights), (pixels,)).sample, pixels).item()


@torch.no_grad()
def encode(model: AutoencoderKL, data: Canvases) -> torch.Tensor:
    """Latents [samples, 4, 8, 8] of all canvases, as the autoencoder has them."""
    parts = (slice(first, first + ENCODED) for first in range(0, len(data.captions), ENCODED))
    pixels = (torch.from_numpy(data.pixels(part)).to(model.device) for part in parts)
    return torch.cat([model.encode(part).latent_dist.mean.cpu() for part in pixels]).contiguous()  # type: ignore[union-attr]
