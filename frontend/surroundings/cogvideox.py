"""CogVideoX: T5 without a mask; latents with frames before channels."""

from __future__ import annotations

from typing import Any

import torch

from .surroundings import Decoder, Prompt, Surroundings, Text
from .t5 import T5Conditions


class CogVideoXSurroundings(Surroundings):
    """`CogVideoXPipeline`."""

    source = "diffusers, CogVideoXPipeline.encode_prompt and decode_latents; Yang et al. 2024 (arXiv 2408.06072)"

    def text(self) -> Text | None:
        """Token numbers [B, T] -> `encoder_hidden_states` [B, T, C]."""
        if not self.has("tokenizer", "text_encoder"):
            return None
        prompt = Prompt("tokenizer", self.argument("max_sequence_length"))
        return Text({"input_ids": prompt}, T5Conditions(self.pipeline.text_encoder))

    def decoder(self, latent: tuple[int, ...]) -> Decoder:
        """From latents [B, F, C, H, W]; the first of them, which only fill patches of frames up, are left out."""
        frames = int(self.argument("num_frames") or self.pipeline.transformer.config.sample_frames)
        kept = (frames - 1) // self.pipeline.vae_scale_factor_temporal + 1
        return _Decoder(self.pipeline.vae, latent[0] - kept)


class _Decoder(Decoder):
    def __init__(self, vae: Any, skipped: int):
        super().__init__(vae)
        self.skipped = skipped  # latent frames

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, F, C, H, W] -> [B, C, F, H, W]."""
        return latents[:, self.skipped :].permute(0, 2, 1, 3, 4)
