"""LTX-Video: T5 with a mask for the denoiser alone; latents as a row of patches."""

from __future__ import annotations

from typing import Any

import torch

from .surroundings import Decoder, Prompt, Surroundings, Text
from .t5 import T5Conditions


class LTXSurroundings(Surroundings):
    """`LTXPipeline`."""

    source = "diffusers, LTXPipeline.encode_prompt and _unpack_latents; HaCohen et al. 2025 (arXiv 2501.00103)"

    @property
    def undecoded(self) -> str:
        """Newer autoencoders of the family add noise to what they decode."""
        config, scale = self.pipeline.vae.config, self.argument("decode_noise_scale")
        if any(config.decoder_inject_noise):
            return "its autoencoder adds noise within its decoder"
        if config.timestep_conditioning and (self._timestep() if scale is None else scale):
            return "the pipeline adds noise to what it decodes; --call decode_noise_scale=0.0 adds none"
        return ""

    def text(self) -> Text | None:
        """Token numbers and mask [B, T] -> `encoder_hidden_states` [B, T, C] and `encoder_attention_mask` [B, T]."""
        if not self.has("tokenizer", "text_encoder"):
            return None
        prompt = Prompt("tokenizer", self.argument("max_sequence_length"), "attention_mask")
        encoder = T5Conditions(self.pipeline.text_encoder, reads_mask=False, mask=torch.bool)
        return Text({"input_ids": prompt}, encoder)

    def decoder(self, latent: tuple[int, ...]) -> Decoder:
        """From patches [B, F H W, C] of videos of the size and length that the pipeline was called with."""
        pipeline = self.pipeline
        spatial = pipeline.vae_spatial_compression_ratio
        frames = (int(self.argument("num_frames")) - 1) // pipeline.vae_temporal_compression_ratio + 1
        grid = (frames, *(int(self.argument(name)) // spatial for name in ("height", "width")))
        timestep = self._timestep() if pipeline.vae.config.timestep_conditioning else None
        return _Decoder(pipeline, grid, timestep)

    def _timestep(self) -> float:
        """The timestep that the autoencoder is told; a list has one for each sample."""
        given = self.argument("decode_timestep")
        return float(given[0] if isinstance(given, list) else given)


class _Decoder(Decoder):
    def __init__(self, pipeline: Any, grid: tuple[int, int, int], timestep: float | None):
        super().__init__(pipeline.vae, standardized=True)
        self.grid, self.timestep = grid, timestep  # patches along frames, height and width
        self.patch = (pipeline.transformer_temporal_patch_size, *[pipeline.transformer_spatial_patch_size] * 2)

    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, F H W, C p_t p p] -> [B, C, F p_t, H p, W p]."""
        frames, height, width = (count * size for count, size in zip(self.grid, self.patch, strict=True))
        patches = latents.reshape(
            -1, *self.grid, latents.shape[-1] // (self.patch[0] * self.patch[1] ** 2), *self.patch
        )
        return patches.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(-1, patches.shape[4], frames, height, width)

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """A video [B, C, F, H, W]."""
        if self.timestep is None:
            return super().decoded(latents)
        told = latents.new_full((latents.shape[0],), self.timestep)
        return self.vae.decode(latents, told, return_dict=False)[0]
