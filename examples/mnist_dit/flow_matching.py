"""Flow matching on a DiT: what a batch is, what the loss is, what one step does.

With x an image in [-1, 1] and s in [0, 1], z(s) = (1 - s) x + s noise, and the model predicts noise - x from z(s), the
timestep 1000 s and the class. s is drawn uniformly: the sampler walks a uniform grid from s = 1, and a logit-normal
draw, which favours the middle, would hardly ever visit that first point, on which every sample depends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from averaged import Pace, Training, begin, descend
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from mnist import CLASSES, Digits
from torch.func import functional_call
from torch.nn import functional as F

UNCONDITIONAL = CLASSES  # the row of the class embedding that stands for "no class"
TIMESTEPS = 1000.0
EVALUATED_BATCHES, EVALUATED_BATCH = 8, 128


@dataclass(frozen=True)
class Settings(Pace):
    """What decides the weights besides data and steps; a run resumes only with the same.

    Attributes:
        config: of the model.
        seed: of initialization and of every batch.
        batch: images a step.
        class_dropout: share of images shown without their class, for classifier-free guidance.
    """

    config: Mapping[str, Any]
    seed: int
    batch: int
    _: KW_ONLY
    learning_rate: float = 5e-4
    warmup: int = 1000
    ema: float = 0.9995
    class_dropout: float = 0.1


@dataclass(frozen=True)
class Batch:
    """Noised images [B, 1, 32, 32], timesteps [B], classes [B], and the target noise - x [B, 1, 32, 32]."""

    state: torch.Tensor
    timestep: torch.Tensor
    labels: torch.Tensor
    target: torch.Tensor


def make_batch(data: Digits, seed: int, step: int, size: int, dropout: float) -> Batch:
    """The batch of a step: a function of its number, so that a resumed run draws what an unbroken one would."""
    rng = np.random.default_rng([seed, step])
    index = rng.integers(len(data.labels), size=size)
    x = data.latents(index)
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    s = rng.random(size, dtype=np.float32)
    labels = np.where(rng.random(size) < dropout, UNCONDITIONAL, data.labels[index])
    weight = s[:, None, None, None]
    arrays = ((1 - weight) * x + weight * noise, TIMESTEPS * s, labels, noise - x)
    return Batch(*(torch.from_numpy(array) for array in arrays))


def loss_of(
    model: DiTTransformer2DModel, batch: Batch, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Mean squared error of the predicted noise - x, a scalar; with `weights` in the place of the model's own."""
    device = model.device
    inputs = {"timestep": batch.timestep.to(device), "class_labels": batch.labels.to(device)}
    received = functional_call(model, dict(weights or {}), (batch.state.to(device),), inputs).sample
    return F.mse_loss(received, batch.target.to(device))


def build(config: Mapping[str, Any], seed: int) -> DiTTransformer2DModel:
    """A fresh model in training mode, every block the identity at first (adaLN-zero)."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**{key: value for key, value in config.items() if not key.startswith("_")})
    for name, parameter in model.named_parameters():
        if ".norm1.linear." in name or name.startswith(("proj_out_1.", "proj_out_2.")):
            torch.nn.init.zeros_(parameter)
    # In training mode each label embedding drops classes itself, and there is one for each block: a sample would be
    # unconditional in one block and not in the next. The batch drops them, once for the whole model.
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model.train()


def start(settings: Settings, device: str) -> Training[DiTTransformer2DModel]:
    """A run at step 0."""
    model = build(settings.config, settings.seed)
    return begin(model.to(device), settings)  # type: ignore[arg-type]  # diffusers' `to` loses its signature


def advance(training: Training[DiTTransformer2DModel], settings: Settings, data: Digits) -> float:
    """Take one step; its loss.

    Raises:
        StepfoldError: the loss is not finite.
    """
    batch = make_batch(data, settings.seed, training.step, settings.batch, settings.class_dropout)
    return descend(training, settings, loss_of(training.model, batch))


@torch.no_grad()
def held_out_loss(
    model: DiTTransformer2DModel, data: Digits, weights: Mapping[str, torch.Tensor] | None = None
) -> float:
    """Flow-matching loss over 1024 draws from held-out images with their classes; the same draws at each call."""
    draws = range(EVALUATED_BATCHES)
    batches = (make_batch(data, seed=0, step=draw, size=EVALUATED_BATCH, dropout=0.0) for draw in draws)
    return float(np.mean([loss_of(model, batch, weights).item() for batch in batches]))
