"""A CLIP tokenizer of the captions' words: each is one token; any other word falls into letters."""

from __future__ import annotations

import string

import torch
from canvases import CAPTIONS
from transformers import CLIPTokenizer

END_OF_WORD = "</w>"
POSITIONS = 16  # tokens of a text, with its beginning and end


def words() -> list[str]:
    """The words of all captions, the longest first: a later word's letters then cannot part an earlier one's."""
    return sorted({word for caption in CAPTIONS for word in str(caption).split()}, key=lambda word: (-len(word), word))


def merges_of(word: str) -> list[tuple[str, str]]:
    """The pairs that byte-pair encoding joins to make the word, from its first letter on."""
    letters = [*word[:-1], word[-1] + END_OF_WORD]
    return [("".join(letters[:count]), letters[count]) for count in range(1, len(letters))]


def make_tokenizer() -> CLIPTokenizer:
    """The tokenizer; as in CLIP, the end of a text has the highest number, and pads it."""
    merges = list(dict.fromkeys(pair for word in words() for pair in merges_of(word)))
    letters = [letter + end for end in ("", END_OF_WORD) for letter in string.ascii_lowercase + string.digits + ".,"]
    pieces = [*letters, *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS)  # type: ignore[arg-type]


def tokens_of(texts: list[str]) -> torch.Tensor:
    """Tokens int64 [texts, 16], padded as a pipeline pads them."""
    padded = make_tokenizer()(texts, padding="max_length", max_length=POSITIONS, truncation=True)
    return torch.tensor(padded["input_ids"])
