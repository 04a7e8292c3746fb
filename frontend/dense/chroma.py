"""Chroma: its embedding of the timestep makes a list of zeros as long as the batch."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch


def forward(
    model: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    timestep: torch.Tensor | None = None,
    img_ids: torch.Tensor | None = None,
    txt_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The model's own, with the zeros as a tensor.

    Args:
        model: a `ChromaTransformer2DModel`.
        hidden_states: [B, N, C] patches of the latent.
        encoder_hidden_states: [B, T, K] of the prompts.
        timestep: [B] in 0 to 1.
        img_ids: [N, 3] positions of the patches.
        txt_ids: [T, 3] positions of the tokens.
        attention_mask: [B, T + N] of tokens and patches.
        **kwargs: further arguments of the model's forward.
    """
    embedding = model.time_text_embed
    embedding.forward = MethodType(_embed, embedding)
    try:
        return type(model).forward(
            model,
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            attention_mask=attention_mask,
            **kwargs,
        )
    finally:
        del embedding.forward


def _embed(embedding: Any, timestep: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, M, 2 C]: timestep, guidance of zero and index of each of the M modulations."""
    modulations = embedding.mod_proj.to(timestep.dtype)
    M, B = len(modulations), timestep.shape[0]
    times = embedding.time_proj(timestep).to(timestep.dtype)
    guidance = embedding.guidance_proj(torch.zeros_like(timestep)).to(timestep.dtype)
    here = torch.cat([times, guidance], dim=1).unsqueeze(1).expand(B, M, -1)
    return torch.cat([here, modulations.expand(B, M, -1)], dim=-1)
