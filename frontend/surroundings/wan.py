"""Wan 2.1: UMT5, zeros behind a prompt; videos of an autoencoder that keeps the end of each frame for the next."""

from __future__ import annotations

from .surroundings import Decoder, Prompt, Surroundings, Text
from .t5 import T5Conditions


class WanSurroundings(Surroundings):
    """`WanPipeline`."""

    source = "diffusers, WanPipeline.encode_prompt and AutoencoderKLWan._decode; Wan 2025 (arXiv 2503.20314)"

    def text(self) -> Text | None:
        """Token numbers and mask [B, T] -> `encoder_hidden_states` [B, T, C]."""
        if not self.has("tokenizer", "text_encoder"):
            return None
        cleaning = ("unescape", "strip", "spaces", "strip")
        prompt = Prompt("tokenizer", self.argument("max_sequence_length"), "attention_mask", cleaning)
        return Text({"input_ids": prompt}, T5Conditions(self.pipeline.text_encoder, zeroed=True))

    def decoder(self, latent: tuple[int, ...]) -> Decoder:
        """From latents [B, C, F, H, W]; all frames are decoded one after the other within one program."""
        return Decoder(self.pipeline.vae, standardized=True)
