"""What pipelines themselves make of prompts, by the names of their denoisers' inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

TEXTS = ["a cat", "", "a prompt that is longer than all of the tokens", "  A Cat\n on a &amp;lt;mat&amp;gt;  "]
CALLS: dict[str, dict[str, Any]] = {
    "StableDiffusion3Pipeline": {"prompt_2": None, "prompt_3": None},
    "FluxPipeline": {"prompt_2": None},
    "StableDiffusionPipeline": {
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    },
    "StableDiffusionXLPipeline": {"do_classifier_free_guidance": False},
    "PixArtAlphaPipeline": {"do_classifier_free_guidance": False, "max_sequence_length": 120},
    "PixArtSigmaPipeline": {"do_classifier_free_guidance": False, "max_sequence_length": 300},
    "WanPipeline": {"do_classifier_free_guidance": False, "max_sequence_length": 32},
    "CogVideoXPipeline": {"do_classifier_free_guidance": False, "max_sequence_length": 32},
    "LTXPipeline": {"do_classifier_free_guidance": False, "max_sequence_length": 32},
}
"""Arguments of `encode_prompt`."""
CONDITIONS = {
    "StableDiffusion3Pipeline": {"encoder_hidden_states": 0, "pooled_projections": 2},
    "FluxPipeline": {"encoder_hidden_states": 0, "pooled_projections": 1},
    "StableDiffusionPipeline": {"encoder_hidden_states": 0},
    "StableDiffusionXLPipeline": {"encoder_hidden_states": 0, "added_cond_kwargs.text_embeds": 2},
    "PixArtAlphaPipeline": {"encoder_hidden_states": 0, "encoder_attention_mask": 1},
    "PixArtSigmaPipeline": {"encoder_hidden_states": 0, "encoder_attention_mask": 1},
    "WanPipeline": {"encoder_hidden_states": 0},
    "CogVideoXPipeline": {"encoder_hidden_states": 0},
    "LTXPipeline": {"encoder_hidden_states": 0, "encoder_attention_mask": 1},
}
"""Place of each condition in what `encode_prompt` returns."""


def encoded(pipeline: Any, prompts: list[str]) -> dict[str, np.ndarray]:
    """The conditions [B, ...] that a pipeline gives its denoiser for prompts, in the branch that they are for."""
    name = type(pipeline).__name__
    with torch.no_grad():
        answer = pipeline.encode_prompt(prompts, **CALLS[name])
    return {condition: answer[place].numpy() for condition, place in CONDITIONS[name].items()}
