"""The two ends of a pipeline: prompts become conditions, latents become images. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..bundle.manifest import Unprompted
from ..bundle.prompts import PromptReader
from ..loop.errors import UsageError
from ..loop.ports import BoundProgram
from .samples import finite

Array = np.ndarray


@dataclass(frozen=True)
class Ends:
    """What a pipeline does around its loop.

    Attributes:
        readers: how the inputs of `text` are made of a prompt.
        text: encoder from token numbers [B, T] to conditions; None where there are no prompts.
        decoder: decoder from latents to images; None where latents are images.
        given: conditions that the pipeline sets itself, name -> the value of one sample.
        unprompted: conditions of the other branch where there is no negative prompt: those of an empty one, or zeros.
    """

    readers: Sequence[PromptReader] = ()
    text: BoundProgram | None = None
    decoder: BoundProgram | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    unprompted: Unprompted = "empty"

    def conditions(self, prompts: Sequence[str]) -> dict[str, Array]:
        """The conditions of a loop, one row for each prompt.

        Args:
            prompts: B of them.

        Returns:
            name -> [B, ...].

        Raises:
            UsageError: the model takes no prompts, or `tokenizers` is not installed.
        """
        if self.text is None:
            raise UsageError(
                "prompt: expected a model that is told what to draw by text; this one has no text encoder."
            )
        distinct = list(dict.fromkeys(prompts))
        numbers = {name: value for reader in self.readers for name, value in reader.read(distinct).items()}
        encoded = dict(zip(self.text.outputs, self.text.evaluate(numbers), strict=True))
        rows = [distinct.index(prompt) for prompt in prompts]
        return {name: value[rows] for name, value in encoded.items()}

    def unconditional(self, negative_prompt: str | None, conditions: Mapping[str, Array]) -> dict[str, Array]:
        """The conditions of the other branch.

        Args:
            negative_prompt: what to keep away from; None for none.
            conditions: those of the prompts, name -> [B, ...].

        Returns:
            name -> [B, ...].
        """
        if negative_prompt is None and self.unprompted == "zeros":
            return {name: np.zeros_like(value) for name, value in conditions.items()}
        return self.conditions([negative_prompt or ""] * len(next(iter(conditions.values()))))

    def set_by_pipeline(self, dtypes: Mapping[str, str], count: int) -> dict[str, Array]:
        """The conditions that do not come from the prompt.

        Args:
            dtypes: types of the conditions, by name.
            count: number of samples B.

        Returns:
            name -> [B, ...].
        """
        return {name: np.stack([np.asarray(value, dtypes[name])] * count) for name, value in self.given.items()}

    def images(self, latents: Array) -> Array:
        """Images [B, C, H, W], or videos [B, C, F, H, W], in [-1, 1] of latents [B, ...].

        They are decoded one after the other: a decoder needs much memory.

        Raises:
            StepfoldError: an image has numbers that are not finite.
        """
        if self.decoder is None:
            return latents
        rows = (latents[i : i + 1] for i in range(len(latents)))
        return finite(np.concatenate([self.decoder.evaluate({"latents": row})[0] for row in rows]), "images")
