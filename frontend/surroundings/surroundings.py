"""The two ends of a pipeline, written as modules that `torch.export` takes.

A pipeline's own `encode_prompt` counts its prompts in Python and could only be captured for that many; so each family
says again, for any batch, what its pipeline does with token numbers and latents. What is captured is compared with
what the pipeline really gave its denoiser (`capture_around`).
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...bundle.manifest import Unprompted
from ...bundle.prompts import Cleaning
from ...loop.errors import UsageError
from ...loop.values import LARGEST_FACTOR

OF_ONE_ENCODER = re.compile(r"(negative_)?prompt_\d")
"""Arguments of calls that give one of several text encoders a prompt of its own."""


@dataclass(frozen=True)
class Prompt:
    """How a prompt becomes the token numbers [B, T] that an encoder reads.

    Attributes:
        tokenizer: name of the pipeline's component.
        length: T; shorter prompts are padded, longer ones cut.
        mask: input of the encoder that tells tokens from padding; None for none.
        cleaning: what the pipeline does to the prompt before.
    """

    tokenizer: str
    length: int
    mask: str | None = None
    cleaning: tuple[Cleaning, ...] = ()


@dataclass(frozen=True)
class Text:
    """From a prompt to conditions.

    Attributes:
        prompts: input of the encoder -> how it is made from the prompt.
        encoder: encoder from token numbers [B, T] by name to the denoiser's conditions by name.
    """

    prompts: Mapping[str, Prompt]
    encoder: torch.nn.Module


class Surroundings(ABC):
    """What one family of pipelines does around its loop."""

    source: ClassVar[str]

    def __init__(self, pipeline: Any, arguments: Mapping[str, Any] | None = None):
        """What is around the loop of one call.

        Args:
            pipeline: pipeline as loaded; components that its folder leaves out are None.
            arguments: arguments of the call that its loop was recorded from.
        """
        self.pipeline = pipeline
        self.arguments = arguments or {}

    @property
    def unprompted(self) -> Unprompted:
        """What the other branch is given where the call has no negative prompt: an empty one, or zeros."""
        return "empty"

    @property
    def undecoded(self) -> str:
        """Why latents are not decoded in the bundle, where the folder has what decodes them; empty where they are."""
        return ""

    @abstractmethod
    def text(self) -> Text | None:
        """How prompts become conditions; None where they are none, or the folder lacks a tokenizer or an encoder."""

    def decoder(self, latent: tuple[int, ...]) -> Decoder:
        """From `latents` [B, *latent] to `image` [B, C, H, W], of a video [B, C, F, H, W], in [-1, 1].

        Args:
            latent: shape of one latent.
        """
        return Decoder(self.pipeline.vae)

    def argument(self, name: str) -> Any:
        """An argument of the call, its default where nobody gave it."""
        given = self.arguments.get(name)
        return inspect.signature(self.pipeline.__call__).parameters[name].default if given is None else given

    @property
    def skipped(self) -> int:
        """How many of the last layers of CLIP encoders the call leaves out, besides those that the family does."""
        return self.arguments.get("clip_skip") or 0

    def require_one_encoding(self, guided: bool) -> None:
        """Refuse a call whose prompts are not all encoded in one way, as those of a bundle are.

        Args:
            guided: whether there is another branch, whose prompts no pipeline skips layers for.

        Raises:
            UsageError: an encoder has a prompt of its own, or layers are skipped for one of two branches.
        """
        own = [name for name, value in self.arguments.items() if value is not None and OF_ONE_ENCODER.fullmatch(name)]
        if own:
            raise UsageError(
                f"--call {own[0]}: expected one prompt for all text encoders, which is what a bundle takes; received one "
                "for one of them. Leave it out."
            )
        skipped = self.arguments.get("clip_skip")
        if guided and skipped:
            raise UsageError(
                f"--call clip_skip: expected none with two branches, because a bundle encodes both in one way; received "
                f"{skipped}, and {type(self.pipeline).__name__} skips layers for the prompt, not for the negative one. "
                "Leave it out, or compile one branch with --guidance 1."
            )

    def has(self, *components: str) -> bool:
        """Whether the folder has all of these components."""
        return all(getattr(self.pipeline, name, None) is not None for name in components)


class Decoder(torch.nn.Module):
    """Latents to images with an autoencoder, after its scale and shift were undone.

    A family says how its latents are unpacked, and what is done to images behind the autoencoder.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, vae: Any, *, shifted: bool = False, standardized: bool = False):
        """What is undone is `(latent - mean) / deviation * scale`.

        Args:
            vae: autoencoder of the pipeline.
            shifted: whether the mean is the `shift_factor` of its configuration.
            standardized: whether its channels have means and deviations where it has both of `latents_mean` and
                `latents_std`, as buffers or in its configuration.
        """
        super().__init__()
        self.vae = vae
        self.scale = _number("scaling_factor", getattr(vae.config, "scaling_factor", 1.0))
        if self.scale == 0:
            raise UsageError("vae/config.json: scaling_factor: expected a number that is not 0; received 0.")
        self.shift = _number("shift_factor", vae.config.shift_factor) if shifted else 0.0
        mean, deviation = (_channels(vae, name) if standardized else None for name in ("latents_mean", "latents_std"))
        self.standardized = mean is not None and deviation is not None
        if self.standardized:
            self.register_buffer("mean", mean)
            self.register_buffer("deviation", deviation)

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, H, W] or [B, C, F, H, W] of what the loop carries."""
        return latents

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """What the autoencoder makes of latents."""
        return self.vae.decode(latents, return_dict=False)[0]

    def finished(self, image: torch.Tensor) -> torch.Tensor:
        """What the pipeline makes of an image of the autoencoder."""
        return image

    def forward(self, latents: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """[B, *latent] -> {"image": [B, C, H, W]}, of a video [B, C, F, H, W]."""
        scaled = self.unpacked(latents)
        if self.standardized:
            sizes = (1, -1, *(1,) * (scaled.ndim - 2))
            scaled = scaled * self.deviation.view(sizes) / self.scale + self.mean.view(sizes)
        else:
            scaled = scaled / self.scale + self.shift
        return {"image": self.finished(self.decoded(scaled)).clamp(-1, 1)}


def _number(name: str, value: Any) -> float:
    """A value of the configuration of an autoencoder, which diffusers takes as it is."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= LARGEST_FACTOR:  # also NaN
        raise UsageError(f"vae/config.json: {name}: expected a finite number; received {value!r:.60}.")
    return float(value)


def _channels(vae: Any, name: str) -> torch.Tensor | None:
    """A number for each channel of an autoencoder, which has them beside its weights or in its configuration."""
    buffers = dict(vae.named_buffers(recurse=False))
    if name in buffers:
        return buffers[name].detach().float()
    values = getattr(vae.config, name, None)
    if values is None:
        return None
    if not isinstance(values, (list, tuple)):
        raise UsageError(f"vae/config.json: {name}: expected a list of numbers; received {values!r:.60}.")
    return torch.tensor([_number(name, value) for value in values])
