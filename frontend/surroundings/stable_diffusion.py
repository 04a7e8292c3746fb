"""Stable Diffusion 1 and 2: one CLIP encoder, all of its tokens."""

from __future__ import annotations

from typing import Any

import torch

from .surroundings import Prompt, Surroundings, Text


class StableDiffusionSurroundings(Surroundings):
    """`StableDiffusionPipeline`."""

    source = "diffusers, StableDiffusionPipeline.encode_prompt"

    def text(self) -> Text | None:
        """`input_ids` [B, T], as long as the tokenizer says -> `encoder_hidden_states` [B, T, C]."""
        if not self.has("tokenizer", "text_encoder"):
            return None
        prompt = Prompt("tokenizer", self.pipeline.tokenizer.model_max_length)
        return Text({"input_ids": prompt}, _Encoder(self.pipeline, self.skipped))


class _Encoder(torch.nn.Module):
    def __init__(self, pipeline: Any, skipped: int):
        super().__init__()
        self.text_encoder = pipeline.text_encoder
        self.skipped = skipped

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.skipped:
            return {"encoder_hidden_states": self.text_encoder(input_ids)[0]}
        layers = self.text_encoder(input_ids, output_hidden_states=True).hidden_states
        return {"encoder_hidden_states": self.text_encoder.text_model.final_layer_norm(layers[-1 - self.skipped])}
