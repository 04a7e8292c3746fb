"""Lumina 2: tokens of a prompt beyond its own length are cut away, and the place of the patches is behind them."""

from __future__ import annotations

from typing import Any

import torch

Array = torch.Tensor


def forward(
    model: Any,
    hidden_states: Array,
    timestep: Array,
    encoder_hidden_states: Array,
    encoder_attention_mask: Array,
    attention_kwargs: Any = None,
    return_dict: bool = False,
) -> tuple[Array]:
    """What the model computes, with tokens masked that it cuts away.

    Args:
        model: a `Lumina2Transformer2DModel`.
        hidden_states: [B, C, H, W] latents.
        timestep: [B] in 0 to 1.
        encoder_hidden_states: [B, T, K] embeddings of the prompts' tokens.
        encoder_attention_mask: [B, T] 1 for the tokens that a prompt has, which come first.
        attention_kwargs: is ignored; it scales adapters.
        return_dict: is ignored.
    """
    del attention_kwargs, return_dict
    B, C, height, width = hidden_states.shape
    p = model.config.patch_size
    H, W, T = height // p, width // p, encoder_attention_mask.shape[1]
    times, text = model.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    text_rotary, image_rotary = _rotary(model, encoder_attention_mask, H, W)
    rows = hidden_states.reshape(B, C, H, p, W, p).permute(0, 2, 4, 3, 5, 1).reshape(B, H * W, p * p * C)
    image = model.x_embedder(rows)
    for layer in model.context_refiner:
        text = layer(text, encoder_attention_mask, text_rotary)
    for layer in model.noise_refiner:
        image = layer(image, None, image_rotary, times)
    both = torch.cat([text, image], dim=1)
    mask = torch.cat([encoder_attention_mask.bool(), torch.ones_like(image[..., 0], dtype=torch.bool)], dim=1)
    rotary = torch.cat([text_rotary, image_rotary], dim=1)
    for layer in model.layers:
        both = layer(both, mask, rotary, times)
    made = model.norm_out(both, times)[:, T:].reshape(B, H, W, p, p, model.out_channels)
    return (made.permute(0, 5, 1, 3, 2, 4).reshape(B, model.out_channels, height, width),)


def _rotary(model: Any, mask: Array, H: int, W: int) -> tuple[Array, Array]:
    """Complex factors of tokens [B, T, d / 2] and of patches [B, H W, d / 2]."""
    B, T = mask.shape
    tables = [torch.view_as_real(table) for table in model.rope_embedder.freqs_cis]
    place = torch.arange(T).clamp(max=len(tables[0]) - 1)  # no prompt of the model reaches beyond
    row, column = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    behind = mask.sum(1).long()[:, None].expand(B, H * W)
    text = [place, torch.zeros_like(place), torch.zeros_like(place)]
    image = [behind, row.flatten(), column.flatten()]
    return _factors(tables, [item.expand(B, T) for item in text]), _factors(
        tables, [item.expand(B, H * W) for item in image]
    )


def _factors(tables: list[Array], places: list[Array]) -> Array:
    """Complex factors [B, N, d / 2] of places [B, N] on each axis; in real numbers up to the last operator."""
    return torch.view_as_complex(
        torch.cat([table[place].float() for table, place in zip(tables, places, strict=True)], dim=2)
    )
