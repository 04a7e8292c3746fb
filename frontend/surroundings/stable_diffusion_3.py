"""Stable Diffusion 3: two CLIP encoders side by side, followed by T5, or zeros in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from .surroundings import Decoder, Prompt, Surroundings, Text


class StableDiffusion3Surroundings(Surroundings):
    """`StableDiffusion3Pipeline`."""

    source = "diffusers, StableDiffusion3Pipeline.encode_prompt; Esser et al. 2024 (arXiv 2403.03206), section 4"

    def text(self) -> Text | None:
        """Token numbers [B, T] -> `encoder_hidden_states` [B, T + T_3, C] and `pooled_projections` [B, C_1 + C_2].

        T5 may be left out of the folder.
        """
        if not self.has("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"):
            return None
        length, behind = self.pipeline.tokenizer_max_length, self.argument("max_sequence_length")
        prompts = {"input_ids": Prompt("tokenizer", length), "input_ids_2": Prompt("tokenizer_2", length)}
        if self.has("tokenizer_3", "text_encoder_3"):
            prompts["input_ids_3"] = Prompt("tokenizer_3", behind)
        return Text(prompts, _Encoder(self.pipeline, behind, 2 + self.skipped))

    def decoder(self, latent: tuple[int, ...]) -> Decoder:
        """From latents [B, C, H, W]."""
        return Decoder(self.pipeline.vae, shifted=True)


class _Encoder(torch.nn.Module):
    def __init__(self, pipeline: Any, length: int, layer: int):
        super().__init__()
        self.layer = layer  # from the end
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2
        self.text_encoder_3 = pipeline.text_encoder_3
        self.without = (length, pipeline.transformer.config.joint_attention_dim)  # zeros where there is no T5

    def forward(
        self, input_ids: torch.Tensor, input_ids_2: torch.Tensor, input_ids_3: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        clip = torch.cat([each.hidden_states[-self.layer] for each in (first, second)], dim=-1)
        behind = self._behind(clip, input_ids_3)
        clip = pad(clip, (0, behind.shape[-1] - clip.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([clip, behind], dim=-2),
            "pooled_projections": torch.cat([first[0], second[0]], dim=-1),
        }

    def _behind(self, clip: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """What T5 makes of the prompt, [B, T_3, C]."""
        if input_ids is None:
            return clip.new_zeros(clip.shape[0], *self.without)
        return self.text_encoder_3(input_ids)[0]
