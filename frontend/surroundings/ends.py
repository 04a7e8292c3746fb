"""The ends of a pipeline as programs, compared with what the pipeline really did."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...bundle.manifest import Unprompted
from ...bundle.prompts import PromptReader
from ...ir.program import Program
from ...loop.errors import StepfoldError, UsageError
from ...loop.metrics import drift
from ..capture import capture
from ..images import LEAST_DB, unit_images, worst
from .surroundings import Prompt, Surroundings, Text

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # relative L2, of conditions
LONG = " ".join(["a very long prompt that is cut"] * 100)
MOST_GIVEN = 1 << 16  # numbers of a condition that a pipeline sets itself; the manifest holds them


@dataclass(frozen=True)
class CapturedEnds:
    """What a pipeline does around its loop.

    Attributes:
        pipeline: class of the pipeline.
        readers: how the inputs of `text` are made of a prompt.
        text: encoder from token numbers to conditions; None where there are no prompts.
        decoder: decoder from latents to images; None where latents are images.
        given: conditions that the pipeline sets itself, name -> the value of one sample.
        unprompted: conditions of the other branch where there is no negative prompt: those of an empty one, or zeros.
    """

    pipeline: str
    readers: tuple[PromptReader, ...]
    text: Program | None
    decoder: Program | None
    given: Mapping[str, Any]
    unprompted: Unprompted


@dataclass(frozen=True)
class Seen:
    """What a pipeline did around its loop when it was run.

    Attributes:
        prompts: B of them; None where it was given embeddings, and has no prompts.
        conditions: what its denoiser was given for them, name -> [B, ...].
        negative: the prompts of the other branch; None where it has none, or zeros in their place.
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
    text = surroundings.text() if seen.prompts is not None else None
    readers, program, given = tuple[PromptReader, ...](), None, dict[str, Any]()
    if text is not None and seen.prompts is not None:
        readers = tuple(_reader(surroundings.pipeline, name, prompt) for name, prompt in text.prompts.items())
        program = _encoders(text, readers, seen, seen.prompts)
        others = {name: value for name, value in seen.conditions.items() if name not in program.outputs}
        given = {name: _given(name, value, seen.unconditional.get(name)) for name, value in others.items()}
    decoder = _decoder(surroundings, latent, seen) if surroundings.has("vae") and not _undecoded(surroundings) else None
    name = type(surroundings.pipeline).__name__
    return CapturedEnds(name, readers, program, decoder, given, surroundings.unprompted)


def _encoders(text: Text, readers: Sequence[PromptReader], seen: Seen, prompts: Sequence[str]) -> Program:
    """The text encoders, which have to make of the prompts what the pipeline made of them, in both branches."""
    numbers = _numbers(readers, prompts)
    program = capture(text.encoder, {name: torch.from_numpy(value) for name, value in numbers.items()})
    _require_same(program, numbers, seen.conditions)
    if not seen.unconditional:
        return program
    if seen.negative is not None:
        _require_same(program, _numbers(readers, seen.negative), {**seen.conditions, **seen.unconditional})
        return program
    for name in program.outputs:
        if seen.unconditional[name].any():
            raise StepfoldError(
                f"{name}: expected zeros in the other branch, because the pipeline was given no negative prompt; "
                "received others. This is a defect of stepfold on this pipeline."
            )
    return program


def _numbers(readers: Sequence[PromptReader], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: value for reader in readers for name, value in reader.read(prompts).items()}


def _undecoded(surroundings: Surroundings) -> bool:
    """Whether the bundle is left without a decoder, which is told."""
    if surroundings.undecoded:
        logger.warning("vae: the bundle draws latents, because %s", surroundings.undecoded)
    return bool(surroundings.undecoded)


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


def _require_same(program: Program, numbers: Mapping[str, np.ndarray], conditions: Mapping[str, torch.Tensor]) -> None:
    """Raise StepfoldError where the encoders give other conditions than the pipeline gave its denoiser."""
    for name, value in zip(program.outputs, program.bind().evaluate(dict(numbers)), strict=True):
        wanted = conditions.get(name)
        if wanted is None or wanted.shape != value.shape or drift(value, wanted.numpy()) > TOLERANCE:
            received = "none" if wanted is None else f"{list(wanted.shape)}"
            raise StepfoldError(
                f"{name}: expected the captured text encoders to give what the pipeline gave its denoiser; it gave "
                f"{received}, they {list(value.shape)}. This is a defect of stepfold on this pipeline."
            )


def _reader(pipeline: Any, name: str, prompt: Prompt) -> PromptReader:
    """The reader of an input, which reads, pads and cuts as the pipeline does."""
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
    reader = PromptReader(name, tokenizer.to_str(), prompt.mask, prompt.cleaning)
    for text in ("a photo of a cat", "", LONG):
        wanted = original(text, padding="max_length", max_length=prompt.length, truncation=True)
        received = reader.read([text])
        masks = [] if prompt.mask is None else [(received[prompt.mask], wanted.attention_mask)]
        for got, expected in [(received[name], wanted.input_ids), *masks]:
            if got[0].tolist() != expected:
                raise StepfoldError(f"{prompt.tokenizer}: its `tokenizer.json` reads {text[:40]!r} differently.")
    return reader


def _given(name: str, value: torch.Tensor, other: torch.Tensor | None = None) -> Any:
    """The value of one sample of a condition that does not come from the prompt, and is that of both branches."""
    rows = [*value, *(() if other is None else other)]
    if value[0].numel() > MOST_GIVEN or not all(torch.equal(row, value[0]) for row in rows):
        raise UsageError(
            f"{name}: the pipeline makes this condition {list(value.shape)} in a way that is not captured; its bundle "
            "would take no prompts."
        )
    return value[0].tolist()
