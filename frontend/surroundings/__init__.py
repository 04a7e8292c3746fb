"""What pipelines do around their loop: prompts become conditions, latents become images. One file for each family."""

from __future__ import annotations

from .cogvideox import CogVideoXSurroundings
from .dit import DitSurroundings
from .flux import FluxSurroundings
from .ltx import LTXSurroundings
from .pixart import PixArtSurroundings
from .stable_diffusion import StableDiffusionSurroundings
from .stable_diffusion_3 import StableDiffusion3Surroundings
from .stable_diffusion_xl import StableDiffusionXLSurroundings
from .surroundings import Decoder, Prompt, Surroundings, Text
from .wan import WanSurroundings

SURROUNDINGS: dict[str, type[Surroundings]] = {
    "CogVideoXPipeline": CogVideoXSurroundings,
    "DiTPipeline": DitSurroundings,
    "FluxPipeline": FluxSurroundings,
    "LTXPipeline": LTXSurroundings,
    "PixArtAlphaPipeline": PixArtSurroundings,
    "PixArtSigmaPipeline": PixArtSurroundings,
    "StableDiffusion3Pipeline": StableDiffusion3Surroundings,
    "StableDiffusionPipeline": StableDiffusionSurroundings,
    "StableDiffusionXLPipeline": StableDiffusionXLSurroundings,
    "WanPipeline": WanSurroundings,
}
"""By the class of the pipeline."""

__all__ = ["SURROUNDINGS", "Decoder", "Prompt", "Surroundings", "Text"]
