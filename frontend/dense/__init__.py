"""Equal forms of denoisers that count samples or tokens in Python, which no capture of a batch can follow.

Such a model reads the number of its rows, or of a prompt's tokens, into Python: it takes a list with a tensor for each
sample (Z-Image), cuts every prompt to its own length (Lumina 2) or makes a list as long as the batch (Chroma). What it
computes does not depend on that. A form here computes the same for a tensor with a row for each sample, and prompts that
are padded to one length beside a mask. It is not trusted: the proof compares it with the pipeline.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from . import chroma, lumina2, z_image


@dataclass(frozen=True)
class DenseForm:
    """How a model is called and what it computes, in tensors.

    Attributes:
        forward: forward of the form; its first argument is the model.
        arguments: (arguments of a call of the model, number of tokens that a prompt may have) -> those of the form; None
            where they are the same.
    """

    forward: Callable[..., Any]
    arguments: Callable[[Mapping[str, Any], int], dict[str, Any]] | None = None


FORMS: Mapping[str, DenseForm] = {
    "ChromaTransformer2DModel": DenseForm(chroma.forward),
    "Lumina2Transformer2DModel": DenseForm(lumina2.forward),
    "ZImageTransformer2DModel": DenseForm(z_image.forward, z_image.arguments),
}
"""Forms by the class of the model in diffusers."""


def dense(model: torch.nn.Module) -> torch.nn.Module:
    """A model in its dense form, which shares all weights with it; the model itself where it has none."""
    form = FORMS.get(type(model).__name__)
    if form is None:
        return model
    twin = copy.copy(model)
    twin.forward = MethodType(form.forward, twin)
    return twin


def dense_arguments(model: torch.nn.Module, arguments: dict[str, Any], tokens: int = 0) -> dict[str, Any]:
    """Arguments of a call of a model as its dense form takes them.

    Args:
        model: the model.
        arguments: what it was called with, by name.
        tokens: number of tokens that a prompt may have; the longest of the call where that is more.
    """
    form = FORMS.get(type(model).__name__)
    return arguments if form is None or form.arguments is None else form.arguments(arguments, tokens)
