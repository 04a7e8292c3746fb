"""Tokenizers of letters and bytes, by the class that a pipeline names; they need no file of a published one."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LETTERS = string.ascii_letters + string.digits
MARKS = " .,:!?-'()"
CHAT_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}{{ c.text if c.text is defined else '' }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Options = Mapping[str, Any]
Maker = Callable[[Options], Any]


def _bytes() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _numbered(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(dict.fromkeys(words))}


def clip(options: Options) -> Any:
    """Letters with and without the end of a word; the end of a text has the highest number, which encoders look for."""
    words = ["!", *(letter + end for end in ("", "</w>") for letter in _bytes()), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab=_numbered(words), merges=[], **options)


def t5(options: Options) -> Any:
    """Letters by likelihood."""
    pieces = _numbered(["<pad>", "</s>", "<unk>", "▁", *LETTERS, *MARKS])
    scored = [(piece, -float(number)) for piece, number in pieces.items()]
    named: dict[str, Any] = {"model_max_length": 512} | dict(options)
    return transformers.T5Tokenizer(vocab=scored, extra_ids=0, **named)


def qwen(options: Options) -> Any:
    """Bytes, and the marks of a conversation."""
    tokenizer = transformers.Qwen2Tokenizer(vocab=_numbered(_bytes() + CHAT_TOKENS), merges=[], **options)
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def plain(options: Options) -> Any:
    """Bytes, and the marks of a conversation, of no class in particular."""
    inner = Tokenizer(models.BPE(vocab=_numbered(_bytes() + CHAT_TOKENS), merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    named: dict[str, Any] = dict.fromkeys(("eos_token", "pad_token", "unk_token"), CHAT_TOKENS[0]) | dict(options)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma(options: Options) -> Any:
    """Letters."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS, *MARKS.strip(), "\n", '"', "<", ">"]
    return transformers.GemmaTokenizer(vocab=_numbered(words), merges=[], **options)


def bert(options: Options) -> Any:
    """Letters at the beginning and inside of a word."""
    letters = [start + letter for letter in string.ascii_lowercase + string.digits for start in ("", "##")]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    named: dict[str, Any] = {"model_max_length": 77} | dict(options)
    return transformers.BertTokenizer(vocab=_numbered(words), **named)


def roberta(options: Options) -> Any:
    """Bytes."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *_bytes()]
    named: dict[str, Any] = {"model_max_length": 77} | dict(options)
    return transformers.RobertaTokenizer(vocab=_numbered(words), merges=[], **named)


MAKERS: Mapping[str, Maker] = {
    "BertTokenizer": bert,
    "CLIPTokenizer": clip,
    "GemmaTokenizer": gemma,
    "PreTrainedTokenizer": plain,
    "Qwen2Tokenizer": qwen,
    "RobertaTokenizer": roberta,
    "T5Tokenizer": t5,
}


def save_tokenizer(name: str, options: Options, folder: Path) -> int:
    """Write a tokenizer.

    Args:
        name: Class in `model_index.json`.
        options: Arguments of the tokenizer that the checkpoint needs, such as its padding token.
        folder: Where its files go.

    Returns:
        The number of tokens.
    """
    tokenizer = MAKERS[name.removesuffix("Fast")](options)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
