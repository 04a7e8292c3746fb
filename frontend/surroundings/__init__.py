"""What pipelines do around their loop: prompts become conditions, latents become images. One file for each family."""

from __future__ import annotations

from .dit import DitSurroundings
from .flux import FluxSurroundings
from .stable_diffusion import StableDiffusionSurroundings
from .stable_diffusion_3 import StableDiffusion3Surroundings
from .surroundings import Decoder, Prompt, Surroundings, Text

SURROUNDINGS: dict[str, type[Surroundings]] = {
    "DiTPipeline": DitSurroundings,
    "FluxPipeline": FluxSurroundings,
    "StableDiffusion3Pipeline": StableDiffusion3Surroundings,
    "StableDiffusionPipeline": StableDiffusionSurroundings,
}
"""By the class of the pipeline."""

__all__ = ["SURROUNDINGS", "Decoder", "Prompt", "Surroundings", "Text"]
