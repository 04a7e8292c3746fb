"""The ends of a pipeline as programs, compared with what the pipeline really did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...ir.program import Program
from ...loop.errors import StepfoldError, UsageError
from ...loop.metrics import drift
from ..capture import capture
from ..images import LEAST_DB, unit_images, worst
from .surroundings import Prompt, Surroundings, Text

TOLERANCE = 1e-4  # relative L2, of conditions
LONG = " ".join(["a very long prompt that is cut"] * 100)
MOST_GIVEN = 1 << 16  # numbers of a condition that a pipeline sets itself; the manifest holds them


@dataclass(frozen=True)
class CapturedEnds:
    """What a pipeline does around its loop.

    Attributes:
        pipeline: class of the pipeline.
        tokenizers: input of `text` -> content of its `tokenizer.json`, padding and truncation included.
        text: encoder from token numbers to conditions; None where there are no prompts.
        decoder: decoder from latents to images; None where latents are images.
        given: conditions that the pipeline sets itself, name -> the value of one sample.
    """

    pipeline: str
    tokenizers: Mapping[str, str]
    text: Program | None
    decoder: Program | None
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """What a pipeline did around its loop when it was run.

    Attributes:
        prompts: B of them; None where it was given embeddings, and has no prompts.
        conditions: what its denoiser was given for them, name -> [B, ...].
        negative: the prompts of the other branch; None where it has none.
        unconditional: what its denoiser was given for those.
        drawn: makes latents [B, *latent] and its images [B, C, H, W] in [0, 1] of them.
    """

    prompts: Sequence[str] | None
    conditions: Mapping[str, torch.Tensor]
    negative: Sequence[str] | None
    unconditional: Mapping[str, torch.Tensor]
    drawn: Callable[[], tuple[np.ndarray, np.ndarray]]


def capture_ends(surroundings: Surroundings, seen: Seen, latent: tuple[int, ...]) -> CapturedEnds:
    """Capture what surrounds a loop.

    Args:
        surroundings: surroundings of the pipeline.
        seen: what the pipeline did, which the captured ends have to do too.
        latent: shape of one latent.

    Raises:
        StepfoldError: a captured end does not do what the pipeline did.
        UsageError: a tokenizer has no `tokenizer.json` form, or the pipeline makes a condition that nobody can give.
    """
    prompts, conditions = seen.prompts, seen.conditions
    text = surroundings.text() if prompts is not None else None
    tokenizers, program, made = dict[str, str](), None, set[str]()
    if text is not None and prompts is not None:
        tokenizers = {name: _tokenizer(surroundings.pipeline, prompt) for name, prompt in text.prompts.items()}
        ids = {name: _token_numbers(content, prompts) for name, content in tokenizers.items()}
        program = _captured(text, ids)
        made = set(program.outputs)
        _require_same(program, ids, conditions)
        if seen.negative is not None and seen.unconditional:
            negative = {name: _token_numbers(content, seen.negative) for name, content in tokenizers.items()}
            _require_same(program, negative, {**conditions, **seen.unconditional})
    others = {name: value for name, value in conditions.items() if name not in made} if program is not None else {}
    given = {name: _given(name, value) for name, value in others.items()}
    decoder = _decoder(surroundings, latent, seen) if surroundings.has("vae") else None
    return CapturedEnds(type(surroundings.pipeline).__name__, tokenizers, program, decoder, given)


def _decoder(surroundings: Surroundings, latent: tuple[int, ...], seen: Seen) -> Program:
    """The decoder, which has to draw what the pipeline draws at the size that it was called with."""
    example = torch.randn(2, *latent, generator=torch.Generator().manual_seed(0))
    program = capture(surroundings.decoder(latent), {"latents": example})
    latents, wanted = seen.drawn()
    got = unit_images(program, latents)
    received = worst(got, wanted)
    if received < LEAST_DB:
        raise StepfoldError(
            f"decoder: expected the images of {type(surroundings.pipeline).__name__} of the same latents, "
            f"{list(wanted.shape)}, within {LEAST_DB:g} dB; received {list(got.shape)}, {received:.1f} dB from them. This "
            "is a defect of stepfold on this pipeline."
        )
    return program


def _captured(text: Text, ids: Mapping[str, np.ndarray]) -> Program:
    return capture(text.encoder, {name: torch.from_numpy(value) for name, value in ids.items()})


def _require_same(program: Program, ids: Mapping[str, np.ndarray], conditions: Mapping[str, torch.Tensor]) -> None:
    """Raise StepfoldError where the encoders give other conditions than the pipeline gave its denoiser."""
    for name, value in zip(program.outputs, program.bind().evaluate(dict(ids)), strict=True):
        wanted = conditions.get(name)
        if wanted is None or wanted.shape != value.shape or drift(value, wanted.numpy()) > TOLERANCE:
            received = "none" if wanted is None else f"{list(wanted.shape)}"
            raise StepfoldError(
                f"{name}: expected the captured text encoders to give what the pipeline gave its denoiser; it gave "
                f"{received}, they {list(value.shape)}. This is a defect of stepfold on this pipeline."
            )


def _tokenizer(pipeline: Any, prompt: Prompt) -> str:
    """The content of a `tokenizer.json` that pads and cuts as the pipeline does."""
    from tokenizers import Tokenizer

    original = getattr(pipeline, prompt.tokenizer)
    backend = getattr(original, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            f"{prompt.tokenizer}: {type(original).__name__} has no form of the `tokenizers` library, which engines read "
            "prompts with. Save the folder with a fast tokenizer."
        )
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.enable_truncation(prompt.length)
    tokenizer.enable_padding(
        direction=original.padding_side,
        length=prompt.length,
        pad_id=original.pad_token_id,
        pad_token=original.pad_token,
    )
    for text in ("a photo of a cat", "", LONG):
        wanted = original(text, padding="max_length", max_length=prompt.length, truncation=True).input_ids
        if tokenizer.encode(text).ids != wanted:
            raise StepfoldError(f"{prompt.tokenizer}: its `tokenizer.json` reads {text[:40]!r} differently.")
    return tokenizer.to_str()


def _token_numbers(content: str, prompts: Sequence[str]) -> np.ndarray:
    """[B, T] int64."""
    from tokenizers import Tokenizer

    return np.array([item.ids for item in Tokenizer.from_str(content).encode_batch(list(prompts))], np.int64)


def _given(name: str, value: torch.Tensor) -> Any:
    """The value of one sample of a condition that does not come from the prompt."""
    if value[0].numel() > MOST_GIVEN or not all(torch.equal(row, value[0]) for row in value):
        raise UsageError(
            f"{name}: the pipeline makes this condition {list(value.shape)} in a way that is not captured; its bundle "
            "would take no prompts."
        )
    return value[0].tolist()
