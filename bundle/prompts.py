"""From prompts to token numbers: what a pipeline does to a text, and its tokenizer. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..loop.errors import BundleError, UsageError

Array = np.ndarray
Cleaning = Literal["unescape", "lower", "spaces", "strip"]
MISSING = "Prompts need the package tokenizers: pip install 'stepfold[prompts]'"


def _unescaped(text: str) -> str:
    """Text without references to characters; what was escaped twice, as pages often are, is freed twice."""
    from html import unescape  # its table of names takes a while to import, and most bundles need none

    return unescape(unescape(text))


CLEANINGS: Mapping[Cleaning, Callable[[str], str]] = {
    "unescape": _unescaped,
    "lower": str.lower,
    "spaces": lambda text: re.sub(r"\s+", " ", text),
    "strip": str.strip,
}
"""What pipelines do to a prompt before a tokenizer reads it, by name."""


@dataclass(frozen=True)
class PromptReader:
    """How one input of the text encoders is made of a prompt.

    Attributes:
        input: input that gets the token numbers [B, T].
        content: content of a `tokenizer.json`, padding and truncation included.
        mask: input that is 1 where a token is one of the prompt and 0 where it is padding [B, T]; None for none.
        cleaning: what is done to the prompt before, in order.
    """

    input: str
    content: str
    mask: str | None = None
    cleaning: tuple[Cleaning, ...] = ()

    def read(self, prompts: Sequence[str]) -> dict[str, Array]:
        """Token numbers, and the mask where there is one: name -> int64 [B, T].

        Raises:
            UsageError: `tokenizers` is not installed.
            BundleError: the library cannot read the content.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UsageError(MISSING) from None
        try:
            encoded = Tokenizer.from_str(self.content).encode_batch([self.clean(prompt) for prompt in prompts])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises plain Exception, and in a panic something that is none
            raise BundleError(f"the tokenizer of {self.input}: {error}") from error
        found = {self.input: np.array([item.ids for item in encoded], np.int64)}
        if self.mask is not None:
            found[self.mask] = np.array([item.attention_mask for item in encoded], np.int64)
        return found

    def clean(self, prompt: str) -> str:
        """A prompt as the tokenizer gets it."""
        for name in self.cleaning:
            prompt = CLEANINGS[name](prompt)
        return prompt
