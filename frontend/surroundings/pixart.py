"""PixArt-alpha and PixArt-sigma: T5, whose padding the denoiser does not read; images at the size that was asked for."""

from __future__ import annotations

from typing import Any

import torch

from .surroundings import Decoder, Prompt, Surroundings, Text
from .t5 import T5Conditions


class PixArtSurroundings(Surroundings):
    """`PixArtAlphaPipeline` and `PixArtSigmaPipeline`."""

    source = "diffusers, PixArtAlphaPipeline.encode_prompt and PixArtImageProcessor.resize_and_crop_tensor"

    def text(self) -> Text | None:
        """Token numbers and mask [B, T] -> `encoder_hidden_states` [B, T, C] and `encoder_attention_mask` [B, T].

        Prompts are in lower case; what `clean_caption` does more needs packages of its own, and is not done.
        """
        if not self.has("tokenizer", "text_encoder"):
            return None
        length = self.argument("max_sequence_length")
        prompt = Prompt("tokenizer", length, mask="attention_mask", cleaning=("lower", "strip"))
        return Text({"input_ids": prompt}, T5Conditions(self.pipeline.text_encoder, mask=torch.int64))

    def decoder(self, latent: tuple[int, ...]) -> Decoder:
        """From latents [B, C, H, W] of one of the sizes that the model was trained for."""
        pipeline = self.pipeline
        own = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
        height, width = (int(self.argument(name) or own) for name in ("height", "width"))
        resized = (height, width) if self.argument("use_resolution_binning") else None
        return _Decoder(pipeline, resized)


class _Decoder(Decoder):
    def __init__(self, pipeline: Any, resized: tuple[int, int] | None):
        super().__init__(pipeline.vae)
        self.resized = resized  # height and width
        self.processor = pipeline.image_processor

    def finished(self, image: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] of the size that the pipeline was asked for."""
        if self.resized is None:
            return image
        height, width = self.resized
        return self.processor.resize_and_crop_tensor(image, width, height)
