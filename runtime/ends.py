"""The two ends of a pipeline: prompts become conditions, latents become images. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..loop.errors import BundleError, UsageError
from ..loop.ports import BoundProgram
from .samples import finite

Array = np.ndarray
MISSING = "Prompts need the package tokenizers: pip install 'stepfold[prompts]'"


@dataclass(frozen=True)
class Ends:
    """What a pipeline does around its loop.

    Attributes:
        tokenizers: input of `text` -> content of its `tokenizer.json`, padding and truncation included.
        text: encoder from token numbers [B, T] to conditions; None where there are no prompts.
        decoder: decoder from latents to images; None where latents are images.
        given: conditions that the pipeline sets itself, name -> the value of one sample.
    """

    tokenizers: Mapping[str, str]
    text: BoundProgram | None
    decoder: BoundProgram | None
    given: Mapping[str, Any]

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
        encoded = dict(zip(self.text.outputs, self.text.evaluate(self._token_numbers(distinct)), strict=True))
        rows = [distinct.index(prompt) for prompt in prompts]
        return {name: value[rows] for name, value in encoded.items()}

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
        """Images [B, C, H, W] in [-1, 1] of latents [B, ...], one after the other: a decoder needs much memory.

        Raises:
            StepfoldError: an image has numbers that are not finite.
        """
        if self.decoder is None:
            return latents
        rows = (latents[i : i + 1] for i in range(len(latents)))
        return finite(np.concatenate([self.decoder.evaluate({"latents": row})[0] for row in rows]), "images")

    def _token_numbers(self, prompts: Sequence[str]) -> dict[str, Array]:
        """name -> int64 [B, T]."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UsageError(MISSING) from None
        found = {}
        for name, content in self.tokenizers.items():
            try:
                encoded = Tokenizer.from_str(content).encode_batch(list(prompts))
                found[name] = np.array([item.ids for item in encoded], np.int64)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # the library raises plain Exception, and in a panic something that is none
                raise BundleError(f"the tokenizer of {name}: {error}") from error
        return found
