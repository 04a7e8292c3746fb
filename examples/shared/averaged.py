"""Training with Adam and an exponential moving average: one step, whatever the model and the loss are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from stepfold.loop.errors import StepfoldError

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast weights change.

    Attributes:
        learning_rate: after the warm-up; constant, so that a run can be prolonged, while the average settles.
        warmup: steps of linear rise.
        ema: decay of the averaged weights, which are what is saved.
        clip: largest norm of the gradient.
    """

    learning_rate: float
    warmup: int
    ema: float
    clip: float = 1.0


@dataclass
class Training(Generic[Model]):
    """The state of a run: model, optimizer, averaged weights by name, and the number of finished steps."""

    model: Model
    optimizer: torch.optim.AdamW
    average: dict[str, torch.Tensor]
    step: int = 0


def begin(model: Model, pace: Pace) -> Training[Model]:
    """A run of this model at step 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=pace.learning_rate, weight_decay=0.0)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Training(model, optimizer, average)


def descend(training: Training[Model], pace: Pace, loss: torch.Tensor) -> float:
    """Take one step down the gradient of this loss, and move the average; the loss.

    Raises:
        StepfoldError: the loss is not finite.
    """
    if not torch.isfinite(loss):
        raise StepfoldError(f"step {training.step + 1}: expected a finite loss; received {loss.item()}. Raise --batch.")
    for group in training.optimizer.param_groups:
        group["lr"] = pace.learning_rate * min(1.0, (training.step + 1) / pace.warmup)
    training.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), pace.clip)
    training.optimizer.step()
    training.step += 1
    decay = min(pace.ema, (1 + training.step) / (10 + training.step))  # short at first: forget the random start
    with torch.no_grad():
        for name, parameter in training.model.named_parameters():
            training.average[name].lerp_(parameter, 1 - decay)
    return loss.item()
