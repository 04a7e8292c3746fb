"""Stable Diffusion XL: two CLIP encoders side by side, pooled embeddings of the second, sizes that the pipeline sets."""

from __future__ import annotations

from typing import Any

import torch

from ...bundle.manifest import Unprompted
from .surroundings import Decoder, Prompt, Surroundings, Text


class StableDiffusionXLSurroundings(Surroundings):
    """`StableDiffusionXLPipeline`."""

    source = "diffusers, StableDiffusionXLPipeline.encode_prompt; Podell et al. 2023 (arXiv 2307.01952), section 2"

    @property
    def unprompted(self) -> Unprompted:
        """Zeros, where the folder says so."""
        return "zeros" if self.pipeline.config.force_zeros_for_empty_prompt else "empty"

    def text(self) -> Text | None:
        """Token numbers [B, T] -> `encoder_hidden_states` [B, T, C_1 + C_2] and `text_embeds` [B, C]."""
        if not self.has("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"):
            return None
        names = {"input_ids": "tokenizer", "input_ids_2": "tokenizer_2"}
        prompts = {
            name: Prompt(tokenizer, getattr(self.pipeline, tokenizer).model_max_length)
            for name, tokenizer in names.items()
        }
        return Text(prompts, _Encoder(self.pipeline, 2 + self.skipped))

    def decoder(self, latent: tuple[int, ...]) -> Decoder:
        """From latents [B, C, H, W]; mean and deviation of each channel, where the autoencoder has them."""
        return Decoder(self.pipeline.vae, standardized=True)


class _Encoder(torch.nn.Module):
    def __init__(self, pipeline: Any, layer: int):
        super().__init__()
        self.layer = layer  # from the end
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2

    def forward(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor) -> dict[str, torch.Tensor]:
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        return {
            "encoder_hidden_states": torch.cat([each.hidden_states[-self.layer] for each in (first, second)], dim=-1),
            "added_cond_kwargs.text_embeds": second[0],
        }
