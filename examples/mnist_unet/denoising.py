"""The objective of DDPM on a small U-Net: what a batch is, what the loss is, what one step does.

With x an image in [-1, 1] and a(t) the cumulated alphas of the schedule, the model predicts the noise from
sqrt(a(t)) x + sqrt(1 - a(t)) noise and the timestep t, which is drawn uniformly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from averaged import Pace, Training, begin, descend
from diffusers import DDIMScheduler, UNet2DModel
from mnist import SIDE, Digits
from torch.func import functional_call
from torch.nn import functional as F

CONFIG: Mapping[str, Any] = {
    "sample_size": SIDE,  # 28 -> 14 -> 7
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}
EVALUATED_BATCHES, EVALUATED_BATCH = 8, 64


@dataclass(frozen=True)
class Settings(Pace):
    """What decides the weights besides data and steps; a run resumes only with the same.

    Attributes:
        config: of the model.
        seed: of initialization and of every batch.
        batch: images a step.
    """

    config: Mapping[str, Any]
    seed: int
    batch: int
    _: KW_ONLY
    learning_rate: float = 1e-3
    warmup: int = 200
    ema: float = 0.998


@dataclass(frozen=True)
class Batch:
    """Noised images [B, 1, 28, 28], timesteps int64 [B], and the noise in them [B, 1, 28, 28]."""

    state: torch.Tensor
    timestep: torch.Tensor
    noise: torch.Tensor


def make_batch(data: Digits, seed: int, step: int, size: int) -> Batch:
    """The batch of a step: a function of its number, so that a resumed run draws what an unbroken one would."""
    rng = np.random.default_rng([seed, step])
    scheduler = DDIMScheduler()
    pixels = data.images[rng.integers(len(data.images), size=size)]
    x = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1.0)[:, None]
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    timestep = torch.from_numpy(rng.integers(len(scheduler.betas), size=size))
    return Batch(scheduler.add_noise(x, noise, timestep), timestep, noise)  # type: ignore[arg-type]


def loss_of(model: UNet2DModel, batch: Batch, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Mean squared error of the predicted noise, a scalar; with `weights` in the place of the model's own."""
    inputs = (batch.state.to(model.device), batch.timestep.to(model.device))
    received = functional_call(model, dict(weights or {}), inputs).sample
    return F.mse_loss(received, batch.noise.to(model.device))


def start(settings: Settings, device: str) -> Training[UNet2DModel]:
    """A run at step 0."""
    torch.manual_seed(settings.seed)
    model = UNet2DModel(**settings.config).train()
    return begin(model.to(device), settings)  # type: ignore[arg-type]  # diffusers' `to` loses its signature


def advance(training: Training[UNet2DModel], settings: Settings, data: Digits) -> float:
    """Take one step; its loss.

    Raises:
        StepfoldError: the loss is not finite.
    """
    batch = make_batch(data, settings.seed, training.step, settings.batch)
    return descend(training, settings, loss_of(training.model, batch))


@torch.no_grad()
def held_out_loss(model: UNet2DModel, data: Digits, weights: Mapping[str, torch.Tensor] | None = None) -> float:
    """The loss over 512 draws from held-out images; the same draws at each call."""
    batches = (make_batch(data, seed=0, step=draw, size=EVALUATED_BATCH) for draw in range(EVALUATED_BATCHES))
    return float(np.mean([loss_of(model, batch, weights).item() for batch in batches]))
