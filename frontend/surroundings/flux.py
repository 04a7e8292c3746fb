"""FLUX.1: T5 for the tokens, CLIP for the pooled embedding; latents in patches of two by two."""

from __future__ import annotations

from typing import Any

import torch

from .surroundings import Decoder, Prompt, Surroundings, Text


class FluxSurroundings(Surroundings):
    """`FluxPipeline`."""

    source = "diffusers, FluxPipeline.encode_prompt and FluxPipeline._unpack_latents"

    def text(self) -> Text | None:
        """Token numbers [B, T] -> `encoder_hidden_states` [B, T_2, C] and `pooled_projections` [B, C_1]."""
        if not self.has("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"):
            return None
        prompts = {
            "input_ids": Prompt("tokenizer", self.pipeline.tokenizer_max_length),
            "input_ids_2": Prompt("tokenizer_2", self.argument("max_sequence_length")),
        }
        return Text(prompts, _Encoder(self.pipeline))

    def decoder(self, latent: tuple[int, ...]) -> Decoder:
        """From patches [B, H W / 4, 4 C] of images of the size that the pipeline was called with."""
        factor = self.pipeline.vae_scale_factor
        sizes = (self.argument(name) or self.pipeline.default_sample_size * factor for name in ("height", "width"))
        height, width = (2 * (int(size) // (2 * factor)) for size in sizes)
        return _Decoder(self.pipeline.vae, height, width)


class _Encoder(torch.nn.Module):
    def __init__(self, pipeline: Any):
        super().__init__()
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2

    def forward(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "encoder_hidden_states": self.text_encoder_2(input_ids_2)[0],
            "pooled_projections": self.text_encoder(input_ids).pooler_output,
        }


class _Decoder(Decoder):
    def __init__(self, vae: Any, height: int, width: int):
        super().__init__(vae, shifted=True)
        self.height, self.width = height, width  # of the latents

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, H W / 4, 4 C] -> [B, C, H, W]."""
        rows, columns, channels = self.height // 2, self.width // 2, latents.shape[-1] // 4
        patches = latents.reshape(-1, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(-1, channels, self.height, self.width)
